# SPDX-License-Identifier: GPL-2.0-or-later
"""Translation units as text: guest code beside what became of it, with the marks of the paper's listing.

    print(listing.render(units, labels={0x101000: "isPrime"}))

    isPrime:  4 instructions, 11 bytes -> 15 bytes at 7f0012340000
    00101000  mov ecx, edi                    mov ecx, edi                            ; IDENT
    ...
    00101009  jge 0x101024                    jge [takenAddr]                         ; JCC -> prime
                                                                                      ; fall-thru into nexti'

A jump that is chained names the unit it leads to, with a prime; any other one names the address it waits for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import NamedTuple

import capstone

from vmm.bt.unit import Piece, Successor, Unit

_GUEST_WIDTH, _HOST_WIDTH = 32, 40
_MODES = {False: capstone.CS_MODE_16, True: capstone.CS_MODE_32}
#: a field of the state block, which r14 points at
_FIELD = re.compile(r"\[r14(?: \+ (0x[0-9a-f]+|\d+))?\]")


class Line(NamedTuple):
    """One line of a unit.  Empty strings where one side has less to say than the other."""

    eip: int | None
    guest: str
    host: str
    note: str


def render(units: Iterable[Unit], labels: Mapping[int, str] | None = None,
           fields: Mapping[int, str] | None = None) -> str:
    """All units, as ordered.  `labels` names guest addresses, `fields` offsets in the state block."""
    return "\n".join(_block(unit, labels or {}, fields or {}) for unit in units)


def lines(unit: Unit, labels: Mapping[int, str], fields: Mapping[int, str]) -> Iterator[Line]:
    """The lines of one unit."""
    elided = [successor for successor in unit.successors if successor.at == len(unit.host)]
    ends = [*unit.pieces[1:], Piece(len(unit.guest), len(unit.host), unit.pieces[-1].mark)]
    for piece, end in zip(unit.pieces, ends):
        eip = unit.eip + piece.guest_at
        guest = [_text(instruction) for instruction in _disassemble(
            unit.guest[piece.guest_at:end.guest_at], eip, _MODES[unit.code32])]
        host = [_host_text(instruction, unit, labels, fields) for instruction in _disassemble(
            unit.host[piece.host_at:end.host_at], unit.address + piece.host_at, capstone.CS_MODE_64)]
        leads = [_name(successor.eip, labels) for successor in unit.successors
                 if piece.host_at <= successor.at < end.host_at]
        note = piece.mark.value + (f" -> {', '.join(leads)}" if leads else "")
        for row, (left, right) in enumerate(zip_longest(guest, host, fillvalue="")):
            yield Line(None if row else eip, left, right, "" if row else note)
    for successor in elided:
        yield Line(None, "", "", f"fall-thru into {_name(successor.eip, labels)}'")


def _block(unit: Unit, labels: Mapping[int, str], fields: Mapping[int, str]) -> str:
    hits = "" if unit.hits is None else f", {_count(unit.hits, 'hit')}"
    instructions, guest = _count(len(unit.pieces), "instruction"), _count(len(unit.guest), "byte")
    head = (f"{_name(unit.eip, labels)}:  {instructions}, {guest} -> {_count(len(unit.host), 'byte')} "
            f"at {unit.address:x}{hits}")
    return "\n".join([head, *(_columns(line) for line in lines(unit, labels, fields)), ""])


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _columns(line: Line) -> str:
    address = "" if line.eip is None else f"{line.eip:08x}"
    text = f"{address:8}  {line.guest:{_GUEST_WIDTH}}{line.host:{_HOST_WIDTH}}"
    return f"{text}; {line.note}" if line.note else text.rstrip()


def _name(eip: int, labels: Mapping[int, str]) -> str:
    return labels.get(eip, f"{eip:08x}")


class _Instruction(NamedTuple):
    address: int
    mnemonic: str
    operands: str


def _disassemble(code: bytes, address: int, mode: int) -> Iterator[_Instruction]:
    """All of `code`, what is no instruction byte by byte."""
    cs = capstone.Cs(capstone.CS_ARCH_X86, mode)
    at = 0
    while at < len(code):
        for start, size, mnemonic, operands in cs.disasm_lite(code[at:], address + at):
            yield _Instruction(start, mnemonic, operands)
            at += size
        if at < len(code):
            yield _Instruction(address + at, ".byte", f"0x{code[at]:02x}")
            at += 1


def _text(instruction: _Instruction) -> str:
    return f"{instruction.mnemonic} {instruction.operands}".rstrip()


def _host_text(instruction: _Instruction, unit: Unit, labels: Mapping[int, str],
               fields: Mapping[int, str]) -> str:
    for successor in unit.successors:
        if instruction.address == unit.address + successor.at:
            return f"{instruction.mnemonic} {_destination(successor, labels)}"
    named = _FIELD.sub(lambda match: _field(match, fields), instruction.operands)
    return _text(instruction._replace(operands=named))


def _destination(successor: Successor, labels: Mapping[int, str]) -> str:
    if successor.chained:
        return f"{_name(successor.eip, labels)}'"
    return "[takenAddr]" if successor.taken else "[fallthrAddr]"


def _field(match: re.Match[str], fields: Mapping[int, str]) -> str:
    name = fields.get(int(match[1] or "0", 0))
    return match[0] if name is None else f"[{name}]"
