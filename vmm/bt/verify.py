# SPDX-License-Identifier: GPL-2.0-or-later
"""The verifier: what translated code may be, checked before it becomes reachable.

It shares nothing with the decoder and the translator: it reads the emitted 64-bit bytes by itself, against
an allow-list (verify_table), and rejects whatever is not on it.  What it accepts keeps these properties,
whatever the translator meant:

    registers    r12, r14, r15 and the segment bases are never written.  No instruction writes more than
                 32 bits of a register, so the upper halves of rax-rdi and r8-r11 stay the zeros they are
                 entered with; a string sequence is the one exception and ends by clearing what it set.
    memory       `gs` with a 32-bit address (65 67), which begins in the window; [r12 + r] with such an r,
                 the same; a string sequence, which moves from there in steps smaller than the guards;
                 [r14 + d], a field of the state block that units may use; the jump table's jump.
    control      direct jumps to instructions of the unit, to known entries, and to exit stubs; the jump
                 `jmp [r15 + r8*8]`, whose r8 is an address below 4 GiB.  The end of a unit is not reached,
                 unless there begins another.
    instructions nothing privileged, nothing that enters the kernel, no stack instruction (the guest's esp
                 is no host address), nothing that changes hidden state (segments, xsave areas, gs base).

Instructions are recognized by an automaton whose nodes are dicts, one look-up a byte; a node's entries are
worked out from the table when they are first needed (`__missing__`).  Their number is bounded by the table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

from vmm.bt.verify_table import BLOCK_FIELDS, TABLES, Form

_GS, _ADDRESS = 0x65, 0x67
_PREFIXES = {0x66: "o", 0xF0: "l", 0xF2: "p", 0xF3: "r"}
_MAPS = {("", 0x0F): "0f", ("0f", 0x38): "0f38", ("0f", 0x3A): "0f3a"}
_TABLE_JUMP = bytes.fromhex("43FF24C7")      # jmp [r15 + r8*8]
_BLOCK_BASE, _WINDOW_BASE = 14, 12
_MAX_LENGTH = 15
#: lea rdi, [rdi + r12]; a string instruction with 64-bit addresses, its source in gs; mov edi, edi; mov esi, esi
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


class Layout(NamedTuple):
    """Where units and exit stubs are."""

    units: int
    units_bytes: int
    stubs: int
    stub_bytes: int
    stub_count: int

    def is_stub(self, address: int) -> bool:
        """Whether an exit stub begins at `address`."""
        number, rest = divmod(address - self.stubs, self.stub_bytes)
        return not rest and 0 <= number < self.stub_count


class _Unit:
    """A unit being verified: its jumps, and where the last instruction that does not go on ends."""

    def __init__(self, code: bytes) -> None:
        self.code = code
        self.jumps: list[tuple[int, int]] = []    # offset of the displacement, target as an offset
        self.ended = -1


#: what to do behind an instruction's opcode and operand bytes: skip so many bytes, or check them
_Action: TypeAlias = Callable[[_Unit, int], int]


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


class _Node(dict[int, "_Node | int | _Action"]):
    """What a byte leads to: another node, a number of bytes left to skip, or an action."""

    __slots__ = ("depth",)

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth

    def __missing__(self, byte: int) -> _Node | int | _Action:
        found = self.find(byte)
        if isinstance(found, int) and self.depth + 1 + found > _MAX_LENGTH:
            raise Rejected("too long")
        self[byte] = found
        return found

    def find(self, byte: int) -> _Node | int | _Action:
        """Work an entry out; raises Rejected when the byte may not come here."""
        raise NotImplementedError


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise Rejected(reason)


class _Start(_Node):
    """Expects a prefix, a REX byte or an opcode."""

    __slots__ = ("opcodes", "prefixes")

    def __init__(self, depth: int, prefixes: _Prefixes, opcodes: str) -> None:
        super().__init__(depth)
        self.prefixes = prefixes
        self.opcodes = opcodes

    def find(self, byte: int) -> _Node | int | _Action:
        prefixes, depth = self.prefixes, self.depth + 1
        if not self.opcodes and not prefixes.rex:
            further = self._further(byte)
            if further is not None:
                return _Start(depth, further, "")
            if byte == _STRING_START and not depth - 1:
                return _string
        opcodes = _MAPS.get((self.opcodes, byte))
        if opcodes is not None:
            return _Start(depth, prefixes, opcodes)
        if not self.opcodes and byte == 0x8D:
            _require(not prefixes.gs and prefixes.others in ("", "o"), "lea with a prefix")
            return _Operand(depth, prefixes, byte, ())
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

    def _opcode(self, byte: int, forms: tuple[Form, ...]) -> _Node | int | _Action:
        prefixes, form = self.prefixes, forms[0]
        if form.kind == "operand":
            if self.opcodes or byte != 0xFF:
                return _Operand(self.depth + 1, prefixes, byte, forms)
            return _IncDecJump(self.depth + 1, prefixes, byte, forms)
        memory = form.kind == "implied"
        _require(prefixes.gs == memory and prefixes.address == (memory or form.kind == "counted"),
                 "address prefixes without a memory operand, or the reverse")
        if form.kind == "register":
            _require(prefixes.rex in (0, 0x40, 0x41) and byte & 7 | prefixes.b < 12, "register not the guest's")
        else:
            _require(not prefixes.rex, "REX without an operand")
        if form.kind in _JUMPS:
            return _JUMPS[form.kind]
        if form.kind == "stop":
            return _stop
        return form.immediate_bytes(prefixes.others)


class _Operand(_Node):
    """Expects the ModRM byte of an instruction with an operand; no forms: that of `lea`."""

    __slots__ = ("byte", "forms", "prefixes")

    def __init__(self, depth: int, prefixes: _Prefixes, byte: int, forms: tuple[Form, ...]) -> None:
        super().__init__(depth)
        self.prefixes = prefixes
        self.byte = byte
        self.forms = forms

    def find(self, byte: int) -> _Node | int | _Action:
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
            return _WindowIndex(self.depth + 1, prefixes, immediate)
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

    def _address(self, mod: int, rm: int, immediate: int) -> _Node | int:
        """An effective address from the guest's registers and the scratch ones."""
        prefixes = self.prefixes
        displacement = (0, 1, 4)[mod]
        if rm == 4:
            return _Sib(self.depth + 1, prefixes, mod, displacement + immediate)
        _require(mod != 0 or rm != 5, "address relative to rip")
        _require(rm | prefixes.b < 12 and not prefixes.x, "address from a register not the guest's")
        return displacement + immediate

    def _block(self, form: Form, mod: int, immediate: int) -> _Action:
        """[r14 + displacement], only with a displacement, and only where the table says so."""
        prefixes = self.prefixes
        _require(mod in (1, 2) and not prefixes.x and form.block != "-", "state block not allowed here")
        _require("l" not in prefixes.others, "locked access to the state block")
        size = 1 if form.block[1] == "1" else 2 if "o" in prefixes.others else 4
        return _block_access(1 if mod == 1 else 4, form.block[0] == "w", size, immediate)


