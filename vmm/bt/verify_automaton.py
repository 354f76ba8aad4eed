# SPDX-License-Identifier: GPL-2.0-or-later
"""The verifier's decoder: an automaton over the bytes of an instruction.

Its nodes are dicts, one look-up a byte; an entry is worked out from the allow-list when it is first needed
(`__missing__`).  A path ends in the number of bytes left to skip (displacement, immediate operand), in an
action that looks at them, or in a `Jump`.  Whatever has no entry and gets none is rejected.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from vmm.bt.verify_table import BLOCK_FIELDS, TABLES, Form

_GS, _ADDRESS = 0x65, 0x67
_PREFIXES = {0x66: "o", 0xF0: "l", 0xF2: "p", 0xF3: "r"}
_MAPS = {("", 0x0F): "0f", ("0f", 0x38): "0f38", ("0f", 0x3A): "0f3a"}
_TABLE_JUMP = bytes.fromhex("43FF24C7")      # jmp [r15 + r8*8]
_BLOCK_BASE, _WINDOW_BASE, _NO_INDEX = 14, 12, 4
#: lea rdi, [rdi + r12]; a string instruction with 64-bit addresses, its source in gs; mov edi, edi and, if it
#: has a source, mov esi, esi
_STRING = re.compile(rb"\x4A\x8D\x3C\x27(?:"
                     rb"\x65\x66?\xF3?[\xA4\xA5]\x89\xFF\x89\xF6|"             # movs
                     rb"\x65\x66?[\xF2\xF3]?[\xA6\xA7]\x89\xFF\x89\xF6|"       # cmps
                     rb"\x66?\xF3?[\xAA\xAB]\x89\xFF|"                         # stos
                     rb"\x66?[\xF2\xF3]?[\xAE\xAF]\x89\xFF)", re.DOTALL)       # scas
_STRING_START = 0x4A


class Rejected(Exception):
    """A unit that must not run: what is wrong with it, and at which offset."""

    def __init__(self, reason: str, offset: int = 0) -> None:
        super().__init__(f"{reason} at offset {offset:#x}")
        self.reason = reason
        self.offset = offset


class Jump(NamedTuple):
    """An instruction that does not simply go on to the next one."""

    #: bytes of its displacement; 0 if it is no direct jump
    width: int
    #: what follows it is not executed
    stops: bool


#: checks what is behind an instruction's opcode and operand bytes; where the instruction ends.  It looks at
#: nothing behind that
Action: TypeAlias = Callable[[bytes, int], int]


class _Prefixes(NamedTuple):
    """The prefixes of an instruction."""

    gs: bool = False
    address: bool = False
    others: str = ""           # letters of _PREFIXES, sorted
    rex: int = 0               # 0: none

    @property
    def r(self) -> int:
        return (self.rex & 4) << 1

    @property
    def x(self) -> int:
        return (self.rex & 2) << 2

    @property
    def b(self) -> int:
        return (self.rex & 1) << 3


@dataclass(frozen=True, slots=True)
class _Expected:
    """What may come next in an instruction."""

    def find(self, byte: int) -> _Expected | int | Jump | Action:
        """What `byte` leads to; a number is of bytes left to skip.  Rejected when it may not come here."""
        raise NotImplementedError


class Node(dict[int, "Node | int | Jump | Action"]):
    """What each byte leads to, as far as it has been asked for.

    Nodes that expect the same are one, so that the automaton stays small whatever a guest's code looks like.
    """

    __slots__ = ("expected", "known")

    def __init__(self, expected: _Expected, known: dict[_Expected, Node]) -> None:
        super().__init__()
        self.expected = expected
        self.known = known

    def __missing__(self, byte: int) -> Node | int | Jump | Action:
        found = self.expected.find(byte)
        entry: Node | int | Jump | Action
        if isinstance(found, _Expected):
            if found not in self.known:
                self.known[found] = Node(found, self.known)
            entry = self.known[found]
        else:
            entry = found
        self[byte] = entry
        return entry


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise Rejected(reason)


@dataclass(frozen=True, slots=True)
class _Start(_Expected):
    """Expects a prefix, a REX byte or an opcode."""

    prefixes: _Prefixes
    opcodes: str

    def find(self, byte: int) -> _Expected | int | Jump | Action:
        prefixes = self.prefixes
        if not self.opcodes and not prefixes.rex:
            further = self._further(byte)
            if further is not None:
                return _Start(further, "")
            if byte == _STRING_START and prefixes == _Prefixes():
                return _string
        opcodes = _MAPS.get((self.opcodes, byte))
        if opcodes is not None:
            return _Start(prefixes, opcodes)
        if not self.opcodes and byte == 0x8D:
            _require(not prefixes.gs and prefixes.others in ("", "o"), "lea with a prefix")
            return _Operand(prefixes, ())
        forms = tuple(form for form in TABLES[self.opcodes].get(byte, ()) if prefixes.others in form.prefixes)
        _require(bool(forms), "instruction not allowed")
        return self._opcode(byte, forms)

    def _further(self, byte: int) -> _Prefixes | None:
        """The prefixes with another one; None when `byte` is none."""
        prefixes = self.prefixes
        if byte == _GS:
            _require(not prefixes.gs, "prefix twice")
            return prefixes._replace(gs=True)
        if byte == _ADDRESS:
            _require(not prefixes.address, "prefix twice")
            return prefixes._replace(address=True)
        letter = _PREFIXES.get(byte)
        if letter is not None:
            _require(letter not in prefixes.others, "prefix twice")
            return prefixes._replace(others="".join(sorted(prefixes.others + letter)))
        if 0x40 <= byte < 0x48:
            return prefixes._replace(rex=byte)
        return None

    def _opcode(self, byte: int, forms: tuple[Form, ...]) -> _Expected | int | Jump | Action:
        prefixes, form = self.prefixes, forms[0]
        if form.kind == "operand":
            if self.opcodes or byte != 0xFF:
                return _Operand(prefixes, forms)
            return _IncDecJump(prefixes, forms)
        memory = form.kind == "implied"
        _require(prefixes.gs == memory and prefixes.address == (memory or form.kind == "counted"),
                 "address prefixes without a memory operand, or the reverse")
        if form.kind == "register":
            _require(prefixes.rex in (0, 0x40, 0x41), "REX without an operand")
            _require(byte & 7 | prefixes.b < 12, "register not the guest's")
        else:
            _require(not prefixes.rex, "REX without an operand")
        if form.kind in _JUMPS:
            return _JUMPS[form.kind]
        return form.immediate_bytes(prefixes.others)


@dataclass(frozen=True, slots=True)
class _Operand(_Expected):
    """Expects the ModRM byte of an instruction with an operand; no forms: that of `lea`."""

    prefixes: _Prefixes
    forms: tuple[Form, ...]

    def find(self, byte: int) -> _Expected | int | Jump | Action:
        prefixes = self.prefixes
        mod, reg, rm = byte >> 6, byte >> 3 & 7, byte & 7
        if not self.forms:
            _require(mod != 3, "lea of a register")
            _require(reg | prefixes.r < 12, "register not the guest's")
            return self._address(mod, rm, 0)
        form = self._form(reg, mod)
        if form.reg == "g":
            _require(reg | prefixes.r < 12, "register not the guest's")
        else:
            _require(not prefixes.r, "REX.R without a register")
        if mod == 3:
            return self._register(form, rm)
        immediate = form.immediate_bytes(prefixes.others)
        if prefixes.gs and prefixes.address:
            return self._address(mod, rm, immediate)
        _require(not prefixes.gs and not prefixes.address, "gs and address-size prefix must come together")
        if rm | prefixes.b == _BLOCK_BASE:
            return self._block(form, mod, immediate)
        if mod == 0 and rm == 4 and prefixes.b:
            return _WindowIndex(prefixes.x, immediate)
        raise Rejected("memory operand outside the window")

    def _form(self, reg: int, mod: int) -> Form:
        for form in self.forms:
            if form.takes(reg, mod == 3):
                return form
        raise Rejected("operand form not allowed")

    def _register(self, form: Form, rm: int) -> int:
        """A register operand; the address prefixes must be there only for what it implies."""
        prefixes = self.prefixes
        implied = "i" in form.rm
        _require(prefixes.gs == prefixes.address == implied, "address prefixes for a register operand")
        _require(not prefixes.x and "l" not in prefixes.others, "prefix without a memory operand")
        _require(rm | prefixes.b < 12 if "g" in form.rm else not prefixes.b, "register not the guest's")
        return form.immediate_bytes(prefixes.others)

    def _address(self, mod: int, rm: int, immediate: int) -> _Expected | int:
        """An effective address from the guest's registers and the scratch ones."""
        prefixes = self.prefixes
        displacement = (0, 1, 4)[mod]
        if rm == 4:
            return _Sib(prefixes.x, prefixes.b, mod, displacement + immediate)
        _require(mod != 0 or rm != 5, "address relative to rip")
        _require(rm | prefixes.b < 12 and not prefixes.x, "address from a register not the guest's")
        return displacement + immediate

    def _block(self, form: Form, mod: int, immediate: int) -> Action:
        """[r14 + displacement], only with a displacement, and only where the table says so."""
        prefixes = self.prefixes
        _require(mod in (1, 2) and not prefixes.x and form.block != "-", "state block not allowed here")
        _require("l" not in prefixes.others, "locked access to the state block")
        size = 1 if form.block[1] == "1" else 2 if "o" in prefixes.others else 4
        return _block_access(1 if mod == 1 else 4, form.block[0] == "w", size, immediate)


