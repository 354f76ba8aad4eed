# SPDX-License-Identifier: GPL-2.0-or-later
"""The instruction set as data: what every opcode means to the translator (APM vol. 3, appendix A).

    table.SLOTS[Map.TWO_BYTE][0xAF]     # (Entry(mnemonic="imul", ...),): the entries of 0F AF

The rows are text, in `vmm.bt.opcodes`; this module gives them their types.  An encoding no entry of its slot
fits is undefined: #UD.  A row is

    opcode  mnemonic  operands  attributes...

opcode
    `[vex.][np.|66.|f3.|f2.|mm.]HEX[+{family}|+8{family}|-HEX][/N|/{family}|:HEX[-HEX|+8{family}]]`.  A slot's
    rows are told apart by the mandatory prefix (`np`: none of the three; no word: any), by the reg field of
    ModRM (`/N`), by the whole ModRM byte (`:c0-c7`) and by whether an operand must be memory or must be a
    register.  `mm` stands for two rows: MMX without a prefix, and with 66 the same on XMM registers.  A
    family of instructions in a regular pattern is one row, too: see `FAMILIES`.
operands
    Comma-separated, each `[=|+]KIND[SIZE]`: `=` written, `+` read and written, else read.  The letters are
    those of the manuals: see `KINDS` and `SIZES`.
attributes
    a `Kind` (lower case; IDENT if none), `lock` (LOCK is allowed), a `Unit`, and flags: `r:` read, `w:`
    written, `u:` left undefined.  `maybe`: the flags may also stay as they are (a shift by zero), so all of
    them are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from typing import NamedTuple

from vmm.bt.opcodes import onebyte, twobyte, vector, x87
from vmm.x86 import flags


class Map(Enum):
    """Where an opcode byte is looked up."""

    ONE_BYTE = auto()
    TWO_BYTE = auto()       # 0F
    X0F38 = auto()
    X0F3A = auto()
    VEX_0F38 = auto()       # C4 with mmmmm 2
    VEX_0F3A = auto()       # C4 with mmmmm 3


class Kind(Enum):
    """How an instruction must be treated."""

    IDENT = auto()          # executes as it is, its memory operand put into the guest's window
    INC_DEC = auto()        # 40-4F, which 64-bit mode spends on REX
    MOFFS = auto()          # A0-A3: memory at an address in the instruction
    XLAT = auto()           # memory at [ebx+al]
    MASKMOV = auto()        # stores through DS:EDI without naming it
    BIT_STRING = auto()     # the bit number may lead outside the addressed operand
    LEGACY = auto()         # has no encoding in 64-bit mode
    PUSH = auto()
    POP = auto()
    PUSHA = auto()
    POPA = auto()
    ENTER = auto()
    LEAVE = auto()
    STRING = auto()
    FPU_ENV = auto()        # shows or sets where the last x87 instruction and its operand were
    JCC = auto()
    LOOP = auto()           # branches on (E)CX
    JMP = auto()
    CALL = auto()
    RET = auto()
    JMP_INDIRECT = auto()
    CALL_INDIRECT = auto()
    FAR = auto()            # also IRET, SYSCALL, SYSRET, SYSENTER, SYSEXIT
    INT = auto()            # raises an exception or a software interrupt
    SEGMENT = auto()        # reads or loads a segment register
    IO = auto()
    SENSITIVE = auto()      # shows or changes the machine's state without trapping at every privilege level
    PRIVILEGED = auto()     # #GP outside CPL 0
    UD = auto()             # undefined: #UD
    OVERLONG = auto()       # more than 15 bytes: #GP(0) (APM vol. 2, 8.2.14)


#: kinds behind which execution does not simply go on
ENDS_UNIT = frozenset({
    Kind.JCC, Kind.LOOP, Kind.JMP, Kind.CALL, Kind.RET, Kind.JMP_INDIRECT, Kind.CALL_INDIRECT, Kind.FAR,
    Kind.INT, Kind.UD, Kind.OVERLONG,
})


class Unit(Enum):
    """Whose registers an instruction uses: what CR0.TS, CR0.EM and CR4.OSFXSR can make it fault for."""

    INTEGER = auto()
    X87 = auto()
    MMX = auto()
    SSE = auto()
    #: SSE that also enters MMX state (CVTPI2PS and its like)
    SSE_MMX = auto()
    #: FXSAVE and FXRSTOR: #NM like the others, but they need no CR4.OSFXSR
    FX = auto()


class Prefix(Enum):
    """The mandatory prefix of a row."""

    ANY = ""
    NONE = "np"
    X66 = "66"
    XF3 = "f3"
    XF2 = "f2"


#: operand letters (those of the manuals' opcode maps) and what they name
KINDS = {
    "E": "ModRM.rm: a general register or memory", "G": "ModRM.reg: a general register",
    "M": "ModRM.rm: memory only", "R": "ModRM.rm: a general register whatever ModRM.mod says",
    "S": "ModRM.reg: a segment register", "C": "ModRM.reg: a control register",
    "D": "ModRM.reg: a debug register",
    "P": "ModRM.reg: an MMX register", "Q": "ModRM.rm: an MMX register or memory",
    "N": "ModRM.rm: an MMX register only",
    "V": "ModRM.reg: an XMM register", "W": "ModRM.rm: an XMM register or memory",
    "U": "ModRM.rm: an XMM register only",
    "B": "VEX.vvvv: a general register", "Z": "the low three opcode bits: a general register",
    "I": "an immediate", "J": "a displacement from the next instruction",
    "A": "a far pointer in the instruction",
    "O": "memory at an address in the instruction",
    "X": "memory at DS:(E)SI", "Y": "memory at ES:(E)DI",
    "@": "a register (or the constant 1) named by the opcode itself",
}
_MODRM_KINDS = frozenset("EGMRSCDPQNVWU")
MEMORY_KINDS = frozenset("EMQW")
_REGISTER_ONLY = frozenset("NU")
# ModRM bytes that address memory, and those that name a register
_IN_MEMORY, _IN_REGISTER = frozenset(range(0xC0)), frozenset(range(0xC0, 0x100))

#: operand size letters: bytes with 16-bit and with 32-bit operand size
SIZES = {
    "n": (0, 0),        # nothing is accessed
    "b": (1, 1), "w": (2, 2), "d": (4, 4), "q": (8, 8), "t": (10, 10), "x": (16, 16),
    "v": (2, 4),        # the operand size
    "k": (2, 2),        # a word in memory; a register is written or read in the operand size
    "p": (4, 6),        # far pointer
    "a": (4, 8),        # two bounds
    "s": (6, 6),        # limit and base of a descriptor table
    "e": (14, 28),      # x87 environment
    "f": (94, 108),     # x87 state
    "y": (512, 512),    # FXSAVE area
}
_FIXED = frozenset({"AL", "eAX", "CL", "DX", "AX", "1", "ES", "CS", "SS", "DS", "FS", "GS", "st", "sti"})

_FLAG_BITS = {
    "o": flags.RFLAGS_OF, "s": flags.RFLAGS_SF, "z": flags.RFLAGS_ZF, "a": flags.RFLAGS_AF,
    "p": flags.RFLAGS_PF, "c": flags.RFLAGS_CF, "d": flags.RFLAGS_DF,
}


class Operand(NamedTuple):
    """One operand of an entry."""

    kind: str           # a letter of KINDS
    size: str           # a letter of SIZES; the name, if kind is "@"
    read: bool
    written: bool

    def bytes(self, opsize: int) -> int:
        """Its size in memory or in the instruction, with an operand size of 2 or 4."""
        return SIZES[self.size][opsize == 4]


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One instruction of the set."""

    opcode: str                     # as the row has it, for messages
    mnemonic: str
    operands: tuple[Operand, ...] = ()
    kind: Kind = Kind.IDENT
    unit: Unit = Unit.INTEGER
    lockable: bool = False
    #: arithmetic flags and DF, as bits of RFLAGS; undefined ones are also written
    flags_read: int = 0
    flags_written: int = 0
    flags_undefined: int = 0
    # -- which encodings it fits
    prefix: Prefix = Prefix.ANY
    modrm: bool = False
    #: ModRM values it is for; every one if empty
    modrms: frozenset[int] = frozenset()
    #: its operand that is memory unless ModRM.mod is 3 (or always: moffs; of two strings the one at (E)SI)
    memory: Operand | None = None
    #: its immediates, branch displacement or far pointer
    immediates: tuple[Operand, ...] = ()

    def fits(self, prefix: Prefix, modrm: int) -> bool:
        """Whether it is the meaning of its opcode under this mandatory prefix and ModRM byte."""
        return (self.prefix in (Prefix.ANY, prefix)) and (not self.modrms or modrm in self.modrms)


