# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's own page tables, walked in software (APM vol. 2, chapter 5).

For what the monitor does in the guest's stead: delivering an event through its IDT, reading its TSS or an
instruction.  Every paging mode is there: none, 32-bit with 4 MiB pages and PSE36, PAE, and 4-level long
mode with NX, SMEP and SMAP.  A walk that succeeds sets accessed and dirty bits as the processor does;
one that fails raises the #PF the processor would and changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vmm.memory.errors import BadAddress
from vmm.x86 import faults
from vmm.x86.faults import GeneralProtection, GuestFault, Vector
from vmm.x86.flags import (
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_NXE,
    MASK32,
    MASK64,
    PHYSICAL_BITS,
    is_canonical,
)

if TYPE_CHECKING:
    from vmm.memory.physical import PhysicalMemory

PAGE = 4096

# bits of page-table entries (APM vol. 2, 5.4.1)
PRESENT = 1 << 0
WRITABLE = 1 << 1
USER = 1 << 2
ACCESSED = 1 << 5
DIRTY = 1 << 6
LARGE = 1 << 7
NO_EXECUTE = 1 << 63

_TABLE = (1 << 52) - PAGE  # address bits of a 64-bit entry
_BEYOND = (1 << 52) - (1 << PHYSICAL_BITS)  # those past the physical address space: must be zero
_PAE_HIGH = 0x7FF << 52  # bits 62:52, which PAE entries outside long mode do not have
_PDPTE_RESERVED = 0x1E6 | NO_EXECUTE  # bits 2:1 and 8:5 of a PAE directory pointer, and NX


class Paging(NamedTuple):
    """The registers that decide how an address is translated."""

    cr0: int = 0
    cr3: int = 0
    cr4: int = 0
    efer: int = 0


class Access(NamedTuple):
    """What is done at the address, and with which rights."""

    write: bool = False
    #: by code of CPL 3; accesses to descriptor tables and TSSs are never
    user: bool = False
    fetch: bool = False
    #: SMAP is lifted: RFLAGS.AC is set and the access is an explicit one
    ac: bool = False


READ = Access()
WRITE = Access(write=True)

#: an entry on the path: address, value, whether it is 8 bytes long
_Path = list[tuple[int, int, bool]]


def translate(memory: PhysicalMemory, paging: Paging, address: int, access: Access = READ) -> int:
    """The guest-physical address behind a linear one.

    Raises #PF as GuestFault, and #GP for an address that is not canonical in long mode.
    """
    if not paging.cr0 & CR0_PG:
        return address & MASK32
    if paging.efer & EFER_LMA:
        if not is_canonical(address):
            raise GeneralProtection
        found = _quick(memory, paging, address, access)
        if found is not None:
            return found
    else:
        address &= MASK32
    walk = _Walk(memory, paging, address, access)
    return walk.wide() if paging.cr4 & CR4_PAE else walk.narrow()


def _quick(memory: PhysicalMemory, paging: Paging, address: int, access: Access) -> int | None:
    """The commonest walk at half the time: long mode, data in a marked supervisor or user page of 4 KiB
    or 2 MiB, allowed without regard to WP, SMEP and SMAP.  None for everything else.
    """
    read = memory.read_u64
    try:
        entry = every = some = read(paging.cr3 & _TABLE | address >> 36 & 0xFF8)
        for shift in (27, 18, 9):
            if entry & (PRESENT | LARGE) != PRESENT:
                break
            entry = read(entry & _TABLE | address >> shift & 0xFF8)
            every &= entry
            some |= entry
        else:
            shift = 0
    except BadAddress:
        return None
    if shift == 0:
        offset = 0xFFF
    elif shift == 9 and not entry & 0x1FE000:
        offset = 0x1FFFFF
    else:
        return None
    needed = PRESENT | ACCESSED
    if access.write:
        if not entry & DIRTY:
            return None
        needed |= WRITABLE
    if access.user:
        needed |= USER
    elif every & USER:
        return None
    if (every & needed != needed or some & _BEYOND or access.fetch
            or (some & NO_EXECUTE and not paging.efer & EFER_NXE)):
        return None
    return entry & _TABLE & ~offset | address & offset


