# SPDX-License-Identifier: GPL-2.0-or-later
"""Entering translated code and leaving it, on either CPU: registers, FPU, faults, misses, kicks."""

from __future__ import annotations

import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bt_cpu_rig import KINDS, Rig
from vmm.bt.native.block import FLAGS, LIVE_FLAGS, R8, REGISTERS, RIP
from vmm.bt.native.trampolines import FAULT, MISS, PREEMPTED

WORD = st.integers(0, 0xFFFF_FFFF)


@pytest.fixture(scope="module", params=KINDS)
def shared_rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig.of(request.param)
    yield rig
    rig.close()


@pytest.fixture
def rig(shared_rig: Rig) -> Iterator[Rig]:
    """The CPU with nothing mapped, registers zero, no kick under way."""
    shared_rig.reset()
    yield shared_rig
    shared_rig.rest()


def test_a_stub_says_its_number(rig: Rig) -> None:
    for number in (0, 1, 7, 255):
        assert rig.cpu.enter(rig.block, rig.cpu.arena.stub(number)) == number


def test_all_registers_and_flags_survive_the_way_in_and_out(shared_rig: Rig) -> None:
    rig, block = shared_rig, shared_rig.block

    @settings(max_examples=50, deadline=None)
    @given(st.lists(WORD, min_size=12, max_size=12), WORD)
    def check(values: list[int], flags: int) -> None:
        places = (*REGISTERS, *range(R8, R8 + 4))
        for index, value in zip(places, values):
            block.q[index] = value | 0xDEAD_0000_0000_0000    # upper halves are not entered with
        block.q[FLAGS] = flags
        assert rig.run("") == 0
        assert [block.d[2 * index] for index in places] == values
        assert block.q[FLAGS] & LIVE_FLAGS == flags & LIVE_FLAGS
        # trap, nested task, alignment check and identification never reach the host
        assert block.q[FLAGS] & ~LIVE_FLAGS == 0x202

    check()


def test_upper_halves_are_zero_in_translated_code(rig: Rig) -> None:
    rig.block.q[REGISTERS[3]] = 0xFFFF_FFFF_8000_0000
    rig.run("48C1EB20 89D9")      # shr rbx, 32; mov ecx, ebx
    assert rig.block.q[REGISTERS[1]] == 0


def test_fpu_and_sse_state_stay_the_guests(rig: Rig) -> None:
    image = bytearray(rig.block.fx)
    for number in range(8):
        image[160 + 16 * number:176 + 16 * number] = bytes([number + 1] * 16)
    image[0:2] = struct.pack("<H", 0x0F7F)       # x87: round to zero
    image[24:28] = struct.pack("<I", 0x0000_7F80 | 1 << 31)     # a reserved bit would fault
    rig.block.load_fx(bytes(image))
    assert rig.run("D9E8") == 0                  # fld1
    sum(0.5 * n for n in range(100))             # Python uses xmm registers
    assert rig.run("0F58C1 D9E8") == 0           # addps xmm0, xmm1; fld1
    assert bytes(rig.block.fx[160 + 16:160 + 128]) == bytes(image[176:160 + 128])
    assert struct.unpack_from("<H", rig.block.fx, 0)[0] == 0x0F7F
    assert struct.unpack_from("<I", rig.block.fx, 24)[0] & 0x7FC0 == 0x7F80 & 0x7FC0
    assert rig.block.fx[4] == 0b1100_0000        # two x87 registers in use
    rig.block.load_fx(bytes(32) + bytes(480))


FAULTS = [
    ("page", "65678B03", 14, 4),                 # mov eax, gs:[ebx]
    ("write", "65678903", 14, 6),
    ("divide", "31C9 F7F1", 0, 0),
    ("invalid", "0F0B", 6, 0),
    ("x87", "DBE3 6567D92C2500000000 D9EE D9E8 DEF1 9B", 16, 0),     # 1/0 unmasked, fwait
]


@pytest.mark.parametrize(("name", "code", "vector", "error"), FAULTS, ids=[row[0] for row in FAULTS])
def test_faults_come_back_with_all_there_is_to_know(
        rig: Rig, name: str, code: str, vector: int, error: int) -> None:
    rig.window.map(0, 0)
    rig.pool.view[0:4] = bytes(4)                # as control word: everything unmasked
    rig.block.set("rbx", 0x8765_4321)
    assert rig.run(code) == FAULT
    fault = rig.block.fault()
    assert (fault.vector, fault.error) == (vector, error)
    assert 0 <= fault.rip - rig.cpu.arena.units < len(bytes.fromhex(code))
    if vector == 14:
        assert fault.address == rig.window.base + 0x8765_4321
    rig.block.load_fx(struct.pack("<H22xI484x", 0x37F, 0x1F80))


def test_a_fault_is_resumed_where_it_struck(rig: Rig) -> None:
    """Page zero of the guest is a page like any other."""
    rig.block.set("rax", 5)
    assert rig.run("83C001 6567890425 10000000 83C001") == FAULT     # add; mov gs:[0x10], eax; add
    rig.window.map(0, 3, writable=True)
    assert rig.cpu.enter(rig.block, rig.block.q[RIP]) == 0
    assert rig.block.get("rax") == 7
    assert rig.pool.page(3)[0x10] == 6


