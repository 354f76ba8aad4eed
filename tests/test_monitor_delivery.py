# SPDX-License-Identifier: GPL-2.0-or-later
"""Events through the guest's IDT, in every mode: frames, stacks, privileges, error codes."""

from __future__ import annotations

import struct

import pytest

from tests import hw_modes as m
from tests.delivery_rig import (
    EXT_BIT,
    GP,
    IDT_BIT,
    INT30,
    NOP,
    PF,
    UD,
    UD2,
    arrive,
    run,
)
from tests.hw_rig import Rig
from vmm.monitor import StopReason
from vmm.silicon import layout as at
from vmm.state import Segment, Table
from vmm.x86 import descriptors as ds
from vmm.x86.flags import RFLAGS_IF, RFLAGS_NT, RFLAGS_RF, RFLAGS_VM

MONITORS = ("hw", "bt")


# -- real mode ----------------------------------------------------------------------------------------------


def test_real_mode_exception(rig: Rig) -> None:
    setup = m.real(NOP + UD2)
    setup.cpu.rflags = RFLAGS_IF | 0x8D7
    arrival = arrive(rig, setup, "3H")
    assert arrival.vector == UD
    assert arrival.frame == [m.CODE + 1, 0, 0x8D7 | RFLAGS_IF]
    assert arrival.machine.processor.regs.rflags() & (RFLAGS_IF | 0x8D5) == 0x8D5


def test_real_mode_software_interrupt(rig: Rig) -> None:
    arrival = arrive(rig, m.real(INT30), "3H")
    assert (arrival.vector, arrival.frame[0]) == (0x30, m.CODE + 2)


def test_real_mode_stack_wraps_at_64k(rig: Rig) -> None:
    setup = m.real(UD2)
    setup.cpu.ss = Segment(0x1000, 0x93, 0xFFFF, 0x10000)
    setup.cpu.gpr[4] = 0x5_0000
    arrival = arrive(rig, setup, "3H")
    assert arrival.rsp == 0x5_FFFA
    assert arrival.frame == [m.CODE, 0, 2]


def test_real_mode_handler_in_another_segment(rig: Rig) -> None:
    setup = m.real(UD2)
    setup.put(4 * UD, struct.pack("<HH", m.handler(UD) - 0x5000, 0x500))
    machine, stop = run(rig, setup)
    q = machine.processor.q
    assert stop.reason is StopReason.HALTED
    assert (q[at.CS], q[at.CS + 1], q[at.RIP]) == (0x500, 0x5000, m.handler(UD) - 0x5000 + 1)


def test_real_mode_vector_beyond_the_table(rig: Rig) -> None:
    """#GP instead; when that is beyond as well, the processor shuts down."""
    setup = m.real(INT30)
    setup.cpu.idtr = Table(0x30 * 4 - 1, 0)
    assert arrive(rig, setup, "3H").frame[0] == m.CODE
    setup.cpu.idtr = Table(3, 0)
    _, stop = run(rig, setup)
    assert stop.reason is StopReason.CRASHED and stop.detail.startswith("triple fault")


# -- protected mode -----------------------------------------------------------------------------------------


def test_same_privilege(rig: Rig) -> None:
    arrival = arrive(rig, m.protected(NOP + UD2), "3I")
    assert (arrival.vector, arrival.frame) == (UD, [m.CODE + 1, m.CODE32, RFLAGS_RF | 2])
    assert arrival.rsp == m.STACK - 12


def test_inner_privilege_takes_the_stack_of_the_task(rig: Rig) -> None:
    arrival = arrive(rig, m.protected(UD2, cpl=3), "5I")
    assert arrival.frame == [m.CODE, m.UCODE32, RFLAGS_RF | 2, m.STACK, m.UDATA]
    assert arrival.rsp == m.INNER_STACK - 20
    q = arrival.machine.processor.q
    assert (q[at.CS] & 0xFFFF, q[at.SS] & 0xFFFF, arrival.machine.processor.regs.cpl) == (m.CODE32, m.DATA, 0)


@pytest.mark.parametrize(("kind", "words", "iflag"), [
    (ds.INTERRUPT_GATE32, "5I", 0), (ds.TRAP_GATE32, "5I", RFLAGS_IF),
    (ds.INTERRUPT_GATE16, "5H", 0), (ds.TRAP_GATE16, "5H", RFLAGS_IF)])
def test_kinds_of_gates(rig: Rig, kind: int, words: str, iflag: int) -> None:
    setup = m.protected(INT30, cpl=3)
    setup.cpu.rflags = RFLAGS_IF | RFLAGS_NT | 0x8D7
    setup.set_gate(0x30, m.gate(m.handler(0x30), m.CODE32, kind, dpl=3))
    arrival = arrive(rig, setup, words)
    flags = setup.cpu.rflags & (0xFFFF if words == "5H" else 0xFFFFFFFF)
    assert arrival.frame == [m.CODE + 2, m.UCODE32, flags, m.STACK, m.UDATA]
    assert arrival.machine.processor.regs.rflags() == 0x8D7 | iflag