class _Walk:
    """One walk: the entries it came through, and the rights they leave."""

    def __init__(self, memory: PhysicalMemory, paging: Paging, address: int, access: Access) -> None:
        self.memory = memory
        self.paging = paging
        self.address = address
        self.access = access
        self.path: _Path = []
        self.rights = WRITABLE | USER
        self.no_execute = 0

    def fault(self, cause: int) -> GuestFault:
        """The #PF with everything its error code tells beside `cause`."""
        access, paging = self.access, self.paging
        code = cause
        if access.write:
            code |= faults.PF_WRITE
        if access.user:
            code |= faults.PF_USER
        no_execute_on = paging.efer & EFER_NXE and paging.cr4 & CR4_PAE
        if access.fetch and (no_execute_on or paging.cr4 & CR4_SMEP):
            code |= faults.PF_FETCH
        return GuestFault(Vector.PF, code, self.address)

    def reserved(self) -> GuestFault:
        return self.fault(faults.PF_PRESENT | faults.PF_RESERVED)

    def narrow(self) -> int:
        """32-bit paging: two levels of 4-byte entries, 4 MiB pages with 40-bit addresses (PSE36)."""
        entry = self.read32((self.paging.cr3 & 0xFFFFF000) + (self.address >> 22) * 4)
        if entry & LARGE and self.paging.cr4 & CR4_PSE:
            if entry & 1 << 21:
                raise self.reserved()
            frame = entry & 0xFFC00000 | (entry >> 13 & 0xFF) << 32
            return self.finish(frame, 0x3FFFFF)
        entry = self.read32((entry & 0xFFFFF000) + (self.address >> 12 & 0x3FF) * 4)
        return self.finish(entry & 0xFFFFF000, 0xFFF)

    def wide(self) -> int:
        """PAE and long mode: 8-byte entries, 2 MiB pages.

        Long mode takes 1 GiB pages too: the silicon does, though CPUID does not offer them.
        """
        must_be_zero = _BEYOND if self.paging.efer & EFER_NXE else _BEYOND | NO_EXECUTE
        if self.paging.efer & EFER_LMA:
            table, shift = self.paging.cr3 & _TABLE, 39
        else:
            must_be_zero |= _PAE_HIGH
            table, shift = self.directory_pointer(), 21
        while True:
            entry = self.read64((table & _TABLE) + (self.address >> shift & 0x1FF) * 8, must_be_zero)
            last = shift == 12
            if entry & LARGE and not last:
                # a PML4 entry has no page size; a large page has no address bits below its size but PAT
                if shift == 39 or entry & (1 << shift) - (1 << 13):
                    raise self.reserved()
                last = True
            if last:
                offset = (1 << shift) - 1
                return self.finish(entry & _TABLE & ~offset, offset)
            table = entry
            shift -= 9

    def directory_pointer(self) -> int:
        """The PAE directory-pointer entry: it has neither rights nor an accessed bit."""
        at = (self.paging.cr3 & 0xFFFFFFE0) + (self.address >> 30) * 8
        entry = _read(self.memory, at, 8)
        if not entry & PRESENT:
            raise self.fault(0)
        if entry & (_PDPTE_RESERVED | _PAE_HIGH | _BEYOND):
            raise self.reserved()
        return entry

    def read32(self, at: int) -> int:
        entry = _read(self.memory, at, 4)
        if not entry & PRESENT:
            raise self.fault(0)
        self.rights &= entry
        self.path.append((at, entry, False))
        return entry

    def read64(self, at: int, must_be_zero: int) -> int:
        entry = _read(self.memory, at, 8)
        if not entry & PRESENT:
            raise self.fault(0)
        if entry & must_be_zero:
            raise self.reserved()
        self.rights &= entry
        self.no_execute |= entry & NO_EXECUTE
        self.path.append((at, entry, True))
        return entry

    def finish(self, frame: int, offset: int) -> int:
        """Check the rights of the whole path, mark it used, and give the address."""
        if not self.allowed():
            raise self.fault(faults.PF_PRESENT)
        leaf = len(self.path) - 1
        for level, (at, entry, wide) in enumerate(self.path):
            marks = ACCESSED | DIRTY if level == leaf and self.access.write else ACCESSED
            if marks & ~entry:
                _mark(self.memory, at, entry | marks, wide)
        return frame | self.address & offset

    def allowed(self) -> bool:
        """APM vol. 2, 5.6."""
        access, cr4 = self.access, self.paging.cr4
        if access.user:
            if not self.rights & USER:
                return False
            writable = self.rights & WRITABLE
        else:
            if self.rights & USER:
                if access.fetch:
                    if cr4 & CR4_SMEP:
                        return False
                elif cr4 & CR4_SMAP and not access.ac:
                    return False
            writable = self.rights & WRITABLE or not self.paging.cr0 & CR0_WP
        if access.write and not writable:
            return False
        return not (access.fetch and self.no_execute)


def _read(memory: PhysicalMemory, at: int, size: int) -> int:
    """An entry; where there is no memory, a bus nobody drives reads as ones."""
    try:
        return memory.read_u64(at) if size == 8 else memory.read_u32(at)
    except BadAddress:
        return (1 << 8 * size) - 1


def _mark(memory: PhysicalMemory, at: int, entry: int, wide: bool) -> None:
    try:
        if wide:
            memory.write_u64(at, entry)
        else:
            memory.write_u32(at, entry)
    except BadAddress:
        return


class LinearMemory:
    """The guest's memory by linear addresses, at one moment of its registers.

    Addresses wrap at 32 bits outside long mode, at 64 bits in it.
    """

    def __init__(self, memory: PhysicalMemory, paging: Paging) -> None:
        self.memory = memory
        self.paging = paging
        self._mask = MASK64 if paging.efer & EFER_LMA else MASK32

    def read(self, address: int, size: int, access: Access = READ) -> bytes:
        """`size` bytes, or the fault the first unreadable one gives.  BadAddress where there is no RAM."""
        if (address & PAGE - 1) + size <= PAGE:
            return self.memory.read(translate(self.memory, self.paging, address & self._mask, access), size)
        return b"".join(self.memory.read(gpa, n) for gpa, n in self._pieces(address, size, access))

    def write(self, address: int, data: bytes, access: Access = WRITE) -> None:
        """Store `data`; a fault leaves all of it unwritten."""
        if (address & PAGE - 1) + len(data) <= PAGE:
            self.memory.write(translate(self.memory, self.paging, address & self._mask, access), data)
            return
        done = 0
        for gpa, n in self._pieces(address, len(data), access):
            self.memory.write(gpa, data[done:done + n])
            done += n

    def _pieces(self, address: int, size: int, access: Access) -> list[tuple[int, int]]:
        """(guest-physical address, length) for each page the bytes lie on."""
        pieces = []
        while size > 0:
            address &= self._mask
            n = min(size, PAGE - (address & PAGE - 1))
            pieces.append((translate(self.memory, self.paging, address, access), n))
            address += n
            size -= n
        return pieces
