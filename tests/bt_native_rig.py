# SPDX-License-Identifier: GPL-2.0-or-later
"""A native CPU with a window and a jump table, units written as hex, and machine code of the tests' own."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

from vmm.bt.native import memory
from vmm.bt.native.block import Block
from vmm.bt.native.cpu import NativeCpu
from vmm.bt.native.jumptable import JumpTable
from vmm.bt.native.windows import WINDOW_BYTES, MappingBudget, Window
from vmm.memory.pool import Pool

POOL_BYTES = 4 << 20


class Rig:
    """Runs units; `leave` is the bytes of a jump to stub `number` from an offset in the units."""

    def __init__(self, fsgsbase: bool | None = None) -> None:
        self.cpu = NativeCpu(arena_bytes=1 << 20, stubs=256, fsgsbase=fsgsbase)
        self.pool = Pool(POOL_BYTES)
        self.budget = MappingBudget()
        self.table = JumpTable()
        self.window = Window(self.pool, self.budget)
        self.block = self.new_block(self.window)

    def new_block(self, window: Window) -> Block:
        block = self.cpu.new_block()
        block.set("window", window.base)
        block.set("jump_table", self.table.base)
        return block

    def leave(self, offset: int, number: int = 0) -> bytes:
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

    def close(self) -> None:
        self.block.close()
        self.window.close()
        self.table.close()
        self.cpu.close()


def function(code: str) -> ctypes._CFuncPtr:
    """Machine code as a function of two pointers."""
    data = bytes.fromhex(code)
    page = memory.reserve(memory.PAGE, memory.READ | memory.WRITE)
    memory.view(page, memory.PAGE)[:len(data)] = data
    memory.protect(page, memory.PAGE, memory.READ | memory.EXEC)
    return ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(page)


def host_mappings(window: Window) -> int:
    """How many mappings the kernel has between the ends of a window, as far as the window can tell."""
    count = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        match = re.match("([0-9a-f]+)-([0-9a-f]+)", line)
        assert match
        first, last = int(match[1], 16), int(match[2], 16)
        count += first < window.base + WINDOW_BYTES and last > window.base
    return count
