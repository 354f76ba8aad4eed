# SPDX-License-Identifier: GPL-2.0-or-later
"""Interrupts come at the first instruction that may be interrupted, not before, not after; none is lost."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

import pytest

from tests import hw_modes as m
from tests.hw_rig import Machine, Rig, frame, halted, vector_of
from vmm.memory.frames import Magazine
from vmm.monitor import Stop, StopReason
from vmm.silicon import layout as at
from vmm.state import decode, encode
from vmm.x86.flags import RFLAGS_IF

MONITORS = ("hw", "bt")
NMI, VECTOR = 2, 0x40
IN, OUT = b"\xe4\x80", b"\xe6\x80"
STI, CLI, HALT, NOP, INC = b"\xfb", b"\xfa", b"\xf4", b"\x90", b"\xff\xc0"
RAX, RCX = 0, 1


class Trigger:
    """A device at port 0x80 whose every access does something."""

    sizes = frozenset({1})

    def __init__(self, machine: Machine, action: Callable[[], None]) -> None:
        self._action = action
        machine.board.ports.detach("post code")
        machine.board.ports.attach(0x80, 1, self, "trigger")

    def read(self, offset: int, size: int) -> int:
        self._action()
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self._action()


def start(rig: Rig, code: bytes, rflags: int = 2) -> Machine:
    """A machine about to run `code` in 64-bit mode, its local APIC on."""
    setup = m.long_mode(code)
    setup.cpu.rflags = rflags
    machine = rig.machine(setup.state, setup.writes)
    machine.board.lapic.write(0xF0, 4, 0x1FF)
    return machine


def interrupt(machine: Machine, vector: int = VECTOR) -> None:
    machine.board.lapic.accept(vector)


def at_handler(machine: Machine) -> tuple[int | None, int]:
    """(vector, offset of the interrupted instruction)."""
    return vector_of(machine), frame(machine, "Q")[0] - m.CODE


# -- the window ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "rflags", "where"), [
    (INC * 3 + HALT, RFLAGS_IF, 0),
    (INC + STI + INC + INC + HALT, 2, 5),                                   # one instruction after STI
    (STI + STI + INC + INC + HALT, 2, 2),                                   # a second STI does not prolong it
    (STI + CLI + INC + STI + NOP + INC + HALT, 2, 6),
    (b"\x6a\x02\x80\xcc\x02\x68\x02\x02\x00\x00\x9d" + INC + HALT, 2, 11),   # popfq: no shadow
    (STI + b"\x0f\xa2" + INC + HALT, 2, 3),                                  # CPUID ends the shadow
    (STI + b"\x0f\x01\xd9" + INC + HALT, 2, 4),                              # so does VMMCALL
    (STI + HALT + INC, 2, 2),
])
def test_window(rig: Rig, code: bytes, rflags: int, where: int) -> None:
    machine = start(rig, code, rflags)
    interrupt(machine)
    assert machine.go() == Stop(StopReason.HALTED)
    assert at_handler(machine) == (VECTOR, where)


def test_no_window_no_interrupt(rig: Rig) -> None:
    machine = start(rig, INC + HALT)
    interrupt(machine)
    assert machine.go() == Stop(StopReason.HALTED)
    assert vector_of(machine) is None and not machine.wake_pending()


@pytest.mark.parametrize(("code", "rflags", "where"), [
    (OUT + INC * 3 + HALT, 2 | RFLAGS_IF, None),
    (OUT + STI + INC + HALT, 2, 5),
    (OUT + STI + HALT, 2, 4),
    (OUT + b"\x8e\xd0" + NOP * 2 + HALT, 2 | RFLAGS_IF, 5),                  # mov ss, ax has a shadow, too
])
def test_interrupt_raised_by_the_guest_itself(rig: Rig, code: bytes, rflags: int, where: int | None) -> None:
    """At the end of the block at the latest; a HLT after STI is woken."""
    machine = start(rig, code, rflags)
    Trigger(machine, lambda: interrupt(machine))
    assert machine.go() == Stop(StopReason.HALTED)
    vector, offset = at_handler(machine)
    assert vector == VECTOR
    assert where is None or offset == where


def _same(machine: Machine, rig: Rig) -> Machine:
    return machine


def _evicted(machine: Machine, rig: Rig) -> Machine:
    machine.processor.evict()
    return machine


def _moved(machine: Machine, rig: Rig) -> Machine:
    return rig.again(machine, decode(encode(machine.capture())))


@pytest.mark.parametrize("between", [_same, _evicted, _moved])
def test_stopped_in_the_shadow(rig: Rig, between: Callable[[Machine, Rig], Machine]) -> None:
    """A kick lands between STI and HLT, an interrupt comes before the guest goes on: taken at once, it would
    leave HLT waiting for what has been."""
    machine = start(rig, OUT + STI + HALT + INC)
    Trigger(machine, rig.cpu.stop)
    assert machine.run(time.monotonic_ns() + 10**10) == Stop(StopReason.KICKED)
    assert machine.processor.q[at.RIP] == m.CODE + 3
    machine = between(machine, rig)
    interrupt(machine)
    assert machine.go() == Stop(StopReason.HALTED)
    assert at_handler(machine) == (VECTOR, 4)


def test_sti_hlt_never_loses_a_wake(rig: Rig) -> None:
    """Two guests that sleep between timer interrupts some 20 us apart, switched at every turn and kicked at
    random moments, count every one of them."""
    ticks = 300
    loop = (b"\xbe\x80\x03\xe0\xfe"                             # mov esi, 0xfee00380: initial count
            b"\xfa\xc7\x06" + struct.pack("<I", 20_000) +       # again: cli; mov dword [rsi], 20000
            b"\xfb\xf4\x81\xf9" + struct.pack("<I", ticks) +  # sti; hlt; cmp ecx, ticks
            b"\x75\xef\xfa\xf4")                             # jne again; cli; hlt
    # inc ecx; mov dword [rsi - 0x2d0], 0: end of interrupt; iretq
    handler = b"\xff\xc1\xc7\x86\x30\xfd\xff\xff\x00\x00\x00\x00\x48\xcf"
    machines = []
    for _ in range(2):
        setup = _with_devices(m.long_mode(loop))
        setup.put(m.handler(VECTOR), handler)
        machine = rig.machine(setup.state, setup.writes)
        lapic = machine.board.lapic
        lapic.write(0xF0, 4, 0x1FF)
        lapic.write(0x3E0, 4, 0xB)                  # divide by 1
        lapic.write(0x320, 4, VECTOR)               # timer, one-shot
        machines.append(machine)
    waiting = list(machines)
    patience = time.monotonic_ns() + 20 * 10**9
    turn = 0
    while waiting:
        assert time.monotonic_ns() < patience
        for machine in list(waiting):
            turn += 1
            stop = machine.run(time.monotonic_ns() + 1000 * (turn % 50))
            if stop.reason is not StopReason.HALTED:
                assert stop.reason in (StopReason.SLICE, StopReason.KICKED)
            elif machine.next_wake() is None and not machine.wake_pending():
                machine.processor.evict()
                state = machine.capture().cpu
                assert state.gpr[RCX] == ticks
                waiting.remove(machine)


def _with_devices(setup: m.Setup) -> m.Setup:
    """Map the local APIC's page where it is: its own directory, everything in its 2 MiB one to one."""
    page = 0x20000
    setup.put(m.TABLES + 0x1000, struct.pack("<4Q", m.TABLES + 0x2000 | 7, 0, 0, page | 7))
    setup.put(page, bytes(0xFEE0_0000 >> 21 & 511) * 8)
    setup.put(page + 8 * (0xFEE0_0000 >> 21 & 511), struct.pack("<Q", 0xFEE0_0000 | 0xE7))
    return setup


