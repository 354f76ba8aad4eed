# SPDX-License-Identifier: GPL-2.0-or-later
"""Random examples, made from the instruction table: sequences of everything that is translated.

Most memory operands are on the pages there are, some on the seams between them; most jumps lead to a later
instruction of the example, so that nearly all examples end.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import NamedTuple

from tests.bt_encodings import ESCAPES, MANDATORY
from tests.bt_example import (
    CODE,
    CODE_BYTES,
    CODE_LIMIT,
    DATA,
    DATA_BYTES,
    INT3,
    SOIL_BYTES,
    Bases,
    Example,
    State,
)
from tests.bt_values import fx_image, soil
from vmm.bt.decode import CS, DS, ES, FS, GS, SS
from vmm.bt.native.block import LIVE_FLAGS
from vmm.bt.table import MEMORY_KINDS, SLOTS, Entry, Kind, Operand, Unit
from vmm.x86.flags import RFLAGS_DF, RFLAGS_IF

_ECX, _ESP, _EBP = 1, 4, 5
_INDIRECT = (Kind.JMP_INDIRECT, Kind.CALL_INDIRECT)
_INTEGER = (Unit.INTEGER,)


class _Group(NamedTuple):
    """Instructions of these kinds and units, of which there is one `weight` times in a hundred."""

    weight: int
    kinds: tuple[Kind, ...]
    units: tuple[Unit, ...]


_GROUPS = tuple(_Group(*group) for group in (
    (40, (Kind.IDENT, Kind.INC_DEC, Kind.MOFFS, Kind.XLAT), _INTEGER),
    (3, (Kind.BIT_STRING,), _INTEGER),
    (2, (Kind.SEGMENT, Kind.SENSITIVE), _INTEGER),
    (10, (Kind.PUSH, Kind.POP, Kind.PUSHA, Kind.POPA, Kind.ENTER, Kind.LEAVE), _INTEGER),
    (7, (Kind.STRING,), _INTEGER),
    (7, (Kind.JCC, Kind.LOOP, Kind.JMP, Kind.CALL), _INTEGER),
    (4, (Kind.RET, *_INDIRECT), _INTEGER),
    (10, (Kind.IDENT,), (Unit.X87,)),
    (6, (Kind.IDENT, Kind.MASKMOV), (Unit.MMX, Unit.SSE_MMX)),
    (13, (Kind.IDENT, Kind.MASKMOV), (Unit.SSE,)),
))
_SEGMENTS = {0x26: ES, 0x2E: CS, 0x36: SS, 0x3E: DS, 0x64: FS, 0x65: GS}
_SEAMS = range(DATA, DATA + DATA_BYTES + 1, 0x1000)
_FX_IMAGES = 32
#: flags that popf can change without more ado, and IF, which it cannot
_POPPED = LIVE_FLAGS & ~RFLAGS_DF | RFLAGS_IF


class _Template(NamedTuple):
    """An entry of the table with what its encodings begin with, and the ModRM bytes it may have."""

    entry: Entry
    mandatory: bytes
    opcode: bytes
    in_memory: tuple[int, ...]
    in_register: tuple[int, ...]


class _Hole(NamedTuple):
    """Bytes of the code that hold the address of an instruction: from `origin`, or absolute if that is -1."""

    at: int
    width: int
    origin: int
    #: the instruction they are in
    number: int


def _translated(entry: Entry) -> bool:
    """Of what has to do with selectors and system flags, what is not left to the monitor."""
    return (entry.kind not in (Kind.SEGMENT, Kind.SENSITIVE) or entry.mnemonic in ("pushfd", "popfd")
            or entry.opcode.startswith("8c"))


def _templates(kinds: tuple[Kind, ...], units: tuple[Unit, ...]) -> list[_Template]:
    found = []
    for where, escape in ESCAPES.items():
        for byte, entries in enumerate(SLOTS[where]):
            for entry in entries:
                if entry.kind in kinds and entry.unit in units and _translated(entry):
                    modrms = sorted(entry.modrms) or range(256)
                    found.append(_Template(
                        entry, MANDATORY[entry.prefix], escape + bytes([byte]),
                        tuple(modrm for modrm in modrms if modrm < 0xC0 and entry.modrm),
                        tuple(modrm for modrm in modrms if modrm >= 0xC0 and entry.modrm)))
    return found


class Mixture(NamedTuple):
    """Instructions in groups, and the weights of these."""

    weights: list[int]
    groups: list[list[_Template]]


def _mixture(groups: Iterable[_Group]) -> Mixture:
    chosen = [(weight, _templates(kinds, units)) for weight, kinds, units in groups]
    return Mixture([weight for weight, _ in chosen], [templates for _, templates in chosen])


EVERYTHING = _mixture(_GROUPS)
#: on general registers only
INTEGER = _mixture(group for group in _GROUPS if group.units == _INTEGER)


class Generator:
    """The examples of one seed, which share their soil."""

    def __init__(self, seed: int, mixture: Mixture = EVERYTHING) -> None:
        self._mixture = mixture
        self._random = random.Random(seed)
        self._chance = self._random.random
        self.soil = soil(self._random)
        self._images = [fx_image(self._random) for _ in range(_FX_IMAGES)]
        self._registers: list[int] = []
        self._bases = Bases()
        self._code = bytearray()
        self._holes: list[_Hole] = []

    def example(self) -> Example:
        """One more."""
        chance, pick = self._chance, self._random.choice
        self._registers = registers = [self._value() for _ in range(8)]
        registers[_ESP] = self._address() if chance() < 0.97 else self._value()
        if chance() < 0.5:
            registers[_ECX] = int(chance() * 40)
        self._bases = self._some_bases() if chance() < 0.3 else Bases()
        self._code, self._holes = bytearray(), []
        starts: list[int] = []
        weights, groups = self._mixture
        for group in self._random.choices(groups, weights, k=pick((1, 1, 2, 3, 4, 5, 6, 8))):
            template = pick(group)
            if self._lead_in(template, len(starts)):
                starts.append(len(self._code) - 5)
            starts.append(len(self._code))
            self._add(template, len(starts) - 1)
        starts.append(len(self._code))
        self._code.append(INT3)
        eip = self._place(len(self._code))
        self._fill_holes(starts, eip)
        flags = self._random.getrandbits(12) & LIVE_FLAGS
        if chance() < 0.5:
            flags &= ~RFLAGS_DF
        state = State(tuple(registers), flags, pick(self._images))
        data_from = int(chance() * (SOIL_BYTES - DATA_BYTES)) & ~15
        return Example(bytes(self._code), tuple(starts), eip, state, data_from, self._bases)

    # -- values ------------------------------------------------------------------------------------

    def _address(self) -> int:
        """Of data, mostly."""
        chance = self._chance()
        if chance < 0.2:
            return self._random.choice(_SEAMS) + int(self._chance() * 48) - 32
        address = DATA + int(self._chance() * DATA_BYTES)
        return address & ~15 if chance < 0.6 else address

    def _value(self) -> int:
        chance = self._chance()
        if chance < 0.55:
            return self._address()
        if chance < 0.8:
            return int(self._chance() * 300) - 64 & 0xFFFF_FFFF
        if chance < 0.85:
            return CODE + int(self._chance() * CODE_BYTES)
        return self._random.getrandbits(32)

    def _some_bases(self) -> Bases:
        """Near 0, or where 16-bit addresses are those of data."""
        def base() -> int:
            return self._random.choice((0, 1, 0x800, -0x1000, -3, DATA & ~0xFFFF)) & 0xFFFF_FFFF
        return Bases(base(), base(), base() if self._chance() < 0.4 else 0)

    def _base(self, segment: int) -> int:
        bases = self._bases
        return {FS: bases.fs, GS: bases.gs, DS: bases.ds}.get(segment, 0)

    # -- code --------------------------------------------------------------------------------------

    def _lead_in(self, template: _Template, number: int) -> bool:
        """Mostly, 5 bytes that give an indirect jump somewhere to go, or popf its flags."""
        if self._chance() > 0.7:
            return False
        if template.entry.mnemonic == "popfd":
            self._code += b"\x68" + (self._random.getrandbits(12) & _POPPED).to_bytes(4, "little")
            return True
        if template.entry.kind is Kind.RET:
            self._code += b"\x68"       # push
        elif template.entry.kind in _INDIRECT:
            self._code.append(0xB8 | int(self._chance() * 8))       # mov
        else:
            return False
        self._holes.append(_Hole(len(self._code), 4, -1, number))
        self._code += bytes(4)
        return True

    def _add(self, template: _Template, number: int) -> None:
        """An instruction."""
        chance, pick, code, entry = self._chance, self._random.choice, self._code, template.entry
        prefixes = [bytes([byte]) for byte in template.mandatory]
        short = chance() < (0.25 if self._bases.ds else 0.05)
        segment = pick(list(_SEGMENTS)) if chance() < 0.12 else 0
        branches = bool(entry.immediates) and entry.immediates[-1].kind == "J"
        half = not template.mandatory and chance() < (0.01 if branches else 0.12)
        modrm = -1
        if entry.modrm:
            modrm = pick(template.in_memory if not template.in_register or
                         (template.in_memory and chance() < 0.6) else template.in_register)
        if entry.kind is Kind.STRING:
            prefixes += pick(([], [b"\xF3"], [b"\xF2"]))
        elif not template.mandatory and chance() < 0.01:
            prefixes.append(pick((b"\xF2", b"\xF3")))
        if entry.lockable and modrm < 0xC0 and chance() < 0.15:
            prefixes.append(b"\xF0")
        prefixes += [b"\x67"] * short + [b"\x66"] * half + [bytes([segment])] * (segment > 0)
        self._random.shuffle(prefixes)
        code += b"".join(prefixes) + template.opcode
        if modrm >= 0:
            memory = modrm < 0xC0 and entry.memory is not None and entry.memory.kind in MEMORY_KINDS
            if memory and (short or pick((0, 1))):
                modrm = modrm & 0x3F | 0x80
            code.append(modrm)
            if modrm < 0xC0:
                (self._address_16 if short else self._address_32)(modrm, segment)
        elif entry.kind is Kind.MOFFS:
            target = self._address() - self._base(_SEGMENTS.get(segment, DS))
            code += (target & (0xFFFF if short else 0xFFFF_FFFF)).to_bytes(2 if short else 4, "little")
        for operand in entry.immediates:
            self._immediate(entry, operand, 2 if half else 4, number)

    def _address_32(self, modrm: int, prefix: int) -> None:
        """SIB byte and displacement; a long one makes the address one of data, if the registers stay."""
        code, mod, base = self._code, modrm >> 6, modrm & 7
        there = 0
        if base == _ESP:
            sib = self._random.getrandbits(8)
            if self._chance() < 0.3:
                sib = sib & 0xC7 | 0x20         # no index
            code.append(sib)
            base = sib & 7
            if sib >> 3 & 7 != 4:
                there += self._registers[sib >> 3 & 7] << (sib >> 6)
        if mod == 0 and base == _EBP:
            base, mod = -1, 2
        else:
            there += self._registers[base]
        if mod == 1:
            code.append(self._random.getrandbits(8))
        if mod == 2:
            segment = _SEGMENTS.get(prefix, SS if base in (_ESP, _EBP) else DS)
            code += (self._address() - there - self._base(segment) & 0xFFFF_FFFF).to_bytes(4, "little")

    def _address_16(self, modrm: int, prefix: int) -> None:
        code, mod = self._code, modrm >> 6
        if mod == 1:
            code.append(self._random.getrandbits(8))
        elif mod == 2 or (mod == 0 and modrm & 7 == 6):
            code += (self._random.getrandbits(14) if self._chance() < 0.8 else 0xFFF0).to_bytes(2, "little")

    def _immediate(self, entry: Entry, operand: Operand, opsize: int, number: int) -> None:
        code, width = self._code, operand.bytes(opsize)
        if operand.kind == "J":
            self._holes.append(_Hole(len(code), width, len(code) + width, number))
            code += bytes(width)
        elif entry.kind in (Kind.ENTER, Kind.RET):
            value = self._random.getrandbits(7) if width == 2 else int(self._chance() < 0.1)
            code += value.to_bytes(width, "little")
        elif self._chance() < 0.4:
            value = self._random.choice((0, 1, 2, 7, 31, 32, 127, -1, -128))
            code += value.to_bytes(width, "little", signed=True)
        else:
            code += self._random.getrandbits(8 * width).to_bytes(width, "little")

    def _place(self, length: int) -> int:
        """Where the code stands: anywhere, across the seam between the pages, at their very end."""
        chance = self._chance()
        if chance < 0.15:
            return CODE + 0x1000 - int(self._chance() * length)
        if chance < 0.17:
            return CODE + CODE_BYTES - length
        return CODE + int(self._chance() * (CODE_BYTES - CODE_LIMIT))

    def _fill_holes(self, starts: list[int], eip: int) -> None:
        """Jumps lead forward, mostly to where an instruction begins."""
        code = self._code
        for hole in self._holes:
            target = self._random.choice(starts[hole.number + 1:])
            if self._chance() < 0.03:
                target = int(self._chance() * len(code))
            if hole.origin < 0:
                code[hole.at:hole.at + 4] = (eip + target).to_bytes(4, "little")
                continue
            distance = target - hole.origin
            if hole.width == 1 and not -128 <= distance < 128:
                distance = 0
            code[hole.at:hole.at + hole.width] = distance.to_bytes(hole.width, "little", signed=True)
