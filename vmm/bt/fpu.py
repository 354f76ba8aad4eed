# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the guest's x87, MMX and SSE state is: in its state block, or on the silicon; never in both.

Translated code leaves it in the block from one entry to the next.  It moves only when the silicon is to
execute an instruction that uses it, and when the guest's state is captured.
"""

from __future__ import annotations

from vmm.bt.native.block import Block
from vmm.silicon.cpu import Cpu
from vmm.silicon.guest import Guest


class FpuState:
    """The state of the guest that is on `cpu`."""

    def __init__(self, cpu: Cpu, guest: Guest, block: Block) -> None:
        self._cpu = cpu
        self._guest = guest
        self._block = block
        self.in_silicon = True

    def to_block(self) -> None:
        """Before translated code runs.  The guest stays on the CPU."""
        if self.in_silicon:
            self._block.load_fx(self._cpu.states.save_fpu(self._guest))
            self.in_silicon = False

    def to_silicon(self) -> None:
        """Before the silicon runs an instruction that uses it.  The guest stays on the CPU."""
        if not self.in_silicon:
            self._cpu.states.load_fpu(self._guest, bytes(self._block.fx))
            self.in_silicon = True
