# SPDX-License-Identifier: GPL-2.0-or-later
"""The smallest guest in 64-bit mode: no kernel, one program, and the tables the processor wants.

    0x1000  page tables: the first GiB to itself, the second to the local APIC, nothing beyond
    0x5000  GDT         0x6000  IDT: page faults only, anything else is a triple fault
    0x7000  the page-fault handler      0x7100  the target of SYSCALL
    0x8000  the program                 0xF000  the stack, downwards
    DATA    memory to work on, not executable: the silicon stores slowly to pages that are
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from hostd.bench import programs
from vmm.memory.pool import PAGE, PAGE_SHIFT
from vmm.state import RBX, RSI, RSP, CpuState, Segment, Table
from vmm.x86 import msr
from vmm.x86.flags import (
    CR0_ET,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
    RFLAGS_IOPL,
    RFLAGS_ONE,
)

MEMORY_BYTES = 32 << 20
DATA = 2 << 20
#: as many pages as there are from DATA on
DATA_PAGES = MEMORY_BYTES - DATA >> PAGE_SHIFT
#: a register of the local APIC (its identifier), and an address where nothing is mapped
DEVICE_REGISTER = (1 << 30) + 0x20
UNMAPPED = 1 << 31

_ROOT, _POINTERS, _LOW, _DEVICES, _GDT, _IDT = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000
_FAULT, _SYSTEM_CALL, CODE, _STACK = 0x7000, 0x7100, 0x8000, 0xF000
_LOCAL_APIC = 0xFEE0_0000

#: present, writable, for all rings; a 2 MiB page; not executable
_TABLE, _LARGE, _NO_EXECUTE = 0x07, 0x87, 1 << 63

# selectors in the order SYSCALL and SYSRET want: kernel code and data; 32-bit code (never loaded), data, code
_KERNEL_CODE, _KERNEL_DATA, _USER_BASE, _USER_DATA, _USER_CODE = 0x08, 0x10, 0x1B, 0x23, 0x2B
_FLAT_LIMIT = 0xFFFF_FFFF
_DESCRIPTORS = struct.pack(
    "<6Q", 0,
    0x00AF_9B00_0000_FFFF,   # 0x08  code, 64-bit, ring 0
    0x00CF_9300_0000_FFFF,   # 0x10  data, ring 0
    0,
    0x00CF_F300_0000_FFFF,   # 0x20  data, ring 3
    0x00AF_FB00_0000_FFFF,   # 0x28  code, 64-bit, ring 3
)
_INTERRUPT_GATE = 0x8E00
_PAGE_FAULT = 14


@dataclass(frozen=True)
class FlatGuest:
    """A program for a guest of its own: its registers RSI, RBX and R15, and the ring it runs in."""

    program: bytes
    rounds: int
    pointer: int = DATA
    count: int = 0
    ring: int = 0

    def writes(self, touched: int = 0) -> list[tuple[int, bytes]]:
        """What its memory holds at the start: something in the first `touched` pages of DATA, too."""
        large = [page << 21 | _LARGE | _NO_EXECUTE for page in range(MEMORY_BYTES >> 21)]
        large[0] &= ~_NO_EXECUTE
        gate = struct.pack("<HHHHQ", _FAULT, _KERNEL_CODE, _INTERRUPT_GATE, 0, 0)
        return [
            (_ROOT, struct.pack("<Q", _POINTERS | _TABLE)),
            (_POINTERS, struct.pack("<QQ", _LOW | _TABLE, _DEVICES | _TABLE)),
            (_LOW, struct.pack(f"<{len(large)}Q", *large)),
            (_DEVICES, struct.pack("<Q", _LOCAL_APIC | _LARGE | _NO_EXECUTE)),
            (_GDT, _DESCRIPTORS),
            (_IDT + 16 * _PAGE_FAULT, gate),
            (_FAULT, programs.SKIP_FAULT),
            (_SYSTEM_CALL, programs.SYSTEM_CALL),
            (CODE, self.program),
            *((DATA + page * PAGE, b"\1") for page in range(touched)),
        ]

    def cpu(self) -> CpuState:
        """The processor at the program's first instruction."""
        code, data = (_USER_CODE, _USER_DATA) if self.ring else (_KERNEL_CODE, _KERNEL_DATA)
        level = self.ring << 5
        registers = [0] * 16
        registers[RSI], registers[RBX], registers[RSP], registers[15] = (
            self.pointer, self.count, _STACK, self.rounds)

        def flat() -> Segment:
            return Segment(data, 0xC93 | level, _FLAT_LIMIT)

        return CpuState(
            gpr=registers, rip=CODE,
            # ring 3 may use ports, so that it can end
            rflags=RFLAGS_ONE | RFLAGS_IOPL,
            cs=Segment(code, 0xA9B | level, _FLAT_LIMIT),
            ss=flat(), ds=flat(), es=flat(), fs=flat(), gs=flat(),
            gdtr=Table(len(_DESCRIPTORS) - 1, _GDT), idtr=Table(16 * (_PAGE_FAULT + 1) - 1, _IDT),
            cr0=CR0_PE | CR0_ET | CR0_NE | CR0_PG, cr3=_ROOT, cr4=CR4_PAE,
            efer=EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE,
            msrs={msr.STAR: _USER_BASE << 48 | _KERNEL_CODE << 32, msr.LSTAR: _SYSTEM_CALL, msr.SFMASK: 0},
        )
