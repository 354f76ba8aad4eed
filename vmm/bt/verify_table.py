# SPDX-License-Identifier: GPL-2.0-or-later
"""The verifier's allow-list: the 64-bit instructions translated code may contain.

Columns of an instruction with an operand:

    opcodes     one, several by commas, or a range; in hex
    prefixes    the combinations allowed of 66 (o), lock (l), F2 (p), F3 (r); n is none
    reg         g: a general register; x: a vector register; digits: the opcode extensions allowed
    rm          what the operand may be: g; x (a vector or x87 register); m (memory); i, a register, and
                memory at edi besides
    immediate   bytes: 0, 1, or z for 4 (2 with 66)
    block       the state block may be read (r) or written (w), by 1 byte or the operand size (v); - neither

The opcodes are those of AMD64 APM vol. 3 to 5.  What is #UD there may be allowed here: the guest gets it.
"""

from __future__ import annotations

from typing import NamedTuple

#: offset, length and writability of what units may touch of the state block
BLOCK_FIELDS = (
    (0x08, 4, True),         # system flags
    (0x0C, 4, True),         # interrupt flag
    (0x10, 4, False),        # interrupt pending
    (0x18, 24, False),       # segment bases
    (0x30, 24, False),       # selectors
    (0x48, 52, True),        # spill
    (0x7C, 4, True),         # direction
)

_INTEGER = """
00,08,10,18,20,28,30    n,o,l,lo    g           gm  0   w1
01,09,11,19,21,29,31    n,o,l,lo    g           gm  0   wv
02,0a,12,1a,22,2a,32    n,o         g           gm  0   r1
03,0b,13,1b,23,2b,33    n,o         g           gm  0   rv
38,3a                   n,o         g           gm  0   r1
39,3b                   n,o         g           gm  0   rv
69                      n,o         g           gm  z   -
6b                      n,o         g           gm  1   -
80                      n,o,l,lo    0123456     gm  1   w1
80                      n,o         7           gm  1   r1
81                      n,o,l,lo    0123456     gm  z   wv
81                      n,o         7           gm  z   rv
83                      n,o,l,lo    0123456     gm  1   wv
83                      n,o         7           gm  1   rv
84                      n,o         g           gm  0   r1
85                      n,o         g           gm  0   rv
86,87                   n,o,l,lo    g           gm  0   -
88                      n,o         g           gm  0   w1
89                      n,o         g           gm  0   wv
8a                      n,o         g           gm  0   r1
8b                      n,o         g           gm  0   rv
c0,c1                   n,o         01234567    gm  1   -
c6                      n,o         0           gm  1   w1
c7                      n,o         0           gm  z   wv
d0-d3                   n,o         01234567    gm  0   -
d8-df                   n,o         01234567    xm  0   -
f6                      n,o         0           gm  1   r1
f6                      n,o,l,lo    23          gm  0   w1
f6                      n,o         4567        gm  0   -
f7                      n,o         0           gm  z   rv
f7                      n,o,l,lo    23          gm  0   wv
f7                      n,o         4567        gm  0   -
fe                      n,o,l,lo    01          gm  0   w1
ff                      n,o,l,lo    01          gm  0   wv
"""

_TWO_BYTE = """
0d                      n           012         m   0   -
18                      n           0123        m   0   -
1f                      n,o         0           gm  0   -
40-4f                   n,o         g           gm  0   rv
90-9f                   n,o         0           gm  0   w1
a3                      n,o         g           gm  0   -
ab,b3,bb                n,o,l,lo    g           gm  0   -
a4,ac                   n,o         g           gm  1   -
a5,ad                   n,o         g           gm  0   -
af                      n,o         g           gm  0   -
b0,b1,c0,c1             n,o,l,lo    g           gm  0   -
b6,be                   n,o         g           gm  0   r1
b7,bf                   n,o         g           gm  0   -
b8                      r,or        g           gm  0   -
ba                      n,o,l,lo    4567        gm  1   -
bc,bd                   n,o,r,or    g           gm  0   -
c3                      n           g           m   0   -
c7                      n,l         1           m   0   -
ae                      n           01237       m   0   -
ae                      n           567         x   0   -
10,11,51,58,59,5c-5f    n,o,p,r     x           xm  0   -
5a                      n,o,p,r     x           xm  0   -
12                      n,o,p,r     x           xm  0   -
16                      n,o,r       x           xm  0   -
13,17,2b,e7             n,o         x           m   0   -
14,15,28,29,2e,2f       n,o         x           xm  0   -
54-57                   n,o         x           xm  0   -
52,53                   n,r         x           xm  0   -
5b                      n,o,r       x           xm  0   -
2a                      n,o         x           xm  0   -
2a                      p,r         x           gm  0   -
2c,2d                   n,o         x           xm  0   -
2c,2d                   p,r         g           xm  0   -
50,d7                   n,o         g           x   0   -
60-6d,74-76             n,o         x           xm  0   -
6e                      n,o         x           gm  0   -
6f,7f                   n,o,r       x           xm  0   -
7e                      n,o         x           gm  0   -
7e                      r           x           xm  0   -
70                      n,o,p,r     x           xm  1   -
71,72                   n,o         246         x   1   -
73                      n,o         2367        x   1   -
7c,7d,d0                o,p         x           xm  0   -
c2                      n,o,p,r     x           xm  1   -
c4                      n,o         x           gm  1   -
c5                      n,o         g           x   1   -
c6                      n,o         x           xm  1   -
d6                      o           x           xm  0   -
d6                      p,r         x           x   0   -
d1-d5,d8-df             n,o         x           xm  0   -
e0-e5,e8-ef,f1-f6       n,o         x           xm  0   -
e6                      o,p,r       x           xm  0   -
f0                      p           x           m   0   -
f7                      n,o         x           i   0   -
f8-fe                   n,o         x           xm  0   -
"""

