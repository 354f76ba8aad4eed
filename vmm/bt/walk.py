# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's page tables as the shadow needs them: where a page is, and what may be mapped of it.

32-bit and PAE paging, read straight from the pool.  A walk that finds anything but present, permitted entries
goes to `vmm.x86.paging`, which raises the right #PF, and otherwise comes back with the entries in order.

Accessed and dirty bits are set here without setting off the traces on page tables: they change nothing that a
shadow depends on.
"""

from __future__ import annotations

from typing import NamedTuple

from vmm.memory.p2mbits import FRAME_MASK, KIND_MASK, KIND_SHIFT, LOGGED, Kind
from vmm.memory.p2mbits import PRESENT as MAPPED
from vmm.memory.physical import GuestMemory
from vmm.silicon import layout as at
from vmm.x86.flags import CR0_PG, CR0_WP, CR4_PAE, CR4_PGE, CR4_PSE, CR4_SMAP, MASK32
from vmm.x86.paging import (
    ACCESSED,
    DIRTY,
    LARGE,
    PRESENT,
    USER,
    WRITABLE,
    Access,
    Paging,
    translate,
)

_GLOBAL = 1 << 8
_ADDRESS = 0x000F_FFFF_FFFF_F000
_PRIVATE = Kind.PRIVATE << KIND_SHIFT


class Table(NamedTuple):
    """A page of page-table entries that a walk went through."""

    #: guest-physical page
    page: int
    #: linear page its first entry is about, linear pages an entry is about, bytes of an entry
    first: int
    span: int
    size: int


class Place(NamedTuple):
    """Where a linear page is."""

    #: guest-physical page
    page: int
    #: the guest's page tables let it be written, and know that it is (dirty)
    writable: bool
    #: stays over a change of CR3
    everywhere: bool
    #: linear pages mapped by the same entry, a power of two
    span: int
    tables: tuple[Table, ...]


class Walker:
    """Walks the page tables of the guest whose registers are in `q`."""

    def __init__(self, q: memoryview, memory: GuestMemory) -> None:
        self._q = q
        self._memory = memory
        self._p2m = memory.p2m
        self._leaf = memory.p2m.leaf
        self._pages = memory.p2m.pages
        self._pool_q = memory.p2m.pool.q
        self._pool_d = memory.p2m.pool.view.cast("I")

    def find(self, address: int, write: bool, user: bool) -> Place:
        """Where `address` is for an access; A and D are set.  Raises GuestFault, OutOfFrames."""
        q = self._q
        cr4 = q[at.CR + 4]
        if not q[at.CR] & CR0_PG:
            return Place(address >> 12, True, True, 1 << 20, ())
        if not cr4 & CR4_SMAP:
            found = self._path(address, write, user)
            if found is not None:
                return found
        self.check(address, Access(write, user))
        found = self._path(address, write, user)
        if found is not None:
            return found
        # through tables outside RAM, or beyond the addresses of RAM: nothing to be mapped for good
        gpa = translate(self._memory, self._paging(), address, Access(write, user))
        return Place(gpa >> 12, False, False, 1, ())

    def check(self, address: int, access: Access) -> int:
        """The guest-physical address of an access, or its #PF.  Raises GuestFault, OutOfFrames."""
        return translate(self._memory, self._paging(), address, access)

    def _paging(self) -> Paging:
        q = self._q
        return Paging(q[at.CR], q[at.CR + 3], q[at.CR + 4], q[at.EFER])

    def _path(self, address: int, write: bool, user: bool) -> Place | None:
        q = self._q
        cr4 = q[at.CR + 4]
        if cr4 & CR4_PAE:
            return self._wide(address, write, user, cr4)
        return self._narrow(address, write, user, cr4)

    def _place(self, gpa: int) -> int:
        """Index of the byte at a guest-physical address in the pool; -1 where no frame is."""
        page = gpa >> 12
        if page >= self._pages:
            return -1
        entry = self._leaf[page]
        return entry & FRAME_MASK | gpa & 0xFFF if entry & MAPPED else -1

    def _narrow(self, address: int, write: bool, user: bool, cr4: int) -> Place | None:
        pool = self._pool_d
        directory = self._q[at.CR + 3] & 0xFFFF_F000
        upper = self._place(directory + (address >> 22) * 4)
        if upper < 0:
            return None
        pde = pool[upper >> 2]
        if not pde & PRESENT:
            return None
        first = Table(directory >> 12, 0, 1024, 4)
        if pde & LARGE and cr4 & CR4_PSE:
            if pde & 0x3FE000:
                return None
            page = pde >> 12 & 0xFFC00 | address >> 12 & 0x3FF
            return self._finish(page, pde, pde, upper, upper, False, write, user, 1024, (first,), cr4)
        table = pde & 0xFFFF_F000
        lower = self._place(table + (address >> 12 & 0x3FF) * 4)
        if lower < 0:
            return None
        pte = pool[lower >> 2]
        if not pte & PRESENT:
            return None
        tables = (first, Table(table >> 12, address >> 12 & ~0x3FF, 1, 4))
        return self._finish(pte >> 12, pde & pte, pte, upper, lower, False, write, user, 1, tables, cr4)

    def _wide(self, address: int, write: bool, user: bool, cr4: int) -> Place | None:
        pool = self._pool_q
        pointers = self._q[at.CR + 3] & 0xFFFF_FFE0
        place = self._place(pointers + (address >> 30) * 8)
        if place < 0 or not pool[place >> 3] & PRESENT:
            return None
        directory = pool[place >> 3] & _ADDRESS
        upper = self._place(directory + (address >> 21 & 0x1FF) * 8)
        if upper < 0:
            return None
        pde = pool[upper >> 3]
        if not pde & PRESENT:
            return None
        first = (Table(pointers >> 12, 0, 0, 8),
                 Table(directory >> 12, address >> 12 & ~0x3FFFF, 512, 8))
        if pde & LARGE:
            page = (pde & _ADDRESS) >> 12 & ~0x1FF | address >> 12 & 0x1FF
            return self._finish(page, pde, pde, upper, upper, True, write, user, 512, first, cr4)
        table = pde & _ADDRESS
        lower = self._place(table + (address >> 12 & 0x1FF) * 8)
        if lower < 0:
            return None
        pte = pool[lower >> 3]
        if not pte & PRESENT:
            return None
        tables = (*first, Table(table >> 12, address >> 12 & ~0x1FF, 1, 8))
        return self._finish((pte & _ADDRESS) >> 12, pde & pte, pte, upper, lower, True, write, user, 1,
                            tables, cr4)

    def _finish(self, page: int, rights: int, leaf: int, upper: int, lower: int, wide: bool, write: bool,
                user: bool, span: int, tables: tuple[Table, ...], cr4: int) -> Place | None:
        """Check the rights of a path through present entries, and mark it used; None if it faults."""
        if user and not rights & USER:
            return None
        writable = bool(rights & WRITABLE) or not (user or self._q[at.CR] & CR0_WP)
        if write and not writable:
            return None
        marks = ACCESSED | DIRTY if write else ACCESSED
        if upper != lower:
            entry = self._pool_q[upper >> 3] if wide else self._pool_d[upper >> 2]
            if not entry & ACCESSED and not self._mark(tables[-2], upper, entry | ACCESSED, wide):
                return None
        if marks & ~leaf and not self._mark(tables[-1], lower, leaf | marks, wide):
            return None
        dirty = write or leaf & DIRTY
        return Place(page, writable and bool(dirty), bool(leaf & _GLOBAL and cr4 & CR4_PGE), span, tables)

    def _mark(self, table: Table, place: int, entry: int, wide: bool) -> bool:
        """Set bits of an entry; False where that takes more than writing it (a shared frame)."""
        mapped = self._leaf[table.page]
        if mapped & KIND_MASK != _PRIVATE:
            return False
        if self._p2m.logging:
            self._leaf[table.page] = mapped | LOGGED
        if wide:
            self._pool_q[place >> 3] = entry
        else:
            self._pool_d[place >> 2] = entry & MASK32
        return True
