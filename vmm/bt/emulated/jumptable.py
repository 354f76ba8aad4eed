# SPDX-License-Identifier: GPL-2.0-or-later
"""The jump table on the emulated processor: 8 bytes for every guest linear address, 32 GiB of addresses.

Translated code jumps through it with a single `jmp [r15 + r8*8]`.  Where nothing was ever entered there is no
page, and the processor's fault on reading there is a miss; so is the one on fetching from address zero, which
is what empty entries of a page say.  An entry costs the page it is in, which `limit` bounds, and its tables.
"""

from __future__ import annotations

from vmm.bt.codepage import TAIL_BYTES
from vmm.bt.emulated.pagetables import DATA, ENTRIES, Page, Places, Root, Space
from vmm.bt.native.jumptable import TABLE_BYTES
from vmm.memory.pool import PAGE, PAGE_SHIFT

#: from 64 TiB to 127 TiB
_FIRST, _COUNT = 1 << 46, 2016
_SHIFT = 9
_EMPTY = memoryview(bytes(PAGE)).cast("Q")


def places() -> Places:
    """Where jump tables can be."""
    return Places(_FIRST, TABLE_BYTES, _COUNT)


class JumpTable:
    """One table; a guest has one for each view of its linear memory that is live."""

    def __init__(self, root: Root, places: Places, limit: int) -> None:
        if limit < 1:
            raise ValueError("a jump table needs at least one page")
        self.limit = limit
        self._root = root
        self._memory = root.memory
        self._places = places
        self.base = places.take()
        self._space = Space(root, self.base)
        root.add(self._space)
        self._pages: dict[int, Page] = {}
        #: how often the whole table was emptied because it had grown to its limit
        self.flushes = 0

    @property
    def resident_bytes(self) -> int:
        """Host memory the entries occupy."""
        return len(self._pages) * PAGE

    def set(self, guest: int, host: int) -> None:
        """From now on a jump to `guest` goes to `host`.  At the limit everything else is forgotten."""
        number = guest >> _SHIFT
        page = self._pages.get(number)
        if page is None:
            if len(self._pages) >= self.limit:
                self.clear()
                self.flushes += 1
            page = self._pages[number] = self._memory.take()
            self._space.leaf(number)[number & ENTRIES - 1] = page.physical | DATA
        page.q[guest & ENTRIES - 1] = host

    def get(self, guest: int) -> int:
        """Where a jump to `guest` goes; 0 when it misses."""
        page = self._pages.get(guest >> _SHIFT)
        return 0 if page is None else page.q[guest & ENTRIES - 1]

    def drop(self, guest: int) -> None:
        """A jump to `guest` misses from now on."""
        page = self._pages.get(guest >> _SHIFT)
        if page is not None:
            page.q[guest & ENTRIES - 1] = 0

    def drop_page(self, number: int) -> None:
        """Jumps into a page of guest code miss from now on, and those to what ends in it."""
        first = number << PAGE_SHIFT
        for table in range(first >> _SHIFT, first + PAGE >> _SHIFT):
            page = self._pages.get(table)
            if page is not None:
                page.q[:] = _EMPTY
        before = self._pages.get((first >> _SHIFT) - 1)
        if before is not None:
            before.q[ENTRIES - TAIL_BYTES:] = _EMPTY[:TAIL_BYTES]

    def clear(self) -> None:
        """Every jump misses from now on."""
        self._space.clear()
        for page in self._pages.values():
            self._memory.give(page)
        self._pages.clear()

    def close(self) -> None:
        """Give the address space back."""
        self.clear()
        self._root.remove(self._space)
        self._space.close()
        self._places.give(self.base)
