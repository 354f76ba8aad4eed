# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory policy over time, on simulated hosts."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostd.policy import State, settle
from tests.simulated_memory import BALLOON, CACHE, FREE, SWAPPED, Guest, SimulatedHost


def reversals(host: SimulatedHost, name: str, since: int) -> int:
    """How often the target of a guest's balloon changed direction."""
    targets = [plan.vms[name].balloon for plan in host.plans[since:]]
    moves = [after - before for before, after in pairwise(targets) if after != before]
    return sum((before < 0) != (after < 0) for before, after in pairwise(moves))


# -- who pays, and how much

def test_idle_guests_pay_before_busy_ones_of_equal_shares() -> None:
    host = SimulatedHost(2500, [Guest("busy", cache=1500, active=1800, seed=1),
                                Guest("idle", cache=1500, active=0, seed=2)])
    host.run(200)
    busy, idle = host.resident("busy", "idle")
    assert busy > 3 * idle
    assert host.policy.state is State.HIGH


def test_a_guest_that_wakes_up_gets_its_share_back() -> None:
    """Asleep it had lost more than half of its share to a busy one; awake they are equals."""
    sleeper = Guest("sleeper", data=200, cache=1600, active=0, seed=1)
    host = SimulatedHost(2800, [sleeper, Guest("busy", data=200, cache=1600, active=1800, seed=2)])
    host.run(250)
    asleep, busy = host.resident("sleeper", "busy")
    assert asleep < 0.65 * busy
    sleeper.active = 1800
    host.run(250)
    awake, busy = host.resident("sleeper", "busy")
    assert awake == pytest.approx(busy, rel=0.15)


@pytest.mark.parametrize("driver", ["prompt", "none"])
def test_two_to_one_shares_are_two_to_one_memory(driver: str) -> None:
    rich, poor = (Guest(name, data=200, cache=1600, active=2048, driver=driver, shares=shares, growth=32,
                        seed=shares) for name, shares in (("rich", 200), ("poor", 100)))
    host = SimulatedHost(2400, [rich, poor])
    host.run(150)
    ratios = []
    for _ in range(50):
        host.tick()
        had = host.resident("rich", "poor")
        ratios.append(had[0] / had[1])
    assert sum(ratios) / len(ratios) == pytest.approx(2, rel=0.2)


def test_the_limit_holds_with_plenty_of_memory() -> None:
    host = SimulatedHost(20_000, [Guest("balloon", data=300, cache=1500, limit=1000),
                                  Guest("swap", data=1800, limit=1000, driver="none", active=100, wander=0)])
    host.run(200)
    assert all(resident <= 1000 + 16 for resident in host.resident("balloon", "swap"))
    assert host["balloon"].at(SWAPPED) == 0                   # it never came to swap
    assert all(plan.state is State.HIGH for plan in host.plans)


def test_reservations_are_left_alone_whatever_others_do() -> None:
    greedy = [Guest(f"greedy{i}", data=1900, active=1900, driver=driver, growth=32, seed=i)
              for i, driver in enumerate(("none", "deaf", "prompt"))]
    reserved = Guest("reserved", data=1000, cache=400, active=0, reservation=1400, growth=64)
    host = SimulatedHost(3000, [reserved, *greedy])
    host.run(40)
    assert host.resident("reserved") == [1400]
    host.run(100)
    assert host.resident("reserved") == [1400]
    assert sum(host.resident("greedy0", "greedy1", "greedy2")) > 1300


def test_a_deaf_guest_pays_by_swap_what_others_pay_by_balloon() -> None:
    host = SimulatedHost(3000, [Guest(driver, data=300, cache=1400, active=200, driver=driver, seed=i)
                                for i, driver in enumerate(("prompt", "late", "deaf", "none"))])
    host.run(300)
    swapped = [host[name].at(SWAPPED) for name in ("prompt", "late", "deaf", "none")]
    assert [pages > 300 for pages in swapped] == [False, False, True, True]
    assert max(host.resident(*host.guests)) < 1.3 * min(host.resident(*host.guests))


# -- when it is over

def test_when_pressure_ends_everything_goes_back() -> None:
    host = SimulatedHost(3000, [Guest(f"g{i}", data=200, cache=1500, active=150, seed=i,
                                      driver=("prompt", "late")[i % 2]) for i in range(3)])
    plan = host.run(150)
    assert sum(vm.balloon for vm in plan.vms.values()) > 1500
    del host.guests["g2"]
    host["g0"].cache = host["g1"].cache = 400
    host["g1"].data = 100
    for guest in host.guests.values():                  # programs end, and their files with them
        guest.release(guest.having(CACHE), FREE)
    before = host.run(1)
    for _ in range(40):
        plan = host.tick()
        assert all(plan.vms[name].balloon <= before.vms[name].balloon for name in host.guests)
        before = plan
    assert plan.state is State.HIGH and not plan.share
    assert all(vm.balloon == vm.evict == 0 for vm in plan.vms.values())
    assert all(len(guest.having(BALLOON)) == 0 for guest in host.guests.values())