#: the meaning of every undefined encoding, and of every instruction of more than 15 bytes
UNDEFINED = Entry("", "(undefined)", kind=Kind.UD)
OVERLONG = Entry("", "(over 15 bytes)", kind=Kind.OVERLONG)

_CONDITIONS = (
    ("o", "o"), ("no", "o"), ("b", "c"), ("ae", "c"), ("e", "z"), ("ne", "z"), ("be", "cz"), ("a", "cz"),
    ("s", "s"), ("ns", "s"), ("p", "p"), ("np", "p"), ("l", "so"), ("ge", "so"), ("le", "zso"), ("g", "zso"),
)
#: families of instructions in one row: index, name, attributes of its own
FAMILIES: dict[str, tuple[tuple[int, str, str], ...]] = {
    "r": tuple((index, "", "") for index in range(8)),
    "cc": tuple((index, name, f"r:{reads}") for index, (name, reads) in enumerate(_CONDITIONS)),
    "alu": (
        (0, "add", "w:oszapc"), (1, "or", "w:oszpc u:a"), (2, "adc", "r:c w:oszapc"),
        (3, "sbb", "r:c w:oszapc"), (4, "and", "w:oszpc u:a"), (5, "sub", "w:oszapc"),
        (6, "xor", "w:oszpc u:a"),
    ),
    "shift": (
        (0, "rol", "w:oc"), (1, "ror", "w:oc"), (2, "rcl", "r:c w:oc"), (3, "rcr", "r:c w:oc"),
        (4, "shl", "w:oszpc u:a"), (5, "shr", "w:oszpc u:a"), (6, "shl", "w:oszpc u:a"),
        (7, "sar", "w:oszpc u:a"),
    ),
    "x87": tuple((index, name, "") for index, name in enumerate(
        ("add", "mul", "com", "comp", "sub", "subr", "div", "divr"))),
}