# -- halting ------------------------------------------------------------------------------------------------


def test_halted_guest_wakes_by_interrupt_alone(rig: Rig) -> None:
    machine = start(rig, STI + HALT + INC + CLI + HALT)
    assert machine.go() == Stop(StopReason.HALTED)
    assert machine.halted and not machine.wake_pending()
    assert machine.run(time.monotonic_ns() + 10**9) == Stop(StopReason.HALTED)
    interrupt(machine)
    assert machine.wake_pending()
    assert machine.go() == Stop(StopReason.HALTED)
    assert at_handler(machine) == (VECTOR, 2)


def test_halt_is_carried_along(rig: Rig) -> None:
    machine = start(rig, STI + HALT + INC)
    machine.go()
    machine = _moved(machine, rig)
    assert machine.halted
    assert machine.run(time.monotonic_ns() + 10**9) == Stop(StopReason.HALTED)
    interrupt(machine)
    machine.go()
    assert at_handler(machine) == (VECTOR, 2)


def test_priorities(rig: Rig) -> None:
    """The task priority holds interrupts back, and lets them go when it is lowered."""
    code = STI + INC + b"\x31\xc0\x44\x0f\x22\xc0" + NOP + HALT     # ...; xor eax, eax; mov cr8, rax
    machine = start(rig, code)
    machine.board.lapic.cr8 = 5
    interrupt(machine)
    assert machine.go() == Stop(StopReason.HALTED)
    assert at_handler(machine)[0] == VECTOR
    assert at_handler(machine)[1] >= 9


