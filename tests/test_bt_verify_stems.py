# SPDX-License-Identifier: GPL-2.0-or-later
"""What the verifier remembers of code it went over, and how it is cut: neither makes any difference."""

from __future__ import annotations

import random

import pytest

from tests.bt_units import LAYOUT, STRINGS, all_forms, cut, jump, lengths, unit
from vmm.bt.verify import Rejected, Verifier
from vmm.bt.verify_scan import JUMPS, OPERAND, STOPS, UNKNOWN, Stems, scan

_FORMS = [code for code, _ in all_forms()]
_SPECIAL = [bytes.fromhex(text) for text in (
    *STRINGS, "458B4618", "4589464C", "41C7460C00000000", "4189F8 43880404", "438B0404", "8D6424FC",
    "7500", "0F8500000000", "EB00", "E900000000", "67E300", "0F0B", "41B800000000 43FF24C7")]
#: what no unit may have
_ESCAPES = [bytes.fromhex(text) for text in (
    "8B042500300020", "438B04C7", "41C7461801000000", "418B8608010000", "4989C6", "48F7D0", "4A8D3C27",
    "CD80", "0F05", "EC", "50", "41FFE0", "6766C3", "4A8D3C27F3AB", "41C7460D00000000")]


def verdict(verifier: Verifier, code: bytes, *sizes: int) -> str:
    """Empty when the unit is accepted, which is forgotten again; else why not."""
    try:
        assert verifier.accept(cut(code, *sizes), LAYOUT.units) == code
    except Rejected as rejected:
        return rejected.reason
    verifier.retract(LAYOUT.units, len(code))
    return ""


def marks(verifier: Verifier, code: bytes, *sizes: int) -> tuple[set[int], set[int], bool]:
    """What is known of an accepted unit: entries, sites, whether its last jump may be replaced."""
    verifier.accept(cut(code, *sizes), LAYOUT.units)
    known = verifier.entries, verifier.sites
    end = LAYOUT.units + len(code)
    replaced = True
    try:
        verifier.accept([unit(b"\x90", end - 5)], end - 5)
        verifier.retract(end - 5, 6)
        verifier.retract(LAYOUT.units, len(code) - 5)
    except Rejected:
        replaced = False
        verifier.retract(LAYOUT.units, len(code))
    return *known, replaced


def _body(randoms: random.Random) -> bytes:
    parts = [randoms.choice(_SPECIAL if randoms.random() < 0.4 else _FORMS)
             for _ in range(randoms.randrange(1, 7))]
    if randoms.random() < 0.3:
        parts.insert(randoms.randrange(len(parts) + 1), randoms.choice(_ESCAPES))
    return b"".join(parts)


def test_hints_and_memory_never_change_a_verdict() -> None:
    """One verifier sees everything, and is told all sorts of things; the other starts anew with each unit."""
    randoms = random.Random(4)
    old = Verifier(LAYOUT)
    accepted = 0
    for _ in range(8000):
        code = unit(_body(randoms))
        if randoms.random() < 0.3:
            data = bytearray(code)
            data[randoms.randrange(len(data))] = randoms.randrange(256)
            code = bytes(data)
        said = verdict(old, code, *lengths(code, randoms))
        assert bool(said) == bool(verdict(Verifier(LAYOUT), code)), code.hex()
        accepted += not said
    assert 2000 < accepted < 7000
    assert len(old._stems) > 1000


def test_hints_and_memory_never_change_what_is_known_of_a_unit() -> None:
    randoms = random.Random(5)
    old = Verifier(LAYOUT._replace(units_bytes=1 << 12))
    checked = 0
    while checked < 1000:
        code = unit(_body(randoms))
        if verdict(old, code):
            continue
        hinted = marks(old, code, *lengths(code, randoms))
        assert hinted == marks(Verifier(LAYOUT._replace(units_bytes=1 << 12)), code)
        checked += 1


def test_a_stem_stands_for_whole_instructions_whatever_follows() -> None:
    randoms = random.Random(6)
    stems = Stems()
    for code in [*_FORMS, *_SPECIAL] * 3:
        for length in range(len(code) + 1):
            stem = code[:length]
            found = stems[stem]
            if found == UNKNOWN:
                continue
            size = length + (found & OPERAND)
            for _ in range(3):
                result = scan(stem + randoms.randbytes(found & OPERAND))
                elsewhere = result.targets[-1:] if found & JUMPS else []
                inside = result.targets[:len(result.targets) - len(elsewhere)]
                assert set(inside) <= result.starts | {size}
                assert (result.ended == size and size not in inside) == bool(found & STOPS)
                assert result.sites == ([size - 4] if found & JUMPS else [])


