# SPDX-License-Identifier: GPL-2.0-or-later
"""The translation cache: chains and fall-throughs, pages by their content, and what becomes of dead units."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.bt_guest import FLAT, Guest, PageFault, Stop
from vmm.bt import cache, emit
from vmm.bt.cache import Callout, Edge
from vmm.bt.mode import Mode
from vmm.bt.native.trampolines import FAULT, PREEMPTED
from vmm.bt.table import Kind
from vmm.bt.template import fixed
from vmm.bt.unit import Mark

HLT = "F4"
DONE = 0x1F00
#: inc eax; jmp 0x1200   /   inc ecx; jmp 0x1F00
FIRST, SECOND = "40 E9FA010000", "41 E9FA0C0000"


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
    put(guest, 0x1200, SECOND)
    guest.registers = [0] * 8
    assert guest.run(0x1000) == Stop("callout", DONE)


def test_a_jump_to_what_is_translated_next_becomes_a_fall_through(guest: Guest) -> None:
    two_units(guest)
    first, second = guest.unit(0x1000), guest.unit(0x1200)
    assert second.address == first.address + first.length == first.address + 2
    assert guest.cache.counters.elided == 2
    assert first.edges[0].target is second


def test_a_unit_that_falls_into_a_dead_one_dies_too(guest: Guest) -> None:
    two_units(guest)
    first, second = guest.unit(0x1000), guest.unit(0x1200)
    assert guest.cache.kill([second]) == 2 and not first.alive
    assert guest.run(0x1000) == Stop("callout", DONE)
    assert guest.registers[:2] == [2, 2]


def test_a_jump_to_a_dead_unit_asks_the_monitor_again(guest: Guest) -> None:
    put(guest, 0x1000, FIRST)
    put(guest, 0x1200, SECOND)
    second = guest.unit(0x1200)
    guest.registers = [0] * 8
    guest.run(0x1000)
    first = guest.unit(0x1000)
    assert first.edges[0].target is second
    guest.cache.kill([second])
    assert first.alive and first.edges[0].target is None
    guest.run(0x1000)
    assert guest.registers[:2] == [2, 2]
    assert first.edges[0].target is guest.unit(0x1200)


def test_another_page_is_reached_through_the_jump_table(guest: Guest) -> None:
    put(guest, 0x1000, "40 E9FA0F0000")      # inc eax; jmp 0x2000
    put(guest, 0x2000, "41 E9FAFEFFFF")      # inc ecx; jmp 0x1F00
    guest.registers = [0] * 8
    assert guest.run(0x1000) == Stop("callout", DONE)
    assert guest.table.get(0x2000) == guest.unit(0x2000).address and not guest.unit(0x1000).edges
    put(guest, 0x2000, "49 E9FAFEFFFF")      # dec ecx
    assert guest.table.get(0x2000) == 0
    guest.run(0x1000)
    assert guest.registers[:2] == [2, 0]


def test_conditional_jumps_to_other_pages(guest: Guest) -> None:
    put(guest, 0x1000, "3D05000000 0F84F51F0000 40 EBF2")    # cmp eax, 5; je 0x3000; inc eax; jmp 0x1000
    put(guest, 0x3000, HLT)
    put(guest, 0x1FF9, "83F907 74FB 41 90")                  # cmp ecx, 7; je itself; inc ecx; nop
    put(guest, 0x2000, HLT)
    guest.registers = [0] * 8
    assert guest.run(0x1000) == Stop("callout", 0x3000)
    assert guest.registers[0] == 5
    assert guest.run(0x1FF9) == Stop("callout", 0x2000)
    assert guest.registers[1] == 1


def test_code_that_comes_back_is_translated_already(guest: Guest) -> None:
    two_units(guest)
    made = guest.cache.counters.units
    put(guest, 0x1200, "49 E9FA0C0000")
    guest.run(0x1000)
    assert guest.registers[:2] == [2, 0] and guest.cache.counters.units > made
    made = guest.cache.counters.units
    put(guest, 0x1200, SECOND)
    guest.run(0x1000)
    assert guest.registers[:2] == [3, 1] and guest.cache.counters.units == made


def test_a_published_unit_that_dies_is_missed_again(guest: Guest) -> None:
    put(guest, 0x1000, "B800200000 FFE0")    # mov eax, 0x2000; jmp eax
    put(guest, 0x2000, "41 E9FAFEFFFF")
    guest.registers = [0] * 8
    guest.run(0x1000)
    unit = guest.unit(0x2000)
    assert guest.table.get(0x2000) == unit.address
    guest.cache.kill([unit])
    assert guest.table.get(0x2000) == 0
    assert guest.run(0x1000) == Stop("callout", DONE)


def test_an_instruction_over_a_page_boundary_depends_on_both_pages(guest: Guest) -> None:
    put(guest, 0x1FF8, "EB04")               # jmp 0x1FFE
    put(guest, 0x1FFE, "B878563412 F4")      # mov eax, 0x12345678
    for value, written in (0x12345678, ""), (0x12AA5678, "AA"), (0x12345678, "34"):
        if written:
            put(guest, 0x2001, written)
        for _ in range(2):
            assert guest.run(0x1FF8) == Stop("callout", 0x2003)
            assert guest.registers[0] == value
            guest.registers = [0] * 8
    page = guest.code[FLAT, 1]
    assert len(page.straddlers) == 2 and len(page.bridges) == 1


def test_a_unit_ends_before_an_instruction_whose_second_page_is_missing(guest: Guest) -> None:
    end = guest.pages << 12
    put(guest, end - 3, "40 B878")
    assert guest.run(end - 3) == Stop("fetch", end - 2)
    assert guest.registers[0] == 1
    with pytest.raises(PageFault):
        guest.unit(end - 2)


def test_an_instruction_that_is_not_all_in_the_page_begins_another_unit(guest: Guest) -> None:
    # whatever is missing of it, and whatever stands before it
    for code in "41 B878563412", "B805000000 C7050080000078563412", "F3AA 41 E9F8EEFFFF", "41 0F84F8EEFFFF":
        parts = [bytes.fromhex(part) for part in code.split()]
        for missing in range(1, len(parts[-1])):
            start = 0x2000 + missing - sum(map(len, parts))
            put(guest, start, code)
            last = 0x2000 + missing - len(parts[-1])
            made = guest.unit(start)
            assert made.eip + made.guest_bytes == last and len(made.pieces) == len(parts) - 1
            over = guest.unit(last)
            assert len(over.pieces) == 1 and len(over.tail) == missing
    assert guest.cache.counters.rejected == 0


def test_modes_are_apart(guest: Guest) -> None:
    put(guest, 0x1000, FIRST)
    modes = [Mode(), Mode(user=True), Mode(fpu=False, sse=False)]
    units = [guest.unit(0x1000, mode) for mode in modes]
    assert len(set(units)) == 3
    guest.cache.forget(units[1].page)
    assert [unit.alive for unit in units] == [True, False, True]


def test_every_stub_comes_back(guest: Guest) -> None:
    two_units(guest)
    put(guest, 0x3000, "7405 7403 F4 C3")
    guest.run(0x3000)
    used = sum(what is not None for what in guest.cache.exits)
    edges = [what for what in guest.cache.exits if isinstance(what, Edge)]
    callouts = [what for what in guest.cache.exits if isinstance(what, Callout)]
    assert used == len(edges) + len(callouts) and {what.eip for what in callouts} == {DONE, 0x3004}
    for page in list(guest.code.values()):
        guest.cache.forget(page)
    assert all(what is None for what in guest.cache.exits)
    assert not guest.cache.verifier.entries and not guest.cache.verifier.sites


def test_code_that_is_written_all_the_time(guest: Guest) -> None:
    """Translations come and go more often than the arena has room for."""
    guest.registers = [0] * 8
    for value in range(3000):
        put(guest, 0x1000, f"B8{value.to_bytes(4, 'little').hex()} 90909090909090909090 E9EC0E0000")
        assert guest.run(0x1000) == Stop("callout", DONE)
        assert guest.registers[0] == value
    assert guest.cache.counters.units == 2 * 3000
    while guest.code:
        guest.cache.forget(guest.code.popitem()[1])


def test_pages_of_code_that_is_rewritten_are_bounded(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_MOST_PAGES", 8)
    guest.registers = [0] * 8
    for value in range(60):
        put(guest, 0x1000, f"B8{value.to_bytes(4, 'little').hex()} E9F60E0000")
        assert guest.run(0x1000) == Stop("callout", DONE)
        assert guest.registers[0] == value and len(guest.cache._pages) <= 8
    assert guest.cache.counters.evicted > 60


def test_a_private_page_keeps_what_did_not_change(guest: Guest) -> None:
    two_units(guest)
    page = guest.code[FLAT, 1]
    first, second = guest.unit(0x1000), guest.unit(0x1200)
    guest.memory[0x1800] = 7
    assert page.change(guest.fetch(1)) == []
    guest.memory[0x1200] = 0x49
    assert page.change(guest.fetch(1)) == [second]
    assert page.covering(0x203) == [second] and page.covering(0) == [first]


def test_a_simulated_instruction_is_left_to_the_monitor(guest: Guest) -> None:
    put(guest, 0x1000, "40 41 40 F4")
    guest.registers = [0] * 8
    assert guest.run(0x1000) == Stop("callout", 0x1003)
    page = guest.code[FLAT, 1]
    guest.cache.simulate(page, 1, True)
    assert guest.run(0x1000) == Stop("callout", 0x1001)
    assert guest.unit(0x1000).pieces[-1].mark is Mark.SIMULATED
    guest.cache.simulate(page, 1, False)
    assert guest.run(0x1000) == Stop("callout", 0x1003)


def test_a_host_address_has_its_guest_instruction(guest: Guest) -> None:
    put(guest, 0x1000, "40 50 58 F4")        # inc eax; push eax; pop eax; hlt
    made = guest.unit(0x1000)
    assert [piece.mark for piece in made.pieces] == [Mark.IDENT, Mark.INLINE, Mark.INLINE, Mark.CALLOUT]
    found = [guest.cache.eip_at(made.address + offset) for offset in range(made.length)]
    assert found == sorted(eip for eip in found if eip is not None)
    assert set(found) == {0x1000, 0x1001, 0x1002, 0x1003}
    assert guest.cache.eip_at(made.address - 1) is None
    assert guest.cache.eip_at(made.address + made.length) is None
    boundaries = [guest.cache.boundary(made.address + offset) for offset in range(made.length)]
    assert [eip for eip in boundaries if eip is not None] == [0x1000, 0x1001, 0x1002, 0x1003]


def test_a_string_instruction_is_resumed_at_its_start(guest: Guest) -> None:
    put(guest, 0x1000, "F3A4 F4")            # rep movsb
    guest.registers = [0, 0x20, 0, 0, 0, 0, 0x8000, 0x3F_FFF0]     # the destination runs out of memory
    made = guest.unit(0x1000)
    assert guest.cpu.enter(guest.block, made.address) == FAULT
    rip = guest.block.fault().rip
    assert rip == made.address + 4 and guest.cache.resume_at(rip) == made.address
    assert guest.cache.eip_at(rip) == 0x1000 == guest.cache.boundary(rip)
    assert (guest.registers[1], guest.registers[7]) == (0x10, 0x40_0000)
    # behind the move itself nothing is to be repeated
    assert guest.cache.resume_at(made.address + 7) == made.address + 7


def test_a_kick_ends_an_endless_loop_and_it_goes_on(guest: Guest) -> None:
    put(guest, 0x1000, "40 75FD F4")         # loop: inc eax; jnz loop
    made = guest.unit(0x1000)
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