def test_two_at_once(rig: Rig) -> None:
    """The higher first; the other as soon as the handler lets it."""
    machine = start(rig, STI + NOP * 3 + HALT)
    machine.memory.write(m.handler(0x60), STI + NOP * 2 + HALT)
    interrupt(machine, 0x50)
    interrupt(machine, 0x60)
    assert machine.go() == Stop(StopReason.HALTED)
    # 0x50 is of a lower class than 0x60, which is still in service
    assert vector_of(machine) == 0x60 and not machine.wake_pending()
    machine.board.lapic.write(0xB0, 4, 0)
    assert machine.wake_pending()
    machine.go()
    assert vector_of(machine) == 0x50


# -- no frame for it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", [_same, _moved])
def test_interrupt_that_waits_for_a_frame(rig: Rig, between: Callable[[Machine, Rig], Machine]) -> None:
    """Acknowledged once, delivered once, however often the frame for its stack is refused."""
    setup = m.long_mode(INC * 2 + HALT)
    setup.cpu.rflags = RFLAGS_IF
    setup.cpu.gpr[4] = m.WINDOW + 0x8000
    machine = rig.machine(setup.state, setup.writes)
    machine.board.lapic.write(0xF0, 4, 0x1FF)
    interrupt(machine)
    stock = machine.frames
    for _ in range(3):
        machine.processor.memory.frames = Magazine()
        assert machine.go() == Stop(StopReason.NO_FRAMES)
        assert not machine.board.lapic.irr
        machine.frames = stock
        machine = between(machine, rig)
    machine.processor.memory.frames = stock
    assert machine.go() == Stop(StopReason.HALTED)
    assert at_handler(machine) == (VECTOR, 0)
    assert machine.block.accounting.interrupts == 1


def test_nmi_that_waits_for_a_frame(rig: Rig) -> None:
    setup = m.long_mode(INC * 2 + HALT)
    setup.cpu.gpr[4] = m.WINDOW + 0x8000
    machine = rig.machine(setup.state, setup.writes)
    machine.board.interrupts.nmi_pending = True
    stock, machine.processor.memory.frames = machine.frames, Magazine()
    for _ in range(3):
        assert machine.go() == Stop(StopReason.NO_FRAMES)
    machine.processor.memory.frames = stock
    assert machine.go() == Stop(StopReason.HALTED)
    assert at_handler(machine) == (NMI, 0)


# -- NMI ----------------------------------------------------------------------------------------------------


def test_nmi_needs_no_flag(rig: Rig) -> None:
    machine = start(rig, INC + HALT)
    machine.board.interrupts.nmi_pending = True
    assert machine.go() == Stop(StopReason.HALTED)
    assert at_handler(machine) == (NMI, 0)
    assert machine.capture().cpu.nmi_masked


def test_nmi_wakes(rig: Rig) -> None:
    machine = start(rig, INC + HALT)
    machine.go()
    machine.board.interrupts.nmi_pending = True
    assert machine.wake_pending()
    machine.go()
    assert at_handler(machine) == (NMI, 3)


