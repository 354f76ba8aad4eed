# SPDX-License-Identifier: GPL-2.0-or-later
"""A translation unit: some guest instructions and the host code that stands for them."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from typing import NamedTuple


class Mark(Enum):
    """What became of a guest instruction."""

    IDENT = "IDENT"             # itself
    INLINE = "INLINE"           # other code with the same effect
    SIMULATED = "SIMULATED"     # was IDENT, and trapped too often
    JCC = "JCC"
    JMP = "JMP"
    CALL = "CALL"
    INDIRECT = "INDIRECT"       # a jump or call through the jump table
    RET = "RET"
    CALLOUT = "callout"         # left to the monitor


class Piece(NamedTuple):
    """One guest instruction.  Offsets count from where the unit begins; it ends where the next one starts."""

    guest_at: int
    host_at: int
    mark: Mark


@dataclass(slots=True)
class Successor:
    """A guest address to which the unit goes on by a jump of its own."""

    eip: int
    #: where the jump is in the host code; its end if the jump is elided, because the next unit follows
    at: int
    #: the branch of a conditional jump, else what follows it
    taken: bool
    #: the jump leads into the successor's translation, not to the monitor
    chained: bool = False


@dataclass(slots=True)
class Unit:
    """A translation unit.  Invariant: the offsets in `pieces` ascend in both kinds of code, from 0."""

    eip: int
    code32: bool
    guest: bytes
    #: address of the host code, and what it was when the unit was listed or made
    address: int
    host: bytes
    pieces: tuple[Piece, ...]
    successors: tuple[Successor, ...] = ()
    #: how often it was entered, if that is counted
    hits: int | None = None

    def eip_at(self, offset: int) -> int:
        """The guest instruction to which the host code at `offset` belongs."""
        index = bisect_right(self.pieces, offset, key=attrgetter("host_at")) - 1
        return self.eip + self.pieces[index].guest_at
