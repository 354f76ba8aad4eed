# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests whose handlers halt: which one did, and what is on its stack."""

from __future__ import annotations

import struct
from typing import NamedTuple

from tests import hw_modes as m
from tests.hw_rig import Machine, Rig
from vmm.monitor import Stop, StopReason
from vmm.silicon import layout as at
from vmm.x86.flags import CR0_PE

UD2, INT30, NOP = b"\x0f\x0b", b"\xcd\x30", b"\x90"

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
