# SPDX-License-Identifier: GPL-2.0-or-later
"""The software walk of a guest's page tables, by hand-made cases."""

from __future__ import annotations

import pytest

from tests.plain_memory import PlainMemory
from vmm.memory.errors import BadAddress
from vmm.x86 import flags
from vmm.x86.faults import GeneralProtection, GuestFault
from vmm.x86.paging import READ, WRITE, Access, LinearMemory, Paging, translate

P, W, U, A, D, PS = 1, 2, 4, 0x20, 0x40, 0x80
NX = 1 << 63

PROTECTED = flags.CR0_PE | flags.CR0_PG
LONG = Paging(PROTECTED | flags.CR0_WP, 0x1000, flags.CR4_PAE,
              flags.EFER_LME | flags.EFER_LMA | flags.EFER_NXE)
PAE = LONG._replace(efer=flags.EFER_NXE)
PLAIN32 = Paging(PROTECTED | flags.CR0_WP, 0x1000, flags.CR4_PSE, 0)


def long_mode_map(memory: PlainMemory, linear: int, entry: int, upper: int = P | W | U) -> None:
    """Tables at 0x1000 - 0x4fff that map one page by `entry`."""
    for level, shift in enumerate((39, 30, 21)):
        at = 0x1000 * (level + 1) + (linear >> shift & 0x1FF) * 8
        memory.write_u64(at, 0x1000 * (level + 2) | upper)
    memory.write_u64(0x4000 + (linear >> 12 & 0x1FF) * 8, entry)


def fault(memory: PlainMemory, paging: Paging, linear: int, access: Access = READ) -> tuple[int, int | None]:
    before = bytes(memory.data)
    with pytest.raises(GuestFault) as caught:
        translate(memory, paging, linear, access)
    assert caught.value.vector == 14
    assert memory.data == before, "a failed walk leaves no mark"
    assert caught.value.error_code is not None
    return caught.value.error_code, caught.value.address


def test_no_paging() -> None:
    assert translate(PlainMemory(0), Paging(flags.CR0_PE), 0x1_2345_6789) == 0x23456789


def test_long_mode_marks_the_path() -> None:
    memory = PlainMemory(0x8000)
    linear = 0xFFFF8123_45678ABC
    long_mode_map(memory, linear, 0x7000 | P | W)
    assert translate(memory, LONG, linear) == 0x7ABC
    path = [0x1000 * (level + 1) + (linear >> 39 - 9 * level & 0x1FF) * 8 for level in range(4)]
    assert [memory.read_u64(at) & (A | D) for at in path] == [A] * 4
    assert translate(memory, LONG, linear, WRITE) == 0x7ABC
    assert [memory.read_u64(at) & (A | D) for at in path] == [A, A, A, A | D]


def test_a_non_canonical_address_is_no_page_fault() -> None:
    with pytest.raises(GeneralProtection):
        translate(PlainMemory(0x8000), LONG, 0x8000_00000000)


def test_addresses_wrap_at_32_bits_outside_long_mode() -> None:
    memory = PlainMemory(0x8000)
    memory.write_u32(0x1000, 0x2000 | P | W)
    memory.write_u32(0x2000 + 5 * 4, 0x6000 | P | W)
    assert translate(memory, PLAIN32, 0x7_0000_5432) == 0x6432


@pytest.mark.parametrize(("entry", "access", "code"), [
    (0, READ, 0),
    (0, WRITE, 2),
    (0, Access(user=True), 4),
    (0, Access(fetch=True), 0x10),
    (P | W, Access(user=True), 5),
    (P | U, Access(user=True, write=True), 7),
    (P, WRITE, 3),
    (P | W | NX, Access(fetch=True), 0x11),
    (P | W | U | NX, Access(fetch=True, user=True), 0x15),
    (P | W | 1 << 45, READ, 9),
    (P | W | 1 << 45, WRITE, 0xB),
])
def test_error_codes(entry: int, access: Access, code: int) -> None:
    memory = PlainMemory(0x8000)
    long_mode_map(memory, 0x123_45678000, entry | (0x7000 if entry else 0))
    assert fault(memory, LONG, 0x123_45678123, access) == (code, 0x123_45678123)


def test_rights_are_those_of_the_whole_path() -> None:
    memory = PlainMemory(0x8000)
    long_mode_map(memory, 0x5000, 0x7000 | P | W | U, upper=P | U)
    assert fault(memory, LONG, 0x5000, WRITE)[0] == 3
    assert translate(memory, LONG._replace(cr0=PROTECTED), 0x5000, WRITE) == 0x7000  # CR0.WP clear
    long_mode_map(memory, 0x5000, 0x7000 | P | W | U, upper=P | W | NX)
    assert fault(memory, LONG, 0x5000, Access(fetch=True))[0] == 0x11
    assert fault(memory, LONG, 0x5000, Access(user=True))[0] == 5


def test_no_execute_is_reserved_until_it_is_enabled() -> None:
    memory = PlainMemory(0x8000)
    long_mode_map(memory, 0x5000, 0x7000 | P | W | NX)
    paging = LONG._replace(efer=flags.EFER_LME | flags.EFER_LMA)
    assert fault(memory, paging, 0x5000)[0] == 9
    assert fault(memory, paging, 0x5000, Access(fetch=True))[0] == 9


