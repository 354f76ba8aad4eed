# SPDX-License-Identifier: GPL-2.0-or-later
"""The deadlines of a machine's devices, in guest time.

The machine looks at `next` before it lets the guest run on, and calls `run` when that time has come.
There are about five timers in a machine, so the earliest is simply the least of a dict's values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

#: later than any deadline
NEVER = 1 << 63

#: expiries handled in one `run`: timers that are set again in the past must not keep the caller
MOST_PER_RUN = 64


class TimedDevice(Protocol):
    """A device with timers, told apart by slot numbers."""

    def expire(self, slot: int, now: int) -> None:
        """The deadline of `slot` has come (and is no longer set)."""


class Timers:
    """The set deadlines.

    # Invariant: `next` is the least deadline set, or NEVER.
    """

    __slots__ = ("_deadlines", "next", "now")

    def __init__(self, now: Callable[[], int]) -> None:
        #: the current guest time in ns
        self.now = now
        self.next = NEVER
        self._deadlines: dict[tuple[TimedDevice, int], int] = {}

    def set(self, owner: TimedDevice, slot: int, deadline: int | None) -> None:
        """Set, move or (with None) clear the deadline of one slot.  A past deadline is due at once."""
        deadlines = self._deadlines
        if deadline is None or deadline >= NEVER:
            if deadlines.pop((owner, slot), None) is None:
                return
        else:
            deadlines[owner, slot] = deadline
            if deadline <= self.next:
                self.next = deadline
                return
        self.next = min(deadlines.values(), default=NEVER)

    def run(self, now: int) -> None:
        """Call `expire` for what is due at `now`, earliest first."""
        deadlines = self._deadlines
        for _ in range(MOST_PER_RUN):
            if self.next > now:
                return
            owner, slot = min(deadlines, key=deadlines.__getitem__)
            del deadlines[owner, slot]
            self.next = min(deadlines.values(), default=NEVER)
            owner.expire(slot, now)
