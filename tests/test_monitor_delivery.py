# SPDX-License-Identifier: GPL-2.0-or-later
"""Events through the guest's IDT, in every mode: frames, stacks, privileges, error codes, double faults."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest

from tests import hw_modes as m
from tests.hw_rig import Machine, Rig
from vmm.hw.delivery import TripleFault
from vmm.memory.errors import BadAddress, OutOfFrames
from vmm.memory.frames import Magazine
from vmm.monitor import Stop, StopReason
from vmm.silicon import layout as at
from vmm.state import Segment, Table
from vmm.x86 import descriptors as ds
from vmm.x86.flags import CR0_PE, CR0_PG, RFLAGS_IF, RFLAGS_NT, RFLAGS_RF, RFLAGS_VM

UD2, INT30, NOP = b"\x0f\x0b", b"\xcd\x30", b"\x90"

MONITORS = ("hw", "bt")
UD, DF, TS, NP, SS, GP, PF = 6, 8, 10, 11, 12, 13, 14
#: selector error codes
IDT_BIT, EXT_BIT = 2, 1


class Arrival(NamedTuple):
    """Where a guest halted, and the words on its stack."""

    vector: int
    frame: list[int]
    machine: Machine

    @property
    def rsp(self) -> int:
        return self.machine.processor.q[4]


def run(rig: Rig, setup: m.Setup) -> tuple[Machine, Stop]:
    machine = rig.machine(setup.state, setup.writes)
    return machine, machine.go()


def arrive(rig: Rig, setup: m.Setup, words: str) -> Arrival:
    """Run until a handler halts; `words` is the struct format of the frame."""
    machine, stop = run(rig, setup)
    assert stop == Stop(StopReason.HALTED), stop
    return look(machine, words)


def look(machine: Machine, words: str) -> Arrival:
    q = machine.processor.q
    where = q[at.RIP] - 1 - m.HANDLERS
    assert 0 <= where < 4096 and where % 16 == 0, hex(q[at.RIP])
    stack = q[at.SS + 1] + (q[4] if q[at.CR] & CR0_PE else q[4] & 0xFFFF)
    form = struct.Struct("<" + words)
    return Arrival(where // 16, list(form.unpack(machine.memory.read(stack, form.size))), machine)


def parked(rig: Rig, setup: m.Setup) -> Machine:
    """A machine halted at its first instruction, its registers on the CPU."""
    setup.put(m.CODE, b"\xf4")
    machine, stop = run(rig, setup)
    assert stop.reason is StopReason.HALTED
    return machine


def deliver(machine: Machine, vector: int, error_code: int | None = None, address: int | None = None,
            words: str = "") -> Arrival:
    """Deliver an exception to a parked machine, and let its handler run."""
    processor = machine.processor
    processor.delivery.exception(vector, error_code, address)
    processor.halted = False
    assert machine.go().reason is StopReason.HALTED
    return look(machine, words)


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


# -- what is refused ----------------------------------------------------------------------------------------

Change = Callable[[m.Setup], None]


def _gate(vector: int, handler: int = 0x30, **options: int | bool) -> Change:
    def change(setup: m.Setup) -> None:
        long = setup.cpu.efer != 0
        rest = dict(options)
        selector = rest.pop("selector", m.CODE64 if long else m.CODE32)
        data = m.gate(m.handler(handler), int(selector), **rest)  # type: ignore[arg-type]
        if long and len(data) == 8:
            data += bytes(8)
        setup.set_gate(vector, data)
    return change


def _task(**fields: int) -> Change:
    def change(setup: m.Setup) -> None:
        task = setup.cpu.tr
        setup.cpu.tr = Segment(task.selector, task.attributes, fields.get("limit", task.limit), task.base)
        for offset, value in ((4, fields.get("esp")), (8, fields.get("ss"))):
            if value is not None:
                setup.memory[m.TSS] = setup.memory[m.TSS][:offset] + struct.pack("<I", value) + \
                    setup.memory[m.TSS][offset + 4:]
    return change


def _idt(limit: int) -> Change:
    def change(setup: m.Setup) -> None:
        setup.cpu.idtr = Table(limit, m.IDT)
    return change


BLAME = 0x30 * 8 | IDT_BIT

#: mode, what is changed, the exception that INT 0x30 gives instead, its error code
REFUSALS = {
    "protected beyond the IDT": (m.protected, _idt(0x30 * 8 + 6), GP, BLAME),
    "protected no gate": (m.protected, _gate(0x30, kind=0xC, dpl=3), GP, BLAME),
    "protected privilege of the gate": (m.protected, _gate(0x30, dpl=2), GP, BLAME),
    "protected absent gate": (m.protected, _gate(0x30, dpl=3, present=False), NP, BLAME),
    "protected null handler": (m.protected, _gate(0x30, dpl=3, selector=0), GP, 0),
    "protected handler beyond the GDT": (m.protected, _gate(0x30, dpl=3, selector=m.BEYOND), GP, m.BEYOND),
    "protected handler in an LDT that is none": (m.protected, _gate(0x30, dpl=3, selector=0x0C), GP, 0x0C),
    "protected handler in data": (m.protected, _gate(0x30, dpl=3, selector=m.DATA), GP, m.DATA),
    "protected absent handler": (m.protected, _gate(0x30, dpl=3, selector=m.ABSENT), NP, m.ABSENT),
    "protected short task": (m.protected, _task(limit=10), TS, m.TASK),
    "protected null stack": (m.protected, _task(ss=0), TS, 0),
    "protected stack beyond the GDT": (m.protected, _task(ss=m.BEYOND), TS, m.BEYOND),
    "protected stack of another ring": (m.protected, _task(ss=m.DATA_1 & ~3), TS, m.DATA_1 & ~3),
    "protected stack in code": (m.protected, _task(ss=m.CODE32), TS, m.CODE32),
    "protected stack limit": (m.protected, _task(ss=m.DATA16, esp=4), SS, 0),
    "long beyond the IDT": (m.long_mode, _idt(0x30 * 16 + 14), GP, BLAME),
    "long no gate": (m.long_mode, _gate(0x30, kind=0x6, dpl=3), GP, BLAME),
    "long privilege of the gate": (m.long_mode, _gate(0x30, dpl=2), GP, BLAME),
    "long absent gate": (m.long_mode, _gate(0x30, dpl=3, present=False), NP, BLAME),
    "long null handler": (m.long_mode, _gate(0x30, dpl=3, selector=0), GP, 0),
    "long handler beyond the GDT": (m.long_mode, _gate(0x30, dpl=3, selector=m.BEYOND), GP, m.BEYOND),
    "long handler of 32 bits": (m.long_mode, _gate(0x30, dpl=3, selector=m.CODE32), GP, m.CODE32),
    "long absent handler": (m.long_mode, _gate(0x30, dpl=3, selector=m.ABSENT), NP, m.ABSENT),
    "long short task": (m.long_mode, _gate(0x30, dpl=3, ist=7), TS, m.TASK),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_software_interrupt(rig: Rig, case: str) -> None:
    """The exception comes at the instruction; its own handler is reached through a task that is whole."""
    mode, change, vector, error_code = REFUSALS[case]
    setup = mode(NOP + INT30, cpl=3)
    _gate(0x30, dpl=3)(setup)
    if case == "long short task":
        setup.cpu.tr = Segment(m.TASK, 0x8B, 0x50, m.TSS)
    # what goes wrong on the stack of ring 0 must not hit the handler of the exception too: it is conforming
    if mode is m.protected and ("task" in case or "stack" in case):
        for number in (TS, SS):
            setup.set_gate(number, m.gate(m.handler(number), m.CONFORMING))
    change(setup)
    setup.put(m.HANDLERS, b"\xeb\xfe".ljust(16, b"\x90") * 256)     # HLT is for ring 0
    machine = rig.machine(setup.state, setup.writes)
    processor = machine.processor
    while not m.HANDLERS <= processor.q[at.RIP] < m.HANDLERS + 4096:
        assert not machine.run(time.monotonic_ns() + 1_000_000).reason.final
    q = processor.q
    words = "Q" if mode is m.long_mode else "I"
    error, rip = struct.unpack(f"<2{words}", machine.memory.read(q[4], 2 * struct.calcsize(words)))
    assert ((q[at.RIP] - m.HANDLERS) // 16, error, rip) == (vector, error_code, m.CODE + 1)


def test_task_gates_are_refused_clearly(rig: Rig) -> None:
    setup = m.protected(UD2)
    setup.set_gate(UD, m.gate(0, m.TASK, ds.TASK_GATE))
    _, stop = run(rig, setup)
    assert stop == Stop(StopReason.CRASHED, "a task gate for vector 6: task switches are not supported")


def test_handler_beyond_its_segment(rig: Rig) -> None:
    setup = m.protected(UD2)
    setup.set_gate(UD, m.gate(0x12345, m.CODE16))
    arrival = arrive(rig, setup, "4I")
    assert (arrival.vector, arrival.frame[:2]) == (GP, [EXT_BIT, m.CODE])


# -- faults on the way --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [m.protected, m.long_mode])
def test_double_fault(rig: Rig, mode: Callable[..., m.Setup]) -> None:
    """#GP whose handler is not there: #NP on the way makes #DF, error code 0."""
    long = mode is m.long_mode
    setup = mode(b"\x66\xb8\xf8\x07\x8e\xd8")
    _gate(GP, present=False)(setup)
    arrival = arrive(rig, setup, "3Q" if long else "3I")
    assert (arrival.vector, arrival.frame[:2]) == (DF, [0, m.CODE + 4])


