# SPDX-License-Identifier: GPL-2.0-or-later
"""The direct jumps of a unit, packed in one number: 32 bits each, at most two.

    0-11    where it leads, as an offset in the unit's page, which it never leaves
    12-14   flags
    16-31   offset of its displacement

All of one unit lead somewhere, so a part that is zero is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

BITS = 32
PAGE_MASK = 0xFFF
SITE = 16
#: the branch of a conditional jump, else what follows it
TAKEN = 0x1000
#: the monitor is to execute the instruction there
CALLOUT = 0x2000
#: its opcode is of two bytes, else of one
WIDE = 0x4000
_ONE = (1 << BITS) - 1


class Exit(NamedTuple):
    """A direct jump to another unit of the same page.  Offsets count from the beginning of the unit."""

    #: the jump, its 32-bit displacement, and where it leads in the guest
    at: int
    site: int
    eip: int
    taken: bool
    callout: bool


def unpack(packed: int, eip: int) -> tuple[Exit, ...]:
    """The jumps of a unit at guest address `eip`."""
    found = []
    for one in each(packed):
        site = one >> SITE
        found.append(Exit(site - (2 if one & WIDE else 1), site, eip & ~PAGE_MASK | one & PAGE_MASK,
                          bool(one & TAKEN), bool(one & CALLOUT)))
    return tuple(found)


def each(packed: int) -> Iterator[int]:
    """The jumps, still packed."""
    while packed:
        yield packed & _ONE
        packed >>= BITS


def both(first: int, second: int) -> int:
    """Two jumps, where there may be less."""
    return first | second << BITS if first else second
