# SPDX-License-Identifier: GPL-2.0-or-later
"""Listings of translation units, with the example of the paper (section 3.1)."""

from __future__ import annotations

from vmm.bt import listing
from vmm.bt.unit import Mark, Piece, Successor, Unit

# mov ecx, edi; mov esi, 2; cmp esi, ecx; jge prime
GUEST = bytes.fromhex("89f9 be02000000 39ce 7d19")
# the same with a 32-bit displacement, and the jump behind it
TAKEN = bytes.fromhex("89f9 be02000000 39ce 0f8d00010000")
LABELS = {0x101000: "isPrime", 0x10100B: "nexti", 0x101024: "prime"}
PIECES = (Piece(0, 0, Mark.IDENT), Piece(2, 2, Mark.IDENT), Piece(7, 7, Mark.IDENT), Piece(9, 9, Mark.JCC))
HOST = 0x7F0012340000


def unit(*, chained: bool, elided: bool) -> Unit:
    host = TAKEN if elided else TAKEN + bytes.fromhex("e900020000")
    return Unit(0x101000, True, GUEST, HOST, host, PIECES,
                (Successor(0x101024, 9, True), Successor(0x10100B, 15, False, chained)))


def test_the_first_unit_of_the_paper() -> None:
    assert listing.render([unit(chained=True, elided=True)], LABELS) == """\
isPrime:  4 instructions, 11 bytes -> 15 bytes at 7f0012340000
00101000  mov ecx, edi                    mov ecx, edi                            ; IDENT
00101002  mov esi, 2                      mov esi, 2                              ; IDENT
00101007  cmp esi, ecx                    cmp esi, ecx                            ; IDENT
00101009  jge 0x101024                    jge [takenAddr]                         ; JCC -> prime
                                                                                  ; fall-thru into nexti'
"""


def test_jumps_name_where_they_wait_and_where_they_lead() -> None:
    fresh = list(listing.lines(unit(chained=False, elided=False), LABELS, {}))
    assert [line.host for line in fresh[-2:]] == ["jge [takenAddr]", "jmp [fallthrAddr]"]
    assert [line.note for line in fresh[-2:]] == ["JCC -> prime, nexti", ""]
    chained = list(listing.lines(unit(chained=True, elided=False), {}, {}))
    assert chained[-1].host == "jmp 0010100b'"


def test_hits_and_names_of_the_state_block() -> None:
    # ret: mov [r14 + 0x10], r8; mov r8d, gs:[esp]; lea esp, [rsp + 4]; jmp [r15 + r8*8]
    host = bytes.fromhex("4d894610 6567448b0424 8d642404 43ff24c7")
    one = Unit(0x5000, True, b"\xc3", HOST, host, (Piece(0, 0, Mark.RET),), hits=12)
    text = listing.render([one], fields={0x10: "SCRATCH"})
    assert text.startswith("00005000:  1 instruction, 1 byte -> ") and ", 12 hits\n" in text
    assert "mov qword ptr [SCRATCH], r8" in text and "; RET" in text
    assert "mov r8d, dword ptr gs:[esp]" in text
    assert "jmp qword ptr [r15 + r8*8]" in text


def test_what_is_no_instruction_is_listed_as_bytes() -> None:
    undefined = Unit(0x100, False, b"\x0f\xff", HOST, b"\x90", (Piece(0, 0, Mark.CALLOUT),))
    lines = list(listing.lines(undefined, {}, {}))
    assert lines[0].note == "callout" and lines[0].host == "nop"
    assert all(line.guest for line in lines)


def test_the_instruction_of_a_host_address() -> None:
    one = unit(chained=False, elided=False)
    expected = [0x101000] * 2 + [0x101002] * 5 + [0x101007] * 2 + [0x101009] * 11
    assert [one.eip_at(offset) for offset in range(len(one.host))] == expected
