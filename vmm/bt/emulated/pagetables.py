# SPDX-License-Identifier: GPL-2.0-or-later
"""x86-64 page tables of the emulated processor, in memory of its own.

Every window and every jump table is a `Space`: a range of virtual addresses at a place of its own within one
512 GiB slot, with a third-level table (a PDPT) of its own.  In the processor's one top-level table (`Root`)
are only the spaces of the guest it runs: nothing of any other guest is within reach of translated code.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator

from vmm.memory.pool import PAGE, PAGE_SHIFT

#: physical address of the processor's own memory, above any pool
OWN_MEMORY = 1 << 38
ENTRIES = PAGE // 8

PRESENT, WRITABLE, USER, NO_EXECUTE = 1, 2, 4, 1 << 63
# accessed and dirty from the start: the processor never has to write to a table
_ACCESSED, _DIRTY = 0x20, 0x40
LEAF = PRESENT | USER | _ACCESSED | _DIRTY
DATA = LEAF | NO_EXECUTE
_TABLE = PRESENT | WRITABLE | USER | _ACCESSED
_ADDRESS = 0x000F_FFFF_FFFF_F000

_CHUNK = 4 << 20
_NOTHING = bytes(PAGE)
_ZEROS = memoryview(_NOTHING).cast("Q")


class Page:
    """One page of the processor's memory: its physical address, and its quadwords."""

    __slots__ = ("physical", "q")

    def __init__(self, physical: int, q: memoryview) -> None:
        self.physical = physical
        self.q = q


class OwnMemory:
    """Pages for page tables and jump tables, zeros when taken; it grows as needed and never shrinks.

    `provide` puts memory of this process at a physical address: address, length, and where it is here.
    """

    def __init__(self, provide: Callable[[int, int, int], None]) -> None:
        self._provide = provide
        self._end = OWN_MEMORY
        self._free: list[Page] = []

    def take(self) -> Page:
        """A page of zeros."""
        if not self._free:
            self._grow()
        return self._free.pop()

    def give(self, page: Page) -> None:
        """A page no entry leads to any more."""
        page.q[:] = _ZEROS
        self._free.append(page)

    def _grow(self) -> None:
        chunk = mmap.mmap(-1, _CHUNK)
        self._provide(self._end, _CHUNK, ctypes.addressof(ctypes.c_char.from_buffer(chunk)))
        view = memoryview(chunk)
        self._free.extend(Page(self._end + at, view[at:at + PAGE].cast("Q"))
                          for at in range(_CHUNK - PAGE, -PAGE, -PAGE))
        self._end += _CHUNK


class Root:
    """The top-level table, at physical address `physical`, and the spaces that can be shown by it.

    `stale` says that an entry that was present has changed since the TLB was flushed.
    Invariant: entries lead to pinned spaces and to those at the addresses `shown`, which are open.
    """

    def __init__(self, memory: OwnMemory) -> None:
        self.memory = memory
        self._page = memory.take()
        self.physical = self._page.physical
        self.shown = (0, 0)
        self.stale = False
        self._spaces: dict[int, Space] = {}

    def pin(self, space: Space) -> None:
        """Show a space always."""
        self._page.q[space.slot] = space.entry

    def add(self, space: Space) -> None:
        """A space that can be shown from now on."""
        self._spaces[space.base] = space

    def remove(self, space: Space) -> None:
        """A space that goes away."""
        del self._spaces[space.base]
        if space.base in self.shown:
            self.show(0, 0)

    def show(self, window: int, table: int) -> None:
        """Show the spaces that begin at these addresses and no others; 0 is none."""
        q = self._page.q
        for base in self.shown:
            if base in self._spaces:
                q[self._spaces[base].slot] = 0
        self.shown = window, table
        for base in self.shown:
            if base in self._spaces:
                q[self._spaces[base].slot] = self._spaces[base].entry
        self.stale = True


class Space:
    """The page tables for addresses from `base` on, by page number from there.

    A leaf table maps 2 MiB: page numbers with the same `page >> 9`.
    """

    def __init__(self, root: Root, base: int) -> None:
        self.base = base
        self._root = root
        self._memory = root.memory
        self._first = base >> PAGE_SHIFT
        self._top = self._memory.take()
        self._middle: dict[int, Page] = {}
        self._leaves: dict[int, Page] = {}
        #: its index in the top-level table, and the entry to put there
        self.slot, self.entry = base >> 39 & ENTRIES - 1, self._top.physical | _TABLE

    @property
    def tables(self) -> int:
        """Pages of memory the tables take."""
        return 1 + len(self._middle) + len(self._leaves)

    def leaf(self, page: int) -> memoryview:
        """The leaf table for `page`, made now if need be: at most two more tables."""
        found = self._leaves.get(page >> 9)
        if found is None:
            found = self._leaves[page >> 9] = self._memory.take()
            number = self._first + page
            middle = self._middle.get(number >> 18)
            if middle is None:
                middle = self._middle[number >> 18] = self._memory.take()
                self._top.q[number >> 18 & ENTRIES - 1] = middle.physical | _TABLE
            middle.q[number >> 9 & ENTRIES - 1] = found.physical | _TABLE
        return found.q

    def changed(self) -> None:
        """An entry that was present is so no longer, or allows less."""
        self._root.stale = True

    def prune(self, page: int) -> None:
        """Give the leaf table for `page` back if nothing is mapped by it."""
        found = self._leaves.get(page >> 9)
        if found is not None and found.q.tobytes() == _NOTHING:
            number = self._first + page
            self._middle[number >> 18].q[number >> 9 & ENTRIES - 1] = 0
            del self._leaves[page >> 9]
            self._memory.give(found)
            self.changed()

    def clear(self) -> None:
        """Nothing is mapped any more; all tables but the first are given back."""
        self._top.q[:] = _ZEROS
        for page in (*self._middle.values(), *self._leaves.values()):
            self._memory.give(page)
        self._middle.clear()
        self._leaves.clear()
        self.changed()

    def close(self) -> None:
        """Give all tables back; a space that was added to the root must have been removed."""
        self.clear()
        self._memory.give(self._top)


class Places:
    """Where spaces begin: `count` places, `stride` bytes apart."""

    def __init__(self, first: int, stride: int, count: int) -> None:
        self._new: Iterator[int] = iter(range(first, first + stride * count, stride))
        self._returned: list[int] = []

    def take(self) -> int:
        """A place nobody has.  Raises OSError when there is none."""
        if self._returned:
            return self._returned.pop()
        place = next(self._new, None)
        if place is None:
            raise OSError("no address space is left for another window or jump table")
        return place

    def give(self, place: int) -> None:
        """A place that is free again."""
        self._returned.append(place)
