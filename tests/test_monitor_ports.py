# SPDX-License-Identifier: GPL-2.0-or-later
"""Port instructions: who may use which port, and what is left when one is refused."""

from __future__ import annotations

import pytest

from tests import hw_modes as m
from tests.hw_rig import Machine, Rig, frame, vector_of
from vmm.memory.errors import OutOfFrames
from vmm.monitor import Stop, StopReason
from vmm.state import Segment
from vmm.x86.flags import RFLAGS_RF

MONITORS = ("hw", "bt")
GP = 13
RAX, RCX, RSI, RDI = 0, 1, 6, 7


class Probe:
    """A device at ports 0x500-0x50f that notes its accesses."""

    sizes = frozenset({1, 2, 4})

    def __init__(self, machine: Machine) -> None:
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int, int]] = []
        machine.board.ports.attach(0x500, 16, self, "probe")

    def read(self, offset: int, size: int) -> int:
        self.reads.append((offset, size))
        return 0x44332211 & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))


#: in al, dx with DX = 0x500; then a store that must not happen if it is refused
PORT_CODE = b"\xba\x00\x05\x00\x00\xf9\xec\xa2\x00\xa0\x00\x00\x40\xee"


@pytest.mark.parametrize("paging", [False, True])
def test_refused_port(rig: Rig, paging: bool) -> None:
    """#GP at the instruction, its flags exact, nothing after it done, nobody asked."""
    setup = m.protected(PORT_CODE, 3, paging=paging)
    machine = rig.machine(setup.state, setup.writes)
    probe = Probe(machine)
    assert machine.go() == Stop(StopReason.HALTED)
    assert vector_of(machine) == GP
    assert frame(machine, "4I") == [0, m.CODE + 6, m.UCODE32, RFLAGS_RF | 3]
    assert machine.processor.q[RAX] == 0
    assert machine.memory.read(0xA000, 1) == b"\0"
    assert probe.reads == probe.writes == []


def _permitted(rig: Rig, setup: m.Setup) -> bool:
    machine = rig.machine(setup.state, setup.writes)
    probe = Probe(machine)
    assert machine.go() == Stop(StopReason.HALTED)
    return bool(probe.reads)


def test_who_may_use_ports(rig: Rig) -> None:
    code = b"\xba\x00\x05\x00\x00\xec\xf4"
    assert _permitted(rig, m.protected(code))
    for mode, permitted in ((m.protected(code, 3), False), (m.long_mode(code, 3), False)):
        assert _permitted(rig, mode) is permitted
        mode.permit(0x500)
        assert _permitted(rig, mode)
    setup = m.protected(code, 3)
    setup.cpu.rflags = 0x3002
    assert _permitted(rig, setup)
    setup = m.v86(b"\xba\x00\x05\xec\xf4", iopl=3)
    assert not _permitted(rig, setup)
    setup.permit(0x500)
    assert _permitted(rig, setup)


def test_every_port_of_a_wide_access_counts(rig: Rig) -> None:
    setup = m.protected(b"\xba\x00\x05\x00\x00\xed\xf4", 3)
    setup.permit(0x500, 0x501, 0x503)
    assert not _permitted(rig, setup)
    setup.permit(0x500, 0x501, 0x502, 0x503)
    assert _permitted(rig, setup)


def test_permission_map_beyond_the_task(rig: Rig) -> None:
    setup = m.protected(b"\xba\x00\x05\x00\x00\xec\xf4", 3)
    setup.permit(0x500)
    setup.cpu.tr = Segment(m.TASK, 0x8B, 0x67 + 0xA0, m.TSS)
    assert not _permitted(rig, setup)


def test_string_instructions(rig: Rig) -> None:
    outsb = b"\xbe\x00\x90\x00\x00\xb9\x05\x00\x00\x00\xba\xf8\x03\x00\x00\xf3\x6e"
    insd = b"\xbf\x00\xa0\x00\x00\xb9\x03\x00\x00\x00\xba\x04\x05\x00\x00\xf3\x6d"
    setup = m.protected(outsb + insd + b"\xf4")
    setup.put(0x9000, b"hello")
    machine = rig.machine(setup.state, setup.writes)
    probe = Probe(machine)
    machine.go()
    assert machine.text == "hello"
    assert probe.reads == [(4, 4)] * 3
    assert machine.memory.read(0xA000, 16) == b"\x11\x22\x33\x44" * 3 + bytes(4)
    q = machine.processor.q
    assert (q[RSI], q[RDI], q[RCX]) == (0x9005, 0xA00C, 0)


def test_refused_string_instruction(rig: Rig) -> None:
    setup = m.protected(b"\xba\x00\x05\x00\x00\xb9\x05\x00\x00\x00\xf3\x6e", 3)
    machine = rig.machine(setup.state, setup.writes)
    probe = Probe(machine)
    machine.go()
    assert vector_of(machine) == GP and frame(machine, "2I") == [0, m.CODE + 10]
    assert probe.writes == [] and machine.processor.q[RCX] == 5


def test_port_check_without_a_frame(rig: Rig) -> None:
    """Looking at the permission map marks page tables, which may need a frame: the instruction waits."""
    setup = m.protected(b"\xba\x00\x05\x00\x00\xec\xf4", 3, paging=True)
    setup.permit(0x500)
    machine = rig.machine(setup.state, setup.writes)
    probe = Probe(machine)
    refused = iter([True, True])
    read = machine.processor.linear.read

    def short_of_frames(address: int, size: int) -> bytes:
        if next(refused, False):
            raise OutOfFrames("refused")
        return read(address, size)

    machine.processor.linear.read = short_of_frames  # type: ignore[method-assign]
    assert [machine.go().reason for _ in range(3)] == [StopReason.NO_FRAMES] * 2 + [StopReason.HALTED]
    assert probe.reads == [(0, 1)]
