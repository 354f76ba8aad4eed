# SPDX-License-Identifier: GPL-2.0-or-later
"""The scheduler on simulated CPUs: shares, caps, sleepers, moves, and what holds whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostd.scheduler import CPU, LATENCY_BOUNDS_NS, Balancer, Load, RunQueue, Usage, entitlements
from hostd.scheduler.runqueue import SLICE_NS

MS = 1_000_000
SECOND = 1_000_000_000


class Simulation:
    """Guests that always want to run, on some CPUs, with the balancer called every second."""

    def __init__(self, cpus: int, shares: dict[str, tuple[int, int]],
                 placement: Callable[[int], int] = lambda i: 0, percent: Sequence[int] = ()) -> None:
        self.now = 0
        self.percent = percent or [100] * cpus          # of each CPU, what its worker gets of it
        self.shares = shares
        self.queues = [RunQueue() for _ in range(cpus)]
        self.balancer = Balancer()
        self.moves = 0
        self.place = {id: placement(i) for i, id in enumerate(shares)}
        self.before = dict.fromkeys(shares, (0, 0))     # run and wait on the CPUs a guest has left
        for id, cpu in self.place.items():
            self.queues[cpu].add(id, *shares[id], 0)

    def run(self, seconds: int) -> dict[str, float]:
        """Part of a CPU that each guest got in this time."""
        start = self.totals()
        for _ in range(seconds):
            for queue, percent in zip(self.queues, self.percent, strict=True):
                run_cpu(queue, self.now, self.now + SECOND, percent)
            self.now += SECOND
            self.balance()
        return {id: (run - start[id][0]) / (seconds * SECOND) for id, (run, _) in self.totals().items()}

    def totals(self) -> dict[str, tuple[int, int]]:
        totals = {}
        for id, cpu in self.place.items():
            usage, before = self.queues[cpu].usage(id, self.now), self.before[id]
            totals[id] = (before[0] + usage.run_ns, before[1] + usage.wait_ns)
        return totals

    def balance(self) -> None:
        totals = self.totals()
        loads = {id: Load(cpu, *self.shares[id], *totals[id]) for id, cpu in self.place.items()}
        for id, source, target in self.balancer.update(self.now, range(len(self.queues)), loads):
            assert self.place[id] == source != target
            usage, before = self.queues[source].remove(id, self.now), self.before[id]
            self.before[id] = (before[0] + usage.run_ns, before[1] + usage.wait_ns)
            self.queues[target].add(id, *self.shares[id], self.now)
            self.place[id] = target
            self.moves += 1


def run_cpu(queue: RunQueue, now: int, end: int, percent: int = 100) -> int:
    """One worker with CPU-bound guests; the answer is how long it was busy.

    Of that time guests run `percent`; the rest goes to other processes of the machine.
    """
    busy = 0
    while now < end:
        pick = queue.pick(now)
        if pick is None:
            event = queue.next_event(now)
            now = end if event is None else min(event, end)
            continue
        ran = min(pick.slice_ns, end - now)
        now += ran
        busy += ran
        queue.charge(pick.id, ran * percent // 100, now)
    return busy


def weighted(*weights: int, cap: int = 0) -> dict[str, tuple[int, int]]:
    return {f"guest{i}": (weight, cap) for i, weight in enumerate(weights)}


# -- one CPU

@pytest.mark.parametrize("weights", [(1, 1), (1, 2, 4, 8), (100, 300), (1, 1000), (999, 1000, 1)])
def test_shares_of_one_cpu_follow_the_weights(weights: tuple[int, ...]) -> None:
    queue = RunQueue()
    for id, (weight, cap) in weighted(*weights).items():
        queue.add(id, weight, cap, 0)
    seconds = 10 + sum(weights) // 3                # until the smallest had scores of turns
    run_cpu(queue, 0, seconds * SECOND)
    for i, weight in enumerate(weights):
        share = queue.usage(f"guest{i}", seconds * SECOND).run_ns / (seconds * SECOND)
        assert share == pytest.approx(weight / sum(weights), rel=0.05)


@pytest.mark.parametrize("cap", [1, 10, 33, 50, 95])
@pytest.mark.parametrize("others", [0, 1])
def test_a_cap_holds_within_five_percent(cap: int, others: int) -> None:
    queue = RunQueue()
    queue.add("capped", 10_000, cap, 0)
    if others:
        queue.add("other", 100, 0, 0)
    run_cpu(queue, 0, 10 * SECOND)
    capped = queue.usage("capped", 10 * SECOND).run_ns / (10 * SECOND)
    assert capped == pytest.approx(cap / 100, rel=0.05)
    if others:
        assert queue.usage("other", 10 * SECOND).run_ns == pytest.approx(10 * SECOND * (1 - capped), rel=0.05)


def test_a_capped_guest_stays_under_its_cap_in_every_window() -> None:
    queue = RunQueue()
    queue.add("capped", 100, 20, 0)
    last = 0
    for window in range(1, 50):
        run_cpu(queue, (window - 1) * 100 * MS, window * 100 * MS)
        run = queue.usage("capped", window * 100 * MS).run_ns
        assert run - last <= 21 * MS
        last = run


def test_a_cap_of_a_whole_cpu_or_more_is_no_cap() -> None:
    queue = RunQueue()
    queue.add("a", 100, 100, 0)
    queue.add("b", 100, 400, 0)
    assert run_cpu(queue, 0, SECOND) == SECOND
    assert queue.next_event(SECOND) is None


def test_an_overrun_slice_is_paid_back() -> None:
    queue = RunQueue()
    queue.add("capped", 100, 10, 0)
    assert queue.pick(0) is not None
    queue.charge("capped", 45 * MS, 45 * MS)        # the guest did not stop in time: 10 ms were allowed
    assert queue.pick(45 * MS) is None
    assert queue.next_event(45 * MS) == 400 * MS    # 45 ms are the budget of 4.5 windows
    assert queue.pick(400 * MS) is not None


def test_slices_are_between_two_and_six_milliseconds() -> None:
    queue = RunQueue()
    for i in range(50):
        queue.add(f"guest{i}", 100, 0, 0)
        pick = queue.pick(0)
        assert pick is not None and 2 * MS <= pick.slice_ns <= 6 * MS
        queue.charge(pick.id, pick.slice_ns, 0)
    alone = RunQueue()
    alone.add("guest", 100, 0, 0)
    assert alone.pick(0) == ("guest", 6 * MS)


def test_the_slice_can_be_chosen() -> None:
    queue = RunQueue(slice_ns=30 * MS)
    for i in range(6):
        queue.add(f"guest{i}", 100, 0, 0)
    assert queue.pick(0) == ("guest0", 20 * MS)


def test_an_interrupted_slice_goes_on_with_what_is_left_of_it() -> None:
    queue = RunQueue()
    queue.add("a", 100, 0, 0)
    queue.add("b", 100, 0, 0)
    first = queue.pick(0)
    assert first == ("a", SLICE_NS)
    queue.charge("a", MS, MS)
    assert queue.pick(MS) == ("a", SLICE_NS - MS)


# -- sleepers

def test_a_sleeper_runs_at_once_when_it_wakes() -> None:
    queue = RunQueue()
    for i in range(20):
        queue.add(f"hog{i}", 10_000, 0, 0)
    queue.add("sleeper", 1, 0, 0)
    queue.sleep("sleeper", 0)
    now = 0
    for _ in range(100):
        now += run_cpu(queue, now, now + 97 * MS)   # in the middle of somebody's slice
        queue.wake("sleeper", now)
        assert queue.pick(now) == ("sleeper", 2 * MS)
        # a weight of 1 in 200,001 buys so little
        queue.charge("sleeper", 100, now + 100)
        queue.sleep("sleeper", now + 100)
        now += 100
    assert queue.latency.counts[0] == 100
    assert sum(queue.latency.counts) == 100
    assert queue.latency.sum_ns == 0


def test_a_sleeper_cannot_hoard_credit() -> None:
    queue = RunQueue()
    queue.add("sleeper", 100, 0, 0)
    queue.add("hog", 100, 0, 0)
    queue.sleep("sleeper", 0)
    run_cpu(queue, 0, 1000 * SECOND)
    queue.wake("sleeper", 1000 * SECOND)
    run_cpu(queue, 1000 * SECOND, 1000 * SECOND + 200 * MS)
    run = queue.usage("sleeper", 1000 * SECOND + 200 * MS).run_ns
    assert 100 * MS <= run <= 100 * MS + 2 * SLICE_NS


def test_short_sleeps_do_not_pay() -> None:
    """A guest that halts for a moment after every millisecond gets no more than its share."""
    queue = RunQueue()
    queue.add("nap", 100, 0, 0)
    queue.add("hog", 300, 0, 0)
    now = 0
    wakes = False
    while now < 20 * SECOND:
        pick = queue.pick(now)
        assert pick is not None
        ran = min(pick.slice_ns, MS)
        now += ran
        queue.charge(pick.id, ran, now)
        if wakes:
            queue.wake("nap", now)
            wakes = False
        if pick.id == "nap":
            queue.sleep("nap", now)
            wakes = True
    assert queue.usage("nap", now).run_ns <= now * 0.25 * 1.05 + SLICE_NS


def test_waking_and_sleeping_twice_changes_nothing() -> None:
    queue = RunQueue()
    queue.add("guest", 100, 0, 0)
    queue.wake("guest", 5)
    queue.sleep("guest", 10)
    queue.sleep("guest", 20)
    assert queue.pick(25) is None
    queue.wake("guest", 30)
    queue.wake("guest", 40)
    assert queue.usage("guest", 50) == Usage(run_ns=0, wait_ns=30, sleep_ns=20)


def test_latency_is_counted_from_wake_to_turn() -> None:
    queue = RunQueue()
    queue.add("guest", 100, 0, 0)
    for i, latency in enumerate((0, 60_000, 3 * MS, 5 * SECOND)):
        queue.sleep("guest", i * 10 * SECOND)
        queue.wake("guest", i * 10 * SECOND)
        assert queue.pick(i * 10 * SECOND + latency) is not None
    counted = dict(zip((*LATENCY_BOUNDS_NS, None), queue.latency.counts, strict=True))
    assert {bound for bound, count in counted.items() if count} == {20_000, 100_000, 5 * MS, None}
    assert queue.latency.sum_ns == 5 * SECOND + 3 * MS + 60_000


# -- membership

def test_a_new_guest_gets_its_share_and_no_more() -> None:
    queue = RunQueue()
    queue.add("old", 100, 0, 0)
    run_cpu(queue, 0, 100 * SECOND)
    queue.add("new", 100, 0, 100 * SECOND)
    run_cpu(queue, 100 * SECOND, 101 * SECOND)
    assert queue.usage("new", 101 * SECOND).run_ns == pytest.approx(SECOND // 2, rel=0.05)


def test_removing_guests_leaves_the_rest_in_order() -> None:
    queue = RunQueue()
    for i in range(10):
        queue.add(f"guest{i}", 100, 30 if i % 3 == 0 else 0, 0)
    now = 0
    for i in range(0, 10, 2):
        now += run_cpu(queue, now, now + SECOND)
        usage = queue.remove(f"guest{i}", now)
        assert sum(usage) == now
        assert f"guest{i}" not in queue
    start = {i: queue.usage(f"guest{i}", now).run_ns for i in (1, 5, 7)}
    run_cpu(queue, now, now + 10 * SECOND)
    for i, before in start.items():
        run = queue.usage(f"guest{i}", now + 10 * SECOND).run_ns - before
        assert run == pytest.approx(2 * SECOND, rel=0.05)
    assert len(queue) == 5


def test_the_guest_being_run_may_be_removed() -> None:
    queue = RunQueue()
    queue.add("guest", 100, 0, 0)
    assert queue.pick(0) is not None
    queue.remove("guest", 10)
    assert queue.pick(10) is None


def test_a_new_weight_counts_from_now_on() -> None:
    queue = RunQueue()
    queue.add("a", 1, 0, 0)
    queue.add("b", 10_000, 0, 0)
    run_cpu(queue, 0, SECOND)
    queue.set_share("a", 10_000, 0)
    before = queue.usage("a", SECOND).run_ns
    run_cpu(queue, SECOND, 3 * SECOND)
    assert queue.usage("a", 3 * SECOND).run_ns - before == pytest.approx(SECOND, rel=0.05)


def test_a_lifted_cap_frees_a_throttled_guest() -> None:
    queue = RunQueue()
    queue.add("guest", 100, 1, 0)
    run_cpu(queue, 0, 50 * MS)
    assert queue.pick(50 * MS) is None
    queue.set_share("guest", 100, 0)
    assert queue.pick(50 * MS) is not None


@pytest.mark.parametrize(("weight", "cap"), [(0, 0), (-1, 0), (10_001, 0), (100, -1)])
def test_shares_out_of_range_are_refused(weight: int, cap: int) -> None:
    queue = RunQueue()
    with pytest.raises(ValueError, match=r"weight|cap"):
        queue.add("guest", weight, cap, 0)
    assert "guest" not in queue


def test_misuse_is_refused() -> None:
    queue = RunQueue()
    queue.add("guest", 100, 0, 0)
    with pytest.raises(ValueError, match="already"):
        queue.add("guest", 100, 0, 0)
    with pytest.raises(ValueError, match="not picked"):
        queue.charge("guest", 1, 1)
    with pytest.raises(KeyError):
        queue.wake("nobody", 0)


# -- whatever happens

Step = tuple[str, int, int]
actions = st.sampled_from(["run", "run", "run", "halt", "wake", "sleep", "share", "move", "idle"])
steps = st.lists(st.tuples(actions, st.integers(0, 7), st.integers(0, 10_000)), max_size=120)
some_shares = st.tuples(st.integers(1, 10_000), st.sampled_from([0, 0, 0, 1, 7, 50, 100]))


@settings(max_examples=150, deadline=None)
@given(st.lists(some_shares, min_size=1, max_size=8), steps)
def test_every_nanosecond_is_accounted_for(shares: list[tuple[int, int]], steps: list[Step]) -> None:
    queue = RunQueue()
    for i, (weight, cap) in enumerate(shares):
        queue.add(f"guest{i}", weight, cap, 0)
    now = busy = gone = 0
    added = {f"guest{i}": 0 for i in range(len(shares))}
    asleep: set[str] = set()
    for what, which, size in steps:
        id = f"guest{which % len(shares)}"
        if what in ("run", "halt"):
            pick = queue.pick(now)
            if pick is None:
                event = queue.next_event(now)
                assert event is not None or asleep == set(added)    # nobody runnable is forgotten
                assert event is None or now < event <= now + 1000 * SECOND
                now = now + MS if event is None else event
                continue
            assert pick.id not in asleep
            ran = min(pick.slice_ns, max(1, size * 1000))
            now += ran + size % 5000                                # the monitor's own work comes on top
            queue.charge(pick.id, ran, now)
            busy += ran
            if what == "halt":
                queue.sleep(pick.id, now)
                asleep.add(pick.id)
        elif what == "wake":
            queue.wake(id, now)
            asleep.discard(id)
        elif what == "sleep":
            queue.sleep(id, now)
            asleep.add(id)
        elif what == "share":
            queue.set_share(id, max(1, size), size % 120)
        elif what == "move":
            usage = queue.remove(id, now)
            assert sum(usage) == now - added[id]
            gone += usage.run_ns
            queue.add(id, max(1, size), 0, now)
            added[id] = now
            asleep.discard(id)
        else:
            now += size * 1000
    usages = {id: queue.usage(id, now) for id in added}
    for id, usage in usages.items():
        assert min(usage) >= 0
        assert sum(usage) == now - added[id]
    assert sum(usage.run_ns for usage in usages.values()) + gone == busy


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=2, max_size=12), st.integers(0, 11))
def test_nobody_starves(weights: list[int], nap: int) -> None:
    """Between two turns of a guest the others get no more than their weights allow and a slice each."""
    queue = RunQueue()
    for i, weight in enumerate(weights):
        queue.add(f"guest{i}", weight, 0, 0)
    napper = f"guest{nap % len(weights)}"
    now = 0
    last_turn = dict.fromkeys((f"guest{i}" for i in range(len(weights))), 0)
    for _ in range(600):
        pick = queue.pick(now)
        assert pick is not None
        now += pick.slice_ns
        queue.charge(pick.id, pick.slice_ns, now)
        last_turn[pick.id] = now
        if pick.id == napper:
            queue.sleep(pick.id, now)
            queue.wake(pick.id, now)
        for i, weight in enumerate(weights):
            longest = SLICE_NS * sum(weights) // weight + 2 * SLICE_NS * len(weights)
            assert now - last_turn[f"guest{i}"] <= longest


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
