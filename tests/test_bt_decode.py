# SPDX-License-Identifier: GPL-2.0-or-later
"""The decoder, judged by capstone and, where that is no judge, by the silicon.

`bt_encodings` makes encodings out of the instruction table; `capstone_errata` has what capstone gets wrong.
"""

from __future__ import annotations

from collections.abc import Iterator

import capstone
import pytest
from capstone import x86
from hypothesis import given
from hypothesis import strategies as st

from tests import capstone_errata as errata
from tests.bt_encodings import Encoding, defined_and_not, encodings
from tests.bt_silicon import EIP, Silicon
from vmm.bt.decode import (
    DS,
    ES,
    FS,
    GS,
    LOCK,
    LONGEST,
    REP,
    REPNE,
    SS,
    Decoder,
    Instruction,
    Truncated,
    decode,
)
from vmm.bt.table import MEMORY_KINDS, Kind, Map, Prefix
from vmm.x86.faults import Vector

REGISTERS = {4: ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi"),
             2: ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")}


def disassembler(code32: bool) -> capstone.Cs:
    cs = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_32 if code32 else capstone.CS_MODE_16)
    cs.detail = True
    return cs


DISASSEMBLERS = {code32: disassembler(code32) for code32 in (False, True)}


def form_of(code: str, code32: bool = True) -> Instruction:
    return decode(bytes.fromhex(code), 0, code32)


def judged_in_32_bit(encoding: Encoding) -> bool:
    """In 16-bit code capstone takes 66 for an operand size only, never for a mandatory prefix."""
    return not encoding.code32 and encoding.entry.prefix is Prefix.X66


def address_of(form: Instruction, code: bytes) -> tuple[str | None, str | None, int, int]:
    names = REGISTERS[form.addrsize]
    return (names[form.base] if form.base >= 0 else None, names[form.index] if form.index >= 0 else None,
            form.scale, form.displacement(code, 0) & (1 << 8 * form.addrsize) - 1)


def disagreements(encoding: Encoding, cs: capstone.Cs) -> Iterator[str]:
    code, _, entry = encoding
    form = decode(code, 0, encoding.code32)
    if form.entry is not entry:
        yield f"is {form.entry.mnemonic}"
        return
    known = next(cs.disasm(code, EIP, 1), None)
    if known is None:
        if entry.opcode not in errata.UNKNOWN and entry.kind is not Kind.UD:
            yield "unknown"
        return
    name = known.mnemonic.split()[-1]
    if name != entry.mnemonic and name not in errata.OTHER_NAMES.get(entry.mnemonic, ()):
        yield f"called {name}"
    if entry.kind is Kind.UD:
        return
    if known.size != form.length:
        yield f"{known.size} bytes long"
    operands = [operand for operand in known.operands if operand.type == x86.X86_OP_MEM]
    if bool(operands) != (form.memory is not None):
        yield "memory operand"
    elif operands and form.memory is not None:
        sources = [operand for operand in operands if known.reg_name(operand.mem.base) in ("si", "esi")]
        operand = sources[0] if form.memory.kind == "X" else operands[0]
        if form.memory.kind in MEMORY_KINDS:
            index = known.reg_name(operand.mem.index) if operand.mem.index else None
            theirs = (known.reg_name(operand.mem.base) if operand.mem.base else None,
                      None if index == "eiz" else index, operand.mem.scale,
                      operand.mem.disp & (1 << 8 * form.addrsize) - 1)
            if theirs != address_of(form, code):
                yield f"address {theirs}"
            if known.disp_offset != max(form.disp_at, 0):
                yield f"displacement at {known.disp_offset}"
        if operand.size != form.mem_size and entry.mnemonic not in errata.WRONG_SIZE:
            yield f"size {operand.size}"
        access = bool(operand.access & capstone.CS_AC_READ), bool(operand.access & capstone.CS_AC_WRITE)
        if access != (form.memory.read, form.memory.written) and entry.mnemonic not in errata.WRONG_ACCESS:
            yield f"access {access}"
    # of two immediates capstone tells the place of the last
    if len(entry.immediates) != 1 or entry.immediates[0].kind == "A":
        return
    if known.imm_offset != form.imm_at:
        yield f"immediate at {known.imm_offset}"
    immediate, operand = form.immediate(code, 0), known.operands[-1]
    if entry.immediates[0].kind == "J":
        if form.opcode in errata.NEAR_TARGETS:
            return
        immediate = form.target(code, 0, EIP)
    if operand.type == x86.X86_OP_IMM and (operand.imm - immediate) & (1 << 8 * form.imm_size) - 1:
        yield f"immediate {operand.imm:#x}"


@pytest.mark.parametrize("code32", [False, True], ids=["16-bit", "32-bit"])
def test_every_entry_as_capstone_sees_it(code32: bool) -> None:
    cs = DISASSEMBLERS[code32]
    wrong = [f"{encoding.code.hex()} {encoding.entry.opcode} {encoding.entry.mnemonic}: {what}"
             for encoding in encodings() if encoding.code32 == code32 and not judged_in_32_bit(encoding)
             for what in disagreements(encoding, cs)]
    assert not wrong, "\n".join(wrong[:50])


