# SPDX-License-Identifier: GPL-2.0-or-later
"""Encodings made from the instruction table: every entry with the prefixes and ModRM forms it can have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from vmm.bt.table import SLOTS, Entry, Map, Prefix

ESCAPES = {Map.ONE_BYTE: b"", Map.TWO_BYTE: b"\x0f", Map.X0F38: b"\x0f\x38", Map.X0F3A: b"\x0f\x3a"}
MANDATORY = {Prefix.ANY: b"", Prefix.NONE: b"", Prefix.X66: b"\x66", Prefix.XF3: b"\xf3", Prefix.XF2: b"\xf2"}
_VEX_PREFIX = {Prefix.NONE: 0, Prefix.X66: 1, Prefix.XF3: 2, Prefix.XF2: 3}

#: what follows the part that selects the form: distinct bytes, so that a misplaced field shows
TAIL = bytes.fromhex("1292a3b4c5d6e7f80910")

#: ModRM.mod and .rm and the SIB byte: a base, a base and a scaled index with a byte, an address, no index
#: with a doubleword, and a register
FORMS = ((0x03, b""), (0x44, b"\x9e"), (0x05, b""), (0x84, b"\x24"), (0xC1, b""))
#: the same for 16-bit addresses
FORMS_16 = ((0x07, b""), (0x42, b""), (0x06, b""), (0x86, b""), (0xC1, b""))

OPTIONAL = (b"", b"\x66", b"\x67", b"\x2e", b"\x64\x67", b"\xf0")


class Encoding(NamedTuple):
    """An instruction, with bytes behind it that do not belong to it."""

    code: bytes
    code32: bool
    entry: Entry


def _selecting_bytes(where: Map, byte: int, entry: Entry) -> bytes:
    if where in ESCAPES:
        return ESCAPES[where] + bytes([byte])
    takes_vvvv = any(operand.kind == "B" for operand in entry.operands)
    last = (0x58 if takes_vvvv else 0x78) | _VEX_PREFIX[entry.prefix]
    return bytes([0xC4, 0xE2 if where is Map.VEX_0F38 else 0xE3, last, byte])


def _modrms(entry: Entry, addresses_16: bool) -> Iterator[bytes]:
    if not entry.modrm:
        yield b""
        return
    fitting = {modrm >> 3 & 7 for modrm in entry.modrms} or {0, 5}
    regs = sorted(fitting) if len(fitting) < 8 else (0, 5)
    for form, sib in FORMS_16 if addresses_16 else FORMS:
        for reg in regs:
            modrm = form | reg << 3
            if not entry.modrms or modrm in entry.modrms:
                yield bytes([modrm]) + sib
    if entry.modrms and min(entry.modrms) >= 0xC0:
        for modrm in {min(entry.modrms), max(entry.modrms)}:
            yield bytes([modrm])


def encodings() -> Iterator[Encoding]:
    """Every entry, in all forms that differ to a decoder."""
    for where, slots in SLOTS.items():
        vex = where not in ESCAPES
        for byte, entries in enumerate(slots):
            for entry in entries:
                for code32 in (True,) if vex else (False, True):
                    for optional in OPTIONAL:
                        if vex and optional not in (b"", b"\x67", b"\x2e"):
                            continue
                        mandatory = b"" if vex else MANDATORY[entry.prefix]
                        if optional == b"\x66" and entry.prefix is Prefix.NONE:
                            continue
                        start = optional + mandatory + _selecting_bytes(where, byte, entry)
                        for modrm in _modrms(entry, (b"\x67" in optional) == code32):
                            if optional == b"\xf0" and not (
                                    entry.lockable and (entry.memory is None or modrm[0] < 0xC0)):
                                continue
                            yield Encoding((start + modrm + TAIL)[:15], code32, entry)


def defined_and_not() -> Iterator[bytes]:
    """The opcode space: every opcode of the legacy maps under every mandatory prefix and LOCK, with ModRM
    bytes of both kinds, and with all of them where the table tells them apart one by one."""
    prefixes = [b"", b"\x66", b"\xf3", b"\xf2", b"\xf0"]
    for where, escape in ESCAPES.items():
        for byte, entries in enumerate(SLOTS[where]):
            if where is Map.ONE_BYTE and (byte in (0x0F, 0x26, 0x2E, 0x36, 0x3E, 0x62, 0xC4, 0xC5)
                                          or 0x64 <= byte <= 0x67 or byte in (0xF0, 0xF2, 0xF3)):
                continue
            if where is Map.TWO_BYTE and byte in (0x38, 0x3A):
                continue
            singled_out = any(0 < len(entry.modrms) < 32 for entry in entries)
            registers = range(0xC0, 0x100) if singled_out else range(0xC1, 0x100, 8)
            for prefix in prefixes:
                for modrm in (*range(1, 0x40, 8), *registers):
                    yield (prefix + escape + bytes([byte, modrm]) + TAIL)[:15]
