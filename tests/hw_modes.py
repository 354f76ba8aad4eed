# SPDX-License-Identifier: GPL-2.0-or-later
"""Machines in every mode of the processor, with tables and handlers laid out the same way in all of them.

The handler of each vector is a HLT of its own with interrupts off: a machine that took an event stands
halted there, its registers still on the CPU.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from vmm.state import CpuState, MachineState, Segment, Table
from vmm.x86 import descriptors as ds
from vmm.x86.flags import (
    CR0_ET,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR4_OSFXSR,
    CR4_PAE,
    CR4_PSE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
    RFLAGS_VM,
)

MEMORY = 4 << 20
CODE, GDT, IDT, TSS, LDT, HANDLERS = 0x1000, 0x2000, 0x3000, 0x4000, 0x7000, 0x8000
INNER_STACK, STACK, IST_STACK = 0xB000, 0xD000, 0xF000
TABLES = 0x10000
#: where there is a page table entry of its own for every page (TABLES + 0x3000), and nothing else
WINDOW = 0x20_0000
PAGES = TABLES + 0x3000

# selectors
CODE32, DATA, UCODE32, UDATA, CODE64, UCODE64, TASK = 0x08, 0x10, 0x1B, 0x23, 0x28, 0x33, 0x38
CODE16, DATA16, CONFORMING, ABSENT, CODE_1, DATA_1 = 0x48, 0x50, 0x58, 0x60, 0x69, 0x71
BEYOND = 0x7F8

_RW, _RX, _DPL3 = 0x93, 0x9B, 0x60
FLAT = ds.GRANULAR | ds.BIG

SEGMENTS: dict[int, Segment] = {
    CODE32: Segment(CODE32, _RX | FLAT, 0xFFFFFFFF),
    DATA: Segment(DATA, _RW | FLAT, 0xFFFFFFFF),
    UCODE32: Segment(UCODE32, _RX | _DPL3 | FLAT, 0xFFFFFFFF),
    UDATA: Segment(UDATA, _RW | _DPL3 | FLAT, 0xFFFFFFFF),
    CODE64: Segment(CODE64, _RX | ds.GRANULAR | ds.LONG, 0xFFFFFFFF),
    UCODE64: Segment(UCODE64, _RX | _DPL3 | ds.GRANULAR | ds.LONG, 0xFFFFFFFF),
    CODE16: Segment(CODE16, _RX, 0xFFFF),
    DATA16: Segment(DATA16, _RW, 0xFFFF),
    CONFORMING: Segment(CONFORMING, 0x9F | FLAT, 0xFFFFFFFF),
    ABSENT: Segment(ABSENT, 0x1B | FLAT, 0xFFFFFFFF),
    CODE_1: Segment(CODE_1, _RX | 0x20 | FLAT, 0xFFFFFFFF),
    DATA_1: Segment(DATA_1, _RW | 0x20 | FLAT, 0xFFFFFFFF),
}
TASK_LIMIT = 0x68 + 0x2000
TASK_SEGMENT = Segment(TASK, 0x8B, TASK_LIMIT, TSS)


def gate(handler: int, selector: int, kind: int = ds.INTERRUPT_GATE32, dpl: int = 0, present: bool = True,
         ist: int = 0) -> bytes:
    """A gate of the IDT: 16 bytes for a 64-bit code selector, 8 otherwise."""
    low = (handler & 0xFFFF | selector << 16 | ist << 32 | kind << 40 | dpl << 45 | present << 47
           | (handler >> 16 & 0xFFFF) << 48)
    return struct.pack("<QQ", low, handler >> 32) if selector in (CODE64, UCODE64) else struct.pack("<Q", low)


def handler(vector: int) -> int:
    """Address of the HLT that takes a vector."""
    return HANDLERS + 16 * vector


@dataclass
class Setup:
    """A machine about to run: its processor, and what is in its memory."""

    cpu: CpuState
    memory: dict[int, bytes] = field(default_factory=dict)

    @property
    def state(self) -> MachineState:
        return MachineState(MEMORY, cpu=self.cpu)

    @property
    def writes(self) -> list[tuple[int, bytes]]:
        return list(self.memory.items())

    def set_gate(self, vector: int, data: bytes) -> None:
        self.memory[IDT + len(data) * vector] = data

    def put(self, address: int, data: bytes) -> None:
        """Later writes win."""
        self.memory.pop(address, None)
        self.memory[address] = data

    def permit(self, *ports: int) -> None:
        """Clear bits of the I/O permission map."""
        bits = bytearray(b"\xff" * 0x2001)
        for port in ports:
            bits[port >> 3] &= ~(1 << (port & 7))
        self.put(TSS + 0x68, bytes(bits))


def _common(code: bytes) -> dict[int, bytes]:
    table = bytearray(0x100)
    for selector, segment in SEGMENTS.items():
        struct.pack_into("<Q", table, selector & ~7, ds.encode_segment(segment))
    struct.pack_into("<Q", table, TASK, ds.encode_segment(TASK_SEGMENT))
    task = bytearray(0x68)
    struct.pack_into("<II", task, 4, INNER_STACK, DATA)         # ring 0: ESP, SS; or the low half of RSP0
    struct.pack_into("<II", task, 12, INNER_STACK, DATA_1)      # ring 1
    struct.pack_into("<H", task, 0x66, 0x68)
    return {CODE: code, GDT: bytes(table), TSS: bytes(task), TSS + 0x68: b"\xff" * 0x2001,
            HANDLERS: b"\xf4".ljust(16, b"\x90") * 256}


def real(code: bytes) -> Setup:
    """Real mode, segments at 0, interrupt vectors at 0."""
    cpu = CpuState(rip=CODE, cs=Segment(0, 0x9B), idtr=Table(0x3FF, 0), cr0=CR0_ET)
    cpu.gpr[4] = STACK
    memory = _common(code)
    memory[0] = b"".join(struct.pack("<HH", handler(v), 0) for v in range(256))
    return Setup(cpu, memory)


def protected(code: bytes, cpl: int = 0, *, wide: bool = True, paging: bool = False) -> Setup:
    """Protected mode with flat 32-bit segments, or 16-bit ones; with `paging`, 32-bit and one to one."""
    if wide:
        cs, data = (UCODE32, UDATA) if cpl else (CODE32, DATA)
    else:
        cs, data = CODE16, DATA16
    cpu = _start(cs, data)
    cpu.cr0 = CR0_PE | CR0_ET | CR0_NE
    memory = _common(code)
    memory[IDT] = b"".join(gate(handler(v), CODE32) for v in range(256))
    if paging:
        cpu.cr0 |= CR0_PG | 1 << 16
        cpu.cr3, cpu.cr4 = TABLES, CR4_PSE
        memory[TABLES] = struct.pack("<II", 0x87, (PAGES) | 7)
        memory[PAGES] = b"".join(struct.pack("<I", 0x40_0000 + 4096 * n & 0x3F_FFFF | 7) for n in range(1024))
    return Setup(cpu, memory)


def v86(code: bytes, iopl: int = 3) -> Setup:
    """Virtual-8086 mode, segments at 0, under a 32-bit IDT."""
    setup = protected(code)
    cpu = setup.cpu
    for name in ("cs", "ss", "ds", "es", "fs", "gs"):
        setattr(cpu, name, Segment(0, 0xF3, 0xFFFF, 0))
    cpu.rflags = RFLAGS_VM | iopl << 12 | 2
    return setup


def long_mode(code: bytes, cpl: int = 0, *, compatibility: bool = False) -> Setup:
    """Long mode; the first 2 MiB are one to one and everybody's, the next are mapped page by page."""
    cs = (UCODE32 if compatibility else UCODE64) if cpl else (CODE32 if compatibility else CODE64)
    cpu = _start(cs, UDATA if cpl else DATA)
    cpu.cr0 = CR0_PG | CR0_PE | CR0_ET | CR0_NE | 1 << 16
    cpu.cr3, cpu.cr4, cpu.efer = TABLES, CR4_PAE | CR4_OSFXSR, EFER_LME | EFER_LMA | EFER_SCE | EFER_NXE
    memory = _common(code)
    memory[IDT] = b"".join(gate(handler(v), CODE64) for v in range(256))
    task = bytearray(memory[TSS])
    struct.pack_into("<Q", task, 4, INNER_STACK)
    struct.pack_into("<Q", task, 12, INNER_STACK)
    struct.pack_into("<Q", task, 0x24, IST_STACK)
    memory[TSS] = bytes(task)
    for level in range(3):
        memory[TABLES + 0x1000 * level] = struct.pack("<Q", TABLES + 0x1000 * (level + 1) | 7)
    memory[TABLES + 0x2000] = struct.pack("<QQ", 0xE7, PAGES | 7)
    memory[PAGES] = b"".join(struct.pack("<Q", WINDOW + 4096 * n | 7) for n in range(512))
    return Setup(cpu, memory)


def _start(cs: int, data: int) -> CpuState:
    cpu = CpuState(rip=CODE, gdtr=Table(0xFF, GDT), idtr=Table(0xFFF, IDT), tr=TASK_SEGMENT)
    cpu.cs, cpu.ss = SEGMENTS[cs], SEGMENTS[data]
    cpu.ds = cpu.es = cpu.fs = cpu.gs = SEGMENTS[data]
    cpu.gpr[4] = STACK
    return cpu
