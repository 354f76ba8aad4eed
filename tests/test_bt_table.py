# SPDX-License-Identifier: GPL-2.0-or-later
"""The instruction table: that its rows make sense.  What they say is judged in test_bt_decode."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bt_encodings import encodings
from tests.bt_silicon import Silicon
from vmm.bt import table
from vmm.bt.decode import decode
from vmm.bt.table import ENDS_UNIT, SLOTS, Entry, Kind, Map, Unit
from vmm.x86 import flags

ARITHMETIC = (flags.RFLAGS_OF | flags.RFLAGS_SF | flags.RFLAGS_ZF | flags.RFLAGS_AF | flags.RFLAGS_PF
              | flags.RFLAGS_CF)


def entries() -> Iterator[Entry]:
    for slots in SLOTS.values():
        for slot in slots:
            yield from slot


def entry(code: str) -> Entry:
    return decode(bytes.fromhex(code) + bytes(10), 0, True).entry


def test_undefined_flags_are_written() -> None:
    for one in entries():
        assert one.flags_undefined & ~one.flags_written == 0
        assert (one.flags_read | one.flags_written) & ~(ARITHMETIC | flags.RFLAGS_DF) == 0


def test_what_lock_allows_is_read_and_written() -> None:
    for one in entries():
        if one.lockable:
            assert one.memory is None or (one.memory.read and one.memory.written)


def test_every_kind_has_its_rows() -> None:
    assert {one.kind for one in entries()} == set(Kind) - {Kind.OVERLONG}
    assert {one.unit for one in entries()} == set(Unit)


def test_branches_end_units() -> None:
    for one in entries():
        if any(operand.kind in "JA" for operand in one.operands):
            assert one.kind in ENDS_UNIT


def test_a_64_bit_processor_has_the_row_only_where_it_means_the_same() -> None:
    """What 64-bit mode has no encoding for must not be IDENT (APM vol. 3, B.3)."""
    gone = [0x06, 0x07, 0x0E, 0x16, 0x17, 0x1E, 0x1F, 0x27, 0x2F, 0x37, 0x3F, *range(0x40, 0x50),
            0x60, 0x61, 0x62, 0x63, 0x9A, 0xC4, 0xC5, 0xCE, 0xD4, 0xD5, 0xD6, 0xEA]
    for byte in gone:
        assert all(one.kind is not Kind.IDENT for one in SLOTS[Map.ONE_BYTE][byte])


def test_what_a_shift_leaves_alone_it_reads() -> None:
    by_one, by_cl = entry("d1e0"), entry("d3e0")
    assert by_one.flags_read == 0 and by_one.flags_undefined == flags.RFLAGS_AF
    assert by_cl.flags_read == by_cl.flags_written == ARITHMETIC
    assert by_cl.flags_undefined == flags.RFLAGS_AF | flags.RFLAGS_OF


@pytest.mark.parametrize(("code", "read"), [
    ("7200", flags.RFLAGS_CF), ("0f4fc1", flags.RFLAGS_ZF | flags.RFLAGS_SF | flags.RFLAGS_OF),
    ("0f9ac0", flags.RFLAGS_PF), ("13c0", flags.RFLAGS_CF), ("11c0", flags.RFLAGS_CF), ("01c0", 0),
    ("a4", flags.RFLAGS_DF), ("dac8", flags.RFLAGS_ZF), ("d6", flags.RFLAGS_CF),
])
def test_flags_read(code: str, read: int) -> None:
    assert entry(code).flags_read == read


@pytest.mark.parametrize(("code", "unit"), [
    ("01c0", Unit.INTEGER), ("d8c1", Unit.X87), ("9b", Unit.X87), ("0f77", Unit.MMX), ("0fd4c1", Unit.MMX),
    ("660fd4c1", Unit.SSE), ("0f2ac1", Unit.SSE_MMX), ("f20fd6c1", Unit.SSE_MMX), ("0fae00", Unit.FX),
    ("0fae10", Unit.SSE), ("f30f2ac1", Unit.SSE), ("0fc300", Unit.INTEGER), ("660f38f6c1", Unit.INTEGER),
])
def test_units(code: str, unit: Unit) -> None:
    assert entry(code).unit is unit


@pytest.mark.parametrize("row", ["00 add +Eb,Gb", "0f10 movups =Vx,Wx x\n0f10 movups =Vx,Wx",
                                 "zz add -", "f1 int1 Ez", "0f01:d9 x Mb", "f1 int1 - nothing"])
def test_a_bad_row_is_refused(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table.x87, "ROWS", row)
    with pytest.raises((ValueError, KeyError)):
        table._build()


#: kinds that execute on their own, without a machine around them
PLAIN = {Kind.IDENT, Kind.INC_DEC, Kind.LEGACY}
#: prefixes that make no difference to flags
OTHER_PREFIXES = {0x67, 0x2E, 0x64}
#: FCOMI and its like clear OF, SF and AF (APM vol. 5); the silicon leaves them alone
CLEARS_TOO_LITTLE = {"fcomi", "fucomi", "fcompi", "fucompi"}


def test_flags_as_the_silicon_has_them() -> None:
    """What is not written stays; what is written and not read depends on no flag."""
    silicon = Silicon()
    executed = 0
    for code, code32, one in encodings():
        # memory would keep the result of the first run; with 66 and F3 the silicon takes 66 to be mandatory
        in_register = not one.modrm or decode(code, 0, code32).mod == 3
        usual = code[0] not in OTHER_PREFIXES and code[:2] != b"\x66\xf3"
        if not (code32 and usual and in_register and one.kind in PLAIN):
            continue
        ones = ARITHMETIC & ~one.flags_read
        if silicon.run(code, flags.RFLAGS_ONE) is not None:
            continue
        after_zeros = silicon.eflags
        assert silicon.run(code, flags.RFLAGS_ONE | ones) is None
        after_ones = silicon.eflags
        kept = ARITHMETIC & ~one.flags_written
        assert after_zeros & kept == 0 and after_ones & kept == ones & kept, one.opcode
        set_anew = one.flags_written & ~one.flags_read & ~one.flags_undefined & ARITHMETIC
        if one.mnemonic not in CLEARS_TOO_LITTLE:
            assert (after_zeros ^ after_ones) & set_anew == 0, one.opcode
        executed += 1
    assert executed > 1000