def test_smep_and_smap() -> None:
    memory = PlainMemory(0x8000)
    long_mode_map(memory, 0x5000, 0x7000 | P | W | U)
    smep = LONG._replace(cr4=flags.CR4_PAE | flags.CR4_SMEP)
    smap = LONG._replace(cr4=flags.CR4_PAE | flags.CR4_SMAP)
    assert fault(memory, smep, 0x5000, Access(fetch=True))[0] == 0x11
    assert fault(memory, smap, 0x5000, READ)[0] == 1
    assert translate(memory, smep, 0x5000, READ) == 0x7000
    assert translate(memory, smap, 0x5000, Access(ac=True)) == 0x7000
    assert translate(memory, smap, 0x5000, Access(fetch=True)) == 0x7000
    assert translate(memory, smap, 0x5000, Access(user=True, write=True)) == 0x7000


@pytest.mark.parametrize(("level", "size"), [(2, 1 << 30), (3, 1 << 21)])
def test_large_pages(level: int, size: int) -> None:
    memory = PlainMemory(0x8000)
    long_mode_map(memory, 0, 0)
    memory.write_u64(0x1000 * level, 5 * size | 1 << 12 | PS | P | W)  # bit 12 is PAT
    assert translate(memory, LONG, size - 1) == 6 * size - 1
    memory.write_u64(0x1000 * level, 5 * size | 1 << 13 | PS | P | W)
    assert fault(memory, LONG, 0)[0] == 9


def test_the_top_level_has_no_large_pages() -> None:
    memory = PlainMemory(0x8000)
    memory.write_u64(0x1000, PS | P | W)
    assert fault(memory, LONG, 0)[0] == 9


def test_pse36_gives_40_bit_addresses() -> None:
    memory = PlainMemory(0x8000)
    memory.write_u32(0x1000 + 3 * 4, 0x40000000 | 0xAB << 13 | PS | P | W)
    assert translate(memory, PLAIN32, 0xC12345) == 0xAB_40012345
    memory.write_u32(0x1000 + 3 * 4, 0x40000000 | 1 << 21 | PS | P | W)
    assert fault(memory, PLAIN32, 0xC12345)[0] == 9
    # without CR4.PSE the bit means nothing: the entry points to a table
    memory.write_u32(0x1000 + 3 * 4, 0x2000 | PS | P | W)
    memory.write_u32(0x2000 + 0x12 * 4, 0x6000 | P | W)
    assert translate(memory, PLAIN32._replace(cr4=0), 0xC12345) == 0x6345


@pytest.mark.parametrize(("entry", "code"), [
    (0x2000, 0), (0x2000 | P | W, 9), (0x2000 | P | U, 9), (0x2000 | P | 1 << 5, 9), (0x2000 | P | NX, 9),
    (0x2000 | P | 1 << 45, 9), (0x2000 | P | 1 << 55, 9)])
def test_pae_directory_pointers(entry: int, code: int) -> None:
    memory = PlainMemory(0x8000)
    memory.write_u64(0x1020 + 2 * 8, entry)
    paging = PAE._replace(cr3=0x1020)  # 32-byte aligned
    assert fault(memory, paging, 0x80000000)[0] == code
    memory.write_u64(0x1020 + 2 * 8, 0x2000 | P)
    memory.write_u64(0x2000, 0x200000 | PS | P | W)
    assert translate(memory, paging, 0x80012345) == 0x212345
    assert memory.read_u64(0x1020 + 2 * 8) == 0x2000 | P, "directory pointers have no accessed bit"


def test_tables_outside_memory_read_as_ones() -> None:
    assert fault(PlainMemory(0x1000), LONG, 0)[0] == 9
    paging = Paging(PROTECTED, 0x5000, 0, 0)
    assert fault(PlainMemory(0x1000), paging._replace(cr4=flags.CR4_PSE), 0)[0] == 9
    # all ones point to a table at 0xfffff000, and that to a page there
    assert translate(PlainMemory(0x1000), paging, 0x123) == 0xFFFFF123


def linear_memory() -> LinearMemory:
    """Two neighbouring pages of linear memory on two distant ones, the second read-only."""
    memory = PlainMemory(0x8000)
    long_mode_map(memory, 0x5000, 0x7000 | P | W)
    memory.write_u64(0x4000 + 6 * 8, 0x5000 | P)
    return LinearMemory(memory, LONG)


def test_linear_accesses_cross_pages() -> None:
    linear = linear_memory()
    linear.memory.write(0x7FFE, b"ab")
    linear.memory.write(0x5000, b"cd")
    assert linear.read(0x5FFE, 4) == b"abcd"
    linear.write(0x5FFC, b"wxyz")
    assert linear.read(0x5FFC, 6) == b"wxyzcd"


def test_a_faulting_write_writes_nothing() -> None:
    linear = linear_memory()
    with pytest.raises(GuestFault) as caught:
        linear.write(0x5FFE, b"wxyz")
    assert (caught.value.error_code, caught.value.address) == (3, 0x6000)
    assert linear.read(0x5FFE, 2) == b"\0\0"


def test_linear_addresses_wrap() -> None:
    memory = PlainMemory(0x1000)
    linear = LinearMemory(memory, Paging())
    memory.write(0, b"wrapped")
    assert linear.read(1 << 32, 7) == b"wrapped"
    with pytest.raises(BadAddress):
        linear.read(0xFFFFFFFC, 8)