def test_stack_of_sixteen_bits(rig: Rig) -> None:
    setup = m.protected(UD2, wide=False)
    setup.cpu.gpr[4] = 0xABCD_0000 | m.STACK
    arrival = arrive(rig, setup, "")
    assert arrival.rsp == 0xABCD_0000 | m.STACK - 12
    assert arrival.machine.memory.read_u32(m.STACK - 12) == m.CODE


def test_conforming_handler_keeps_the_privilege(rig: Rig) -> None:
    setup = m.protected(INT30, cpl=3)
    setup.set_gate(0x30, m.gate(0x9000, m.CONFORMING, dpl=3))
    setup.put(0x9000, UD2)
    arrival = arrive(rig, setup, "5I")
    assert arrival.frame[:2] == [0x9000, m.CONFORMING | 3]


def test_ring_one(rig: Rig) -> None:
    setup = m.protected(INT30, cpl=3)
    setup.set_gate(0x30, m.gate(0x9000, m.CODE_1, dpl=3))
    setup.put(0x9000, UD2)
    arrival = arrive(rig, setup, "5I")
    assert arrival.frame == [0x9000, m.CODE_1, RFLAGS_RF | 2, m.INNER_STACK - 20, m.DATA_1]


def test_sixteen_bit_task(rig: Rig) -> None:
    setup = m.protected(UD2, cpl=3)
    setup.cpu.tr = Segment(m.TASK, 0x83, 0x2B, m.TSS)
    setup.put(m.TSS, struct.pack("<HHH", 0, 0xA000, m.DATA))
    assert arrive(rig, setup, "5I").rsp == 0xA000 - 20


def test_error_code_is_pushed(rig: Rig) -> None:
    setup = m.protected(b"\xb8\xf8\x07\0\0\x8e\xd8")             # mov eax, 0x7f8; mov ds, ax
    arrival = arrive(rig, setup, "4I")
    assert (arrival.vector, arrival.frame) == (GP, [0x7F8, m.CODE + 5, m.CODE32, RFLAGS_RF | 2])


def test_page_fault(rig: Rig) -> None:
    setup = m.protected(b"\xa1\0\0\x50\0", cpl=3, paging=True)      # mov eax, [0x500000]
    setup.put(m.PAGES + 4 * 0x100, struct.pack("<I", 0))
    arrival = arrive(rig, setup, "6I")
    assert (arrival.vector, arrival.frame[:3]) == (PF, [4, m.CODE, m.UCODE32])
    assert arrival.machine.processor.q[at.CR + 2] == 0x50_0000


@pytest.mark.parametrize(("code", "vector"), [(b"\xcc", 3), (b"\xcd\x03", 3), (b"\xcd\x04", 4)])
def test_breakpoint_is_a_software_interrupt(rig: Rig, code: bytes, vector: int) -> None:
    setup = m.protected(NOP + code, cpl=3)
    arrival = arrive(rig, setup, "6I")
    assert (arrival.vector, arrival.frame[:2]) == (GP, [vector * 8 | IDT_BIT, m.CODE + 1])
    setup.set_gate(vector, m.gate(m.handler(vector), m.CODE32, dpl=3))
    arrival = arrive(rig, setup, "5I")
    assert (arrival.vector, arrival.frame[0]) == (vector, m.CODE + 1 + len(code))
    assert not arrival.frame[2] & RFLAGS_RF


def test_overflow(rig: Rig) -> None:
    setup = m.protected(b"\xce", cpl=3)
    setup.cpu.rflags = 0x802
    assert arrive(rig, setup, "6I").frame[:2] == [4 * 8 | IDT_BIT, m.CODE]
    setup.set_gate(4, m.gate(m.handler(4), m.CODE32, dpl=3))
    arrival = arrive(rig, setup, "5I")
    assert (arrival.vector, arrival.frame[0]) == (4, m.CODE + 1)


# -- virtual-8086 mode --------------------------------------------------------------------------------------


def test_out_of_virtual_8086_mode(rig: Rig) -> None:
    setup = m.v86(UD2)
    for name, selector in (("es", 0x11), ("ds", 0x22), ("fs", 0x33), ("gs", 0x44)):
        setattr(setup.cpu, name, Segment(selector, 0xF3, 0xFFFF, selector << 4))
    arrival = arrive(rig, setup, "9I")
    flags = RFLAGS_VM | RFLAGS_RF | 0x3002
    assert arrival.frame == [m.CODE, 0, flags, m.STACK, 0, 0x11, 0x22, 0x33, 0x44]
    q = arrival.machine.processor.q
    assert [q[index] & 0xFFFF for index in (at.ES, at.DS, at.FS, at.GS)] == [0] * 4
    assert not arrival.machine.processor.regs.rflags() & RFLAGS_VM