_OPCODE = re.compile(
    r"(?P<vex>vex\.)?(?:(?P<prefix>np|66|f3|f2|mm)\.)?(?P<code>[0-9a-f]+)"
    r"(?:-(?P<last>[0-9a-f]{2})|\+(?P<step>8?)\{(?P<family>\w+)\})?"
    r"(?:/(?:(?P<reg>[0-7])|\{(?P<group>\w+)\})"
    r"|:(?P<low>[0-9a-f]{2})(?:-(?P<high>[0-9a-f]{2})|\+8\{(?P<stack>\w+)\})?)?")
_MAPS = {("", ""): Map.ONE_BYTE, ("", "0f"): Map.TWO_BYTE, ("", "0f38"): Map.X0F38, ("", "0f3a"): Map.X0F3A,
         ("vex.", "0f38"): Map.VEX_0F38, ("vex.", "0f3a"): Map.VEX_0F3A}
_WORDS_KIND = {kind.name.lower(): kind for kind in Kind}
_WORDS_UNIT = {unit.name.lower(): unit for unit in Unit}
_ON_XMM = str.maketrans("PQN", "VWU")


@cache
def _operand(text: str) -> Operand:
    access = text[0] if text[0] in "=+" else ""
    name = text[len(access):]
    if name in _FIXED:
        return Operand("@", name, access != "=", bool(access))
    kind, size = name[0], name[1:]
    if kind not in KINDS or size not in SIZES:
        raise ValueError(f"operand {text}")
    return Operand(kind, size, access != "=", bool(access))


def _implied_unit(kinds: frozenset[str]) -> Unit:
    mmx, sse = bool(kinds & frozenset("PQN")), bool(kinds & frozenset("VWU"))
    if sse:
        return Unit.SSE_MMX if mmx else Unit.SSE
    return Unit.MMX if mmx else Unit.INTEGER


