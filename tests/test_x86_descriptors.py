# SPDX-License-Identifier: GPL-2.0-or-later
"""Descriptors, gates, selectors and the I/O permission map."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.state import Segment, Table
from vmm.x86 import descriptors as d
from vmm.x86.faults import GuestFault, Vector

NO_LDT = Segment(0, 0x82)


@pytest.mark.parametrize(("descriptor", "attributes", "limit", "base"), [
    (0x00CF9B000000FFFF, 0xC9B, 0xFFFFFFFF, 0),  # flat 32-bit code
    (0x00AF9B000000FFFF, 0xA9B, 0xFFFFFFFF, 0),  # flat 64-bit code
    (0x00CFF3000000FFFF, 0xCF3, 0xFFFFFFFF, 0),  # flat user data
    (0x00009B0F00000FFF, 0x09B, 0xFFF, 0xF0000),  # 16-bit code
    (0x12008B345678_0067, 0x08B, 0x67, 0x12345678),  # busy 32-bit TSS
])
def test_known_descriptors(descriptor: int, attributes: int, limit: int, base: int) -> None:
    assert d.decode_segment(8, descriptor) == Segment(8, attributes, limit, base)
    assert d.encode_segment(Segment(8, attributes, limit, base)) == descriptor


@given(st.integers(0, 2**64 - 1))
def test_decoding_is_undone_by_encoding(descriptor: int) -> None:
    assert d.encode_segment(d.decode_segment(0x10, descriptor)) == descriptor


def test_long_mode_system_descriptors_have_64_bit_bases() -> None:
    segment = d.decode_segment(0x40, 0x12008B3456780067, 0xFFFFFE00)
    assert segment == Segment(0x40, 0x8B, 0x67, 0xFFFFFE0012345678)


def test_gates() -> None:
    assert d.decode_gate(0xC0108E000010_5678) == d.Gate(0x10, 0xC0105678, d.INTERRUPT_GATE32, 0, True)
    assert d.decode_gate(0xC010EF000010_5678) == d.Gate(0x10, 0xC0105678, d.TRAP_GATE32, 3, True)
    # a 16-bit gate has 16 bits of offset
    assert d.decode_gate(0xC01086000010_5678) == d.Gate(0x10, 0x5678, d.INTERRUPT_GATE16, 0, True)
    assert d.decode_gate(0x000005000028_0000) == d.Gate(0x28, 0, d.TASK_GATE, 0, False)
    assert d.decode_gate64(0x81A08E020010_0C30, 0xFFFFFFFF) == d.Gate(
        0x10, 0xFFFFFFFF81A00C30, d.INTERRUPT_GATE32, 0, True, 2)


def test_attribute_questions() -> None:
    assert d.dpl(0xCF3) == 3 and d.dpl(0xC93) == 0
    assert d.is_code(0xA9B) and not d.is_code(0xC93) and not d.is_code(0x08B)
    assert d.is_conforming(0x09E) and not d.is_conforming(0x09A)
    assert d.is_writable_data(0x093) and not d.is_writable_data(0x091) and not d.is_writable_data(0x09B)
    assert d.is_null(0) and d.is_null(3) and not d.is_null(4) and not d.is_null(8)


def test_locate_in_both_tables() -> None:
    gdtr, ldtr = Table(0x1F, 0x1000), Segment(0x18, 0x82, 0xF, 0x2000)
    assert d.locate(0x18, gdtr, ldtr) == 0x1018
    assert d.locate(0x1B, gdtr, ldtr) == 0x1018
    assert d.locate(0x0C, gdtr, ldtr) == 0x2008
    assert d.locate(0x10, gdtr, ldtr, size=16) == 0x1010


@pytest.mark.parametrize(("selector", "size"), [(0x20, 8), (0x18, 16), (0x0C, 16), (0x14, 8), (0xFFFF, 8)])
def test_locate_beyond_the_limit(selector: int, size: int) -> None:
    gdtr, ldtr = Table(0x1F, 0x1000), Segment(0x18, 0x82, 0xF, 0x2000)
    with pytest.raises(GuestFault) as caught:
        d.locate(selector, gdtr, ldtr, Vector.TS, size, external=1)
    assert (caught.value.vector, caught.value.error_code) == (Vector.TS, selector & 0xFFFC | 1)


def test_locate_without_ldt() -> None:
    with pytest.raises(GuestFault):
        d.locate(0x0C, Table(0xFFFF, 0), NO_LDT)
    with pytest.raises(GuestFault):
        d.locate(0x0C, Table(0xFFFF, 0), Segment(0x18, 0x02, 0xFFFF, 0))


def test_stack_slots_of_task_state_segments() -> None:
    assert [d.tss16_stack(n) for n in range(3)] == [2, 6, 10]
    assert [d.tss32_stack(n) for n in range(3)] == [4, 12, 20]
    assert [d.tss64_stack(n) for n in range(3)] == [4, 12, 20]
    assert [d.tss64_ist(n) for n in (1, 7)] == [0x24, 0x54]


@given(st.sets(st.integers(0, 0xFFFF), max_size=4), st.integers(0, 0xFFFF), st.sampled_from([1, 2, 4]),
       st.integers(0x67, 0x68 + 0x2001))
def test_io_permission_map(denied: set[int], port: int, size: int, limit: int) -> None:
    tss = bytearray(0x68 + 0x2001)
    tss[0x66:0x68] = (0x68).to_bytes(2, "little")
    for number in denied:
        tss[0x68 + number // 8] |= 1 << number % 8
    tr = Segment(0x40, 0x8B, limit, 0x5000)

    def read(address: int, n: int) -> bytes:
        assert 0x5000 <= address <= 0x5000 + limit - (n - 1), "read beyond the TSS"
        return bytes(tss[address - 0x5000:address - 0x5000 + n])
    in_map = 0x68 + port // 8 + 1 <= limit
    expected = in_map and not denied & set(range(port, port + size))
    assert d.io_permitted(tr, port, size, read) == expected


def test_io_permission_without_a_map() -> None:
    def read(address: int, n: int) -> bytes:
        raise AssertionError("nothing to read")
    assert not d.io_permitted(Segment(0x40, 0x83, 0x2B, 0), 0x80, 1, read)  # 16-bit TSS
    assert not d.io_permitted(Segment(0x40, 0x8B, 0x66, 0), 0x80, 1, read)
