# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that is stopped again and again loses no instruction: least of all one the monitor carries out."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator

import pytest

from tests import hw_modes as modes
from tests.hw_rig import Rig, vector_of
from vmm.monitor import StopReason

MONITORS = ("hw", "bt")
GP = 13
_ROUNDS = 20_000
_SLICE_NS = 30_000
_STOPPED = (StopReason.SLICE, StopReason.KICKED)
_PORT = 0x500
_SYSENTER_CS, _SYSENTER_ESP, _SYSENTER_EIP = 0x174, 0x175, 0x176
_STAR, _LSTAR = 0xC000_0081, 0xC000_0082

_ENTRY = modes.CODE + 0x80
#: inc ecx (or r8, which SYSCALL leaves alone); the call; once more if it comes back here
_SYSENTER = b"\x41\x0f\x34\xeb\xfb"
_SYSCALL = b"\x49\xff\xc0\x0f\x05\xeb\xf9"
#: mov al, 7; out dx, al
_OUT = b"\xb0\x07\xee"


class Counter:
    """A device that counts what is written to it."""

    sizes = frozenset({1})

    def __init__(self) -> None:
        self.writes = 0

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes += 1


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.clear()


def _entry(increment: bytes, compare: bytes) -> bytes:
    """Count the call and write to the port; then the next round, or halt."""
    body = increment + _OUT + compare
    back = modes.CODE - (_ENTRY + len(body) + 6)
    return body + b"\x0f\x82" + struct.pack("<i", back) + b"\xfa\xf4"     # jb CODE; cli; hlt


def _setup(mode: str) -> modes.Setup:
    limit = struct.pack("<I", _ROUNDS)
    if mode == "sysenter":
        setup = modes.protected(_SYSENTER)
        setup.cpu.msrs = {_SYSENTER_CS: modes.CODE32, _SYSENTER_ESP: modes.STACK, _SYSENTER_EIP: _ENTRY}
        entry = _entry(b"\x43", b"\x81\xf9" + limit)                       # inc ebx; cmp ecx, limit
    else:
        setup = modes.long_mode(_SYSCALL)
        setup.cpu.msrs = {_STAR: modes.CODE64 << 32, _LSTAR: _ENTRY}
        entry = _entry(b"\xff\xc3", b"\x49\x81\xf8" + limit)               # inc ebx; cmp r8, limit
    setup.put(_ENTRY, entry)
    setup.cpu.gpr[2] = _PORT
    return setup


@pytest.mark.parametrize("mode", ["sysenter", "syscall"])
def test_calls_and_port_writes_are_all_carried_out(rig: Rig, mode: str) -> None:
    setup, counter = _setup(mode), Counter()
    machine = rig.machine(setup.state, setup.writes)
    machine.board.ports.attach(_PORT, 1, counter, "counter")
    slices = 0
    while (stop := machine.run(time.monotonic_ns() + _SLICE_NS)).reason in _STOPPED:
        slices += 1
    assert stop.reason is StopReason.HALTED
    calls = machine.capture().cpu.gpr
    assert (calls[1] if mode == "sysenter" else calls[8], calls[3], counter.writes) == (_ROUNDS,) * 3
    assert slices > 10


def test_a_stop_during_a_refused_port_access_is_no_endless_loop(
        rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt that is pending before the rest of the block is undone must not come again and again."""
    setup = modes.protected(b"\xba\x00\x05\x00\x00\xec\xf4", 3)           # mov edx, 0x500; in al, dx; hlt
    machine = rig.machine(setup.state, setup.writes)
    abort = rig.cpu._abort

    def abort_and_interrupt() -> None:
        abort()
        rig.cpu.stop()

    monkeypatch.setattr(rig.cpu, "_abort", abort_and_interrupt)
    assert machine.go().reason is StopReason.HALTED
    assert vector_of(machine) == GP
