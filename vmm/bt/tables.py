# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest page tables that views were filled from, and how views follow them.

    traced       write-protected in the P2M; a write sets the trace off, and the page becomes
    out of sync  writable, with a copy of what it was; at the next change of CR3 it is compared, changed
                 entries are dropped from all views, and it is traced again

Invariant: what a view derived from a table is dropped from it before the guest can expect a changed entry to
count; what is derived from a table out of sync is derived from what its copy says.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vmm.bt.native.windows import runs
from vmm.bt.views import View
from vmm.bt.walk import Table
from vmm.memory.pool import PAGE
from vmm.x86.paging import ACCESSED, DIRTY

#: a page of which more entries changed at once is no page table any more
_FLOOD = 256


def _changed(before: bytes, now: bytes, size: int) -> list[int]:
    """Which present entries of a page of tables are others now; A and D, which we set, do not count.

    From an absent entry nothing was derived.
    """
    kind = np.dtype(np.uint32 if size == 4 else np.uint64)
    one, marks = kind.type(1), kind.type(ACCESSED | DIRTY)
    old, new = np.frombuffer(before, kind), np.frombuffer(now, kind)
    other = (old ^ new) & ~(new & marks)
    return [int(index) for index in np.flatnonzero((old & one).astype(bool) & (other != 0))]


class TracedTables:
    """The page tables of one guest; `page_bytes` reads a guest-physical page, `trace` write-protects it."""

    def __init__(self, page_bytes: Callable[[int], bytes], trace: Callable[[int], None]) -> None:
        self._page_bytes = page_bytes
        self._trace_page = trace
        #: page -> what its entries are about, in which views
        self._tables: dict[int, dict[tuple[View, int], Table]] = {}
        #: tables out of sync: page -> what it was
        self._unsynced: dict[int, bytes] = {}

    def __contains__(self, page: int) -> bool:
        return page in self._tables

    def depends(self, view: View, tables: tuple[Table, ...]) -> None:
        """Something in a view was found through these tables: they are traced from now on."""
        for table in tables:
            users = self._tables.get(table.page)
            if users is None:
                users = self._tables[table.page] = {}
                if table.page not in self._unsynced:
                    self._trace_page(table.page)
            users.setdefault((view, table.first), table)
            before = self._unsynced.get(table.page)
            if before is not None:
                # what is derived from it from now on is derived from what it is now
                now = self._page_bytes(table.page)
                if now != before:
                    self.compare(table.page, before)
                    self._unsynced[table.page] = now

    def went_off(self, page: int) -> None:
        """A traced page is about to be written."""
        if page in self._tables:
            self._unsynced[page] = self._page_bytes(page)

    def disown(self, view: View) -> None:
        """A view depends on nothing any more."""
        for page, users in list(self._tables.items()):
            for key in [key for key in users if key[0] is view]:
                self._release_table(page, key)

    def clear(self) -> None:
        """No view depends on anything any more."""
        self._tables.clear()
        self._unsynced.clear()

    def sync(self) -> None:
        """Compare the tables that were written with what they were, and trace them again.

        Raises OutOfFrames for one whose contents are elsewhere: it and those after it are out of sync still.
        """
        for page, before in list(self._unsynced.items()):
            if page in self._tables:
                self.compare(page, before)
            del self._unsynced[page]
            if page in self._tables:
                self._trace_page(page)

    def compare(self, page: int, before: bytes) -> None:
        """Drop from all views what depends on the entries that changed in a page of tables."""
        users = self._tables[page]
        now = self._page_bytes(page)
        if now == before:
            return
        for size in {table.size for table in users.values()}:
            changed = _changed(before, now, size)
            for key, table in [item for item in users.items() if item[1].size == size]:
                if len(changed) > _FLOOD:
                    self._release_table(page, key)
                else:
                    self._drop_entries(key[0], table, changed)

    def _drop_entries(self, view: View, table: Table, changed: list[int]) -> None:
        if not table.span:              # directory pointers: each is about a gigabyte
            for _ in changed:
                view.drop(0, 1 << 20)
            return
        for first, count in runs(changed):
            view.drop(table.first + first * table.span, count * table.span)

    def _release_table(self, page: int, key: tuple[View, int]) -> None:
        """The page is no table of a view any more; what was found through it is forgotten."""
        view, table = key[0], self._tables[page].pop(key)
        if not self._tables[page]:
            del self._tables[page]
        entries = PAGE // table.size
        view.drop(table.first if table.span else 0, entries * table.span if table.span else 1 << 20)