def test_swapped_pages_come_back_on_demand_only() -> None:
    sleeper = Guest("sleeper", data=1500, active=0, driver="none", growth=64)
    busy = Guest("busy", data=1500, active=1500, driver="none", growth=64, seed=1)
    host = SimulatedHost(2000, [sleeper, busy])
    host.run(100)
    swapped = sleeper.at(SWAPPED)
    assert swapped > 800
    del host.guests["busy"]
    host.run(20)
    assert sleeper.at(SWAPPED) == swapped
    sleeper.active = 1500
    host.run(20)
    assert sleeper.at(SWAPPED) == 0


# -- properties

@st.composite
def guests(draw: st.DrawFn, index: int, drivers: tuple[str, ...]) -> Guest:
    driver = draw(st.sampled_from(drivers))
    reservation = draw(st.sampled_from([0, 0, 0, 256]))
    return Guest(f"g{index}", data=draw(st.integers(50, 1500)), active=draw(st.integers(0, 1000)),
                 cache=draw(st.integers(0, 1200)), driver=driver, statistics=draw(st.booleans()),
                 reservation=reservation, limit=draw(st.sampled_from([2048, 2048, 2048, 1024])),
                 shares=draw(st.sampled_from([20, 80, 80, 320])), growth=draw(st.integers(4, 16)),
                 wander=draw(st.integers(0, 20)), seed=index)


@st.composite
def crowds(draw: st.DrawFn,
           drivers: tuple[str, ...] = ("prompt", "prompt", "late", "deaf", "none")) -> list[Guest]:
    return [draw(guests(i, drivers)) for i in range(draw(st.integers(1, 7)))]


@settings(deadline=None, max_examples=40)
@given(crowds(), st.integers(25, 120), st.data())
def test_whatever_guests_do_the_promises_hold(crowd: list[Guest], percent: int, data: st.DataObject) -> None:
    """Guests that need from a quarter more than there is to a quarter of it, and change their minds."""
    pool = max(1500, sum(min(guest.data + guest.cache, 2000) for guest in crowd) * percent // 100)
    host = SimulatedHost(pool, crowd, overhead=pool // 50)
    for _ in range(4):
        for _ in range(25):
            before = dict(zip(host.guests, host.resident(*host.guests)))
            plan = host.decide()
            assert host.decide() == plan                # asked again, it says the same
            host.tick()
            assert host.free >= 0
            assert sum(vm.target for vm in plan.vms.values()) <= pool - host.overhead
            for name, guest in host.guests.items():
                own = min(guest.settings.reservation, before[name])
                assert before[name] - plan.vms[name].evict >= own
                assert guest.oom == 0
        for guest in crowd:
            if data.draw(st.booleans()):
                guest.data, guest.active = data.draw(st.tuples(st.integers(50, 1500), st.integers(0, 1000)))


@settings(deadline=None, max_examples=40)
@given(crowds(("prompt", "late")), st.integers(60, 100))
def test_guests_that_stay_as_they_are_come_to_rest(crowd: list[Guest], percent: int) -> None:
    """What programs hold, and the margin, fits everybody's share; what caches would like does not.  After a
    while nothing is swapped and hardly a balloon moves, though estimates of working sets go on being such."""
    wanted = sum(min(guest.data + guest.cache, 2000) for guest in crowd)
    pool = max(500 * len(crowd), wanted * percent // 100)
    for guest in crowd:
        guest.statistics, guest.wander = True, 0
        guest.settings = settle(guest.memory)
        guest.data = min(guest.data, pool // len(crowd) * 8 // 10 - guest.memory // 8)
        guest.active = min(guest.active, guest.data)
    host = SimulatedHost(pool, crowd)
    host.run(300)
    evicted = host.evicted
    host.run(100)
    assert host.evicted == evicted
    assert all(plan.state <= State.SOFT for plan in host.plans[300:])
    assert all(reversals(host, name, 300) <= 4 for name in host.guests)


@settings(deadline=None, max_examples=25)
@given(crowds(("prompt", "late")))
def test_when_everything_fits_everything_goes_back(crowd: list[Guest]) -> None:
    for guest in crowd:
        guest.settings = guest.settings._replace(limit=2048)
    wanted = sum(min(guest.data + guest.cache, 2000) for guest in crowd)
    host = SimulatedHost(max(1000, wanted // 2), crowd)
    host.run(100)
    host.pool = wanted * 12 // 10 + 500
    plan = host.run(150)                                # those with few shares are the last
    assert (plan.state, plan.share) == (State.HIGH, False)
    assert all(vm.balloon == vm.evict == 0 for vm in plan.vms.values())