def test_benign_exception_with_a_fault_on_the_way(rig: Rig) -> None:
    setup = m.protected(UD2)
    _gate(UD, present=False)(setup)
    arrival = arrive(rig, setup, "2I")
    assert (arrival.vector, arrival.frame) == (NP, [UD * 8 | IDT_BIT | EXT_BIT, m.CODE])


@pytest.mark.parametrize("mode", [m.protected, m.long_mode])
def test_triple_fault(rig: Rig, mode: Callable[..., m.Setup]) -> None:
    setup = mode(b"\x66\xb8\xf8\x07\x8e\xd8")
    for vector in (GP, DF):
        _gate(vector, present=False)(setup)
    _, stop = run(rig, setup)
    assert stop == Stop(StopReason.CRASHED, "triple fault: #NP(0x43) while delivering a double fault")


def test_page_fault_on_the_stack(rig: Rig) -> None:
    """#UD benign, so its page fault is delivered, on a stack that is there."""
    setup = m.long_mode(UD2)
    setup.cpu.gpr[4] = m.WINDOW + 0x20_0000 + 0x100         # nothing is mapped there
    setup.set_gate(PF, m.gate(m.handler(PF), m.CODE64, ist=1))
    arrival = arrive(rig, setup, "6Q")
    assert (arrival.vector, arrival.frame[:2]) == (PF, [2, m.CODE])
    assert arrival.machine.processor.q[at.CR + 2] == (m.WINDOW + 0x20_0000 + 0x100 & ~15) - 40


