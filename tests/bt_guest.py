# SPDX-License-Identifier: GPL-2.0-or-later
"""Translated code run by as little monitor as possible: flat memory, and every callout ends the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vmm.bt.cache import Callout, Edge, Translation, TranslationCache
from vmm.bt.codepage import CodePage
from vmm.bt.cpu import TranslationCpu
from vmm.bt.mode import Mode
from vmm.bt.native.block import R8, REGISTERS, RIP
from vmm.bt.native.cpu import NativeCpu
from vmm.bt.native.trampolines import FAULT, MISS, PREEMPTED
from vmm.bt.native.windows import MappingBudget
from vmm.bt.unit import Mark
from vmm.memory.pool import PAGE, PAGE_SHIFT, Pool

FLAT = Mode()


class PageFault(Exception):
    """Code was fetched where there is no memory."""


class Stop(NamedTuple):
    """Why the guest stopped, and where.  For a page fault: the address and the error code."""

    why: str
    eip: int
    vector: int = -1
    address: int = -1
    error: int = -1


class Guest:
    """One vCPU; its memory is the pool, from linear address 0."""

    #: makes the CPU it runs on, from the bytes of its arena and the number of stubs
    new_cpu: Callable[[int, int], TranslationCpu] = NativeCpu

    def __init__(self, memory: int = 4 << 20, arena: int = 2 << 20, stubs: int = 16384) -> None:
        self.cpu = type(self).new_cpu(arena, stubs)
        self.pool = Pool(memory)
        self.window = self.cpu.new_window(self.pool, MappingBudget())
        self.table = self.cpu.new_table()
        self.cache = TranslationCache(self.cpu.arena)
        self.cache.tables.append(self.table)
        self.code: dict[tuple[Mode, int], CodePage] = {}
        self.block = self.cpu.new_block()
        self.block.set("window", self.window.base)
        self.block.set("jump_table", self.table.base)
        self.pages = memory >> PAGE_SHIFT
        self.window.map(0, 0, self.pages, writable=True)
        self.memory = self.pool.view
        self.cpu.prepare()

    def fetch(self, page: int) -> bytes:
        """The bytes of a page."""
        if page >= self.pages:
            raise PageFault
        return bytes(self.memory[page << PAGE_SHIFT:(page << PAGE_SHIFT) + PAGE])

    def unit(self, eip: int, mode: Mode = FLAT) -> Translation:
        """The unit at `eip`, translated now if need be."""
        number = eip >> PAGE_SHIFT
        page = self.code.get((mode, number))
        if page is None:
            page = self.code[mode, number] = self.cache.page(mode, number, self.fetch(number))
        return self.cache.get(page, eip, lambda: self.fetch(number + 1))

    def follow(self, edge: Edge) -> Translation:
        """The unit a jump leads to."""
        return self.cache.follow(edge, lambda: self.fetch((edge.eip >> PAGE_SHIFT) + 1))

    def write(self, address: int, data: bytes) -> None:
        """Write to memory; code that was there is looked at again."""
        self.memory[address:address + len(data)] = data
        for number in range(address >> PAGE_SHIFT, (address + len(data) - 1 >> PAGE_SHIFT) + 1):
            self.table.drop_page(number)
            for key in [key for key in self.code if key[1] == number]:
                del self.code[key]

    @property
    def registers(self) -> list[int]:
        return [self.block.q[index] for index in REGISTERS]

    @registers.setter
    def registers(self, values: list[int]) -> None:
        for index, value in zip(REGISTERS, values):
            self.block.q[index] = value

    def run(self, eip: int, mode: Mode = FLAT, limit: int = 1_000_000) -> Stop:
        """Run from `eip` to a callout or a fault, or until the guest left its code `limit` times."""
        cache, cpu, block = self.cache, self.cpu, self.block
        try:
            address = self.unit(eip, mode).address
            for _ in range(limit):
                left = cpu.enter(block, address)
                if left >= 0:
                    what = cache.exits[left]
                    if isinstance(what, Callout):
                        return Stop("callout", what.eip)
                    assert isinstance(what, Edge)
                    eip = what.eip
                    address = self.follow(what).address
                elif left == MISS:
                    eip = block.q[R8]
                    address = self.unit(eip, mode).address
                    self.table.set(eip, address)
                elif left == PREEMPTED:
                    address = cache.resume_at(block.q[RIP])
                else:
                    assert left == FAULT
                    return self._fault()
        except PageFault:
            return Stop("fetch", eip)
        return Stop("limit", eip)

    def _fault(self) -> Stop:
        fault = self.block.fault()
        eip = self.cache.eip_at(fault.rip)
        assert eip is not None
        if fault.vector != 14:
            return Stop("fault", eip, fault.vector)
        return Stop("fault", eip, 14, fault.address - self.window.base, fault.error & 2)

    def marks(self) -> list[tuple[int, list[Mark]]]:
        """Every unit, by its place in the cache, with the marks of its instructions."""
        return [(unit.eip, [piece.mark for piece in unit.pieces]) for unit in self.cache.units()]

    def close(self) -> None:
        self.block.close()
        self.window.close()
        self.table.close()
        self.cpu.close()
