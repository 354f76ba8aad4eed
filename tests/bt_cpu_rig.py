# SPDX-License-Identifier: GPL-2.0-or-later
"""A CPU for translated code with a window and a jump table, and units written as hex."""

from __future__ import annotations

from vmm.bt.cpu import TranslationCpu, Window
from vmm.bt.emulated.cpu import EmulatedCpu
from vmm.bt.native.block import FLAGS, R8, REGISTERS, Block
from vmm.bt.native.cpu import NativeCpu, handlers
from vmm.bt.native.trampolines import PREEMPTED
from vmm.bt.native.windows import MappingBudget
from vmm.memory.pool import Pool

POOL_BYTES = 4 << 20
ARENA_BYTES, STUBS = 1 << 20, 256
KINDS = {"native": NativeCpu, "emulated": EmulatedCpu}


class Rig:
    """Runs units on `cpu`."""

    def __init__(self, cpu: TranslationCpu) -> None:
        # a kick that came for somebody else's guest in this process must not keep ours from entering
        handlers().forget_kick()
        self.cpu = cpu
        self.pool = Pool(POOL_BYTES)
        self.budget = MappingBudget()
        self.table = cpu.new_table()
        self.window = cpu.new_window(self.pool, self.budget)
        self.block = self.new_block(self.window)

    @classmethod
    def of(cls, kind: str) -> Rig:
        """A rig with a small CPU of one of KINDS."""
        return cls(KINDS[kind](ARENA_BYTES, STUBS))

    def new_block(self, window: Window) -> Block:
        block = self.cpu.new_block()
        block.set("window", window.base)
        block.set("jump_table", self.table.base)
        return block

    def leave(self, offset: int, number: int = 0) -> bytes:
        """The bytes of a jump to stub `number` from an offset in the units."""
        arena = self.cpu.arena
        return b"\xE9" + (arena.stub(number) - (arena.units + offset + 5)).to_bytes(4, "little", signed=True)

    def put(self, code: str, offset: int = 0, stub: int = 0) -> int:
        """Write a unit that leaves by `stub`; its address."""
        data = bytes.fromhex(code)
        address = self.cpu.arena.units + offset
        self.cpu.arena.write(address, data + self.leave(offset + len(data), stub))
        return address

    def run(self, code: str, stub: int = 0) -> int:
        return self.cpu.enter(self.block, self.put(code, stub=stub))

    def reset(self) -> None:
        """Nothing mapped, registers zero."""
        self.window.clear()
        for index in (*REGISTERS, *range(R8, R8 + 4), FLAGS):
            self.block.q[index] = 0

    def rest(self) -> None:
        """No kick under way."""
        self.cpu.timer.rest()
        while self.run("") == PREEMPTED:
            pass

    def close(self) -> None:
        self.block.close()
        self.window.close()
        self.table.close()
        self.cpu.close()