def test_virtual_8086_mode_entered_by_iret(rig: Rig) -> None:
    frame = (0, 0, 0, 0, 0, m.STACK, RFLAGS_VM | 0x3002, 0, 0x9800)
    setup = m.protected(b"".join(b"\x68" + struct.pack("<I", word) for word in frame) + b"\xcf")
    setup.put(0x9800, UD2)
    arrival = arrive(rig, setup, "9I")
    assert arrival.frame[:4] == [0x9800, 0, RFLAGS_VM | RFLAGS_RF | 0x3002, m.STACK]
    assert arrival.rsp == m.INNER_STACK - 36


def test_software_interrupt_in_virtual_8086_mode(rig: Rig) -> None:
    setup = m.v86(INT30, iopl=3)
    setup.set_gate(0x30, m.gate(m.handler(0x30), m.CODE32, dpl=3))
    assert arrive(rig, setup, "9I").frame[0] == m.CODE + 2
    setup.cpu.rflags = RFLAGS_VM | 2
    arrival = arrive(rig, setup, "10I")
    assert (arrival.vector, arrival.frame[:2]) == (GP, [0, m.CODE])


def test_virtual_8086_mode_needs_a_handler_at_ring_zero(rig: Rig) -> None:
    setup = m.v86(UD2)
    setup.set_gate(UD, m.gate(m.handler(UD), m.CONFORMING))
    arrival = arrive(rig, setup, "10I")
    assert (arrival.vector, arrival.frame[0]) == (GP, m.CONFORMING | EXT_BIT)


# -- long mode ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", range(0, 16, 5))
def test_long_mode_frame(rig: Rig, offset: int) -> None:
    """SS and RSP are always there; the stack is aligned first."""
    setup = m.long_mode(NOP + UD2)
    setup.cpu.gpr[4] = m.STACK - offset
    arrival = arrive(rig, setup, "5Q")
    assert arrival.frame == [m.CODE + 1, m.CODE64, RFLAGS_RF | 2, m.STACK - offset, m.DATA]
    assert arrival.rsp == (m.STACK - offset & ~15) - 40


@pytest.mark.parametrize("compatibility", [False, True])
def test_long_mode_inner_privilege(rig: Rig, compatibility: bool) -> None:
    arrival = arrive(rig, m.long_mode(UD2, 3, compatibility=compatibility), "5Q")
    code = m.UCODE32 if compatibility else m.UCODE64
    assert arrival.frame == [m.CODE, code, RFLAGS_RF | 2, m.STACK, m.UDATA]
    q = arrival.machine.processor.q
    assert (arrival.rsp, q[at.SS] & 0xFFFF, q[at.CS] & 0xFFFF) == (m.INNER_STACK - 40, 0, m.CODE64)


@pytest.mark.parametrize("cpl", [0, 3])
def test_interrupt_stack_table(rig: Rig, cpl: int) -> None:
    setup = m.long_mode(b"\x66\xb8\xf8\x07\x8e\xd8", cpl)           # mov ax, 0x7f8; mov ds, ax
    setup.set_gate(GP, m.gate(m.handler(GP), m.CODE64, ist=1))
    arrival = arrive(rig, setup, "6Q")
    assert (arrival.rsp, arrival.frame[:2]) == (m.IST_STACK - 48, [0x7F8, m.CODE + 4])
    assert arrival.frame[4] == m.STACK


def test_long_mode_frame_over_two_pages(rig: Rig) -> None:
    setup = m.long_mode(UD2)
    setup.cpu.gpr[4] = m.WINDOW + 0x5010
    arrival = arrive(rig, setup, "5Q")
    assert arrival.frame == [m.CODE, m.CODE64, RFLAGS_RF | 2, m.WINDOW + 0x5010, m.DATA]


def test_long_mode_page_fault(rig: Rig) -> None:
    setup = m.long_mode(b"\x48\xa1" + struct.pack("<Q", 0x40_0008), 3)      # mov rax, [0x400008]
    arrival = arrive(rig, setup, "6Q")
    assert (arrival.vector, arrival.frame[:2]) == (PF, [4, m.CODE])
    assert arrival.machine.processor.q[at.CR + 2] == 0x40_0008


def test_trap_gate_keeps_interrupts_on(rig: Rig) -> None:
    setup = m.long_mode(UD2)
    setup.cpu.rflags |= RFLAGS_IF | RFLAGS_NT
    setup.set_gate(UD, m.gate(m.handler(UD), m.CODE64, ds.TRAP_GATE32))
    assert arrive(rig, setup, "").machine.processor.regs.rflags() == RFLAGS_IF | 2