def test_page_fault_while_delivering_a_page_fault(rig: Rig) -> None:
    setup = m.long_mode(b"\x48\xa1" + struct.pack("<Q", 0x40_0008))
    setup.cpu.gpr[4] = 0x40_0800
    setup.set_gate(DF, m.gate(m.handler(DF), m.CODE64, ist=1))
    arrival = arrive(rig, setup, "6Q")
    assert (arrival.vector, arrival.frame[:2]) == (DF, [0, m.CODE])


def test_stack_that_is_not_canonical(rig: Rig) -> None:
    setup = m.long_mode(UD2)
    setup.cpu.gpr[4] = 1 << 47
    setup.set_gate(SS, m.gate(m.handler(SS), m.CODE64, ist=1))
    setup.cpu.gpr[4] = (1 << 47) + 0x1000
    assert arrive(rig, setup, "2Q").frame == [EXT_BIT, m.CODE]


def test_tables_without_memory(rig: Rig) -> None:
    """An IDT where there is no RAM cannot be used for anything."""
    setup = m.protected(UD2)
    setup.cpu.idtr = Table(0xFFF, 0xC000_0000)
    _, stop = run(rig, setup)
    assert stop.reason is StopReason.CRASHED and stop.detail.startswith("triple fault")


# -- directly on the register file --------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "words"), [(m.real, "3H"), (m.protected, "3I"), (m.long_mode, "5Q")])
def test_exceptions_by_hand(rig: Rig, mode: Callable[[bytes], m.Setup], words: str) -> None:
    machine = parked(rig, mode(b""))
    arrival = deliver(machine, 0, words=words)
    assert (arrival.vector, arrival.frame[0]) == (0, m.CODE + 1)