_THREE_BYTE_38 = """
00-0b,1c-1e             n,o         x           xm  0   -
10,14,15,17,20-25       o           x           xm  0   -
28,29,2b,30-35,37-41    o           x           xm  0   -
2a                      o           x           m   0   -
db-df                   o           x           xm  0   -
f0                      n,o         g           m   0   -
f1                      n,o         g           m   0   -
f0,f1                   p,op        g           gm  0   -
f6                      o,r         g           gm  0   -
"""

_THREE_BYTE_3A = """
08-0e,40-42,44,60-63,df o           x           xm  1   -
0f                      n,o         x           xm  1   -
14-17,20,22             o           x           gm  1   -
21                      o           x           xm  1   -
"""

#: opcodes, prefixes, kind, immediate.  plain: no operand byte; register: in the opcode; implied: memory that
#: takes a segment; counted: jumps by ecx; stop: nothing is executed behind it
_WITHOUT_OPERAND = {
    "": """
04,0c,14,1c,24,2c,34,3c,a8    n,o       plain       1
05,0d,15,1d,25,2d,35,3d,a9    n,o       plain       z
98,99                         n,o       plain       0
9b,9e,9f,f5,f8,f9,fc,fd       n         plain       0
90                            r         plain       0
90-97                         n,o       register    0
b0-b7                         n,o       register    1
b8-bf                         n,o       register    z
a0-a3                         n,o       implied     4
ac,ad                         n,o,r,or  implied     0
d7                            n         implied     0
70-7f                         n         jcc8        0
e0-e3                         n         counted     0
e9                            n         jmp32       0
eb                            n         jmp8        0
""",
    "0f": """
0b                            n         stop        0
77                            n         plain       0
80-8f                         n         jcc32       0
c8-cf                         n         register    0
""",
}


class Form(NamedTuple):
    """One allowed form of an opcode."""

    prefixes: frozenset[str]
    kind: str
    reg: str
    rm: str
    immediate: str
    block: str

    def immediate_bytes(self, prefixes: str) -> int:
        """Length of the immediate operand."""
        if self.immediate == "z":
            return 2 if "o" in prefixes else 4
        return int(self.immediate)

    def takes(self, reg: int, register: bool) -> bool:
        """Whether the ModRM fields fit: the extension digit, and a register or memory as operand."""
        if self.reg not in "gx" and str(reg) not in self.reg:
            return False
        return self.rm != "m" if register else "m" in self.rm


def _opcodes(column: str) -> list[int]:
    found: list[int] = []
    for part in column.split(","):
        first, _, last = part.partition("-")
        found.extend(range(int(first, 16), int(last or first, 16) + 1))
    return found


def _prefixes(column: str) -> frozenset[str]:
    return frozenset("" if part == "n" else part for part in column.split(","))


def _tables() -> dict[str, dict[int, tuple[Form, ...]]]:
    tables: dict[str, dict[int, tuple[Form, ...]]] = {}
    operands = {"": _INTEGER, "0f": _TWO_BYTE, "0f38": _THREE_BYTE_38, "0f3a": _THREE_BYTE_3A}
    for name, text in operands.items():
        table = tables.setdefault(name, {})
        for line in text.strip().splitlines():
            opcodes, prefixes, reg, rm, immediate, block = line.split()
            form = Form(_prefixes(prefixes), "operand", reg, rm, immediate, block)
            for opcode in _opcodes(opcodes):
                table[opcode] = (*table.get(opcode, ()), form)
    for name, text in _WITHOUT_OPERAND.items():
        table = tables[name]
        for line in text.strip().splitlines():
            opcodes, prefixes, kind, immediate = line.split()
            form = Form(_prefixes(prefixes), kind, "", "", immediate, "-")
            for opcode in _opcodes(opcodes):
                table[opcode] = (*table.get(opcode, ()), form)
    return tables


#: opcode map -> opcode -> its forms
TABLES = _tables()
