# SPDX-License-Identifier: GPL-2.0-or-later
"""Units as the conventions have them, accepted by the verifier and run on either CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bt_cpu_rig import KINDS, Rig
from tests.bt_units import jump
from vmm.bt.native.arena import STUB_BYTES
from vmm.bt.native.trampolines import FAULT, MISS
from vmm.bt.verify import Layout, Verifier


class Machine:
    """A rig whose arena is written only with what its verifier accepted."""

    def __init__(self, kind: str) -> None:
        self.rig = Rig.of(kind)
        arena = self.rig.cpu.arena
        self.units = arena.units
        self.verifier = Verifier(
            Layout(arena.units, arena.units_bytes, arena.stubs, STUB_BYTES, arena.stub_count))
        self.rig.window.map(0, 0, 16, writable=True)
        self.memory = self.rig.pool.view

    def install(self, offset: int, code: str, target: int | None = None, stub: int = 0) -> int:
        """A unit that goes on to `target`, or to a stub; its address."""
        address = self.units + offset
        data = bytes.fromhex(code)
        data += jump(address + len(data), self.rig.cpu.arena.stub(stub) if target is None else target)
        self.verifier.accept([data], address)
        self.rig.cpu.arena.write(address, data)
        return address

    def run(self, address: int, **registers: int) -> int:
        for name, value in registers.items():
            self.rig.block.set(name, value)
        return self.rig.cpu.enter(self.rig.block, address)

    def get(self, name: str) -> int:
        return self.rig.block.get(name)


@pytest.fixture(params=KINDS)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    machine = Machine(request.param)
    yield machine
    machine.rig.close()


def test_call_and_return_through_the_table(machine: Machine) -> None:
    """call: push the return address 0x1234, go to the callee; ret: pop it, jump through the table."""
    back = machine.install(0x100, "8D4001", stub=5)
    callee_code = bytes.fromhex("8D4064 6567448B0424 8D642404 43FF24C7")
    callee = machine.units + 0x200
    machine.verifier.accept([callee_code], callee)
    machine.rig.cpu.arena.write(callee, callee_code)
    caller = machine.install(0, "6567C74424FC34120000 8D6424FC", target=callee)
    assert machine.run(caller, rsp=0x8000, rax=0) == MISS
    assert (machine.get("r8"), machine.get("rsp"), machine.get("rax")) == (0x1234, 0x8000, 100)
    machine.rig.table.set(0x1234, back)
    assert machine.run(caller, rsp=0x8000, rax=0) == 5
    assert machine.get("rax") == 101


def test_a_stub_is_patched_into_a_chain(machine: Machine) -> None:
    first = machine.install(0, "8D4001", stub=1)
    assert machine.run(first, rax=0) == 1
    second = machine.install(0x40, "8D400A", stub=2)
    site = first + 4
    machine.rig.cpu.arena.write(site, machine.verifier.patch(site, second))
    assert machine.run(first, rax=0) == 2
    assert machine.get("rax") == 11


def test_a_unit_over_the_trailing_jump_is_fallen_into(machine: Machine) -> None:
    first = machine.install(0, "8D4001", stub=1)
    machine.install(3, "8D400A", stub=2)
    assert machine.run(first, rax=0) == 2
    assert machine.get("rax") == 11


@pytest.mark.parametrize(("flags", "edi", "esi"), [(0x202, 0x4028, 0x3028), (0x602, 0x3FD8, 0x2FD8)])
def test_string_moves_in_both_directions(machine: Machine, flags: int, edi: int, esi: int) -> None:
    machine.memory[0x2000:0x4000] = bytes(range(256)) * 32
    unit = machine.install(0, "4A8D3C27 65F3A5 89FF 89F6")
    assert machine.run(unit, flags=flags, rcx=10, rsi=0x3000, rdi=0x4000) == 0
    assert (machine.get("rcx"), machine.get("rdi"), machine.get("rsi")) == (0, edi, esi)
    low = min(edi, 0x4000) + (4 if flags & 0x400 else 0)
    assert machine.memory[low:low + 40] == machine.memory[low - 0x1000:low - 0x1000 + 40]


def test_a_string_move_is_begun_again_after_a_fault(machine: Machine) -> None:
    """The registers in the block count guest addresses, as far as the move got."""
    unit = machine.install(0, "4A8D3C27 F3AA 89FF")
    assert machine.run(unit, rcx=0x20, rdi=0xFFF0, rax=7) == FAULT
    assert (machine.get("rcx"), machine.get("rdi")) == (0x10, 0x10000)
    machine.rig.window.map(16, 20, writable=True)
    assert machine.run(unit) == 0
    assert (machine.get("rcx"), machine.get("rdi")) == (0, 0x10010)
    assert bytes(machine.rig.pool.page(20)[:0x11]) == b"\7" * 16 + b"\0"


def test_bit_strings_reach_no_further_than_the_guards(machine: Machine) -> None:
    """bts gs:[0], ebx with the most distant bits: 256 MiB below the window, and above its beginning."""
    unit = machine.install(0, "65670FAB1C2500000000")
    for offset in (0x8000_0000, 0x7FFF_FFFF):
        assert machine.run(unit, rbx=offset) == FAULT
        distance = machine.rig.block.fault().address - machine.rig.window.base
        assert -(256 << 20) <= distance < 1 << 32


def test_addresses_wrap_at_four_gibibytes(machine: Machine) -> None:
    machine.memory[0x10] = 0x5A
    unit = machine.install(0, "65670FB64310")      # movzx eax, gs:[ebx + 0x10], at 2^32
    machine.memory[0] = 0xA5
    assert machine.run(unit, rbx=0xFFFF_FFF0) == 0
    assert machine.get("rax") == 0xA5
