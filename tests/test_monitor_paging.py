# SPDX-License-Identifier: GPL-2.0-or-later
"""What guests do to their page tables and to their own code, under either monitor: the same results.

Under the software monitor this is shadow paging, write traces, and code that changes; each test that counts
such events says so and asks that monitor alone.
"""

from __future__ import annotations

import struct

import pytest

from tests import hw_modes as m
from tests.hw_rig import Machine, Rig, halted, vector_of
from vmm.exitcodes import ExitCode
from vmm.monitor import Stop, StopReason
from vmm.x86.faults import PF_PRESENT, PF_USER, PF_WRITE

MONITORS = ("hw", "bt")
EAX, ECX, EDX, EBX = 0, 1, 2, 3
HLT = b"\xf4"
#: linear addresses from here on have entries of their own, for frames from 0
SMALL = 0x40_0000
DATA = 0x2_0000
ACCESSED, DIRTY = 0x20, 0x40


def word(value: int) -> bytes:
    return struct.pack("<I", value & 0xFFFF_FFFF)


def store(address: int, value: int) -> bytes:
    return b"\xc7\x05" + word(address) + word(value)        # mov dword [address], value


def load(address: int) -> bytes:
    return b"\xa1" + word(address)                          # mov eax, [address]


def add_to_ebx(address: int) -> bytes:
    return b"\x03\x1d" + word(address)                      # add ebx, [address]


def repeat(times: int, body: bytes) -> bytes:
    """`body`, over and over; ECX counts down."""
    back = -(len(body) + 7)
    return b"\xb9" + word(times) + body + b"\x49\x0f\x85" + word(back)     # mov ecx; dec ecx; jnz


def invlpg(address: int) -> bytes:
    return b"\x0f\x01\x3d" + word(address)


def cr3(value: int) -> bytes:
    return b"\xb8" + word(value) + b"\x0f\x22\xd8"          # mov eax, value; mov cr3, eax


def entry(page: int) -> int:
    """Guest-physical address of the entry of a page of SMALL."""
    return m.PAGES + 4 * page


def run(rig: Rig, code: bytes, cpl: int = 0, **memory: bytes) -> Machine:
    setup = m.protected(code + HLT, cpl, paging=True)
    for place, data in memory.items():
        setup.put(int(place[1:], 16), data)
    return halted(rig, setup)


def count(machine: Machine, code: ExitCode) -> int:
    return {code: count for code, count, _ in machine.block.exit_stats.rows()}.get(code, 0)


# -- page tables --------------------------------------------------------------------------------------------


def test_accessed_and_dirty_bits(rig: Rig) -> None:
    machine = run(rig, load(SMALL + 0x20000) + store(SMALL + 0x21000, 1) + load(SMALL + 0x22000)
                  + store(SMALL + 0x22000, 2))
    entries = [machine.memory.read_u32(entry(0x20 + n)) for n in range(4)]
    assert [value & (ACCESSED | DIRTY) for value in entries] == [
        ACCESSED, ACCESSED | DIRTY, ACCESSED | DIRTY, 0]
    assert machine.memory.read_u32(m.TABLES + 4) & ACCESSED


@pytest.mark.parametrize(("cpl", "flags", "code", "error"), [
    (0, 0, load(SMALL + 0x20000), 0),
    (0, 0, store(SMALL + 0x20000, 1), PF_WRITE),
    (0, 1, store(SMALL + 0x20000, 1), PF_PRESENT | PF_WRITE),
    (3, 0, load(SMALL + 0x20000), PF_USER),
    (3, 3, load(SMALL + 0x20000), PF_USER | PF_PRESENT),
    (3, 5, store(SMALL + 0x20000, 1), PF_USER | PF_PRESENT | PF_WRITE),
], ids=["absent", "absent write", "read-only", "user absent", "supervisor's", "user read-only"])
def test_true_page_faults(rig: Rig, cpl: int, flags: int, code: bytes, error: int) -> None:
    setup = m.protected(b"\x90" + code + HLT, cpl, paging=True)
    setup.put(entry(0x20), word(0x2_0000 | flags))
    machine = halted(rig, setup)
    assert vector_of(machine) == 14
    frame = struct.unpack("<2I", machine.memory.read(machine.processor.q[4], 8))
    assert frame == (error, m.CODE + 1)
    assert machine.processor.q[55] == SMALL + 0x20000       # CR2


def test_an_entry_that_becomes_present_needs_no_flush(rig: Rig) -> None:
    machine = run(rig, store(entry(0x30), 0x2_1007) + load(SMALL + 0x30000), x21000=word(77),
                  **{f"x{entry(0x30):x}": word(0)})
    assert machine.processor.q[EAX] == 77


@pytest.mark.parametrize("flush", [invlpg(SMALL + 0x20000), b"\x0f\x20\xd8\x0f\x22\xd8"],
                         ids=["invlpg", "cr3"])
