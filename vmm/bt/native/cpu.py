# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's own processor as a CPU for translated code: units run in this process, at its speed.

One thread of a process runs guests: that which makes its `NativeCpu`s.  Each has an arena; any number of
blocks (vCPUs) and windows may be used with it, one at a time.

What a monitor may rely on after `enter`:

    a stub      all registers of the guest, its flags and FPU are in the block
    FAULT       the same, as of the instruction that faulted; `Block.fault()` says which and why
    MISS        the same; the guest address the jump wanted is in r8
    PREEMPTED   the same; entering again at the block's rip goes on, unless that lies inside a string
                sequence, whose registers count from the window's base: that is entered at its start
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

from vmm.bt.native import trampolines
from vmm.bt.native.arena import Arena
from vmm.bt.native.block import RIP, SINGLE_STEP, TF, Block
from vmm.bt.native.jumptable import JumpTable
from vmm.bt.native.signals import Handlers
from vmm.bt.native.timer import KickTimer
from vmm.bt.native.windows import MappingBudget, Window
from vmm.memory.pool import Pool
from vmm.silicon.kick import Kicker

DEFAULT_ARENA, DEFAULT_STUBS = 32 << 20, 1 << 16


@functools.cache
def handlers() -> Handlers:
    """The signal handlers of this process, installed when first asked for."""
    return Handlers()


class NativeCpu:
    """An arena, the way into it and out of it, and the timer that makes guests leave."""

    def __init__(self, arena_bytes: int = DEFAULT_ARENA, stubs: int = DEFAULT_STUBS,
                 fsgsbase: bool | None = None) -> None:
        self._handlers = handlers()
        code = trampolines.build(trampolines.has_fsgsbase() if fsgsbase is None else fsgsbase,
                                 self._handlers.names)
        self.arena = Arena(arena_bytes, stubs, code.code)
        self.timer = KickTimer()
        # the interpreter's lock is kept: the guest's slice is this thread's
        self._enter = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(self.arena.base)
        base, labels = self.arena.base, code.labels
        self._constants = {
            "exit": base + labels["leave"],
            "stub_origin": self.arena.origin,
            "units": self.arena.units, "units_bytes": self.arena.units_bytes,
            "monitor_code": base, "monitor_code_bytes": self.arena.units - base,
            "entering": base + labels["entering"],
            "entering_bytes": labels["abandon"] - labels["entering"],
            "abandon": base + labels["abandoned"],
        }

    def new_block(self) -> Block:
        """A state block for guests whose units are in this CPU's arena."""
        block = Block()
        for name, value in self._constants.items():
            block.set(name, value)
        return block

    def new_window(self, pool: Pool, budget: MappingBudget,
                   evicted: Callable[[list[int]], None] = lambda pages: None) -> Window:
        """An empty window over frames of `pool`; `evicted` hears of pages unmapped for the budget's sake."""
        return Window(pool, budget, evicted)

    def new_table(self, limit: int = 1024) -> JumpTable:
        """An empty jump table of at most `limit` pages."""
        return JumpTable(limit)

    def prepare(self) -> None:
        """Before a slice: take the signals back if somebody took them (faulthandler, for one)."""
        if not self._handlers.intact():
            self._handlers.ensure()

    def enter(self, block: Block, address: int) -> int:
        """Run the guest from host `address`; the number of the stub it left by, or FAULT, MISS, PREEMPTED."""
        block.q[RIP] = address
        left: int = self._enter(block.argument)
        return left

    def step(self, block: Block, address: int) -> int:
        """Run one host instruction of the guest, then FAULT with vector 1 (#DB); or as `enter`.

        A jump to a stub leaves by it.  So a preempted guest is brought to the end of its instruction.
        """
        block.q[SINGLE_STEP] = TF
        try:
            return self.enter(block, address)
        finally:
            block.q[SINGLE_STEP] = 0

    def kick(self) -> None:
        """Make the next entry give up (for signal handlers of Python's, and tests)."""
        self._handlers.kick()

    def join(self, kicker: Kicker) -> None:
        """What stops the emulated silicon is a kick for this CPU, too: one timer, one signal for input."""
        kicker.precede(self._handlers.kick_handler, self._handlers.forget_kick)

    def close(self) -> None:
        """Give the arena and the timer back; the handlers stay."""
        self.timer.close()
        self.arena.close()
