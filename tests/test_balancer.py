# SPDX-License-Identifier: GPL-2.0-or-later
"""Shares on several CPUs: who is entitled to what, and how moves bring it about."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostd.scheduler import CPU, Balancer, Load, entitlements
from tests.simulation import MS, SECOND, Simulation, weighted

# -- entitlements

def test_entitlements_follow_the_weights_up_to_one_cpu() -> None:
    assert entitlements({"a": 1, "b": 1, "c": 2}, {}, 1) == {"a": CPU // 4, "b": CPU // 4, "c": CPU // 2}
    assert entitlements({"a": 10_000, "b": 1, "c": 1}, {}, 2) == {"a": CPU, "b": CPU // 2, "c": CPU // 2}
    assert entitlements({"a": 1, "b": 1}, {"a": 10}, 1) == {"a": CPU // 10, "b": CPU - CPU // 10}
    assert entitlements({"a": 5}, {"a": 400}, 8) == {"a": CPU}
    assert entitlements({}, {}, 8) == {}


@settings(deadline=None)
@given(st.dictionaries(st.integers().map(str), st.tuples(st.integers(1, 10_000), st.integers(0, 150)),
                       max_size=20), st.integers(1, 8))
def test_entitlements_waste_nothing_and_favour_nobody(shares: dict[str, tuple[int, int]], cpus: int) -> None:
    weights = {id: weight for id, (weight, _) in shares.items()}
    caps = {id: cap for id, (_, cap) in shares.items()}
    given_ = entitlements(weights, caps, cpus)
    limits = {id: min(CPU, cap * CPU // 100) if cap else CPU for id, cap in caps.items()}
    assert all(0 <= given_[id] <= limits[id] for id in shares)
    assert sum(given_.values()) == pytest.approx(min(cpus * CPU, sum(limits.values())), abs=len(shares) + 1)
    level = max((given_[id] / weights[id] for id in shares), default=0)
    for id in shares:                               # who is below the water level is so by its own limit
        if given_[id] < limits[id]:
            assert given_[id] / weights[id] == pytest.approx(level, rel=1e-3)


# -- several CPUs

#: no placement of these is fair at any moment: only taking turns is
AWKWARD = [(2, (1, 1, 1)), (2, (3, 2, 2)), (2, (5, 4, 3)), (3, (1,) * 7), (4, (1,) * 5),
           (4, (7, 5, 5, 3, 3, 2))]


@pytest.mark.parametrize("placement", [lambda i: 0, lambda i: i % 2], ids=["crowded", "spread"])
@pytest.mark.parametrize(("cpus", "weights"), [(2, (1, 1, 2, 2, 4, 4, 8, 8)), (2, (10_000, 1, 1)), *AWKWARD])
def test_shares_of_several_cpus_are_fair_in_the_long_run(cpus: int, weights: tuple[int, ...],
                                                         placement: Callable[[int], int]) -> None:
    simulation = Simulation(cpus, weighted(*weights), placement)
    simulation.run(10)                              # find a placement
    got = simulation.run(30)
    due = entitlements({id: weight for id, (weight, _) in simulation.shares.items()}, {}, cpus)
    assert got == pytest.approx({id: rate / CPU for id, rate in due.items()}, rel=0.05)


def test_caps_hold_across_cpus() -> None:
    shares = weighted(100, 100, 100, 100) | {"capped": (10_000, 30), "tiny": (100, 5)}
    simulation = Simulation(2, shares)
    simulation.run(15)
    got = simulation.run(30)
    assert got["capped"] == pytest.approx(0.30, rel=0.05)
    assert got["tiny"] == pytest.approx(0.05, rel=0.05)
    assert [got[f"guest{i}"] for i in range(4)] == pytest.approx([1.65 / 4] * 4, rel=0.05)


@pytest.mark.parametrize("percent", [(70, 70), (90, 60)])
def test_shares_are_fair_when_the_machine_has_other_work(percent: tuple[int, int]) -> None:
    simulation = Simulation(2, weighted(2, 2, 2, 1, 1), percent=percent)
    simulation.run(20)
    got = simulation.run(30)
    due = [sum(percent) / 100 * weight / 8 for weight in (2, 2, 2, 1, 1)]
    assert list(got.values()) == pytest.approx(due, rel=0.05)


def test_a_fair_placement_is_left_alone() -> None:
    simulation = Simulation(2, weighted(1, 1, 2, 2, 4, 4, 8, 8), lambda i: i % 2)
    simulation.run(60)
    assert simulation.moves == 0


def test_fifty_guests_on_one_worker_spread_out_soon() -> None:
    """As after the replacement of a lost worker."""
    simulation = Simulation(2, weighted(*[100] * 50))
    simulation.run(30)                              # who starved at first catches up, too
    assert list(simulation.run(30).values()) == pytest.approx([2 / 50] * 50, rel=0.05)
    simulation.run(20)
    assert sorted(list(simulation.place.values()).count(cpu) for cpu in (0, 1)) == [25, 25]
    moves = simulation.moves
    simulation.run(10)
    assert simulation.moves == moves


def test_moves_are_bounded() -> None:
    loads = {f"guest{i}": Load(0, 100, 0, 0, 0) for i in range(50)}
    balancer = Balancer(moves_per_update=3)
    assert balancer.update(0, [0, 1, 2], loads) == []
    later = {id: load._replace(run_ns=SECOND // 50, wait_ns=SECOND * 49 // 50) for id, load in loads.items()}
    moves = balancer.update(SECOND, [0, 1, 2], later)
    assert len(moves) == 3
    assert len({move.id for move in moves}) == 3


def test_idle_guests_are_left_alone() -> None:
    balancer = Balancer()
    for second in range(10):
        loads = {f"guest{i}": Load(0, 100, 0, second * 10 * MS, second * MS) for i in range(50)}
        assert balancer.update(second * SECOND, [0, 1], loads) == []


def test_totals_that_began_again_are_no_measurement() -> None:
    balancer = Balancer()
    balancer.update(0, [0, 1], {"a": Load(0, 100, 0, 90 * SECOND, 0), "b": Load(0, 100, 0, SECOND, 0)})
    assert balancer.update(SECOND, [0, 1], {"a": Load(0, 100, 0, 0, 0)}) == []
    assert balancer.update(SECOND + 1, [0, 1], {"a": Load(0, 100, 0, 0, 0)}) == []      # too soon to tell
    assert balancer.update(2 * SECOND, [], {}) == []


def test_a_new_guest_goes_to_the_least_loaded_worker() -> None:
    balancer = Balancer()
    loads = [Load(0, 100, 0, 0, 0), Load(1, 400, 0, 0, 0), Load(9, 1, 0, 0, 0)]     # 9 is gone
    assert balancer.place([0, 1], loads) == 0
    assert balancer.place([0, 1, 2], loads) == 2