@dataclass(frozen=True, slots=True)
class _IncDecJump(_Operand):
    """Opcode FF: inc and dec as the table has them, and the one indirect jump."""

    def find(self, byte: int) -> _Expected | int | Jump | Action:
        if byte == _TABLE_JUMP[2] and self.prefixes == _Prefixes(rex=_TABLE_JUMP[0]):
            return _LastByte()
        return _Operand.find(self, byte)


@dataclass(frozen=True, slots=True)
class _LastByte(_Expected):
    """Expects the end of the jump through the table."""

    def find(self, byte: int) -> Jump:
        _require(byte == _TABLE_JUMP[3], "indirect jump not through the table")
        return _STOP


@dataclass(frozen=True, slots=True)
class _Sib(_Expected):
    """Expects the SIB byte of an effective address."""

    x: int
    b: int
    mod: int
    rest: int

    def find(self, byte: int) -> int:
        base, index = byte & 7, byte >> 3 & 7
        _require(index | self.x < 12, "address from a register not the guest's")
        if self.mod == 0 and base == 5:
            _require(not self.b, "REX.B without a register")
            return self.rest + 4
        _require(base | self.b < 12, "address from a register not the guest's")
        return self.rest


@dataclass(frozen=True, slots=True)
class _WindowIndex(_Expected):
    """Expects the SIB byte of [r12 + index]."""

    x: int
    rest: int

    def find(self, byte: int) -> int:
        scale, index, base = byte >> 6, byte >> 3 & 7 | self.x, byte & 7 | 8
        _require(base == _WINDOW_BASE and scale == 0, "memory operand outside the window")
        _require(index < 12 and index != _NO_INDEX, "index missing or not the guest's")
        return self.rest


def _string(code: bytes, at: int) -> int:
    """A whole string sequence, taken as one instruction: nothing may jump into it."""
    match = _STRING.match(code, at - 1)
    if match is None:
        raise Rejected("64-bit instruction that begins no string sequence")
    return match.end()


_STOP = Jump(0, True)
_JUMPS = {
    "stop": _STOP, "jmp8": Jump(1, True), "jmp32": Jump(4, True),
    "jcc8": Jump(1, False), "jcc32": Jump(4, False), "counted": Jump(1, False),
}


def _block_access(width: int, write: bool, size: int, immediate: int) -> Action:
    """An access to the state block: the displacement decides."""
    def action(code: bytes, at: int) -> int:
        if at + width > len(code):
            raise Rejected("cut short")
        offset = int.from_bytes(code[at:at + width], "little", signed=True)
        for start, length, writable in BLOCK_FIELDS:
            if start <= offset and offset + size <= start + length and (writable or not write):
                return at + width + immediate
        raise Rejected(f"state block at {offset:#x} may not be {'written' if write else 'read'}")
    return action


def root() -> Node:
    """The beginning of an instruction."""
    return Node(_Start(_Prefixes(), ""), {})