def test_instructions_with_a_mandatory_66_are_the_same_in_16_bit_code() -> None:
    for encoding in filter(judged_in_32_bit, encodings()):
        in_16 = decode(encoding.code, 0, False)
        code = encoding.code.replace(b"\x67", b"", 1) if in_16.addrsize == 4 else b"\x67" + encoding.code
        moved = len(code) - len(encoding.code)
        in_32 = decode(code, 0, True)
        assert in_16.entry is in_32.entry is encoding.entry
        assert in_16.length + moved == in_32.length
        for name in ("addrsize", "segment", "modrm", "base", "index", "scale", "disp_size", "imm_size"):
            assert getattr(in_16, name) == getattr(in_32, name), encoding.code.hex()


@pytest.mark.parametrize("code32", [False, True], ids=["16-bit", "32-bit"])
def test_every_effective_address(code32: bool) -> None:
    cs = DISASSEMBLERS[code32]
    for prefix in (b"", b"\x67"):
        addresses_16 = (prefix == b"\x67") == code32
        for modrm in range(0xC0):
            sibs: list[bytes] = [b""]
            if not addresses_16 and modrm & 7 == 4:
                sibs = [bytes([sib]) for sib in range(256)]
            for sib in sibs:
                code = prefix + b"\x8b" + bytes([modrm]) + sib + bytes.fromhex("92a3b4c5d6")
                form = decode(code, 0, code32)
                known = next(cs.disasm(code, EIP, 1))
                operand = known.operands[1]
                index = known.reg_name(operand.mem.index) if operand.mem.index else None
                assert known.size == form.length
                assert address_of(form, code) == (
                    known.reg_name(operand.mem.base) if operand.mem.base else None,
                    None if index in ("eiz", "riz") else index, operand.mem.scale,
                    operand.mem.disp & (1 << 8 * form.addrsize) - 1), code.hex()
                on_stack = form.base in (4, 5)
                assert form.segment == (SS if on_stack else DS)


def test_what_is_undefined() -> None:
    """The whole opcode space.  Capstone knows more extensions; where it disagrees, the silicon decides."""
    cs, silicon = DISASSEMBLERS[True], Silicon()
    wrong = []
    for code in defined_and_not():
        form = decode(code, 0, True)
        undefined = form.kind in (Kind.UD, Kind.OVERLONG)
        known = next(cs.disasm_lite(code, EIP, 1), None)
        if undefined == (known is None):
            continue
        name = known[2].split()[-1] if known is not None else ""
        refused = silicon.run(code) == Vector.UD
        excused = name in errata.LENIENT_SILICON if undefined else form.entry.opcode in errata.STRICT_SILICON
        if refused != undefined and not excused:
            wrong.append(f"{code.hex()} {form.entry.mnemonic}, capstone {name}, silicon {refused}")
    assert not wrong, "\n".join(wrong[:50])


ALL = tuple(encodings())


def test_decoding_is_the_same_however_the_form_was_found() -> None:
    known, forgetful = Decoder(), Decoder(limit=1)
    for code, code32, entry in ALL[::3]:
        first = known.decode(code, 0, code32)
        assert known.decode(b"\xcc" + code, 1, code32) is first or entry.kind is Kind.UD
        again = forgetful.decode(memoryview(code), 0, code32)
        assert again is not first
        for name in Instruction.__slots__:
            assert getattr(again, name) == getattr(first, name)


def test_the_forms_kept_are_bounded() -> None:
    decoder = Decoder(limit=100)
    for code, code32, _ in ALL[:5000]:
        decoder.decode(code, 0, code32)
        assert decoder._nodes <= 100


def test_values_are_not_part_of_a_form() -> None:
    assert form_of("8b4508") is form_of("8b45f8")
    assert form_of("b878563412") is form_of("b800000000")
    code = bytes.fromhex("c70485785634120df0ad8b")  # mov dword ptr [eax*4 + 0x12345678], 0x8badf00d
    form = decode(code, 0, True)
    assert form.displacement(code, 0) == 0x12345678
    assert form.immediate(code, 0) & 0xFFFFFFFF == 0x8BADF00D
    assert (form.base, form.index, form.scale, form.memory and form.memory.written) == (-1, 0, 4, True)


def test_truncated_code_is_told_from_undefined_code() -> None:
    for code, code32, _ in ALL[::7]:
        form = decode(code, 0, code32)
        for length in range(form.length):
            with pytest.raises(Truncated):
                decode(code[:length], 0, code32)
        assert decode(code[:form.length], 0, code32) is form