@pytest.mark.parametrize("stem", [
    "", "0F", "6567", "41C746", "41C7460C", "4A8D3C27", "4A8D3C27F3AB89", "75", "EB", "67E3", "E990", "E9E9",
    "0F85FF", "43FF24C790", "90E990", "CC", "438B04", "7590", "7505 43FF24C7", "7501 43FF24C7", "75FC 89C0",
    "EB00", "EBFE", "7400 E990"])
def test_what_cannot_be_said_of_a_stem_alone_is_not_remembered(stem: str) -> None:
    stems = Stems()
    assert stems[bytes.fromhex(stem)] == UNKNOWN and not stems


@pytest.mark.parametrize(("stem", "found"), [
    ("B8", 4), ("89C0", 0), ("89C0 B8", 4), ("0F85", JUMPS | 4), ("E9", JUMPS | STOPS | 4),
    ("43FF24C7", STOPS), ("89C0 E9", JUMPS | STOPS | 4), ("7504 43FF24C7", 0), ("7502 89C0", 0), ("75FE", 0),
    ("7502 89C0 43FF24C7", STOPS), ("7405 E9", JUMPS | 4), ("7400 E9", JUMPS | STOPS | 4), ("7405 B8", 4)])
def test_what_a_stem_stands_for(stem: str, found: int) -> None:
    """A jump over what does not go on makes it go on."""
    assert Stems()[bytes.fromhex(stem)] == found


def test_a_jump_is_looked_at_although_it_is_known() -> None:
    verifier = Verifier(LAYOUT)
    assert verdict(verifier, unit(b""), 1, 4) == ""
    assert "no instruction is known" in verdict(verifier, jump(LAYOUT.units, LAYOUT.stubs + 1), 1, 4)
    assert "into an instruction" in verdict(verifier, unit(bytes.fromhex("0F84FBFFFFFF")), 2, 4, 1)
    # by a jump into the displacement of another one, and into an immediate
    code = bytes.fromhex("B800000000 E9F8FFFFFF")
    assert "into an instruction" in verdict(verifier, unit(code), 1, 4, 1, 4, 1)
    assert "into an instruction" in verdict(verifier, code, 1, 4, 1)
    code = bytes.fromhex("B800000000 E9F6FFFFFF")
    assert verdict(verifier, unit(code), 1, 4, 1, 4, 1) == "" == verdict(verifier, code, 1, 4, 1)
    # one that is not among the last two
    far = (LAYOUT.stubs + 8).to_bytes(4, "little")
    code = bytes.fromhex("0F84") + far + bytes.fromhex("89C0 89C0 43FF24C7")
    assert "no instruction is known" in verdict(verifier, code, 2, 4, 2, 0, 2, 0, 4)
    assert "no instruction is known" in verdict(verifier, code, 2, 4, 4, 0, 4)


def test_a_part_that_is_cut_short_is_not_accepted_for_its_stem() -> None:
    verifier = Verifier(LAYOUT)
    assert verdict(verifier, unit(bytes.fromhex("B800000000")), 1, 4, 1) == ""
    for code in "B80000", "E90000", "B8", "E9", "0F84", "0F84E9":
        data = bytes.fromhex(code)
        for sizes in (1,), (1, 0), (2,), (2, 0), (0, 1), ():
            assert "cut short" in verdict(verifier, data, *sizes)
    for sizes in (1,), (1, 4), (5, 0), (5, 5, 5), (255,):
        assert "runs over" in verdict(verifier, bytes.fromhex("B800000000"), *sizes)
    # add eax, 1; int 0x80: what one operand has too much, the other has not
    code = bytes.fromhex("83C0 01CD8090 B8 90")
    assert "not allowed" in verdict(verifier, unit(code), 2, 4, 1, 1, 1)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.bt.verify_scan._MOST_STEMS", 10)
    verifier = Verifier(LAYOUT)
    for code in _FORMS[:200]:
        assert verdict(verifier, unit(code), len(code), 0, 1) == ""
        assert len(verifier._stems) <= 10


def test_only_whole_units_are_retracted() -> None:
    verifier = Verifier(LAYOUT)
    code = unit(b"\x90" * 8)
    verifier.accept([code], LAYOUT.units)
    for address, length in (LAYOUT.units + 1, len(code) - 1), (LAYOUT.units, 4), (LAYOUT.units + 64, 8):
        with pytest.raises(Rejected):
            verifier.retract(address, length)
    verifier.retract(LAYOUT.units, len(code))
    assert not verifier.entries and not verifier.sites