def test_a_remapped_page_is_seen_after_a_flush(rig: Rig, flush: bytes) -> None:
    code = add_to_ebx(SMALL + 0x20000) + store(entry(0x20), 0x2_1007) + flush + add_to_ebx(SMALL + 0x20000)
    machine = run(rig, code, x20000=word(1), x21000=word(10))
    assert machine.processor.q[EBX] == 11


def test_a_page_made_read_only_faults_after_a_flush(rig: Rig) -> None:
    address = SMALL + 0x20000
    machine = run(rig, store(address, 1) + store(entry(0x20), 0x2_0005) + invlpg(address) + store(address, 2))
    assert vector_of(machine) == 14 and machine.memory.read_u32(0x2_0000) == 1


def test_address_spaces_take_turns(rig: Rig) -> None:
    """Two page directories show different frames at an address; each is changed under the other one."""
    other, pages, page = 0x3_0000, 0x3_1000, SMALL + 0x20000
    tables = {f"x{other:x}": struct.pack("<II", 0x87, pages | 7),
              f"x{pages:x}": b"".join(word(0x2_4000 | 7) for _ in range(1024)),
              "x20000": word(1), "x21000": word(100), "x24000": word(10_000), "x25000": word(1_000_000)}
    turn = cr3(other) + add_to_ebx(page) + cr3(m.TABLES) + add_to_ebx(page)
    change = store(pages + 4 * 0x20, 0x2_5007) + cr3(other) + store(entry(0x20), 0x2_1007)
    machine = run(rig, repeat(50, turn) + change + repeat(5, turn), **tables)
    assert machine.processor.q[EBX] == 50 * 10_001 + 5 * 1_000_100


def test_large_pages_and_their_flush(rig: Rig) -> None:
    """A page of 4 MiB at 8 MiB shows frame 0, then the same through small ones."""
    address = 0x80_0000 + DATA
    code = (store(m.TABLES + 8, 0x87) + add_to_ebx(address) + store(m.TABLES + 8, m.PAGES | 7)
            + store(entry(0x20), 0x2_1007) + invlpg(0x80_0000) + add_to_ebx(address))
    machine = run(rig, code, x20000=word(1), x21000=word(10))
    assert machine.processor.q[EBX] == 11


def test_pae(rig: Rig) -> None:
    pointers, directory, pages = 0x3_0000, 0x3_1000, 0x3_2000
    setup = m.protected(b"", paging=True)
    page = 0x20_0000 + 0x20000
    setup.put(m.CODE, add_to_ebx(page) + store(pages + 8 * 0x20, 0x2_1007) + invlpg(page) + add_to_ebx(page)
              + store(page, 5) + HLT)
    setup.cpu.cr3, setup.cpu.cr4 = pointers, 0x30
    setup.put(pointers, struct.pack("<4Q", directory | 1, 0, 0, 0))
    setup.put(directory, struct.pack("<2Q", 0x87, pages | 7))
    setup.put(pages, b"".join(struct.pack("<Q", 4096 * n | 7) for n in range(512)))
    setup.put(0x2_0000, word(1))
    setup.put(0x2_1000, word(10))
    machine = halted(rig, setup)
    assert machine.processor.q[EBX] == 11
    assert machine.memory.read_u32(0x2_1000) == 5
    assert machine.memory.read_u64(pages + 8 * 0x20) & (ACCESSED | DIRTY) == ACCESSED | DIRTY


def test_the_dirty_log_has_what_was_written(rig: Rig) -> None:
    setup = m.protected(repeat(1000, store(SMALL + 0x20000, 1)) + HLT + store(SMALL + 0x21000, 2)
                        + load(SMALL + 0x22000) + store(DATA + 0x3000, 3) + HLT, paging=True)
    for frame in range(0x20, 0x24):
        setup.put(frame << 12, word(0))
    machine = rig.machine(setup.state, setup.writes)
    assert machine.go() == Stop(StopReason.HALTED)
    machine.processor.evict()
    machine.block.p2m.start_log()
    machine.processor.halted = False
    assert machine.go() == Stop(StopReason.HALTED)
    machine.processor.evict()
    written = {int(page) for page in machine.block.p2m.collect_log()}
    assert {0x21, 0x23} <= written and not {0x20, 0x22} & written


# -- code that changes --------------------------------------------------------------------------------------


def test_a_store_that_changes_the_next_instruction(rig: Rig) -> None:
    # mov byte [the immediate of the next], 5; mov al, 1
    machine = run(rig, b"\xc6\x05" + word(m.CODE + 8) + b"\x05" + b"\xb0\x01")
    assert machine.processor.q[EAX] & 0xFF == 5


def test_code_that_changes_itself_all_the_time(rig: Rig) -> None:
    """add byte [the immediate], 1; add ebx, immediate: 200 times."""
    body = b"\x80\x05" + word(m.CODE + 5 + 7 + 2) + b"\x01" + b"\x83\xc3\x00"
    machine = run(rig, repeat(100, body))
    assert machine.processor.q[EBX] == sum(range(1, 101))