def test_a_store_to_a_read_only_page_says_so(rig: Rig) -> None:
    rig.window.map(1, 1)
    assert rig.run("6567880425 00100000") == FAULT
    # whether the host had the page present already says nothing about the guest
    assert rig.block.fault().error & ~1 == 6


def test_jumps_through_the_table(rig: Rig) -> None:
    rig.cpu.arena.write(rig.cpu.arena.units, bytes.fromhex("43FF24C7"))
    target = rig.put("B801000000", offset=64, stub=9)
    for guest in (0, 0x1234, 0xFFFF_FFFF):
        rig.block.set("r8", guest)
        assert rig.cpu.enter(rig.block, rig.cpu.arena.units) == MISS
        assert rig.block.get("r8") == guest
        rig.table.set(guest, target)
        assert rig.cpu.enter(rig.block, rig.cpu.arena.units) == 9
        rig.table.drop(guest)
        assert rig.cpu.enter(rig.block, rig.cpu.arena.units) == MISS


def test_time_makes_a_guest_leave_that_never_would(rig: Rig) -> None:
    unit = rig.cpu.arena.units
    rig.cpu.arena.write(unit, bytes.fromhex("83C001 EBFB"))
    for _ in range(3):
        rig.cpu.timer.at(time.monotonic_ns() + 2_000_000)
        before = rig.block.get("rax")
        address = unit
        while rig.block.get("rax") == before:      # a kick may have been left over
            assert rig.cpu.enter(rig.block, address) == PREEMPTED
            address = rig.block.q[RIP]
            assert address in (unit, unit + 3)


def test_input_makes_a_guest_leave(rig: Rig) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        rig.cpu.timer.on_readable(ours.fileno())
        rig.cpu.arena.write(rig.cpu.arena.units, bytes.fromhex("EBFE"))
        threading.Thread(target=theirs.send, args=(b"x",)).start()
        assert rig.cpu.enter(rig.block, rig.cpu.arena.units) == PREEMPTED


def test_a_kick_before_the_entry_is_not_lost(rig: Rig) -> None:
    rig.block.set("rax", 77)
    unit = rig.put("83C001")
    rig.cpu.kick()
    assert rig.cpu.enter(rig.block, unit) == PREEMPTED
    assert (rig.block.get("rax"), rig.block.q[RIP]) == (77, unit)
    assert rig.cpu.enter(rig.block, rig.block.q[RIP]) == 0
    assert rig.block.get("rax") == 78


def test_kicks_anywhere_change_nothing_the_guest_sees(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kicks every 50 us strike trampolines, units and stubs alike; the guest counts on."""
    monkeypatch.setattr(sys.modules[type(rig.cpu.timer).__module__], "_REPEAT_NS", 50_000)
    rig.cpu.timer.at(1)
    unit = rig.put("8D4001 8D5B02 8D7603")      # lea, so that flags stay
    preempted = 0
    try:
        for _ in range(4000):
            address = unit
            while rig.cpu.enter(rig.block, address) == PREEMPTED:
                preempted += 1
                address = rig.block.q[RIP]
    finally:
        rig.cpu.timer.rest()
    assert [rig.block.get(name) for name in ("rax", "rbx", "rsi")] == [4000, 8000, 12000]
    assert preempted


def test_single_steps_strike_after_each_instruction_and_leave_by_stubs(rig: Rig) -> None:
    unit = rig.put("83C001 83C002", stub=4)
    at = []
    address = unit
    while (left := rig.cpu.step(rig.block, address)) == FAULT:
        assert rig.block.fault().vector == 1
        address = rig.block.q[RIP]
        at.append(address - unit)
    assert (at, left, rig.block.get("rax")) == ([3, 6], 4, 3)
    assert rig.run("") == 0      # and no trap flag is left behind


def test_several_guests_in_one_process(rig: Rig) -> None:
    other_window = rig.cpu.new_window(rig.pool, rig.budget)
    other = rig.new_block(other_window)
    unit = rig.put("6567 8B0425 00000000")
    rig.window.map(0, 10)
    other_window.map(0, 11)
    rig.pool.page(10)[0], rig.pool.page(11)[0] = 1, 2
    for _ in range(3):
        assert rig.cpu.enter(rig.block, unit) == rig.cpu.enter(other, unit) == 0
        assert (rig.block.get("rax"), other.get("rax")) == (1, 2)
    other.close()
    other_window.close()


def test_string_sequences_stop_at_the_guard(rig: Rig) -> None:
    """rep stosd from the last page on: it faults behind the window, with edi and ecx as far as they came."""
    rig.window.map(0xFFFFF, 7, writable=True)
    rig.block.set("rdi", 0xFFFF_FFF0)
    rig.block.set("rcx", 100)
    rig.block.set("rax", 0x01010101)
    assert rig.run("4A8D3C27 F3AB 89FF") == FAULT
    assert rig.block.fault().address == rig.window.base + (1 << 32)
    assert (rig.block.get("rcx"), rig.block.get("rdi")) == (96, 0)
    assert bytes(rig.pool.page(7)[0xFF0:]) == b"\1" * 16