class _IncDecJump(_Operand):
    """Opcode FF: inc and dec as the table has them, and the one indirect jump."""

    __slots__ = ()

    def find(self, byte: int) -> _Node | int | _Action:
        if byte == _TABLE_JUMP[2] and self.prefixes == _Prefixes(rex=_TABLE_JUMP[0]):
            return _LastByte(self.depth + 1)
        return super().find(byte)


class _LastByte(_Node):
    """Expects the end of the jump through the table."""

    __slots__ = ()

    def find(self, byte: int) -> _Action:
        _require(byte == _TABLE_JUMP[3], "indirect jump not through the table")
        return _stop


class _Sib(_Node):
    """Expects the SIB byte of an effective address."""

    __slots__ = ("mod", "prefixes", "rest")

    def __init__(self, depth: int, prefixes: _Prefixes, mod: int, rest: int) -> None:
        super().__init__(depth)
        self.prefixes = prefixes
        self.mod = mod
        self.rest = rest

    def find(self, byte: int) -> int:
        prefixes, base, index = self.prefixes, byte & 7, byte >> 3 & 7
        _require(index | prefixes.x < 12, "address from a register not the guest's")
        if self.mod == 0 and base == 5:
            _require(not prefixes.b, "REX.B without a register")
            return self.rest + 4
        _require(base | prefixes.b < 12, "address from a register not the guest's")
        return self.rest


class _WindowIndex(_Node):
    """Expects the SIB byte of [r12 + index]."""

    __slots__ = ("prefixes", "rest")

    def __init__(self, depth: int, prefixes: _Prefixes, rest: int) -> None:
        super().__init__(depth)
        self.prefixes = prefixes
        self.rest = rest

    def find(self, byte: int) -> int:
        scale, index, base = byte >> 6, byte >> 3 & 7, byte & 7 | self.prefixes.b
        _require(base == _WINDOW_BASE and scale == 0, "memory operand outside the window")
        _require(index | self.prefixes.x < 12 and index | self.prefixes.x != 4, "no index, or not the guest's")
        return self.rest