def test_a_string_instruction_that_overwrites_itself(rig: Rig) -> None:
    """rep movsb copies HLTs over what follows it, and over itself."""
    # mov esi; mov edi; mov ecx, 40; rep movsb; inc eax ...
    code = (b"\xbe" + word(DATA) + b"\xbf" + word(m.CODE + 0x14) + b"\xb9" + word(40) + b"\xf3\xa4"
            + b"\x40" * 100)
    machine = run(rig, code, x20000=HLT * 40)
    assert machine.processor.q[EAX] == 3 and machine.processor.q[ECX] == 0


def test_data_beside_code(rig: Rig) -> None:
    counter = m.CODE + 0x800
    machine = run(rig, repeat(3000, b"\xff\x05" + word(counter)))
    assert machine.memory.read_u32(counter) == 3000


def test_a_function_that_is_replaced(rig: Rig) -> None:
    """call function; copy another body over it; call it again."""
    function, other = 0x2_0000, 0x2_1000

    def call(at: int) -> bytes:
        return b"\xe8" + word(function - (m.CODE + at + 5))

    copy = b"\xbe" + word(other) + b"\xbf" + word(function) + b"\xb9" + word(8) + b"\xf3\xa4"
    code = call(0) + copy + call(5 + len(copy))
    machine = run(rig, code, x20000=b"\x83\xc3\x01\xc3".ljust(8, b"\x90"),
                  x21000=b"\x83\xc3\x64\xc3".ljust(8, b"\x90"))
    assert machine.processor.q[EBX] == 101


def test_an_alias_writes_code(rig: Rig) -> None:
    """The page of a function is written through another linear address."""
    function = 0x2_0000
    call = b"\xe8" + word(function - (m.CODE + 5))
    patch = b"\xc6\x05" + word(SMALL + function + 2) + b"\x07"
    again = b"\xe8" + word(function - (m.CODE + 5 + len(patch) + 5))
    machine = run(rig, call + patch + again, x20000=b"\x83\xc3\x01\xc3")
    assert machine.processor.q[EBX] == 8


# -- what it takes ------------------------------------------------------------------------------------------


under_bt = pytest.mark.parametrize("rig", ["bt"], indirect=True)


@under_bt
def test_a_move_that_keeps_trapping_is_simulated_and_then_is_itself_again(rig: Rig) -> None:
    """A subroutine stores to its own page 100 times, then elsewhere 200 times."""
    stores = 0x2_0000                               # mov [edi], eax; ret
    own, elsewhere = stores + 0x800, 0x3_0000

    def calls(times: int, target: int, at: int) -> bytes:
        head = b"\xbf" + word(target) + b"\xb9" + word(times)
        back = at + len(head)
        return head + b"\xe8" + word(stores - (m.CODE + back + 5)) + b"\x49\x75\xf8"

    first = calls(100, own, 0)
    machine = run(rig, first + calls(200, elsewhere, len(first)), x20000=b"\x89\x07\xc3")
    assert count(machine, ExitCode.BT_ADAPTED) >= 2
    assert count(machine, ExitCode.BT_SIMULATED) >= 64
    assert count(machine, ExitCode.BT_TRACE) < 40


@under_bt
def test_an_address_space_that_comes_back_is_still_there(rig: Rig) -> None:
    other, page = 0x3_0000, SMALL + 0x20000
    turn = cr3(other) + add_to_ebx(page) + cr3(m.TABLES) + add_to_ebx(page)
    machine = run(rig, repeat(300, turn), x30000=struct.pack("<II", 0x87, m.PAGES | 7))
    assert count(machine, ExitCode.BT_HIDDEN_FAULT) < 30


@under_bt
def test_guests_with_the_same_code_share_its_translation(rig: Rig) -> None:
    code = repeat(20, b"\x40\x41\x49" + add_to_ebx(DATA))
    run(rig, code)
    counters = rig.translations()
    units = counters.units
    machine = run(rig, code)
    assert machine.processor.q[EBX] == 0
    assert counters.units == units and counters.shared > 0


def test_code_that_runs_over_the_end_of_memory(rig: Rig) -> None:
    """The last instruction in memory ends where there is none; a jump within its page leads there."""
    end = m.MEMORY
    setup = m.protected(b"\xe9" + word(end - 16 - (m.CODE + 5)), paging=False)
    # jz over there; mov eax, with one byte of its immediate
    setup.put(end - 16, b"\x31\xc0\x74\x0a".ljust(14, b"\x90") + b"\xb8\x01")
    machine = rig.machine(setup.state, setup.writes)
    stop = machine.go()
    assert stop.reason is StopReason.CRASHED and stop.detail.startswith("the guest cannot go on")
