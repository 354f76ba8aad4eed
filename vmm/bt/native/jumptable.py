# SPDX-License-Identifier: GPL-2.0-or-later
"""The jump table: the host address for every guest linear address, 8 bytes each, 32 GiB of address space.

Translated code jumps through it with a single `jmp [r15 + r8*8]`.  Where nothing was ever entered it reads
as zero from the host's zero page, and a jump to address zero is what the fault handler knows as a miss.
An entry costs the page it is in: 4 KiB for the 512 guest addresses around it, which `limit` bounds.
"""

from __future__ import annotations

from vmm.bt.codepage import TAIL_BYTES
from vmm.bt.native import memory
from vmm.bt.native.memory import PAGE
from vmm.memory.pool import PAGE_SHIFT

TABLE_BYTES = 8 << 32
#: guest addresses whose entries share a page
PER_PAGE = PAGE // 8
_PAGE_SHIFT = 9
_NO_ENTRIES = memoryview(bytes(PAGE)).cast("Q")


class JumpTable:
    """One table; a guest has one for each view of its linear memory that is live.

    Invariant: an entry outside the pages of `_pages` is zero.
    """

    def __init__(self, limit: int = 1024) -> None:
        if limit < 1:
            raise ValueError("a jump table needs at least one page")
        self.limit = limit
        self.base = memory.reserve(TABLE_BYTES, memory.READ | memory.WRITE)
        # a huge page for one entry would cost 2 MiB
        memory.advise(self.base, TABLE_BYTES, memory.MADV_NOHUGEPAGE)
        self._entries = memory.view(self.base, TABLE_BYTES).cast("Q")
        self._pages: set[int] = set()
        #: how often the whole table was emptied because it had grown to its limit
        self.flushes = 0

    @property
    def resident_bytes(self) -> int:
        """Host memory the table occupies."""
        return len(self._pages) * PAGE

    def set(self, guest: int, host: int) -> None:
        """From now on a jump to `guest` goes to `host`.  At the limit everything else is forgotten."""
        page = guest >> _PAGE_SHIFT
        if page not in self._pages:
            if len(self._pages) >= self.limit:
                self.clear()
                self.flushes += 1
            self._pages.add(page)
        self._entries[guest] = host

    def get(self, guest: int) -> int:
        """Where a jump to `guest` goes; 0 when it misses."""
        return self._entries[guest] if guest >> _PAGE_SHIFT in self._pages else 0

    def drop(self, guest: int) -> None:
        """A jump to `guest` misses from now on."""
        if guest >> _PAGE_SHIFT in self._pages:
            self._entries[guest] = 0

    def drop_page(self, number: int) -> None:
        """Jumps into a page of guest code miss from now on, and those to what ends in it."""
        first = number << PAGE_SHIFT
        for page in range(first >> _PAGE_SHIFT, (first + PAGE) >> _PAGE_SHIFT):
            if page in self._pages:
                self._entries[page << _PAGE_SHIFT:(page + 1) << _PAGE_SHIFT] = _NO_ENTRIES
        before = max(first - TAIL_BYTES, 0)
        if first and before >> _PAGE_SHIFT in self._pages:
            self._entries[before:first] = _NO_ENTRIES[:first - before]

    def clear(self) -> None:
        """Every jump misses from now on."""
        if self._pages:
            memory.advise(self.base, TABLE_BYTES, memory.MADV_DONTNEED)
            self._pages.clear()

    def close(self) -> None:
        """Give the address space back."""
        self._entries = memoryview(b"").cast("Q")
        memory.unmap(self.base, TABLE_BYTES)
