# SPDX-License-Identifier: GPL-2.0-or-later
"""Units for the verifier's tests: a layout, bodies of instructions, every form the allow-list knows."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import accumulate, pairwise, product

from vmm.bt.verify import Layout, Rejected, Verifier
from vmm.bt.verify_scan import scan
from vmm.bt.verify_table import TABLES, Form

LAYOUT = Layout(units=0x2000_0000, units_bytes=1 << 20, stubs=0x1FF0_0000, stub_bytes=16, stub_count=1024)
_PREFIX = {"o": b"\x66", "l": b"\xF0", "p": b"\xF2", "r": b"\xF3"}
_MAP = {"": b"", "0f": b"\x0F", "0f38": b"\x0F\x38", "0f3a": b"\x0F\x3A"}
#: ModRM (reg 0) and what follows: [ebx], [ebp+1], [esi+d32], [ecx+edx*4], [esp+8], [d32]
WINDOW_OPERANDS = tuple(bytes.fromhex(text) for text in (
    "03", "4501", "8678563412", "0491", "442408", "042510000000"))
STRINGS = ("6567AC", "4A8D3C27 65F3A5 89FF89F6", "4A8D3C27 65A4 89FF89F6", "4A8D3C27 F3AB 89FF",
           "4A8D3C27 66AB 89FF", "4A8D3C27 65F3A6 89FF89F6", "4A8D3C27 F2AE 89FF",
           "4A8D3C27 6566F3A5 89FF89F6")


def jump(at: int, target: int) -> bytes:
    """`jmp rel32` at an address."""
    return b"\xE9" + (target - at - 5).to_bytes(4, "little", signed=True)


def unit(body: bytes, address: int = LAYOUT.units, stub: int = 3) -> bytes:
    """A body that leaves by a stub."""
    return body + jump(address + len(body), LAYOUT.stubs + 16 * stub)


def cut(code: bytes, *sizes: int) -> list[bytes]:
    """The code in parts of these lengths, and what is left."""
    ends = [*accumulate(sizes, initial=0), len(code)]
    return [code[begin:max(begin, end)] for begin, end in pairwise(ends)]


def lengths(code: bytes, randoms: random.Random) -> list[int]:
    """Of stems and operands: of single instructions, as far as they are known, and more or less spoilt."""
    try:
        starts = [*sorted(scan(code).starts), len(code)]
    except Rejected:
        starts = [0, *sorted(randoms.sample(range(1, len(code) + 1), min(3, len(code))))]
    found = []
    for begin, end in pairwise(starts):
        operand = 4 if code[begin:begin + 1] in (b"\xE9", b"\x0F") else randoms.choice((0, 0, 1, 4))
        operand = min(operand, end - begin)
        found += [end - begin - operand, operand]
    for _ in range(randoms.choice((0, 0, 0, 1, 2))):
        found[randoms.randrange(len(found))] = randoms.randrange(20)
    if randoms.random() < 0.9:
        found.pop()
    return found


def verdict(code: bytes, address: int = LAYOUT.units, verifier: Verifier | None = None) -> str:
    """Empty when a unit is accepted, else why not."""
    try:
        (verifier or Verifier(LAYOUT)).accept([code], address)
    except Rejected as rejected:
        return rejected.reason
    return ""


def _digits(form: Form) -> list[int]:
    return [3] if form.reg in ("g", "x") else [int(digit) for digit in form.reg]


def _operand_forms(form: Form, prefix: str, opcode: bytes) -> Iterator[tuple[bytes, bool]]:
    legacy = b"".join(_PREFIX[letter] for letter in prefix)
    immediate = bytes(form.immediate_bytes(prefix))
    for digit in _digits(form):
        if form.takes(digit, True) and "l" not in prefix:
            implied = b"\x65\x67" if form.rm == "i" else b""
            yield implied + legacy + opcode + bytes([0xC0 | digit << 3 | 1]) + immediate, form.rm == "i"
        if form.takes(digit, False):
            for operand in WINDOW_OPERANDS:
                modrm = bytes([operand[0] | digit << 3]) + operand[1:]
                yield b"\x65\x67" + legacy + opcode + modrm + immediate, True
            if form.reg == "g":      # r9 and [r8 + r11]
                yield b"\x65\x67" + legacy + b"\x47" + opcode + b"\x0C\x18" + immediate, True


def all_forms() -> Iterator[tuple[bytes, bool]]:
    """An instruction of every form of the allow-list that goes on behind it; whether it touches memory."""
    for name, table in TABLES.items():
        for number, forms in table.items():
            opcode = _MAP[name] + bytes([number])
            for form, prefix in product(forms, sorted(table[number][0].prefixes | forms[-1].prefixes)):
                if prefix not in form.prefixes:
                    continue
                if form.kind == "operand":
                    yield from _operand_forms(form, prefix, opcode)
                elif form.kind in ("plain", "register", "implied"):
                    implied = form.kind == "implied"
                    legacy = b"".join(_PREFIX[letter] for letter in prefix)
                    yield ((b"\x65\x67" if implied else b"") + legacy + opcode
                           + bytes(form.immediate_bytes(prefix)), implied)
