# SPDX-License-Identifier: GPL-2.0-or-later
"""Kicks of the emulated CPU: its own, those of the monitor's silicon, and of CPUs that are gone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from tests.bt_cpu_rig import Rig
from vmm.bt.emulated.cpu import EmulatedCpu
from vmm.bt.native.block import RIP
from vmm.bt.native.trampolines import FAULT, MISS, PREEMPTED
from vmm.silicon.cpu import Cpu
from vmm.silicon.layout import SiliconError


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig.of("emulated")
    yield rig
    rig.close()


def kick(number: int) -> None:
    os.kill(os.getpid(), number)


def test_stops_of_the_silicon_are_kicks(rig: Rig) -> None:
    silicon = Cpu(rig.pool)
    try:
        rig.cpu.join(silicon.kicker)
        unit = rig.put("83C001")
        kick(silicon.kicker.signal)
        assert rig.cpu.enter(rig.block, unit) == PREEMPTED
        kick(silicon.kicker.signal)
        rig.cpu.forget_kick()
        assert rig.cpu.enter(rig.block, unit) == 0
        silicon.kicker.at(time.monotonic_ns() + 2_000_000)
        endless = rig.cpu.arena.units + 64
        rig.cpu.arena.write(endless, bytes.fromhex("EBFE"))
        assert rig.cpu.enter(rig.block, endless) == PREEMPTED
        silicon.rest()
        rig.cpu.close()
        kick(silicon.kicker.signal)
        assert silicon.kicker.signal > 0
    finally:
        silicon.close()


def test_kicks_on_the_way_in_and_out_lose_no_step(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kicks every 15 us strike all there is between an entry and the way out, by stub, miss and fault."""
    monkeypatch.setattr("vmm.silicon.kick._REPEAT_NS", 15_000)
    jump = rig.cpu.arena.units + 64
    rig.cpu.arena.write(jump, bytes.fromhex("8D4001 43FF24C7"))
    ways = {rig.put("8D4001", stub=1): 1, jump: MISS, rig.put("8D4001 0F0B", offset=128): FAULT}
    preempted = 0
    rig.cpu.timer.at(1)
    for _ in range(1500):
        for unit, expected in ways.items():
            address = unit
            while (left := rig.cpu.enter(rig.block, address)) == PREEMPTED:
                preempted += 1
                address = rig.block.q[RIP]
            assert left == expected
    rig.cpu.timer.rest()
    assert rig.block.get("rax") == 3 * 1500
    assert preempted


def test_single_steps_among_kicks(rig: Rig) -> None:
    unit = rig.put("8D4001 8D4001", stub=4)
    for _ in range(50):
        address, steps = unit, 0
        while True:
            kick(rig.cpu.timer.signal)
            assert rig.cpu.step(rig.block, address) == PREEMPTED
            assert rig.block.q[RIP] == address
            left = rig.cpu.step(rig.block, address)
            if left != FAULT:
                break
            address, steps = rig.block.q[RIP], steps + 1
        assert (left, steps) == (4, 2)
    assert rig.block.get("rax") == 100


def test_an_engine_that_does_not_stop_as_it_should_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EmulatedCpu, "kick", lambda self: None)
    with pytest.raises(SiliconError, match="does not stop as it should"):
        EmulatedCpu(1 << 20, 64)
