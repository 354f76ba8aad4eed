# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest linear memory in this process: 4 GiB windows over pool frames; the host's MMU does the paging.

    base - GUARD ... base            guard
    base ... base + 4 GiB            guest linear addresses; what is not mapped faults
    base + 4 GiB ... + GUARD         guard

Effective addresses of translated code are 32 bits wide, so an access begins in the window.  It can end
behind it (a wide operand, a string instruction with a host address), and `bt` and its kin add a bit offset
of up to 256 MiB either way: the guards take all of that.

The kernel bounds a process's mappings (`vm.max_map_count`).  A mapping is a run of pages with consecutive
frames and equal rights; the kernel merges neighbours by itself, and the windows count as it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import islice
from pathlib import Path
from typing import Protocol

from vmm.bt.native import memory
from vmm.bt.native.memory import READ, WRITE
from vmm.memory.pool import PAGE_SHIFT, Pool

WINDOW_BYTES = 1 << 32
GUARD_BYTES = 512 << 20
PAGES = WINDOW_BYTES >> PAGE_SHIFT
#: mappings left to the rest of the process
_SPARE = 8192
_WRITABLE = 1


def host_mapping_limit() -> int:
    """How many mappings the host allows a process."""
    return int(Path("/proc/sys/vm/max_map_count").read_text())


def runs(pages: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Ascending page numbers as (first, count) of consecutive ones."""
    first = count = 0
    for page in pages:
        if page != first + count or not count:
            if count:
                yield first, count
            first, count = page, 0
        count += 1
    if count:
        yield first, count


class Spender(Protocol):
    """What takes of a budget: the windows here, and those of the emulated processor."""

    @property
    def pages(self) -> Sized: ...
    @property
    def mappings(self) -> int: ...

    def evict(self) -> None:
        """Unmap some pages."""


def _seam(before: int | None, entry: int | None) -> bool:
    """Whether two neighbouring pages are in different mappings: frames and rights do not go on."""
    return entry != (None if before is None else before + 2)


class MappingBudget:
    """The mappings all windows of a process may have together."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = host_mapping_limit() - _SPARE if limit is None else limit
        self.used = 0
        self.windows: list[Spender] = []

    def make_room(self) -> None:
        """Before a change: it splits at most one mapping in three.  The fullest window pays."""
        while self.used + 2 > self.limit:
            fullest = max(self.windows, key=lambda window: window.mappings)
            if not fullest.pages:
                raise OSError(f"{self.limit} mappings are not enough for {len(self.windows)} guest windows")
            fullest.evict()


class Window:
    """One guest address space, seen with one privilege.

    `evicted` is called with pages that were unmapped to stay within the budget.
    Invariant: `pages` says what the host has mapped: page number -> frame and writability, the page mapped
    longest first; `mappings` is the number of mappings the kernel needs for it.
    """

    def __init__(self, pool: Pool, budget: MappingBudget,
                 evicted: Callable[[list[int]], None] = lambda pages: None) -> None:
        self._pool = pool
        self._budget = budget
        self._evicted = evicted
        span = WINDOW_BYTES + 2 * GUARD_BYTES
        self._reserved_bytes = span + WINDOW_BYTES
        self._reserved = memory.reserve(self._reserved_bytes)
        #: a multiple of 4 GiB: the low half of a host address is the guest's
        self.base = -(-(self._reserved + GUARD_BYTES) // WINDOW_BYTES) * WINDOW_BYTES
        self.pages: dict[int, int] = {}
        self.mappings = 1
        budget.used += 1
        budget.windows.append(self)
        #: pages unmapped to make room
        self.evictions = 0

    def map(self, page: int, frame: int, count: int = 1, writable: bool = False) -> None:
        """Map `count` pages to consecutive frames, in place of what is there."""
        self._check(page, count)
        self._budget.make_room()
        memory.map_shared(self.base + (page << PAGE_SHIFT), count << PAGE_SHIFT,
                          READ | WRITE if writable else READ, self._pool.fd, frame << PAGE_SHIFT)
        entry = frame << 1 | writable
        if count == 1:
            self._note_one(page, entry)
        else:
            self._note(page, [entry + 2 * index for index in range(count)])

    def map_pages(self, page: int, frames: Iterable[int], writable: bool = False) -> None:
        """Map consecutive pages to `frames`; consecutive frames share a system call."""
        for first, count in runs(frames):
            self.map(page, first, count, writable)
            page += count

    def protect(self, page: int, count: int, writable: bool) -> None:
        """Change whether mapped pages may be written."""
        self._check(page, count)
        self._budget.make_room()
        for first, length in runs(p for p in range(page, page + count) if p in self.pages):
            memory.protect(self.base + (first << PAGE_SHIFT), length << PAGE_SHIFT,
                           READ | WRITE if writable else READ)
            self._note(first, [self.pages[p] & ~_WRITABLE | writable for p in range(first, first + length)])

    def unmap(self, page: int, count: int = 1) -> None:
        """Pages fault again."""
        self._check(page, count)
        memory.blank(self.base + (page << PAGE_SHIFT), count << PAGE_SHIFT)
        if count == 1:
            self._note_one(page, None)
        elif count > len(self.pages):
            for present in sorted(p for p in self.pages if page <= p < page + count):
                self._note(present, [None])
        else:
            self._note(page, [None] * count)

    def clear(self) -> None:
        """Nothing is mapped any more."""
        memory.blank(self.base, WINDOW_BYTES)
        self.pages.clear()
        self._budget.used -= self.mappings - 1
        self.mappings = 1

    def close(self) -> None:
        """Give the address space back."""
        memory.unmap(self._reserved, self._reserved_bytes)
        self._budget.used -= self.mappings
        self._budget.windows.remove(self)
        self.pages.clear()
        self.mappings = 0

    @staticmethod
    def _check(page: int, count: int) -> None:
        if page < 0 or count < 1 or page + count > PAGES:
            raise ValueError(f"pages {page:#x} to {page + count:#x} are not within 4 GiB")

    def _seams(self, first: int, last: int) -> int:
        """How many of the boundaries between pages first..last separate two mappings."""
        get = self.pages.get
        seams = 0
        before = get(first) if first >= 0 else None
        for page in range(first + 1, last + 1):
            entry = get(page)
            # a page continues a mapping with the next frame and the same right
            seams += entry != (None if before is None else before + 2)
            before = entry
        return seams

    def _note_one(self, page: int, entry: int | None) -> None:
        """`_note` of one page, which is most of all changes."""
        pages = self.pages
        old = pages.pop(page, None)
        before, behind = pages.get(page - 1), pages.get(page + 1)
        change = _seam(before, entry) - _seam(before, old) if page else 0
        if page < PAGES - 1:
            change += _seam(entry, behind) - _seam(old, behind)
        if entry is not None:
            pages[page] = entry
        self.mappings += change
        self._budget.used += change

    def _note(self, page: int, entries: list[int | None]) -> None:
        """Record what was mapped from `page` on, and count the mappings again around it."""
        last = min(page + len(entries), PAGES - 1)
        before = self._seams(max(page - 1, 0), last)
        pages = self.pages
        for index, entry in enumerate(entries, page):
            pages.pop(index, None)
            if entry is not None:
                pages[index] = entry
        change = self._seams(max(page - 1, 0), last) - before
        self.mappings += change
        self._budget.used += change

    def evict(self) -> None:
        """Unmap the older quarter of the pages."""
        victims = sorted(islice(self.pages, len(self.pages) // 4 + 1))
        for first, count in runs(victims):
            self.unmap(first, count)
        self.evictions += len(victims)
        self._evicted(victims)
