# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest instructions, decoded.

    form = decode(page, offset, code32=True)
    form.entry.mnemonic, form.length, form.immediate(page, offset)

What `decode` returns is the instruction's *form*: everything about it except the values of its displacement
and immediate, and so the same object for `mov eax, [ebx+8]` wherever it stands and whatever is in place of
the 8.  Forms are found by walking a trie over prefixes, opcode, ModRM and SIB bytes; only a form not met
before is worked out from the table.  A translator may keep what it derives from a form by its identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from vmm.bt.table import MEMORY_KINDS, OVERLONG, SLOTS, UNDEFINED, Entry, Kind, Map, Operand, Prefix

#: more bytes than this are never an instruction (APM vol. 2, 8.2.14)
LONGEST = 15

#: segment registers by their numbers
ES, CS, SS, DS, FS, GS = range(6)

# bits of Instruction.prefixes
LOCK, REPNE, REP, OPSIZE, ADDRSIZE, SEGMENT = (1 << bit for bit in range(6))


class Truncated(Exception):
    """The code ends before the instruction does: the caller has to fetch more."""


@dataclass(frozen=True, slots=True, eq=False)
class Instruction:
    """The form of an instruction.  Offsets (`*_at`) count from its first byte; -1 says that there is none."""

    length: int
    entry: Entry
    #: operand and address size, 2 or 4
    opsize: int
    addrsize: int
    #: the prefixes present; of REP and REPNE the last one only
    prefixes: int
    #: segment of the memory operand, by prefix, else by its base
    segment: int
    map: Map
    opcode: int
    opcode_at: int
    modrm: int = -1
    mod: int = -1
    reg: int = -1
    rm: int = -1
    sib: int = -1
    #: registers of the effective address, -1 if absent; the index is to be multiplied by `scale`
    base: int = -1
    index: int = -1
    scale: int = 1
    #: VEX.vvvv as a register number
    vvvv: int = -1
    disp_at: int = -1
    disp_size: int = 0
    #: immediates, branch displacement or far pointer, all of them together (ENTER has a word and a byte)
    imm_at: int = -1
    imm_size: int = 0
    #: the operand in memory, explicit or a string's; a string's second one is always at ES:(E)DI
    memory: Operand | None = None
    mem_size: int = 0

    @property
    def kind(self) -> Kind:
        """How it must be treated."""
        return self.entry.kind

    def displacement(self, code: bytes | memoryview, at: int) -> int:
        """The displacement of its effective address, signed; 0 if there is none."""
        start = at + self.disp_at
        return int.from_bytes(code[start:start + self.disp_size], "little", signed=True)

    def immediate(self, code: bytes | memoryview, at: int) -> int:
        """Its immediate, signed; 0 if there is none."""
        start = at + self.imm_at
        return int.from_bytes(code[start:start + self.imm_size], "little", signed=True)

    def target(self, code: bytes | memoryview, at: int, eip: int) -> int:
        """Where its relative branch leads when it stands at `eip`: a 16-bit operand size truncates EIP."""
        start = at + self.imm_at
        there = eip + self.length + int.from_bytes(code[start:start + self.imm_size], "little", signed=True)
        return there & (0xFFFF if self.opsize == 2 else 0xFFFFFFFF)


_PREFIXES = {0xF0: LOCK, 0xF2: REPNE, 0xF3: REP, 0x66: OPSIZE, 0x67: ADDRSIZE,
             **dict.fromkeys((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65), SEGMENT)}
_SEGMENTS = {0x26: ES, 0x2E: CS, 0x36: SS, 0x3E: DS, 0x64: FS, 0x65: GS}
_ESCAPES = {0x38: Map.X0F38, 0x3A: Map.X0F3A}
_VEX_PREFIX = (Prefix.NONE, Prefix.X66, Prefix.XF3, Prefix.XF2)
_VEX_MAPS = {2: Map.VEX_0F38, 3: Map.VEX_0F3A}
_EBX, _ESP, _EBP, _ESI, _EDI = 3, 4, 5, 6, 7
#: base and index of the 16-bit effective addresses (APM vol. 3, table A-35)
_BASE_INDEX_16 = ((_EBX, _ESI), (_EBX, _EDI), (_EBP, _ESI), (_EBP, _EDI),
                  (_ESI, -1), (_EDI, -1), (_EBP, -1), (_EBX, -1))


