# SPDX-License-Identifier: GPL-2.0-or-later
"""A page of guest code, by what is in it: what translations are keyed by.

A unit's host code depends on the mode, on its linear address and on the bytes it was made from, and on
nothing else: guest memory is reached through a register, other pages of code through the jump table.  So
whoever has the same bytes at the same linear address in the same mode runs the same units - another process,
another guest, or the same one after its code was patched back.

A page that is written while it is executed (data beside code) would be another page with every store.  Such
a page is private to the one guest: its units die one by one as their bytes change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vmm.bt.mode import Mode
from vmm.memory.pool import PAGE_SHIFT

if TYPE_CHECKING:
    from vmm.bt.cache import Translation

#: the longest instruction, but for its first byte
TAIL_BYTES = 14


@dataclass(slots=True, eq=False)
class CodePage:
    """One page.  Invariant: a unit in `units` was made from the bytes that `code` has there."""

    mode: Mode
    #: linear page number
    number: int
    code: bytes
    #: by offset in the page
    units: dict[int, Translation] = field(default_factory=dict)
    #: units of one instruction that ends in the next page, by offset and by the bytes there
    straddlers: dict[tuple[int, bytes], Translation] = field(default_factory=dict)
    #: by the offset of a straddler: a jump to it through the table, where direct jumps in the page can lead
    bridges: dict[int, Translation] = field(default_factory=dict)
    #: offsets of instructions the monitor executes because they kept trapping
    simulated: set[int] = field(default_factory=set)
    #: of one guest alone, which goes on while the bytes change
    private: bool = False

    def unit_at(self, offset: int, beyond: bytes) -> Translation | None:
        """The unit that begins at `offset`; `beyond` is how the next page begins."""
        found = self.units.get(offset)
        if found is not None or not self.straddlers:
            return found
        for (at, tail), unit in self.straddlers.items():
            if at == offset and beyond.startswith(tail):
                return unit
        return None

    def all_units(self) -> Iterator[Translation]:
        """Every unit of the page."""
        yield from self.units.values()
        yield from self.straddlers.values()
        yield from self.bridges.values()

    def covering(self, offset: int) -> list[Translation]:
        """The units with the byte at `offset` among their guest code."""
        return [unit for unit in self.all_units() if unit.offset <= offset < unit.offset + unit.guest_bytes]

    def change(self, code: bytes) -> list[Translation]:
        """The page reads `code` now; the units made from what was there before and is not any more."""
        old, self.code = self.code, code
        if old == code:
            return []
        return [unit for unit in self.all_units()
                if old[unit.offset:unit.offset + unit.guest_bytes]
                != code[unit.offset:unit.offset + unit.guest_bytes]]

    @property
    def base(self) -> int:
        """Linear address of its first byte."""
        return self.number << PAGE_SHIFT
