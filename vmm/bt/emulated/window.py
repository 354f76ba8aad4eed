# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest linear memory on the emulated processor: 4 GiB windows over pool frames, by page tables of our own.

    base - 4 GiB ... base              nothing
    base ... base + 4 GiB              guest linear addresses; what is not mapped faults
    base + 4 GiB ... base + 8 GiB      nothing

The space on both sides takes what accesses of translated code can reach beyond a window, as the guards of
`vmm.bt.native.windows` do.  What a window costs are its page tables, and so these are what it takes of the
budget: one for the window and one for every 2 MiB it has a page in, roughly.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from itertools import islice

from vmm.bt.emulated.pagetables import DATA, ENTRIES, WRITABLE, Places, Root, Space
from vmm.bt.native.windows import PAGES, WINDOW_BYTES, MappingBudget, runs
from vmm.memory.pool import PAGE_SHIFT

#: from 1 TiB to 63 TiB
_FIRST, _STRIDE, _COUNT = 1 << 40, 2 * WINDOW_BYTES, 7936
_WRITABLE = 1


def places() -> Places:
    """Where windows can be."""
    return Places(_FIRST + WINDOW_BYTES, _STRIDE, _COUNT)


class Window:
    """One guest address space, seen with one privilege.

    `evicted` is called with pages that were unmapped to stay within the budget.
    Invariant: `pages` says what the page tables map: page number -> frame and writability, the page mapped
    longest first; `mappings` is the number of tables.
    """

    def __init__(self, root: Root, places: Places, budget: MappingBudget,
                 evicted: Callable[[list[int]], None]) -> None:
        self._root = root
        self._places = places
        self._budget = budget
        self._evicted = evicted
        #: a multiple of 4 GiB: the low half of an address is the guest's
        self.base = places.take()
        self._space = Space(root, self.base)
        root.add(self._space)
        self.pages: dict[int, int] = {}
        self.mappings = 0
        self._count()
        budget.windows.append(self)
        #: pages unmapped to make room
        self.evictions = 0

    def map(self, page: int, frame: int, count: int = 1, writable: bool = False) -> None:
        """Map `count` pages to consecutive frames, in place of what is there."""
        self._check(page, count)
        rights = DATA | (WRITABLE if writable else 0)
        end = page + count
        while page < end:
            last = min(end, (page | ENTRIES - 1) + 1)
            self._budget.make_room()
            self._fill(page, last - page, frame << PAGE_SHIFT | rights)
            self._note(page, range(frame << 1 | writable, frame + last - page << 1, 2))
            frame += last - page
            page = last

    def _fill(self, page: int, count: int, entry: int) -> None:
        """Write entries with consecutive frames into one leaf table."""
        leaf, at = self._space.leaf(page), page & ENTRIES - 1
        self._count()
        if any(leaf[at:at + count]):
            self._space.changed()
        leaf[at:at + count] = array("Q", range(entry, entry + (count << PAGE_SHIFT), 1 << PAGE_SHIFT))

    def _note(self, page: int, entries: Iterable[int]) -> None:
        pages = self.pages
        for number, entry in enumerate(entries, page):
            pages.pop(number, None)
            pages[number] = entry

    def map_pages(self, page: int, frames: Iterable[int], writable: bool = False) -> None:
        """Map consecutive pages to `frames`."""
        for first, count in runs(frames):
            self.map(page, first, count, writable)
            page += count

    def protect(self, page: int, count: int, writable: bool) -> None:
        """Change whether mapped pages may be written."""
        self._check(page, count)
        pages = self.pages
        for number in range(page, page + count):
            entry = pages.pop(number, None)
            if entry is not None:
                pages[number] = entry & ~_WRITABLE | writable
                leaf = self._space.leaf(number)
                at = number & ENTRIES - 1
                leaf[at] = leaf[at] & ~WRITABLE | (WRITABLE if writable else 0)
        if not writable:
            self._space.changed()

    def unmap(self, page: int, count: int = 1) -> None:
        """Pages fault again."""
        self._check(page, count)
        end = page + count
        if count > len(self.pages):
            doomed = [number for number in self.pages if page <= number < end]
        else:
            doomed = [number for number in range(page, end) if number in self.pages]
        for number in doomed:
            del self.pages[number]
            self._space.leaf(number)[number & ENTRIES - 1] = 0
        if doomed:
            self._space.changed()
            for table in {number >> 9 for number in doomed}:
                self._space.prune(table << 9)
            self._count()

    def clear(self) -> None:
        """Nothing is mapped any more."""
        self.pages.clear()
        self._space.clear()
        self._count()

    def close(self) -> None:
        """Give the address space back."""
        self._root.remove(self._space)
        self._space.close()
        self._places.give(self.base)
        self._budget.used -= self.mappings
        self._budget.windows.remove(self)
        self.pages.clear()
        self.mappings = 0

    def evict(self) -> None:
        """Unmap the older quarter of the pages."""
        victims = sorted(islice(self.pages, len(self.pages) // 4 + 1))
        for first, count in runs(victims):
            self.unmap(first, count)
        self.evictions += len(victims)
        self._evicted(victims)

    def _count(self) -> None:
        """Bring the budget up to date."""
        tables = self._space.tables
        self._budget.used += tables - self.mappings
        self.mappings = tables

    @staticmethod
    def _check(page: int, count: int) -> None:
        if page < 0 or count < 1 or page + count > PAGES:
            raise ValueError(f"pages {page:#x} to {page + count:#x} are not within 4 GiB")
