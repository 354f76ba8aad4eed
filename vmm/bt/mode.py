# SPDX-License-Identifier: GPL-2.0-or-later
"""What a translation takes for granted about the guest: nothing in its code says so, yet it depends on it."""

from __future__ import annotations

from typing import NamedTuple

from vmm.bt.decode import CS, SS
from vmm.bt.table import Unit

#: a bit for each segment register, ES to GS
ALL_SEGMENTS = 0b111111

_FPU = frozenset({Unit.X87, Unit.MMX, Unit.FX})
_INTEGER = frozenset({Unit.INTEGER})
_SSE = frozenset({Unit.SSE, Unit.SSE_MMX})


class Mode(NamedTuple):
    """A state of the guest that code is translated for.  Other states run other translations."""

    code32: bool = True
    stack32: bool = True
    #: segments from 0 to 4 GiB, readable and writable (CS: executable and readable)
    flat: int = ALL_SEGMENTS
    #: segments of 4 GiB, like the flat ones, that begin anywhere
    based: int = 0
    #: neither CR0.EM nor CR0.TS
    fpu: bool = True
    #: and CR4.OSFXSR
    sse: bool = True
    #: CPL 3; else CPL 0
    user: bool = False

    @property
    def translated(self) -> bool:
        """Whether there are translations for it: 32-bit code in a flat segment, with a 32-bit stack."""
        return self.code32 and self.stack32 and bool(self.flat >> CS & 1)

    @property
    def stack(self) -> bool:
        """Whether stack instructions can find their memory in the window without more ado."""
        return bool(self.flat >> SS & 1)

    @property
    def units(self) -> frozenset[Unit]:
        """Whose registers instructions may use without a fault."""
        if not self.fpu:
            return _INTEGER
        return _INTEGER | _FPU | _SSE if self.sse else _INTEGER | _FPU
