# SPDX-License-Identifier: GPL-2.0-or-later
"""The deadlines of a machine."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmm.devices.timers import MOST_PER_RUN, NEVER, Timers


class Recorder:
    def __init__(self) -> None:
        self.expired: list[tuple[int, int]] = []

    def expire(self, slot: int, now: int) -> None:
        self.expired.append((slot, now))


def test_due_timers_expire_in_order_and_once() -> None:
    timers, device = Timers(lambda: 0), Recorder()
    for slot, deadline in ((0, 30), (1, 10), (2, 20), (3, 40)):
        timers.set(device, slot, deadline)
    assert timers.next == 10
    timers.run(30)
    assert device.expired == [(1, 30), (2, 30), (0, 30)]
    assert timers.next == 40
    timers.run(39)
    assert len(device.expired) == 3


def test_never_is_never() -> None:
    timers, device = Timers(lambda: 0), Recorder()
    timers.set(device, 0, NEVER)
    assert timers.next == NEVER
    timers.run(NEVER - 1)
    assert not device.expired


def test_a_timer_that_is_set_in_the_past_does_not_keep_the_caller() -> None:
    timers = Timers(lambda: 0)

    class Eager:
        count = 0

        def expire(self, slot: int, now: int) -> None:
            self.count += 1
            timers.set(self, slot, now)

    device = Eager()
    timers.set(device, 0, 5)
    timers.run(5)
    assert device.count == MOST_PER_RUN
    assert timers.next == 5


@given(st.lists(st.tuples(st.integers(0, 3), st.one_of(st.none(), st.integers(0, 100)))))
def test_next_is_the_least_deadline(changes: list[tuple[int, int | None]]) -> None:
    timers, device = Timers(lambda: 0), Recorder()
    model: dict[int, int] = {}
    for slot, deadline in changes:
        timers.set(device, slot, deadline)
        if deadline is None:
            model.pop(slot, None)
        else:
            model[slot] = deadline
        assert timers.next == min(model.values(), default=NEVER)
    timers.run(100)
    assert sorted(slot for slot, _ in device.expired) == sorted(model)