@pytest.mark.parametrize("filler", [0x66, 0x2E, 0xF3], ids=hex)
def test_fifteen_bytes_are_the_most(filler: int) -> None:
    for tail in ("90", "0faf00", "8b842478563412", "c7058000000078563412"):
        instruction = bytes.fromhex(tail)
        length = decode(instruction, 0, True).length
        most = bytes([filler]) * (LONGEST - length) + instruction
        if filler != 0x66 or len(tail) < 20:  # 66 shortens the immediate
            assert decode(most + bytes(4), 0, True).length == LONGEST
            assert decode(bytes([filler]) + most, 0, True).kind is Kind.OVERLONG
    assert decode(bytes([filler]) * LONGEST, 0, True).kind is Kind.OVERLONG
    with pytest.raises(Truncated):
        decode(bytes([filler]) * (LONGEST - 1), 0, True)


def test_the_last_prefix_of_a_kind_counts() -> None:
    assert form_of("f2f30f10c1").entry.mnemonic == "movss"
    assert form_of("f3f20f10c1").entry.mnemonic == "movsd"
    assert form_of("f3f2a4").prefixes == REPNE and form_of("f2f3a4").prefixes == REP
    assert form_of("2e648b00").segment == FS and form_of("642e658b00").segment == GS
    # the register width of CRC32 follows 66, which F2 outranks as a mandatory prefix
    assert form_of("66f20f38f1c1").entry.mnemonic == "crc32"
    assert form_of("66f20f38f1c1").opsize == 2


def test_segments_of_strings() -> None:
    """An override is the source's; the destination knows none."""
    assert form_of("64a4").segment == form_of("64ac").segment == form_of("646e").segment == FS
    assert form_of("a4").segment == DS
    assert form_of("64aa").segment == form_of("64ae").segment == form_of("646c").segment == ES
    assert form_of("64d7").segment == FS and form_of("d7").segment == DS


@pytest.mark.parametrize(
    "code", ["f08b00", "f001c0", "f03900", "f090", "f00f20d8", "f0a4", "f0ff30", "f0eb00"])
def test_lock_is_refused_but_where_it_is_for(code: str) -> None:
    assert form_of(code).kind is Kind.UD


@pytest.mark.parametrize(
    "code", ["f00100", "f08700", "f00fb103", "f00fc70e", "f00fba2b01", "f00f20c0", "f0f718"])
def test_lock_is_allowed(code: str) -> None:
    form = form_of(code)
    assert form.kind is not Kind.UD and form.prefixes & LOCK


def test_vex() -> None:
    andn = form_of("c4e270f2c2")
    assert (andn.entry.mnemonic, andn.vvvv, andn.reg, andn.rm, andn.map) == ("andn", 1, 0, 2, Map.VEX_0F38)
    # the unused top bit of vvvv does not matter, unless vvvv is unused as a whole
    assert form_of("c4e230f2c2").vvvv == 1
    assert form_of("c4e37bf0c104").entry.mnemonic == "rorx"
    for undefined in ("c4e33bf0c104", "c4e274f2c2", "66c4e270f2c2", "c5f877", "c4e27858c1", "c4c17058c1"):
        assert form_of(undefined).kind is Kind.UD
    # LES and LDS have memory operands only; in 16-bit code there is no VEX
    assert form_of("c400").entry.mnemonic == "les"
    assert form_of("c4e270f2c2", code32=False).kind is Kind.UD


def test_branch_targets() -> None:
    assert form_of("ebfe").target(bytes.fromhex("ebfe"), 0, EIP) == EIP
    near = bytes.fromhex("66e9fc0f")
    assert form_of(near.hex()).target(near, 0, 0x12345000) == 0x6000
    backwards = bytes.fromhex("0f8400f0ffff")
    assert form_of(backwards.hex()).target(backwards, 0, 0) == 0xFFFFF006


def judge(code: bytes, code32: bool) -> None:
    try:
        form = decode(code, 0, code32)
    except Truncated:
        assert len(code) < LONGEST
        return
    assert 0 < form.length <= LONGEST and form.length <= len(code)
    known = next(DISASSEMBLERS[code32].disasm_lite(code, EIP, 1), None)
    if known is not None and form.kind not in (Kind.UD, Kind.OVERLONG) and form.entry.mnemonic != "extrq":
        assert known[1] == form.length


@given(st.binary(max_size=20), st.booleans())
def test_no_bytes_surprise_it(code: bytes, code32: bool) -> None:
    judge(code, code32)


PREFIXES = st.lists(st.sampled_from([0xF0, 0xF2, 0xF3, 0x66, 0x67, 0x26, 0x2E, 0x64]), max_size=4).map(bytes)
ESCAPES = st.sampled_from(
    [b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a", b"\xc4\xe2", b"\xc4\xe3", b"\xd9", b"\xdf"])


@given(PREFIXES, ESCAPES, st.binary(max_size=16), st.booleans())
def test_nor_do_opcodes_of_any_map(prefixes: bytes, escape: bytes, rest: bytes, code32: bool) -> None:
    judge(prefixes + escape + rest, code32)
