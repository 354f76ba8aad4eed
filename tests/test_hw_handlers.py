# SPDX-License-Identifier: GPL-2.0-or-later
"""Exits as values, and handlers called with made-up ones on a guest that stands still."""

from __future__ import annotations

import pytest

from tests import hw_modes as m
from tests.hw_rig import Machine, Rig, halted
from vmm.exitcodes import INTERCEPT_BITS, ExitCode
from vmm.hw.exits import Fault, MsrAccess, NestedFault, Plain, RegisterMove, decode
from vmm.hw.handlers import HANDLERS, INTERCEPTS
from vmm.memory.errors import OutOfFrames
from vmm.memory.frames import Magazine
from vmm.monitor import Stop, StopReason
from vmm.silicon import layout as at
from vmm.x86.faults import GuestFault, Vector
from vmm.x86.flags import RFLAGS_IF

RAX, RCX, RDX, RBX = 0, 1, 2, 3


@pytest.fixture
def machine(rig: Rig) -> Machine:
    """Halted in 64-bit mode, its registers on the CPU."""
    return halted(rig, m.long_mode(b"\xf4"))


@pytest.mark.parametrize(("code", "info1", "info2", "value"), [
    (ExitCode.CPUID, 5, 6, Plain(ExitCode.CPUID)),
    (ExitCode.EXCP_PF, 6, 0x1234, Fault(14, 6, 0x1234)),
    (ExitCode.EXCP_GP, 0x10, 99, Fault(13, 0x10)),
    (ExitCode.EXCP_UD, 77, 99, Fault(6)),
    (ExitCode.NPF, 0, 0x5000, NestedFault(0x5000, False)),
    (ExitCode.NPF, 0x1_0000_0006, 0x5000, NestedFault(0x5000, True)),
    (ExitCode.NPF, 0x14, 0x5000, NestedFault(0x5000, False, True)),
    (ExitCode.MSR, 1, 0, MsrAccess(True)),
    (ExitCode.MSR, 0, 0, MsrAccess(False)),
    (ExitCode.CR8_WRITE, 0, 0, RegisterMove(False, 8, True)),
    (ExitCode.CR0_READ, 0, 0, RegisterMove(False, 0, False)),
    (ExitCode.DR7_WRITE, 0, 0, RegisterMove(True, 7, True)),
    (0x3FF, 1, 2, Plain(0x3FF)),
])
def test_exits_as_values(code: int, info1: int, info2: int, value: object) -> None:
    assert decode(code, info1, info2) == value


def test_every_intercept_has_a_handler_and_every_code_a_value() -> None:
    for code in INTERCEPTS:
        assert 0 <= code < INTERCEPT_BITS and code in HANDLERS
    for code in ExitCode:
        assert decode(code, 0, 0) is not None
    assert ExitCode.VMRUN in INTERCEPTS


def test_cpuid(machine: Machine) -> None:
    q = machine.processor.q
    q[RAX], q[RCX], rip = 0xFFFF_FFFF_0000_0000, 0, q[at.RIP]
    assert HANDLERS[ExitCode.CPUID](machine.processor, Plain(ExitCode.CPUID))
    assert (q[at.RIP], q[RAX], q[RBX]) == (rip + 2, 7, 0x68747541)


def test_hlt(machine: Machine) -> None:
    processor = machine.processor
    processor.halted = False
    assert not HANDLERS[ExitCode.HLT](processor, Plain(ExitCode.HLT))
    assert processor.halted and processor.verdict is None
    machine.board.lapic.write(0xF0, 4, 0x1FF)
    machine.board.lapic.accept(0x40)
    processor.q[at.RFLAGS] |= RFLAGS_IF
    assert HANDLERS[ExitCode.HLT](processor, Plain(ExitCode.HLT)), "an interrupt is ready: no need to leave"


def test_nested_faults(machine: Machine) -> None:
    processor, gpa = machine.processor, 0x20_0000
    handler = HANDLERS[ExitCode.NPF]
    assert handler(processor, NestedFault(gpa, False))
    assert machine.block.p2m.for_read(gpa, machine.frames) > 0
    assert handler(processor, NestedFault(0xFEE0_0000, False))
    assert handler(processor, NestedFault((1 << 52) - 4096, True)), "an address no bus has"
    processor.frames = Magazine()
    with pytest.raises(OutOfFrames):
        handler(processor, NestedFault(gpa + 4096, True))


def test_msr(machine: Machine) -> None:
    processor, q = machine.processor, machine.processor.q
    handler = HANDLERS[ExitCode.MSR]
    q[RCX], q[RAX], q[RDX], rip = 0x277, 0x0007_0406, 0xFFFF_FFFF_0000_0006, q[at.RIP]
    assert handler(processor, MsrAccess(True))
    q[RAX] = q[RDX] = 0
    assert handler(processor, MsrAccess(False))
    assert (q[RAX], q[RDX], q[at.RIP]) == (0x0007_0406, 6, rip + 4)
    q[RCX] = 0xDEAD
    for write in (False, True):
        with pytest.raises(GuestFault, match="#GP"):
            handler(processor, MsrAccess(write))
    assert q[at.RIP] == rip + 4


@pytest.mark.parametrize(
    "code", [ExitCode.VMRUN, ExitCode.VMLOAD, ExitCode.CLGI, ExitCode.MONITOR, ExitCode.XSETBV])
def test_what_this_processor_does_not_have(machine: Machine, code: ExitCode) -> None:
    with pytest.raises(GuestFault) as fault:
        HANDLERS[code](machine.processor, Plain(code))
    assert fault.value.vector == Vector.UD


def test_shutdown(machine: Machine) -> None:
    assert not HANDLERS[ExitCode.SHUTDOWN](machine.processor, Plain(ExitCode.SHUTDOWN))
    assert machine.processor.verdict == Stop(StopReason.CRASHED, "triple fault")


def test_exit_without_a_handler_crashes_the_guest_by_name(machine: Machine) -> None:
    processor = machine.processor
    assert not processor.intercepted(ExitCode.TASK_SWITCH)
    verdict = processor.verdict
    assert verdict is not None and verdict.reason is StopReason.CRASHED and "0x7d" in verdict.detail


def test_exits_are_counted_and_timed(machine: Machine) -> None:
    stats = machine.block.exit_stats
    before = {code: count for code, count, _ in stats.rows()}
    machine.processor.q[RAX] = 0
    for _ in range(5):
        machine.processor.intercepted(ExitCode.CPUID)
    rows = {code: (count, seconds) for code, count, seconds in stats.rows()}
    assert rows[ExitCode.CPUID][0] == before.get(ExitCode.CPUID, 0) + 5
    assert 0 < rows[ExitCode.CPUID][1] < 1
    assert stats.total() == sum(count for count, _ in rows.values())
