# SPDX-License-Identifier: GPL-2.0-or-later
"""The direct jumps of a unit, packed in one number: 32 bits each, at most two.

    0-11    where it leads, as an offset in the unit's page, which it never leaves
    12-14   flags
    16-31   offset of its displacement

All of one unit lead somewhere, so a part that is zero is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

BITS = 32
PAGE_MASK = 0xFFF
SITE = 16
#: the branch of a conditional jump, else what follows it
TAKEN = 0x1000
#: the monitor is to execute the instruction there
CALLOUT = 0x2000
#: its opcode is of two bytes, else of one
WIDE = 0x4000
#: the place it leads to in the page; of what leads to the monitor, none there is
WHERE = PAGE_MASK | CALLOUT
#: one of them
ONE = (1 << BITS) - 1

#: a jump of a unit that is not placed yet: where it leads, and flags; how many bytes of the unit are behind
#: its displacement; the index of that, from the end, in the parts of the unit (`vmm.bt.template.Parts`)
Exit: TypeAlias = tuple[int, int, int]


def each(packed: int) -> Iterator[int]:
    """The jumps, still packed."""
    while packed:
        yield packed & ONE
        packed >>= BITS


def before(parts: Sequence[bytes], exits: Sequence[Exit]) -> tuple[Exit, ...]:
    """The jumps when there are these parts behind them."""
    further = sum(map(len, parts))
    return tuple((to, behind + further, part - len(parts)) for to, behind, part in exits)
