# SPDX-License-Identifier: GPL-2.0-or-later
"""What code on the emulated CPU could do if the verifier had let anything pass: nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bt_cpu_rig import Rig
from vmm.bt.emulated.arena import Arena
from vmm.bt.native.trampolines import FAULT
from vmm.silicon.guest import EngineFault
from vmm.x86.faults import Vector


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    rig = Rig.of("emulated")
    rig.window.map(0, 0, writable=True)
    yield rig
    rig.close()


def load(address: int) -> str:
    """mov rax, [address]"""
    return "48A1" + address.to_bytes(8, "little").hex()


def store(address: int) -> str:
    """mov [address], rax"""
    return "48A3" + address.to_bytes(8, "little").hex()


def test_other_guests_windows_and_tables_are_out_of_reach(rig: Rig) -> None:
    window, table = rig.cpu.new_window(rig.pool, rig.budget), rig.cpu.new_table()
    window.map(0, 1, writable=True)
    table.set(0, rig.cpu.arena.stub(1))
    block = rig.new_block(window)
    block.set("jump_table", table.base)
    assert rig.cpu.enter(block, rig.put(load(window.base) + load(table.base))) == 0
    for base in (window.base, table.base):
        for code, error in ((load(base), 4), (store(base), 6)):
            assert rig.run(code) == FAULT
            assert rig.block.fault()[:3] == (Vector.PF, error, base)
    block.close()
    window.close()
    table.close()


def test_code_and_jump_tables_are_read_only(rig: Rig) -> None:
    rig.table.set(0, rig.cpu.arena.stub(1))
    for address in (rig.cpu.arena.units, rig.cpu.arena.stubs, rig.cpu.arena.base, rig.table.base):
        assert rig.run(store(address)) == FAULT
        assert rig.block.fault()[:3] == (Vector.PF, 7, address)
    rig.table.clear()


def test_nothing_lies_around(rig: Rig) -> None:
    arena = rig.cpu.arena
    around = [rig.window.base - 8, rig.window.base + (1 << 32), arena.base - 8, arena.base + arena.size, 0,
              rig.pool.base, 1 << 38, rig.table.base - 8, 0xFFFF_8000_0000_0000, 0xFFFF_FFFF_FFFF_F000]
    for address in around:
        assert rig.run(load(address)) == FAULT
        assert rig.block.fault()[:3] == (Vector.PF, 4, address)


PRIVILEGED = {
    "hlt": "F4", "cli": "FA", "mov from cr0": "0F20C0", "mov to cr3": "0F22D8", "mov to dr7": "0F23F8",
    "lgdt": "0F0114250000000000", "lidt": "0F011C250000000000", "rdmsr": "0F32", "wrmsr": "0F30",
    "invlpg": "0F013C2500000000", "wbinvd": "0F09", "clts": "0F06", "swapgs": "0F01F8", "sysret": "480F07",
    "vmrun": "0F01D8", "clgi": "0F01DD", "ltr": "0F00D8", "lldt": "0F00D0"}


@pytest.mark.parametrize("code", PRIVILEGED.values(), ids=PRIVILEGED)
def test_privileged_instructions_fault(rig: Rig, code: str) -> None:
    rig.block.set("rax", 0)
    unit = rig.put(code)
    assert rig.cpu.enter(rig.block, unit) == FAULT
    assert rig.block.fault().vector in (Vector.GP, Vector.UD) and rig.block.fault().rip == unit
    assert rig.run("83C001", stub=3) == 3


def test_software_interrupts_leave_nothing_behind(rig: Rig) -> None:
    for code, vector in (("CD80", 0x80), ("CC", Vector.BP)):
        assert rig.run(code) == FAULT
        assert rig.block.fault().vector == vector
        unit = rig.put("0F0B")
        assert rig.cpu.enter(rig.block, unit) == FAULT
        assert rig.block.fault().rip == unit
        rig.block.set("rax", 6)
        assert rig.run("83C001", stub=3) == 3
        assert rig.block.get("rax") == 7


@pytest.mark.parametrize("code", ["41FFE4", "41FF2424", "E900000080", "0F05"],
                         ids=["jump into the window", "jump by way of it", "jump to nowhere", "syscall"])
def test_what_verified_code_cannot_do_ends_the_run_with_an_error(rig: Rig, code: str) -> None:
    rig.pool.q[0] = rig.window.base + 8
    with pytest.raises(EngineFault):
        rig.run(code)
    assert rig.run("83C001", stub=3) == 3


@pytest.mark.parametrize(("size", "stubs"), [(0x3000, 1024), (0x2800, 1), (0x2000, 1)])
def test_an_arena_needs_room(size: int, stubs: int) -> None:
    with pytest.raises(ValueError, match="no room"):
        Arena(size, stubs, b"", 1 << 32)


def test_only_units_are_written(rig: Rig) -> None:
    arena = rig.cpu.arena
    for address in (arena.base, arena.stubs, arena.units - 1, arena.base + arena.size - 1):
        with pytest.raises(ValueError, match="not among the units"):
            arena.write(address, b"\x90\x90")
    assert arena.read(arena.stub(1), 16) == arena.read(arena.stub(2), 16)
