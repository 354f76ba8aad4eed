# SPDX-License-Identifier: GPL-2.0-or-later
"""The running guest's linear memory as its monitor sees it: remembered walks first, the general way else.

Event delivery reads three or four places of the guest (IDT, GDT, TSS, stack), and each needs a walk of the
guest's page tables.  A walk that needed nothing but entries that are present, accessed and permitted is
remembered with the entries it went through; it is taken again only while every one of them still reads
the same, so no stale translation is ever used.  Whatever else is met goes to `vmm.x86.paging`, which knows
every mode, marks entries and raises the right fault.
"""

from __future__ import annotations

from vmm.memory.p2mbits import FRAME_MASK
from vmm.memory.p2mbits import PRESENT as MAPPED
from vmm.memory.physical import GuestMemory
from vmm.silicon import layout as at
from vmm.x86.flags import CR0_PG, CR4_PAE, CR4_PSE, CR4_SMAP, EFER_LMA, MASK32
from vmm.x86.paging import (
    ACCESSED,
    DIRTY,
    LARGE,
    PRESENT,
    READ,
    WRITABLE,
    WRITE,
    LinearMemory,
    Paging,
    translate,
)

_ADDRESS = 0x000F_FFFF_FFFF_F000
_MOST_REMEMBERED = 256

#: a remembered walk: CR3, CR4, P2M version; index and value of four quadwords of the pool; the machine page
_Walk = tuple[int, int, int, int, int, int, int, int, int, int, int, int]


class Linear:
    """Supervisor accesses to the linear memory of the guest whose registers are in `q`."""

    def __init__(self, q: memoryview, memory: GuestMemory) -> None:
        self._q = q
        self.memory = memory
        self._p2m = memory.p2m
        self._leaf = memory.p2m.leaf
        self._pages = memory.p2m.pages
        self._pool = memory.p2m.pool.q
        self.view = memory.p2m.pool.view
        self._walks: dict[int, _Walk] = {}

    def paging(self) -> Paging:
        """The guest's paging registers now."""
        q = self._q
        return Paging(q[at.CR], q[at.CR + 3], q[at.CR + 4], q[at.EFER])

    def general(self) -> LinearMemory:
        """Access of any length in any mode."""
        return LinearMemory(self.memory, self.paging())

    def machine(self, address: int, write: bool) -> int:
        """Machine address of one byte, or -1 where it is an absent page that is only read.

        Raises GuestFault, BadAddress, OutOfFrames.
        """
        q, pool = self._q, self._pool
        walk = self._walks.get(address >> 12 << 1 | write)
        if (walk is not None and q[at.CR] & CR0_PG and walk[0] == q[at.CR + 3] and walk[1] == q[at.CR + 4]
                and walk[2] == self._p2m.version and pool[walk[3]] == walk[4] and pool[walk[5]] == walk[6]
                and pool[walk[7]] == walk[8] and pool[walk[9]] == walk[10]):
            return walk[11] | address & 0xFFF
        return self._walk(address, write)

    def _walk(self, address: int, write: bool) -> int:
        q = self._q
        if not q[at.CR] & CR0_PG:
            gpa = address & MASK32
        else:
            gpa = translate(self.memory, self.paging(), address, WRITE if write else READ)
        if not write:
            place = self._p2m.for_read(gpa, self.memory.frames)
        else:
            place = self._p2m.for_write(gpa, self.memory.frames)
        if place >= 0 and q[at.CR] & CR0_PG and not q[at.CR + 4] & CR4_SMAP:
            self._remember(address, write, place & ~0xFFF)
        return place

    def _remember(self, address: int, write: bool, page: int) -> None:
        """Note the entries the walk of `address`, which has just succeeded, went through."""
        q = self._q
        cr4 = q[at.CR + 4]
        if q[at.EFER] & EFER_LMA:
            entries = self._wide(q[at.CR + 3] & _ADDRESS, address, (39, 30, 21, 12), write)
        elif cr4 & CR4_PAE:
            pointer = self._entry((q[at.CR + 3] & 0xFFFF_FFE0) + (address >> 30 & 3) * 8)
            if pointer is None:
                return
            entries = self._wide(pointer[1] & _ADDRESS, address, (21, 12), write)
            entries = [pointer, *entries] if entries else []
        else:
            entries = self._narrow(q[at.CR + 3] & 0xFFFF_F000, address, bool(cr4 & CR4_PSE), write)
        if not entries:
            return
        entries += [entries[-1]] * (4 - len(entries))
        (a, b), (c, d), (e, f), (g, h) = entries
        if len(self._walks) >= _MOST_REMEMBERED:
            self._walks.clear()
        self._walks[address >> 12 << 1 | write] = (
            q[at.CR + 3], cr4, self._p2m.version, a, b, c, d, e, f, g, h, page)

    def _entry(self, gpa: int) -> tuple[int, int] | None:
        """(pool index, value) of the quadword at a guest-physical address, if it is mapped RAM."""
        page = gpa >> 12
        if page >= self._pages:
            return None
        mapped = self._leaf[page]
        if not mapped & MAPPED:
            return None
        index = (mapped & FRAME_MASK | gpa & 0xFFF) >> 3
        return index, self._pool[index]

    def _wide(self, table: int, address: int, shifts: tuple[int, ...], write: bool) -> list[tuple[int, int]]:
        """The path through 8-byte entries; empty where one is not plainly usable."""
        needs = PRESENT | ACCESSED | (WRITABLE if write else 0)
        path = []
        for shift in shifts:
            found = self._entry(table + (address >> shift & 511) * 8)
            if found is None or found[1] & needs != needs:
                return []
            path.append(found)
            if shift == 12 or found[1] & LARGE:
                return path if not write or found[1] & DIRTY else []
            table = found[1] & _ADDRESS
        return []

    def _narrow(self, table: int, address: int, pse: bool, write: bool) -> list[tuple[int, int]]:
        """The path through 4-byte entries, each remembered by the quadword it lies in."""
        needs = PRESENT | ACCESSED | (WRITABLE if write else 0)
        path = []
        for shift in (22, 12):
            gpa = table + (address >> shift & 1023) * 4
            found = self._entry(gpa & ~7)
            if found is None:
                return []
            entry = found[1] >> (gpa & 4) * 8 & MASK32
            if entry & needs != needs:
                return []
            path.append(found)
            if shift == 12 or (entry & LARGE and pse):
                return path if not write or entry & DIRTY else []
            table = entry & 0xFFFF_F000
        return []

    def read_quad(self, address: int) -> int:
        """Eight bytes at a linear address."""
        if address & 7:
            if address & 0xFFF > 0xFF8:
                return int.from_bytes(self.general().read(address, 8), "little")
            place = self.machine(address, False)
            return 0 if place < 0 else int.from_bytes(self.view[place:place + 8], "little")
        place = self.machine(address, False)
        return 0 if place < 0 else self._pool[place >> 3]

    def read_pair(self, address: int) -> tuple[int, int]:
        """Sixteen bytes at a linear address, as two quadwords."""
        if address & 15:
            return self.read_quad(address), self.read_quad(address + 8)
        place = self.machine(address, False)
        if place < 0:
            return 0, 0
        return self._pool[place >> 3], self._pool[(place >> 3) + 1]

    def write(self, address: int, data: bytes) -> None:
        """Store `data`, in one page or more; a fault leaves all of it unwritten."""
        if address & 0xFFF <= 0x1000 - len(data):
            place = self.machine(address, True)
            self.view[place:place + len(data)] = data
        else:
            self.general().write(address, data)

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes at a linear address."""
        return self.general().read(address, size)
