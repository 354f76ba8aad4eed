# SPDX-License-Identifier: GPL-2.0-or-later
"""The translator: the example of the paper, and every encoding of the instruction table."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bt_encodings import encodings
from tests.bt_guest import Guest, Stop
from vmm.bt import listing
from vmm.bt.decode import CS, DS, ES, FS, SS, decode
from vmm.bt.exits import CALLOUT
from vmm.bt.mode import ALL_SEGMENTS, Mode
from vmm.bt.table import Entry, Kind
from vmm.bt.translate import LONGEST_UNIT, Translator
from vmm.bt.unit import Mark
from vmm.bt.verify import Layout, Verifier

# the paper's isPrime (section 3.1): its argument in edi, its result in eax
IS_PRIME = bytes.fromhex("89f9 be02000000 39ce 7d0e"           # isPrime: jge prime
                         "89c8 99 f7fe 85d2 740b"               # nexti: je notPrime
                         "46 39ce 7cf2"                         # jl nexti
                         "b801000000 c3"                        # prime
                         "31c0 c3")                             # notPrime
LABELS = {0x1000: "isPrime", 0x100B: "nexti", 0x1014: "again", 0x1019: "prime", 0x101F: "notPrime"}
HLT = b"\xF4"


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


def test_the_translation_cache_of_the_paper_after_isprime_49(guest: Guest) -> None:
    guest.write(0x1000, IS_PRIME)
    guest.write(0x2000, HLT)
    guest.write(0x8000, (0x2000).to_bytes(4, "little"))
    guest.registers = [0, 0, 0, 0, 0x8000, 0, 0, 49]
    assert guest.run(0x1000) == Stop("callout", 0x2000)
    assert guest.registers == [0, 49, 0, 0, 0x8004, 0, 7, 49]
    lines = [(line.guest.split(" ")[0], line.host, line.note)
             for unit in list(guest.cache.units())[:4] for line in listing.lines(unit, LABELS, {})]
    assert lines == [
        ("mov", "mov ecx, edi", "IDENT"),
        ("mov", "mov esi, 2", "IDENT"),
        ("cmp", "cmp esi, ecx", "IDENT"),
        ("jge", "jge [takenAddr]", "JCC -> prime"),
        ("", "", "fall-thru into nexti'"),
        ("mov", "mov eax, ecx", "IDENT"),
        ("cdq", "cdq", "IDENT"),
        ("idiv", "idiv esi", "IDENT"),
        ("test", "test edx, edx", "IDENT"),
        ("je", "je notPrime'", "JCC -> notPrime"),
        ("", "", "fall-thru into again'"),
        ("inc", "inc esi", "IDENT"),
        ("cmp", "cmp esi, ecx", "IDENT"),
        ("jl", "jl nexti'", "JCC -> nexti, prime"),
        ("", "jmp [fallthrAddr]", ""),
        ("xor", "xor eax, eax", "IDENT"),
        ("ret", "mov r8d, dword ptr gs:[esp]", "RET"),
        ("", "lea esp, [rsp + 4]", ""),
        ("", "jmp qword ptr [r15 + r8*8]", ""),
    ]


MODES = {
    "flat": Mode(),
    "based": Mode(flat=1 << CS | 1 << SS | 1 << ES, based=1 << DS | 1 << FS),
}


@pytest.mark.parametrize("name", MODES)
def test_every_encoding_becomes_code_the_verifier_accepts(name: str) -> None:
    mode = MODES[name]
    translator = Translator(mode)
    base, stub = 0x2000_0000, 0x1FF0_0000
    verifier = Verifier(Layout(base, 1 << 28, stub, 16, 8))
    address, count = base, 0
    for encoding in encodings():
        if not encoding.code32:
            continue
        form = decode(encoding.code, 0, True)
        code = encoding.code[:form.length]
        draft = translator.translate(code, 0, 0x1000)
        for _, behind, part in draft.exits:
            distance = stub - (address + len(draft.host) - behind)
            draft.parts[part] = distance.to_bytes(4, "little", signed=True)
        try:
            assert verifier.accept(draft.parts, address) == draft.host
        except Exception as error:
            raise AssertionError(f"{form.entry.mnemonic} {code.hex()} -> {draft.host.hex()}") from error
        address += len(draft.host)
        count += draft.pieces[0].mark is not Mark.CALLOUT
    assert count > 2000


def in_line(entry: Entry) -> bool:
    """Flags and segment selectors are read and changed in line."""
    reads_segment = entry.kind is Kind.SEGMENT and not any(
        (operand.written and operand.kind in "S@") or operand.size == "p" for operand in entry.operands)
    return entry.mnemonic in ("cli", "sti", "pushfd", "popfd") or reads_segment


@pytest.mark.parametrize("kind", [Kind.FAR, Kind.INT, Kind.SEGMENT, Kind.IO, Kind.SENSITIVE, Kind.PRIVILEGED,
                                  Kind.UD, Kind.LEGACY, Kind.FPU_ENV])
def test_what_the_monitor_has_to_execute_is_left_to_it(kind: Kind) -> None:
    translator = Translator(Mode())
    found = [encoding.code for encoding in encodings() if encoding.code32 and encoding.entry.kind is kind
             and not in_line(encoding.entry)]
    assert found or kind is Kind.UD
    for code in [*found, b"\x0F\x0B" + bytes(8)][:200]:
        draft = translator.translate(code, 0, 0x1000)
        assert [piece.mark for piece in draft.pieces] == [Mark.CALLOUT]
        assert draft.exits == ((CALLOUT, 0, -1),)


@pytest.mark.parametrize("mode", [
    Mode(code32=False), Mode(stack32=False), Mode(flat=ALL_SEGMENTS & ~(1 << CS))])
def test_a_mode_that_is_not_translated_is_left_to_the_monitor(mode: Mode) -> None:
    draft = Translator(mode).translate(b"\x90\x90", 0, 0x1000)
    assert [piece.mark for piece in draft.pieces] == [Mark.CALLOUT]


@pytest.mark.parametrize(("mode", "code"), [
    (Mode(fpu=False, sse=False), "d9e8"), (Mode(sse=False), "0f58c1"), (Mode(fpu=False, sse=False), "0f77"),
    (Mode(flat=ALL_SEGMENTS & ~(1 << DS)), "8b03"), (Mode(flat=ALL_SEGMENTS & ~(1 << SS)), "50"),
    (Mode(flat=ALL_SEGMENTS & ~(1 << ES)), "aa"), (Mode(flat=ALL_SEGMENTS & ~(1 << FS)), "648b03")])
def test_what_the_mode_does_not_grant_is_left_to_the_monitor(mode: Mode, code: str) -> None:
    draft = Translator(mode).translate(bytes.fromhex(code) + bytes(16), 0, 0x1000)
    assert draft.pieces[0].mark is Mark.CALLOUT
    assert Translator(Mode()).translate(bytes.fromhex(code) + bytes(16), 0, 0).pieces[0].mark \
        is not Mark.CALLOUT


def test_a_unit_is_at_most_twelve_instructions() -> None:
    draft = Translator(Mode()).translate(b"\x40" * 40, 0, 0x1000)
    assert len(draft.pieces) == LONGEST_UNIT == draft.guest_bytes
    assert draft.exits == ((0x00C, 0, -1),)


def test_another_page_is_reached_through_the_jump_table() -> None:
    draft = Translator(Mode()).translate(b"\x40" * 40, 0, 0xFFFF_FFF8)
    assert draft.guest_bytes == LONGEST_UNIT and not draft.exits
    # mov r8d, 4; jmp [r15 + r8*8]
    assert draft.host.endswith(bytes.fromhex("41b804000000 43ff24c7"))