def _entry(opcode: str, mnemonic: str, operands: str, attributes: str, prefix: Prefix,
           modrms: frozenset[int]) -> Entry:
    parsed = tuple(_operand(text) for text in operands.split(",")) if operands != "-" else ()
    kinds = frozenset(operand.kind for operand in parsed)
    kind, unit, lockable, maybe = Kind.IDENT, _implied_unit(kinds), False, False
    masks = {"r": 0, "w": 0, "u": 0}
    for word in attributes.split():
        name, colon, letters = word.partition(":")
        if colon:
            masks[name] |= sum(_FLAG_BITS[letter] for letter in letters)
        elif word == "lock":
            lockable = True
        elif word == "maybe":
            maybe = True
        elif word in _WORDS_UNIT:
            unit = _WORDS_UNIT[word]
        else:
            kind = _WORDS_KIND[word]
    written = masks["w"] | masks["u"]
    needed = _IN_REGISTER if kinds & _REGISTER_ONLY else _IN_MEMORY if "M" in kinds else frozenset[int]()
    fitting = modrms & needed if modrms and needed else modrms or needed
    if modrms and not fitting:
        raise ValueError(f"{opcode} {mnemonic}: no ModRM byte fits")
    return Entry(
        opcode, mnemonic, parsed, kind, unit, lockable,
        masks["r"] | (written if maybe else 0), written, masks["u"],
        prefix, bool(modrms or kinds & _MODRM_KINDS), fitting,
        next((operand for letters in ("EMQWOX", "Y") for operand in parsed if operand.kind in letters), None),
        tuple(operand for operand in parsed if operand.kind in "IJA"))


@cache
def _with_reg(reg: int) -> frozenset[int]:
    return frozenset(modrm for modrm in range(256) if modrm >> 3 & 7 == reg)


def _expand(row: str) -> Iterator[tuple[Map, int, Entry]]:
    """The entries of one row."""
    opcode, mnemonic, operands, *words = row.split()
    match = _OPCODE.fullmatch(opcode)
    if match is None:
        raise ValueError(f"opcode {opcode}")
    part = match.groupdict()
    escape, first = part["code"][:-2], int(part["code"][-2:], 16)
    where = _MAPS[part["vex"] or "", escape]
    attributes = " ".join(words)

    def entries(byte: int, name: str, extra: str, modrms: frozenset[int]) -> Iterator[tuple[Map, int, Entry]]:
        both = f"{extra} {attributes}"
        if part["prefix"] == "mm":
            yield where, byte, _entry(opcode, name, operands, both, Prefix.NONE, modrms)
            wide = re.sub("W[qd]", "Wx", operands.translate(_ON_XMM)).replace("Vq", "Vx")
            yield where, byte, _entry(opcode, name, wide, both, Prefix.X66, modrms)
        else:
            yield where, byte, _entry(opcode, name, operands, both, Prefix(part["prefix"] or ""), modrms)

    def named(family: str, name: str) -> str:
        return mnemonic.replace(f"{{{family}}}", name)

    low = frozenset[int]()
    if part["reg"]:
        low = _with_reg(int(part["reg"]))
    elif part["low"]:
        low = frozenset(range(int(part["low"], 16), int(part["high"] or part["low"], 16) + 1))
    if family := part["family"]:
        step = int(part["step"] or 1)
        for index, name, extra in FAMILIES[family]:
            yield from entries(first + step * index, named(family, name), extra, low)
    elif family := part["group"]:
        for index, name, extra in FAMILIES[family]:
            yield from entries(first, named(family, name), extra, _with_reg(index))
    elif family := part["stack"]:
        for index, name, extra in FAMILIES[family]:
            start = int(part["low"], 16) + 8 * index
            yield from entries(first, named(family, name), extra, frozenset(range(start, start + 8)))
    else:
        for byte in range(first, int(part["last"] or part["code"][-2:], 16) + 1):
            yield from entries(byte, mnemonic, "", low)


def _clash(one: Entry, other: Entry) -> bool:
    """Whether an encoding fits both, neither being the more special by its prefix."""
    return one.prefix is other.prefix and (
        not one.modrms or not other.modrms or bool(one.modrms & other.modrms))


def _build() -> dict[Map, list[tuple[Entry, ...]]]:
    slots: dict[Map, list[list[Entry]]] = {where: [[] for _ in range(256)] for where in Map}
    for text in (onebyte.ROWS, twobyte.ROWS, vector.ROWS, x87.ROWS):
        for line in text.splitlines():
            row = line.partition("#")[0].strip()
            if not row:
                continue
            for where, byte, entry in _expand(row):
                if any(_clash(entry, other) for other in slots[where][byte]):
                    raise ValueError(f"{row}: the encoding is taken")
                slots[where][byte].append(entry)
    # a row for one prefix goes before the row for any
    return {where: [tuple(sorted(entries, key=lambda entry: entry.prefix is Prefix.ANY)) for entries in rows]
            for where, rows in slots.items()}


#: map -> opcode byte -> its entries
SLOTS = _build()
