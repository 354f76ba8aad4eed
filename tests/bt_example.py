# SPDX-License-Identifier: GPL-2.0-or-later
"""One example: some 32-bit code, the state it begins in, and what came of it.

    CODE   two pages, read-only; int3 wherever the example's code is not
    DATA   two writable pages and a read-only one, with nothing mapped on either side

The data are a piece of the *soil*, bytes that all examples of a seed have in common.
"""

from __future__ import annotations

from typing import NamedTuple

CODE, CODE_BYTES = 0x101000, 0x2000
DATA, WRITABLE_BYTES, DATA_BYTES = 0x211000, 0x2000, 0x3000
SOIL_BYTES = 0x20000
#: bytes of code an example may have
CODE_LIMIT = 256
INT3 = 0xCC
#: selectors at CPL 3, as Linux has them; those with a base are entries of the thread's own
CODE_SELECTOR, FLAT_SELECTOR = 0x23, 0x2B
FS_SELECTOR, GS_SELECTOR, DS_SELECTOR = 0x63, 0x6B, 0x73


class State(NamedTuple):
    """Registers in the order of their encoding; flags are the arithmetic ones and DF; an FXSAVE image."""

    registers: tuple[int, ...]
    flags: int
    fx: bytes


class Bases(NamedTuple):
    """Of the segments that are not always flat."""

    fs: int = 0
    gs: int = 0
    ds: int = 0


class Example(NamedTuple):
    """Code that stands and is begun at `eip`; `starts` is where its instructions are in it."""

    code: bytes
    starts: tuple[int, ...]
    eip: int
    state: State
    #: where its data begin in the soil
    data_from: int
    bases: Bases = Bases()

    def at(self, eip: int) -> int:
        """The byte of code at `eip`."""
        at = eip - self.eip
        return self.code[at] if 0 <= at < len(self.code) else INT3

    def ending_at(self, eip: int) -> Example:
        """The same with int3 in place of the instruction at `eip`."""
        at = eip - self.eip
        return self._replace(code=self.code[:at] + bytes([INT3]) + self.code[at + 1:])


class Outcome(NamedTuple):
    """How it ended: `vector` is 3 for int3, and `eip` is where that stands or the instruction that faulted.

    Of a page fault there is the address, and whether it was a read, a write or a fetch.
    """

    eip: int
    vector: int
    address: int
    access: str
    state: State
    #: the writable pages
    memory: bytes
