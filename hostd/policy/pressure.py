# SPDX-License-Identifier: GPL-2.0-or-later
"""How short of memory the host is."""

from __future__ import annotations

from enum import IntEnum


class State(IntEnum):
    """The four states of OSDI 2002, 6.3; the greater, the shorter."""

    HIGH = 0
    SOFT = 1
    HARD = 2
    LOW = 3

    @property
    def label(self) -> str:
        return self.name.lower()


def next_state(before: State, free: int, thresholds: tuple[int, int, int, int]) -> State:
    """The state after `before` with so many pages free, where `thresholds` are those of the four states.

    A state is entered from above when less is free than its own threshold, and left upwards when as much is
    free as the threshold of the state above: between the two it stays what it was.  The same arguments with
    the answer for `before` give the answer again.
    """
    deepest_entered = sum(free < threshold for threshold in thresholds[1:])
    deepest_kept = sum(free < threshold for threshold in thresholds[:-1])
    return State(max(deepest_entered, min(before, deepest_kept)))
