# SPDX-License-Identifier: GPL-2.0-or-later
"""Views: the guest's linear memory as one of its address spaces shows it at one privilege.

A view is a shadow page table whose walker is the host's MMU (a window of host mappings), a jump table for
the code in it, and what both are derived from.  It is filled by faults and is to the guest a TLB: it may
keep what the guest's page tables said until the guest flushes it.
"""

from __future__ import annotations

from collections import OrderedDict

from vmm.bt.codepage import CodePage
from vmm.bt.cpu import JumpTable, TranslationCpu
from vmm.bt.mode import Mode
from vmm.bt.native.block import JUMP_TABLE, WINDOW
from vmm.bt.native.windows import MappingBudget, runs
from vmm.memory.pool import Pool

#: modes of code with a jump table in one view: kernels have a few at once, as they load segments on entry
_MOST_MODES = 4


class View:
    """One linear memory at one privilege.

    Invariants: `sources` has the guest-physical page of every mapped page, and the window maps no other frame
    than the P2M's; a jump table entry leads to a unit of `code[page]`.
    """

    def __init__(self, cpu: TranslationCpu, pool: Pool, budget: MappingBudget, table_pages: int,
                 tables: list[JumpTable]) -> None:
        self.window = cpu.new_window(pool, budget, self._evicted)
        self._cpu = cpu
        self._table_pages = table_pages
        self._tables = tables
        #: linear page -> guest-physical page
        self.sources: dict[int, int] = {}
        #: by mode: the jump table, and linear page -> the code that is executed there
        self._executed: OrderedDict[Mode, tuple[JumpTable, dict[int, CodePage]]] = OrderedDict()
        #: mapped pages, and pages of code, that a change of CR3 flushes
        self.passing: set[int] = set()
        #: first pages of large pages that something is mapped of, with their length
        self.large: dict[int, int] = {}
        #: the page behind those mapped last, and how many that were
        self.next, self.run = -1, 1
        self.user = False
        self.mode: Mode | None = None
        self.table: JumpTable
        self.code: dict[int, CodePage] = {}

    def change_mode(self, mode: Mode) -> None:
        """`table` and `code` are those of a mode: none of another mode's units is met in it."""
        known = self._executed.get(mode)
        if known is None:
            if len(self._executed) < _MOST_MODES:
                table = self._cpu.new_table(self._table_pages)
                self._tables.append(table)
            else:
                table = self._executed.popitem(last=False)[1][0]
                table.clear()
            known = self._executed[mode] = table, {}
        self._executed.move_to_end(mode)
        self.mode = mode
        self.table, self.code = known

    def enter(self, block: memoryview) -> None:
        """Make a state block, given as quadwords, use this view."""
        block[WINDOW] = self.window.base
        block[JUMP_TABLE] = self.table.base

    def map(self, page: int, source: int, frame: int, writable: bool, count: int = 1) -> None:
        """Show `count` guest-physical pages, whose frames follow one another."""
        self.window.map(page, frame, count, writable)
        self.sources[page] = source
        for index in range(1, count):
            self.sources[page + index] = source + index

    def drop(self, page: int, count: int = 1) -> None:
        """Forget `count` pages: they fault again, and jumps into them miss."""
        sources = self.sources
        codes = [code for _, code in self._executed.values()]
        if count > len(sources):
            every = sources.keys() | {one for code in codes for one in code}
            found = [one for one in every if page <= one < page + count]
        else:
            found = [one for one in range(page, page + count)
                     if one in sources or any(one in code for code in codes)]
        if not found:
            return
        mapped = sorted(one for one in found if one in sources)
        if len(mapped) > 64:
            self.window.unmap(mapped[0], mapped[-1] - mapped[0] + 1)
        else:
            for first, length in runs(mapped):
                self.window.unmap(first, length)
        for one in found:
            sources.pop(one, None)
            self.passing.discard(one)
            if any(one in code for code in codes):
                self.drop_code(one)

    def drop_code(self, page: int) -> None:
        """What is executed at a page is to be looked at again."""
        for table, code in self._executed.values():
            code.pop(page, None)
            table.drop_page(page)

    def executed(self) -> list[CodePage]:
        """All the code."""
        return [page for _, code in self._executed.values() for page in code.values()]

    def flush_passing(self) -> None:
        """A change of CR3: everything goes but global pages."""
        if not self.passing:
            return
        pages = sorted(self.passing)
        if len(pages) > 16:
            # one call for all: holes cost nothing, but what lies between must be passing, too
            groups = _groups(pages, self.sources)
        else:
            groups = [(first, count) for first, count in runs(pages)]
        for first, count in groups:
            self.drop(first, count)
        self.passing.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.window.clear()
        self.sources.clear()
        for table, code in self._executed.values():
            table.clear()
            code.clear()
        self.passing.clear()
        self.large.clear()

    def close(self) -> None:
        """Give the address space back."""
        self.window.close()
        for table, _ in self._executed.values():
            self._tables.remove(table)
            table.close()
        self._executed.clear()

    def _evicted(self, pages: list[int]) -> None:
        for page in pages:
            self.sources.pop(page, None)


def _groups(pages: list[int], sources: dict[int, int]) -> list[tuple[int, int]]:
    """Ascending pages as (first, count) of stretches without any other mapped page in them."""
    others = sorted(sources.keys() - set(pages))
    groups: list[tuple[int, int]] = []
    first = last = pages[0]
    index = 0
    for page in pages[1:]:
        while index < len(others) and others[index] < last:
            index += 1
        if index < len(others) and others[index] < page:
            groups.append((first, last - first + 1))
            first = page
        last = page
    groups.append((first, last - first + 1))
    return groups
