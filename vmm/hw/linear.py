# SPDX-License-Identifier: GPL-2.0-or-later
"""The running guest's linear memory as its monitor sees it: a short way for long mode, the general one else.

Event delivery reads four places of the guest (IDT, GDT, TSS, stack) and each needs a page walk.  The short
way only follows entries that are present, accessed and permitted; whatever else it meets, it hands to
`vmm.x86.paging`, which knows every mode, marks entries and raises the right fault.
"""

from __future__ import annotations

from vmm.memory.p2mbits import FRAME_MASK, PRESENT
from vmm.memory.p2mbits import WRITABLE as MAPPED_WRITABLE
from vmm.memory.physical import GuestMemory
from vmm.silicon import layout as at
from vmm.x86.flags import CR0_PG, CR4_SMAP, EFER_LMA
from vmm.x86.paging import ACCESSED, DIRTY, LARGE, READ, WRITABLE, WRITE, LinearMemory, Paging, translate

_ADDRESS = 0x000F_FFFF_FFFF_F000
_READ_NEEDS = PRESENT | ACCESSED
_WRITE_NEEDS = PRESENT | WRITABLE | ACCESSED
_CANONICAL_LOW = 1 << 47
_CANONICAL_HIGH = (1 << 64) - (1 << 47)


class Linear:
    """Supervisor accesses to the linear memory of the guest whose registers are in `q`."""

    def __init__(self, q: memoryview, memory: GuestMemory) -> None:
        self._q = q
        self.memory = memory
        self._leaf = memory.p2m.leaf
        self._pages = memory.p2m.pages
        self._pool = memory.p2m.pool.q
        self.view = memory.p2m.pool.view

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
        q = self._q
        if q[at.EFER] & EFER_LMA and not q[at.CR + 4] & CR4_SMAP and (
                address < _CANONICAL_LOW or address >= _CANONICAL_HIGH):
            leaf, pages, pool = self._leaf, self._pages, self._pool
            needs = _WRITE_NEEDS if write else _READ_NEEDS
            table = q[at.CR + 3] & _ADDRESS
            for shift in (39, 30, 21, 12):
                page = table >> 12
                if page >= pages:
                    break
                mapped = leaf[page]
                if not mapped & PRESENT:
                    break
                entry = pool[(mapped & FRAME_MASK) >> 3 | address >> shift & 511]
                if entry & needs != needs:
                    break
                if shift == 12 or entry & LARGE:
                    if shift == 39 or (write and not entry & DIRTY):
                        break
                    offset = (1 << shift) - 1
                    gpa = entry & _ADDRESS & ~offset | address & offset
                    page = gpa >> 12
                    if page >= pages:
                        break
                    mapped = leaf[page]
                    if mapped & PRESENT and (not write or mapped & MAPPED_WRITABLE):
                        return mapped & FRAME_MASK | gpa & 0xFFF
                    break
                table = entry & _ADDRESS
        if q[at.CR] & CR0_PG:
            gpa = translate(self.memory, self.paging(), address, WRITE if write else READ)
        else:
            gpa = address & 0xFFFF_FFFF
        if write:
            return self.memory.p2m.for_write(gpa, self.memory.frames)
        return self.memory.p2m.for_read(gpa)

    def read_quad(self, address: int) -> int:
        """Eight bytes at a linear address."""
        if address & 0xFFF > 0xFF8:
            return int.from_bytes(self.general().read(address, 8), "little")
        place = self.machine(address, False)
        return 0 if place < 0 else int.from_bytes(self.view[place:place + 8], "little")

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes at a linear address."""
        return self.general().read(address, size)


