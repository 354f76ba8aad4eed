# SPDX-License-Identifier: GPL-2.0-or-later
"""The translation cache: chains and fall-throughs, and what becomes of them when units die."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.bt_guest import FLAT, Guest, PageFault, Stop
from vmm.bt import emit
from vmm.bt.cache import Callout, Edge
from vmm.bt.mode import Mode
from vmm.bt.native.trampolines import FAULT, PREEMPTED
from vmm.bt.table import Kind
from vmm.bt.template import fixed
from vmm.bt.unit import Mark

HLT = "F4"
DONE = 0x5000
#: inc eax; jmp 0x2000   /   inc ecx; jmp 0x5000
FIRST, SECOND = "40 E9FA0F0000", "41 E9FA2F0000"


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    guest.write(DONE, bytes.fromhex(HLT))
    yield guest
    guest.close()


def put(guest: Guest, address: int, code: str) -> None:
    guest.write(address, bytes.fromhex(code))


def two_units(guest: Guest) -> None:
    put(guest, 0x1000, FIRST)
    put(guest, 0x2000, SECOND)
    guest.registers = [0] * 8
    assert guest.run(0x1000) == Stop("callout", DONE)


def test_a_jump_to_what_is_translated_next_becomes_a_fall_through(guest: Guest) -> None:
    two_units(guest)
    first, second = guest.cache.find(FLAT, 0x1000), guest.cache.find(FLAT, 0x2000)
    assert first is not None and second is not None
    assert second.address == first.address + len(first.unit.host) == first.address + 2
    assert guest.cache.counters.elided == 2
    assert first.edges[0].target is second


def test_a_unit_that_falls_into_a_dead_one_dies_too(guest: Guest) -> None:
    two_units(guest)
    put(guest, 0x2000, "49 E9FA2F0000")      # dec ecx
    assert guest.cache.find(FLAT, 0x1000) is None
    assert guest.run(0x1000) == Stop("callout", DONE)
    assert guest.registers[:2] == [2, 0]


def test_a_jump_to_a_dead_unit_asks_the_monitor_again(guest: Guest) -> None:
    put(guest, 0x1000, FIRST)
    put(guest, 0x2000, SECOND)
    guest.cache.get(FLAT, 0x2000, guest.fetch)
    guest.registers = [0] * 8
    guest.run(0x1000)
    first = guest.cache.find(FLAT, 0x1000)
    assert first is not None and first.unit.successors[0].chained
    put(guest, 0x2000, "83C109 E9F82F0000")  # add ecx, 9
    assert first.alive and not first.unit.successors[0].chained and first.edges[0].target is None
    guest.run(0x1000)
    assert guest.registers[:2] == [2, 10]
    assert first.unit.successors[0].chained


def test_a_published_unit_that_dies_is_missed_again(guest: Guest) -> None:
    put(guest, 0x1000, "B800200000 FFE0")    # mov eax, 0x2000; jmp eax
    put(guest, 0x2000, SECOND)
    guest.registers = [0] * 8
    guest.run(0x1000)
    assert guest.table.get(0x2000) == guest.cache.get(FLAT, 0x2000, guest.fetch).address
    put(guest, 0x2000, HLT)
    assert guest.table.get(0x2000) == 0
    assert guest.run(0x1000) == Stop("callout", 0x2000)


def test_an_instruction_over_a_page_boundary_belongs_to_both_pages(guest: Guest) -> None:
    put(guest, 0x1FFE, "B878563412 F4")      # mov eax, 0x12345678
    assert guest.run(0x1FFE) == Stop("callout", 0x2003)
    assert guest.registers[0] == 0x12345678
    put(guest, 0x2001, "AA")
    assert guest.cache.find(FLAT, 0x1FFE) is None
    guest.run(0x1FFE)
    assert guest.registers[0] == 0x12AA5678


def test_a_unit_ends_before_an_instruction_whose_second_page_is_missing(guest: Guest) -> None:
    end = guest.pages << 12
    put(guest, end - 3, "40 B878")
    assert guest.run(end - 3) == Stop("fetch", end - 2)
    assert guest.registers[0] == 1
    with pytest.raises(PageFault):
        guest.cache.get(FLAT, end - 2, guest.fetch)


def test_linear_memories_and_modes_are_apart(guest: Guest) -> None:
    put(guest, 0x1000, FIRST)
    modes = [Mode(), Mode(space=1), Mode(fpu=False, sse=False)]
    units = [guest.cache.get(mode, 0x1000, guest.fetch) for mode in modes]
    assert len(set(units)) == 3
    assert guest.cache.invalidate(1, 1) == 1
    assert [unit.alive for unit in units] == [True, False, True]
    assert guest.cache.forget(0) == 2 and len(guest.cache) == 0


def test_every_stub_comes_back(guest: Guest) -> None:
    two_units(guest)
    put(guest, 0x3000, "7405 7403 F4 C3")
    guest.run(0x3000)
    used = sum(what is not None for what in guest.cache.exits)
    edges = [what for what in guest.cache.exits if isinstance(what, Edge)]
    callouts = [what for what in guest.cache.exits if isinstance(what, Callout)]
    assert used == len(edges) + len(callouts) and {what.eip for what in callouts} == {DONE, 0x3004}
    guest.cache.forget(0)
    assert all(what is None for what in guest.cache.exits)
    assert not guest.cache.verifier.entries and not guest.cache.verifier.sites


def test_code_that_is_written_all_the_time(guest: Guest) -> None:
    """Translations come and go more often than the arena has room for."""
    guest.registers = [0] * 8
    for value in range(3000):
        put(guest, 0x1000, f"B8{value.to_bytes(4, 'little').hex()} 90909090909090909090 E9EC3F0000")
        assert guest.run(0x1000) == Stop("callout", DONE)
        assert guest.registers[0] == value
    assert guest.cache.counters.invalidated == 2999
    assert len(guest.cache) == 2


def test_a_host_address_has_its_guest_instruction(guest: Guest) -> None:
    put(guest, 0x1000, "40 50 58 F4")        # inc eax; push eax; pop eax; hlt
    made = guest.cache.get(FLAT, 0x1000, guest.fetch)
    assert [piece.mark for piece in made.unit.pieces] == [
        Mark.IDENT, Mark.INLINE, Mark.INLINE, Mark.CALLOUT]
    found = [guest.cache.eip_at(made.address + offset) for offset in range(len(made.unit.host))]
    assert found == sorted(eip for eip in found if eip is not None)
    assert set(found) == {0x1000, 0x1001, 0x1002, 0x1003}
    assert guest.cache.eip_at(made.address - 1) is None
    assert guest.cache.eip_at(made.address + len(made.unit.host)) is None


def test_a_string_instruction_is_resumed_at_its_start(guest: Guest) -> None:
    put(guest, 0x1000, "F3A4 F4")            # rep movsb
    guest.registers = [0, 0x20, 0, 0, 0, 0, 0x8000, 0x3F_FFF0]     # the destination runs out of memory
    made = guest.cache.get(FLAT, 0x1000, guest.fetch)
    assert guest.cpu.enter(guest.block, made.address) == FAULT
    rip = guest.block.fault().rip
    assert rip == made.address + 4 and guest.cache.resume_at(rip) == made.address
    assert guest.cache.eip_at(rip) == 0x1000
    assert (guest.registers[1], guest.registers[7]) == (0x10, 0x40_0000)
    # behind the move itself nothing is to be repeated
    assert guest.cache.resume_at(made.address + 7) == made.address + 7


def test_a_kick_ends_an_endless_loop_and_it_goes_on(guest: Guest) -> None:
    put(guest, 0x1000, "40 75FD F4")         # loop: inc eax; jnz loop
    made = guest.cache.get(FLAT, 0x1000, guest.fetch)
    guest.registers = [1] + [0] * 7
    guest.cpu.timer.at(time.monotonic_ns() + 1_000_000)
    left = guest.cpu.enter(guest.block, made.address)
    guest.cpu.timer.rest()
    assert left == PREEMPTED
    assert guest.registers[0] > 1
    guest.registers = [0xFFFF_FFF0] + [0] * 7
    assert guest.run(0x1000) == Stop("callout", 0x1003)
    assert guest.registers[0] == 0


def test_a_unit_the_verifier_rejects_is_left_to_the_monitor(
        guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    # syscall
    monkeypatch.setitem(emit.BUILDERS, Kind.INC_DEC, lambda form, mode: fixed(Mark.IDENT, form, b"\x0F\x05"))
    put(guest, 0x1000, "40 F4")
    assert guest.run(0x1000) == Stop("callout", 0x1000)
    assert guest.cache.counters.rejected == 1