def test_second_nmi_waits_for_iret(rig: Rig) -> None:
    """Served, masked until IRET, then served again: twice in all for three that came."""
    setup = m.long_mode(OUT + NOP + HALT)
    setup.put(m.handler(NMI), b"\xff\xc1\xe6\x80\x48\xcf")      # inc ecx; out 0x80, al; iretq
    machine = rig.machine(setup.state, setup.writes)
    served = []

    def more() -> None:
        served.append(machine.processor.q[RCX])
        if len(served) < 3:
            machine.board.interrupts._nmi()

    Trigger(machine, more)
    assert machine.go() == Stop(StopReason.HALTED)
    assert served == [0, 1, 2] and machine.processor.q[RCX] == 2
    assert not machine.capture().cpu.nmi_masked


def test_masked_nmi_is_carried_along(rig: Rig) -> None:
    machine = start(rig, INC + HALT)
    machine.board.interrupts.nmi_pending = True
    machine.go()
    machine = _moved(machine, rig)
    machine.board.interrupts.nmi_pending = True
    assert not machine.wake_pending()
    assert machine.run(time.monotonic_ns() + 10**9) == Stop(StopReason.HALTED)


# -- time and kicks -----------------------------------------------------------------------------------------


def test_slice_ends_a_busy_guest(rig: Rig) -> None:
    machine = start(rig, b"\xeb\xfe")
    deadline = time.monotonic_ns() + 2_000_000
    assert machine.run(deadline) == Stop(StopReason.SLICE)
    assert time.monotonic_ns() >= deadline
    assert machine.run(time.monotonic_ns() - 1) == Stop(StopReason.SLICE)


def test_stale_kick_is_no_excuse_for_a_real_one(rig: Rig) -> None:
    """A timer interrupt that came between two entries must not swallow the kick that follows."""
    machine = start(rig, OUT + b"\xeb\xfc", RFLAGS_IF)
    Trigger(machine, rig.cpu.stop)
    assert machine.run(time.monotonic_ns() + 10**10) == Stop(StopReason.KICKED)
    machine.processor._running = True
    machine.processor._output_rose()
    assert machine.run(time.monotonic_ns() + 10**10) == Stop(StopReason.KICKED)


def test_timer_interrupt_of_a_busy_guest(rig: Rig) -> None:
    machine = start(rig, b"\xeb\xfe", RFLAGS_IF)
    lapic = machine.board.lapic
    lapic.write(0x3E0, 4, 0xB)
    lapic.write(0x320, 4, VECTOR)
    lapic.write(0x380, 4, 1_000_000)
    assert machine.go(10**10) == Stop(StopReason.HALTED)
    assert at_handler(machine) == (VECTOR, 0)


def test_clock_record_that_waits_for_a_frame(rig: Rig) -> None:
    """The record of a clone's clock lies in a shared page: it may have to wait, the guest with it."""
    record = 0x30_0000
    machine = start(rig, STI + HALT)
    machine.memory.write_u64(record, 0)
    machine.processor.kvm.msrs[0x4B564D01] = record | 1
    machine.go()
    clone = rig.clone(machine, machine.capture())
    stock, clone.processor.memory.frames = clone.processor.memory.frames, Magazine()
    for _ in range(2):
        assert clone.go() == Stop(StopReason.NO_FRAMES)
    clone.processor.memory.frames = stock
    assert clone.go() == Stop(StopReason.HALTED)
    assert (machine.memory.read_u32(record), clone.memory.read_u32(record)) == (2, 4)
    rig.allocator.drop(clone.take_dropped())


def test_steal_time_that_finds_no_frame(rig: Rig) -> None:
    machine = halted(rig, m.long_mode(HALT))
    machine.processor.kvm.msrs[0x4B564D03] = 0x30_0000 | 1
    stock, machine.processor.memory.frames = machine.processor.memory.frames, Magazine()
    machine.add_steal(1000)
    machine.processor.memory.frames = stock
    machine.add_steal(2000)
    assert machine.memory.read_u64(0x30_0000) == 2000
