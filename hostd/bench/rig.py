# SPDX-License-Identifier: GPL-2.0-or-later
"""A CPU and machine memory in this process: a worker without its daemon, for measuring."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from hostd.model import BtCpu
from hostd.scheduler.runqueue import LONE_TURN_NS
from hostd.translator import Translator
from vmm.boot.layout import Write
from vmm.machine import VirtualMachine
from vmm.memory.block import VmBlock, clone_block, free_block, new_block
from vmm.memory.frames import FrameAllocator, LocalFrames
from vmm.memory.physical import GuestMemory
from vmm.memory.pool import Pool
from vmm.monitor import Stop, StopReason
from vmm.silicon import tsc
from vmm.silicon.cpu import Cpu
from vmm.state import CpuState, MachineState

#: the length of a turn in a worker, for a guest that nobody competes with
SLICE_NS = LONE_TURN_NS
#: in all its time a rig hands out more frames than it has
_NO_LIMIT = 1 << 62


def _silent(data: bytes) -> None:
    """A console nobody looks at."""


class Rig:
    """Machines come and go; what they leave in memory or in the CPU does not reach the next."""

    def __init__(self, memory_bytes: int, bt_cpu: BtCpu = "native") -> None:
        self.pool = Pool(memory_bytes)
        self.allocator = FrameAllocator(self.pool)
        self.frames = LocalFrames(self.allocator, _NO_LIMIT)
        self.cpu = Cpu(self.pool)
        self.translator = Translator(self.pool, self.cpu.kicker, bt_cpu)
        self.tsc_khz = tsc.measure_khz()

    def block(self, memory_bytes: int, writes: Iterable[Write]) -> VmBlock:
        """The memory of a guest, filled."""
        block = new_block(self.allocator, memory_bytes)
        memory = GuestMemory(block.p2m, self.frames)
        for gpa, data in writes:
            memory.write(gpa, data)
        return block

    def clone(self, block: VmBlock) -> VmBlock:
        """A second guest with the same memory."""
        return clone_block(self.allocator, block)

    def free(self, block: VmBlock) -> None:
        """A guest's memory is not needed any more, and what was translated from it is forgotten."""
        self.allocator.drop(frame for _, frame in block.p2m.dropped)
        free_block(self.allocator, block)
        self.cpu.invalidate(0, self.pool.frames)

    @contextmanager
    def machine(self, block: VmBlock, cpu: CpuState,
                console: Callable[[bytes], None] = _silent, vmm: str = "hw") -> Iterator[VirtualMachine]:
        """The guest on this CPU, under the monitor `vmm`; its memory goes with it."""
        state = MachineState(memory_bytes=block.memory_bytes, cpu=cpu, monitor=vmm)
        machine = VirtualMachine(self.cpu, block, self.frames, state, console, self.tsc_khz,
                                 self.translator.engine)
        try:
            yield machine
        finally:
            machine.pause_clock()
            machine.close()
            self.cpu.rest()
            self.free(block)

    def close(self) -> None:
        self.translator.close()
        self.cpu.close()


@contextmanager
def rig(memory_bytes: int, bt_cpu: BtCpu = "native") -> Iterator[Rig]:
    """A rig whose guests have at most `memory_bytes` together, tables and all; `bt_cpu` executes what is
    translated of them."""
    made = Rig(memory_bytes, bt_cpu)
    try:
        yield made
    finally:
        made.close()


def run_to_end(machine: VirtualMachine) -> Stop:
    """Run a guest that never sleeps, in turns as a worker gives them, until it ends."""
    while True:
        stop = machine.run(time.monotonic_ns() + SLICE_NS)
        if stop.reason not in (StopReason.SLICE, StopReason.KICKED):
            return stop
