# SPDX-License-Identifier: GPL-2.0-or-later
"""The processor as a boot loader hands it over: complete and legal CPU states for the three ways in.

The flat modes use the selectors of the Linux boot protocol (CS 0x10, DS 0x18), which Multiboot allows too.
"""

from __future__ import annotations

import struct

from vmm.boot.layout import Layout
from vmm.state import RAX, RBX, RDX, RSI, RSP, CpuState, Segment, Table
from vmm.x86.flags import CR0_ET, CR0_NE, CR0_PE, CR0_PG, CR4_PAE, EFER_LMA, EFER_LME

_CODE, _DATA, _TASK = 0x10, 0x18, 0x20
_FLAT_LIMIT = 0xFFFFFFFF
_TSS_BYTES = 0x68

#: segment attributes in the VMCB's form (vmm.state.Segment)
_CODE_32 = 0xC9B  # G, D, present, ring 0, execute/read, accessed
_CODE_64 = 0xA9B  # the same with L instead of D
_FLAT_DATA = 0xC93  # G, B, present, ring 0, read/write, accessed
_BUSY_TSS = 0x08B

#: present, writable; and a 2 MiB page
_PAGE_TABLE = 0x03
_PAGE_LARGE = 0x83


def _descriptor(segment: Segment) -> bytes:
    """The eight bytes in a GDT that load as `segment` (APM vol. 2, figure 4-13)."""
    attributes = segment.attributes
    limit = segment.limit >> 12 if attributes & 0x800 else segment.limit
    return struct.pack("<HHBBBB", limit & 0xFFFF, segment.base & 0xFFFF, segment.base >> 16 & 0xFF,
                       attributes & 0xFF, (attributes >> 8 << 4 | limit >> 16) & 0xFF, segment.base >> 24)


def _flat(layout: Layout, code_attributes: int) -> CpuState:
    """Flat segments from a GDT in low memory, a task register that no task switch needs, no IDT."""
    task_base = layout.reserve_low(_TSS_BYTES, "the task state segment")
    task = Segment(_TASK, _BUSY_TSS, _TSS_BYTES - 1, task_base)
    code = Segment(_CODE, code_attributes, _FLAT_LIMIT)
    data = Segment(_DATA, _FLAT_DATA, _FLAT_LIMIT)
    # The task's upper half in a 64-bit GDT is the zero entry after it: its base is below 4 GiB.
    gdt = bytes(_CODE) + _descriptor(code) + _descriptor(data) + _descriptor(task) + bytes(8)
    gdt_base = layout.place_low(gdt, "the descriptor table")
    return CpuState(
        gpr=[0] * 16, cr0=CR0_PE | CR0_ET | CR0_NE,
        cs=code, ss=_copy(data), ds=_copy(data), es=_copy(data), fs=_copy(data), gs=_copy(data), tr=task,
        gdtr=Table(len(gdt) - 1, gdt_base), idtr=Table(0, 0),
    )


def _copy(segment: Segment) -> Segment:
    return Segment(segment.selector, segment.attributes, segment.limit, segment.base)


def _identity_map(layout: Layout) -> int:
    """4-level page tables that map all of the machine's memory to itself in 2 MiB pages; their root."""
    gigabytes = -(-layout.memory_bytes >> 30)
    large_pages = [frame << 21 | _PAGE_LARGE for frame in range(512 * gigabytes)]
    directories = _place_table(layout, large_pages)
    pointers = _place_table(layout, [directories + 4096 * i | _PAGE_TABLE for i in range(gigabytes)])
    return _place_table(layout, [pointers | _PAGE_TABLE])


def _place_table(layout: Layout, entries: list[int]) -> int:
    """A page table, or several in a row, of which the last may be partly empty."""
    table = struct.pack(f"<{len(entries)}Q", *entries)
    return layout.place_low(table.ljust(-(-len(table) // 4096) * 4096, b"\0"), "the page tables", align=4096)


def multiboot(layout: Layout, rip: int, info: int) -> CpuState:
    """Multiboot 1, section 3.2: flat 32-bit, no paging, EAX the magic, EBX the information structure."""
    cpu = _flat(layout, _CODE_32)
    cpu.rip = rip
    cpu.gpr[RAX], cpu.gpr[RBX] = 0x2BADB002, info
    return cpu


def linux_32(layout: Layout, rip: int, zero_page: int) -> CpuState:
    """Linux boot protocol, "32-bit Boot Protocol": flat, no paging, ESI the zero page, EBP EDI EBX zero."""
    cpu = _flat(layout, _CODE_32)
    cpu.rip = rip
    cpu.gpr[RSI] = zero_page
    return cpu


def linux_64(layout: Layout, rip: int, zero_page: int) -> CpuState:
    """Linux boot protocol, "64-bit Boot Protocol": long mode on an identity map, RSI the zero page."""
    cpu = _flat(layout, _CODE_64)
    cpu.cr3 = _identity_map(layout)
    cpu.cr4 = CR4_PAE
    cpu.efer = EFER_LME | EFER_LMA
    cpu.cr0 |= CR0_PG
    cpu.rip = rip
    cpu.gpr[RSI] = zero_page
    return cpu


def boot_sector(address: int, drive: int) -> CpuState:
    """As a BIOS enters a boot sector: real mode, CS:IP 0:address, the stack below it, DL the boot drive."""
    cpu = CpuState(gpr=[0] * 16, cr0=CR0_ET, rip=address, cs=Segment(0, 0x09B), idtr=Table(0x3FF, 0))
    cpu.gpr[RSP], cpu.gpr[RDX] = address, drive
    return cpu
