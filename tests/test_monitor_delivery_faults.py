# SPDX-License-Identifier: GPL-2.0-or-later
"""Events that the guest's IDT refuses: what becomes of them, faults on the way, double and triple faults."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

import pytest

from tests import hw_modes as m
from tests.delivery_rig import (
    DF,
    EXT_BIT,
    GP,
    IDT_BIT,
    INT30,
    NOP,
    NP,
    PF,
    SS,
    TS,
    UD,
    UD2,
    arrive,
    deliver,
    look,
    parked,
    run,
)
from tests.hw_rig import Rig
from vmm.hw.delivery import TripleFault
from vmm.memory.errors import BadAddress, OutOfFrames
from vmm.memory.frames import Magazine
from vmm.monitor import Stop, StopReason
from vmm.silicon import layout as at
from vmm.state import Segment, Table
from vmm.x86 import descriptors as ds
from vmm.x86.flags import CR0_PG

MONITORS = ("hw", "bt")


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