def _string(unit: _Unit, at: int) -> int:
    """A whole string sequence, taken as one instruction: nothing may jump into it."""
    match = _STRING.match(unit.code, at - 1)
    if match is None:
        raise Rejected("64-bit instruction that begins no string sequence")
    return match.end()


def _stop(unit: _Unit, at: int) -> int:
    unit.ended = at
    return at


def _jump(width: int, stops: bool) -> _Action:
    """A direct jump with a displacement of `width` bytes."""
    def action(unit: _Unit, at: int) -> int:
        end = at + width
        if end > len(unit.code):
            raise Rejected("cut short")
        unit.jumps.append((at, end + int.from_bytes(unit.code[at:end], "little", signed=True)))
        if stops:
            unit.ended = end
        return end
    return action


_JUMPS: dict[str, _Action] = {
    "jmp8": _jump(1, True), "jmp32": _jump(4, True),
    "jcc8": _jump(1, False), "jcc32": _jump(4, False), "counted": _jump(1, False),
}


def _block_access(width: int, write: bool, size: int, immediate: int) -> _Action:
    """An access to the state block: the displacement decides."""
    def action(unit: _Unit, at: int) -> int:
        offset = int.from_bytes(unit.code[at:at + width], "little", signed=True)
        for start, length, writable in BLOCK_FIELDS:
            if start <= offset and offset + size <= start + length and (writable or not write):
                return at + width + immediate
        raise Rejected(f"state block at {offset:#x} may not be {'written' if write else 'read'}")
    return action


class Verifier:
    """Remembers what it accepted: entries of units, and where their jumps to elsewhere can be patched."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        #: addresses where an accepted unit begins
        self.entries: set[int] = set()
        #: addresses of the 32-bit displacements of direct jumps in accepted units
        self.sites: set[int] = set()
        self._root = _Start(0, _Prefixes(), "")

    def accept(self, code: bytes, address: int) -> None:
        """Accept the unit `code`, which will be at `address`, or raise Rejected.

        A unit may be written over the trailing jump of the one before it, which then falls through into it.
        """
        layout = self.layout
        if not layout.units <= address <= layout.units + layout.units_bytes - len(code):
            raise Rejected("unit outside the arena")
        unit = _Unit(code)
        starts = self._scan(unit)
        if unit.ended != len(code) and address + len(code) not in self.entries:
            raise Rejected("runs over its end", len(code))
        for site, target in unit.jumps:
            if target not in starts and not self._reachable(address + target):
                raise Rejected("jump to where no instruction is known to begin", site)
        self.sites.difference_update(range(address - 3, address + len(code)))
        self.sites.update(address + site for site, target in unit.jumps if self._is_wide(code, site))
        self.entries.add(address)

    def _scan(self, unit: _Unit) -> set[int]:
        """Go over all instructions; where they begin."""
        code, root = unit.code, self._root
        at, end = 0, len(unit.code)
        starts: set[int] = set()
        start = starts.add
        begin = 0
        try:
            while at < end:
                begin = at
                start(at)
                step = root[code[at]]
                at += 1
                while isinstance(step, _Node):
                    step = step[code[at]]
                    at += 1
                at = at + step if step.__class__ is int else step(unit, at)
        except IndexError:
            raise Rejected("cut short", begin) from None
        except Rejected as rejected:
            raise Rejected(rejected.reason, begin) from None
        if at != end or not code:
            raise Rejected("cut short", begin)
        return starts

    def patch(self, site: int, target: int) -> bytes:
        """The four bytes that make the accepted jump with its displacement at `site` go to `target`."""
        if site not in self.sites:
            raise Rejected("no jump of an accepted unit", site)
        if not self._reachable(target):
            raise Rejected("jump to where no instruction is known to begin", site)
        return (target - site - 4).to_bytes(4, "little", signed=True)

    def retract(self, address: int, length: int) -> None:
        """The units in a range are gone; the caller has unlinked the jumps to them."""
        span = range(address, address + length)
        self.entries.difference_update(span)
        self.sites.difference_update(span)

    def _reachable(self, address: int) -> bool:
        return address in self.entries or self.layout.is_stub(address)


def fields_of(layout: Iterable[tuple[int, int, bool]]) -> bytes:
    raise NotImplementedError