def test_nothing_has_changed_when_a_frame_is_missing(rig: Rig) -> None:
    """The stack's page has no frame, and none is in stock: all as before; with one, all is done."""
    setup = m.long_mode(b"")
    setup.cpu.gpr[4] = m.WINDOW + 0x8000
    machine = parked(rig, setup)
    processor = machine.processor
    stock, processor.memory.frames = processor.memory.frames, Magazine()
    before = bytes(processor.regs.image)
    for _ in range(2):
        with pytest.raises(OutOfFrames):
            processor.delivery.exception(UD)
        assert bytes(processor.regs.image) == before
    processor.memory.frames = stock
    assert deliver(machine, UD, words="2Q").frame == [m.CODE + 1, m.CODE64]


def test_interrupt_whose_gate_is_absent(rig: Rig) -> None:
    setup = m.long_mode(b"")
    _gate(0x40, present=False)(setup)
    machine = parked(rig, setup)
    machine.processor.delivery.interrupt(0x40)
    machine.processor.halted = False
    machine.go()
    arrival = look(machine, "2Q")
    assert (arrival.vector, arrival.frame) == (NP, [0x40 * 8 | IDT_BIT | EXT_BIT, m.CODE + 1])


def test_shutdown_by_hand(rig: Rig) -> None:
    setup = m.protected(b"")
    setup.cpu.idtr = Table(0, 0)
    machine = parked(rig, setup)
    with pytest.raises(TripleFault, match="triple fault: #GP"):
        machine.processor.delivery.exception(UD)


def test_tables_that_change_are_read_anew(rig: Rig) -> None:
    """Walks and segments are remembered only as long as what they came from."""
    machine = parked(rig, m.long_mode(b""))
    assert deliver(machine, UD).vector == UD
    machine.memory.write(m.IDT + 16 * UD, m.gate(m.handler(0x55), m.CODE64))
    assert deliver(machine, UD).vector == 0x55
    other = 0x30_0000
    machine.memory.write(other, machine.memory.read(m.IDT, 0x1000))
    machine.memory.write(other + 16 * UD, m.gate(m.handler(0x66), m.CODE64))
    # by way of a page with an entry of its own, first here, then there
    q = machine.processor.q
    q[at.IDTR + 1] = m.WINDOW
    machine.memory.write_u64(m.PAGES, m.IDT | 0x67)
    assert deliver(machine, UD).vector == 0x55
    machine.memory.write_u64(m.PAGES, other | 0x67)
    assert deliver(machine, UD).vector == 0x66


def test_paging_turned_off_under_remembered_walks(rig: Rig) -> None:
    setup = m.protected(b"", paging=True)
    machine = parked(rig, setup)
    q = machine.processor.q
    q[at.IDTR + 1] = 0x40_0000 + m.IDT      # the page tables lead there back to 0
    assert deliver(machine, UD).vector == UD
    q[at.CR] &= ~CR0_PG
    with pytest.raises(BadAddress):
        machine.processor.linear.read_quad(0x40_0000 + m.IDT)
