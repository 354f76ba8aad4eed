# SPDX-License-Identifier: GPL-2.0-or-later
"""The run queue on a simulated CPU: shares, caps, sleepers, and what holds whatever happens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostd.scheduler import LATENCY_BOUNDS_NS, RunQueue, Usage
from hostd.scheduler.runqueue import LONE_TURN_NS, SLICE_NS
from tests.simulation import MS, SECOND, run_cpu, weighted

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
    queue.add("first", 100, 0, 0)
    for i in range(50):
        queue.add(f"guest{i}", 100, 0, 0)
        pick = queue.pick(0)
        assert pick is not None and 2 * MS <= pick.slice_ns <= 6 * MS
        queue.charge(pick.id, pick.slice_ns, 0)


def test_a_guest_alone_runs_on_until_another_comes() -> None:
    queue = RunQueue()
    queue.add("a", 100, 0, 0)
    assert queue.pick(0) == ("a", LONE_TURN_NS)
    queue.charge("a", 10 * MS, 10 * MS)
    assert queue.pick(10 * MS) == ("a", LONE_TURN_NS - 10 * MS)
    queue.charge("a", MS, 11 * MS)
    queue.add("b", 100, 0, 11 * MS)
    queue.add("c", 1, 5, 11 * MS)
    turns = []
    now = 11 * MS
    for _ in range(4):
        pick = queue.pick(now)
        assert pick is not None and pick.slice_ns <= SLICE_NS
        now += pick.slice_ns
        queue.charge(pick.id, pick.slice_ns, now)
        turns.append(pick.id)
    assert set(turns) >= {"a", "b"}


def test_a_guest_alone_lets_a_throttled_one_back_in_time() -> None:
    queue = RunQueue()
    queue.add("capped", 100, 10, 0)
    queue.add("free", 100, 0, 0)
    run_cpu(queue, 0, 60 * MS)
    pick = queue.pick(60 * MS)
    assert pick is not None and pick.id == "free" and pick.slice_ns < LONE_TURN_NS


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


def test_an_alarm_that_goes_off_as_its_guest_falls_asleep() -> None:
    queue = RunQueue()
    queue.add("guest", 100, 0, 0)
    queue.sleep("guest", 20)
    queue.wake("guest", 15)
    assert queue.usage("guest", 30) == Usage(run_ns=0, wait_ns=30, sleep_ns=0)


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
