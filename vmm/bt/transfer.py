# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's registers, from the silicon's register file to a state block and back.

The register file is the truth whenever no translated code runs; what translated code leaves in the state
block comes back at a boundary between two instructions of the guest.
"""

from __future__ import annotations

from vmm.bt.modes import Modes
from vmm.bt.native.block import FLAGS, LIVE_FLAGS, Block
from vmm.bt.views import View
from vmm.silicon import layout as at
from vmm.silicon.registers import Registers
from vmm.x86.flags import MASK32, RFLAGS_IF

_CC, _DF = 0x8D5, 0x400
#: RFLAGS without the arithmetic flags, DF, IF, RF and the bit that is always one
_SYSTEM = MASK32 & ~(_CC | _DF | RFLAGS_IF | 0x10002)
# fields of the state block, as doublewords
_SYSTEM_FLAGS, _INTERRUPT_FLAG, _PENDING, _DIRECTION = 2, 3, 4, 31
_GPRS = slice(16, 24)


class Transfer:
    """Between `regs` and `block`."""

    def __init__(self, regs: Registers, modes: Modes, block: Block) -> None:
        self._regs = regs
        self._q, self._d = regs.q, regs.d
        self._modes = modes
        self._bq, self._bd = block.q, block.d

    def to_block(self, view: View, pending: bool) -> None:
        """The guest's registers go to the state block; `pending`: an interrupt waits for IF."""
        q, d, bq, bd = self._q, self._d, self._bq, self._bd
        bq[_GPRS] = q[0:8]
        if d[at.CC_OP] == 1:
            flags = q[at.CC_SRC] & _CC | (_DF if d[at.DF] != 1 else 0)
        else:
            flags = self._regs.rflags() & LIVE_FLAGS
        bq[FLAGS] = flags
        rflags = q[at.RFLAGS]
        bd[_SYSTEM_FLAGS] = rflags & _SYSTEM
        bd[_INTERRUPT_FLAG] = rflags & RFLAGS_IF
        bd[_DIRECTION] = flags & _DF
        bd[_PENDING] = pending
        self._modes.load_segments(bd)
        view.enter(bq)

    def to_registers(self, eip: int) -> None:
        """The guest's registers come back, at a boundary between instructions."""
        q, d, bq, bd = self._q, self._d, self._bq, self._bd
        q[0:8] = bq[_GPRS]
        flags = bq[FLAGS]
        q[at.CC_SRC] = flags & _CC
        d[at.CC_OP] = 1
        d[at.DF] = MASK32 if flags & _DF else 1
        q[at.RFLAGS] = bd[_SYSTEM_FLAGS] | bd[_INTERRUPT_FLAG] | 2
        q[at.RIP] = eip