class Decoder:
    """A decoder with its trie of known forms.

    Invariant: a path through the trie is the bytes of one form up to and without its displacement and
    immediate, so no path is the beginning of another.  What guests can make it hold is bounded by `limit`
    nodes; then it starts over.
    """

    def __init__(self, limit: int = 50_000) -> None:
        self._limit = limit
        self._nodes = 0
        #: one trie for 16-bit and one for 32-bit code; inner nodes are dicts by the next byte, leaves forms
        self._tries: tuple[dict[int, Any], dict[int, Any]] = ({}, {})

    def forms(self, code32: bool) -> dict[int, Any]:
        """The trie of 16-bit or of 32-bit code, for who walks it without `decode`."""
        return self._tries[code32]

    def decode(self, code: bytes | memoryview, at: int, code32: bool) -> Instruction:
        """The instruction that starts at `code[at]`; an undefined one has an entry of kind UD.

        An undefined encoding or one of over 15 bytes is an entry of its own, with nothing else to know but as
        many bytes as show it.  Raises `Truncated` if `code` ends before that, and nothing else.
        """
        try:
            here = at
            node = self._tries[code32][code[here]]
            while node.__class__ is dict:
                here += 1
                node = node[code[here]]
        except KeyError:
            node = self._learn(code, at, code32)
        except IndexError:
            raise Truncated from None
        if at + node.length > len(code):
            raise Truncated
        form: Instruction = node
        return form

    def _learn(self, code: bytes | memoryview, at: int, code32: bool) -> Instruction:
        try:
            form, path = _work_out(bytes(code[at:at + LONGEST]), code32)
        except IndexError:
            raise Truncated from None
        if self._nodes + len(path) > self._limit:
            self._tries = ({}, {})
            self._nodes = 0
        node = self._tries[code32]
        for byte in path[:-1]:
            node = node.setdefault(byte, {})
        node[path[-1]] = form
        self._nodes += len(path)
        return form


class _Opcode(NamedTuple):
    """What stands before ModRM."""

    map: Map
    byte: int
    at: int
    selecting: Prefix
    #: the last byte of a VEX prefix
    vex: int = -1


def _work_out(code: bytes, code32: bool) -> tuple[Instruction, bytes]:
    """The form `code` starts with, and the bytes that make it this form.  IndexError: `code` is too short."""
    try:
        return _form(code, code32)
    except IndexError:
        if len(code) < LONGEST:
            raise
        return _nothing(OVERLONG, LONGEST), code


def _nothing(entry: Entry, length: int) -> Instruction:
    """An encoding that is none."""
    return Instruction(length, entry, 4, 4, 0, DS, Map.ONE_BYTE, 0, 0)


def _form(code: bytes, code32: bool) -> tuple[Instruction, bytes]:
    prefixes, segment, at = 0, -1, 0
    while bit := _PREFIXES.get(code[at]):
        if bit == SEGMENT:
            segment = _SEGMENTS[code[at]]
        elif bit in (REP, REPNE):
            prefixes &= ~(REP | REPNE)
        prefixes |= bit
        at += 1
    opcode = _opcode(code, at, code32, prefixes)
    if opcode is None:
        return _nothing(UNDEFINED, at + 2), code[:at + 2]
    entries = SLOTS[opcode.map][opcode.byte]
    end = opcode.at + 1
    modrm = code[end] if any(entry.modrm for entry in entries) else -1
    end += modrm >= 0
    entry = next((entry for entry in entries if entry.fits(opcode.selecting, modrm)), UNDEFINED)
    opsize = 4 if bool(prefixes & OPSIZE) != code32 else 2
    addrsize = 4 if bool(prefixes & ADDRSIZE) != code32 else 2
    fields: dict[str, Any] = {}
    if modrm >= 0:
        fields.update(modrm=modrm, mod=modrm >> 6, reg=modrm >> 3 & 7, rm=modrm & 7)
    if opcode.vex >= 0:
        fields.update(vvvv=~opcode.vex >> 3 & 7)
    natural, header = DS, end
    if entry.memory is not None and (modrm < 0xC0 or entry.memory.kind not in MEMORY_KINDS):
        fields.update(memory=entry.memory, mem_size=entry.memory.bytes(opsize))
        if entry.memory.kind in MEMORY_KINDS:
            header, natural = _address(code, end, modrm, addrsize, fields)
        elif entry.memory.kind == "Y":
            natural, segment = ES, -1
        elif entry.memory.kind == "O":
            fields.update(disp_size=addrsize)
    end = header
    if size := fields.get("disp_size", 0):
        fields.update(disp_at=end)
        end += size
    if entry.immediates:
        size = sum(operand.bytes(opsize) for operand in entry.immediates)
        fields.update(imm_at=end, imm_size=size)
        end += size
    if end > LONGEST:
        return _nothing(OVERLONG, LONGEST), code[:header]
    if _forbidden(entry, prefixes, "memory" in fields, opcode.vex):
        return _nothing(UNDEFINED, end), code[:header]
    if segment < 0:
        segment = natural
    return Instruction(end, entry, opsize, addrsize, prefixes, segment, opcode.map, opcode.byte, opcode.at,
                       **fields), code[:header]


