# SPDX-License-Identifier: GPL-2.0-or-later
"""One silicon CPU with machine memory, and small machines on it, to test either monitor."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable

from tests import hw_modes
from vmm.bt.cache import Counters
from vmm.bt.engine import TranslationEngine
from vmm.clock import GuestClock
from vmm.machine import VirtualMachine
from vmm.memory.block import VmBlock, clone_block, free_block, new_block
from vmm.memory.errors import OutOfFrames
from vmm.memory.frames import FrameAllocator, FrameSource, LocalFrames
from vmm.memory.physical import GuestMemory
from vmm.memory.pool import Pool
from vmm.monitor import Stop, StopReason
from vmm.silicon import layout as at
from vmm.silicon import tsc
from vmm.silicon.cpu import Cpu
from vmm.state import MachineState

POOL = 160 << 20
MEMORY = 4 << 20
#: no test runs a guest for longer at a stretch
PATIENCE_NS = 20_000_000_000

Writes = Iterable[tuple[int, bytes | memoryview]]


class Refusing:
    """A FrameSource that has no frame at every `period`-th request."""

    def __init__(self, frames: FrameSource, period: int) -> None:
        self._frames = frames
        self.period = period
        self._asked = 0
        self.refused = 0

    def take(self) -> int:
        self._asked += 1
        if self._asked % self.period == 0:
            self.refused += 1
            raise OutOfFrames("refused")
        return self._frames.take()

    exchange = take

    def __len__(self) -> int:
        return len(self._frames)


def quiet(cpu: Cpu) -> None:
    """No stop that was meant for who ran before."""
    cpu.rest()
    cpu.forget_stop()


#: all machines since the rig was cleared
machines: list[Machine] = []
_engines: dict[Cpu, TranslationEngine] = {}


def engine_of(cpu: Cpu) -> TranslationEngine:
    """What translates code for the guests of a CPU that are under the software monitor."""
    if cpu not in _engines:
        _engines[cpu] = TranslationEngine(cpu.pool, cache_bytes=8 << 20, kicker=cpu.kicker)
    return _engines[cpu]


class Machine(VirtualMachine):
    """A machine that keeps what it prints, and whose memory tests can see."""

    def __init__(self, cpu: Cpu, block: VmBlock, frames: FrameSource, state: MachineState, khz: int) -> None:
        self.printed = bytearray()
        quiet(cpu)
        super().__init__(cpu, block, frames, state, self.printed.extend, khz, lambda: engine_of(cpu))
        machines.append(self)
        self.memory = GuestMemory(block.p2m, frames)

    @property
    def text(self) -> str:
        return self.printed.decode("latin1")

    def take_dropped(self) -> list[int]:
        """Frames of shares broken since the last call."""
        dropped, self.block.p2m.dropped = self.block.p2m.dropped, []
        return [frame for _, frame in dropped]

    def go(self, slice_ns: int = 10_000_000) -> Stop:
        """Run, slice after slice, over halts that a timer ends, until something else happens."""
        patience = time.monotonic_ns() + PATIENCE_NS
        while time.monotonic_ns() < patience:
            stop = self.run(time.monotonic_ns() + slice_ns)
            if stop.reason is StopReason.HALTED and self.next_wake() is not None:
                continue
            if stop.reason not in (StopReason.SLICE, StopReason.KICKED):
                return stop
        raise AssertionError(f"the guest goes on for ever; it printed {self.text[-200:]!r}")


class Rig:
    """The CPU, and what machines are made from.  `clear` takes all machines away again."""

    def __init__(self) -> None:
        self.pool = Pool(POOL)
        self.cpu = Cpu(self.pool)
        self.khz = tsc.measure_khz(5_000_000)
        self.allocator = FrameAllocator(self.pool)
        self.blocks: list[VmBlock] = []
        #: the monitor of machines that are made from now on
        self.monitor = "hw"

    def frames(self) -> LocalFrames:
        return LocalFrames(self.allocator)

    def block(self, memory_bytes: int = MEMORY) -> VmBlock:
        self.blocks.append(new_block(self.allocator, memory_bytes))
        return self.blocks[-1]

    def machine(self, state: MachineState, writes: Writes = (), frames: FrameSource | None = None,
                cpu: Cpu | None = None) -> Machine:
        """A new machine, with `writes` in its memory."""
        block = self.block(state.memory_bytes)
        memory = GuestMemory(block.p2m, self.frames())
        for gpa, data in writes:
            memory.write(gpa, data)
        state.monitor = self.monitor
        return Machine(cpu or self.cpu, block, frames or memory.frames, state, self.khz)

    def again(self, machine: Machine, state: MachineState, cpu: Cpu | None = None) -> Machine:
        """The machine of `state` over the memory of another one, which is not used any more."""
        machine.close()
        return Machine(cpu or self.cpu, machine.block, machine.frames, state, self.khz)

    def clone(self, machine: Machine, state: MachineState) -> Machine:
        """A second machine sharing the memory of a captured one."""
        self.blocks.append(clone_block(self.allocator, machine.block))
        return Machine(self.cpu, self.blocks[-1], self.frames(), state, self.khz)

    def clock(self) -> GuestClock:
        clock = GuestClock(self.khz, tsc.read)
        clock.start()
        return clock

    def translations(self) -> Counters:
        """What the translation cache counts."""
        return engine_of(self.cpu).counters

    def check(self) -> list[str]:
        return self.allocator.check([block.leaf() for block in self.blocks])

    def clear(self) -> None:
        self.cpu.evict()
        quiet(self.cpu)
        while machines:
            machines.pop().close()
        wrong = self.check()
        for block in self.blocks:
            free_block(self.allocator, block)
        self.blocks.clear()
        self.allocator.reclaim(0, [])
        # the frames go to other guests: what was translated from them must not
        self.cpu.invalidate(1, self.pool.frames - 1)
        assert not wrong, wrong


def halted(rig: Rig, setup: hw_modes.Setup) -> Machine:
    """Run to a HLT; registers are on the CPU."""
    machine = rig.machine(setup.state, setup.writes)
    assert machine.go() == Stop(StopReason.HALTED)
    return machine


def vector_of(machine: Machine) -> int | None:
    """Which handler halted, if one did."""
    where = machine.processor.q[at.RIP] - 1 - hw_modes.HANDLERS
    return where // 16 if 0 <= where < 4096 else None


def frame(machine: Machine, words: str) -> list[int]:
    form = struct.Struct("<" + words)
    return list(form.unpack(machine.memory.read(machine.processor.q[4], form.size)))