def _opcode(code: bytes, at: int, code32: bool, prefixes: int) -> _Opcode | None:
    """The opcode behind the prefixes; None for a VEX prefix that is undefined."""
    byte = code[at]
    if byte == 0x0F:
        escape = code[at + 1]
        selecting = _mandatory(prefixes)
        if escape in _ESCAPES:
            return _Opcode(_ESCAPES[escape], code[at + 2], at + 2, selecting)
        return _Opcode(Map.TWO_BYTE, escape, at + 1, selecting)
    if byte in (0xC4, 0xC5) and code[at + 1] >= 0xC0:
        # VEX, since LES and LDS have no register form.  The silicon knows it in 32-bit code only, which keeps
        # it out of real and virtual-8086 mode, as it has to be.  All we have is in the maps of its long form.
        where = _VEX_MAPS.get(code[at + 1] & 31)
        if where is None or byte == 0xC5 or not code32 or prefixes & (LOCK | REP | REPNE | OPSIZE):
            return None
        return _Opcode(where, code[at + 3], at + 3, _VEX_PREFIX[code[at + 2] & 3], code[at + 2])
    return _Opcode(Map.ONE_BYTE, byte, at, _mandatory(prefixes))


def _mandatory(prefixes: int) -> Prefix:
    """F2 and F3 select before 66 does."""
    if prefixes & REP:
        return Prefix.XF3
    if prefixes & REPNE:
        return Prefix.XF2
    return Prefix.X66 if prefixes & OPSIZE else Prefix.NONE


def _forbidden(entry: Entry, prefixes: int, in_memory: bool, vex: int) -> bool:
    """Whether the encoding is undefined although the opcode is not."""
    kinds = {operand.kind for operand in entry.operands}
    if prefixes & LOCK and not (entry.lockable and (in_memory or "C" in kinds)):
        return True  # LOCK is for read-modify-write of memory, and for LOCK MOV CR0, which reaches CR8
    # VEX.L must be 0, and VEX.vvvv 1111 where it names no register
    return vex >= 0 and bool(vex & 4 or ("B" not in kinds and vex & 0x78 != 0x78))


def _address(code: bytes, at: int, modrm: int, addrsize: int, fields: dict[str, Any]) -> tuple[int, int]:
    """The effective address, put into `fields`; where its displacement is, and its natural segment."""
    mod, rm = modrm >> 6, modrm & 7
    if addrsize == 2:
        base, index = _BASE_INDEX_16[rm]
        size = (0, 1, 2)[mod]
        if mod == 0 and rm == 6:
            base, size = -1, 2
        if base >= 0:
            fields.update(base=base, index=index)
    else:
        base, size = rm, (0, 1, 4)[mod]
        if rm == 4:
            sib = code[at]
            at += 1
            base = sib & 7
            index = sib >> 3 & 7
            fields.update(sib=sib, scale=1 << (sib >> 6), index=-1 if index == 4 else index)
        if mod == 0 and base == 5:
            base, size = -1, 4
        fields.update(base=base)
    fields.update(disp_size=size)
    return at, SS if base in (_ESP, _EBP) else DS


#: the decoder of this process: forms do not depend on the guest
DECODER = Decoder()
decode = DECODER.decode
