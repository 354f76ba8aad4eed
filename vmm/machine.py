# SPDX-License-Identifier: GPL-2.0-or-later
"""A virtual machine: memory, board, clock, and a processor under one of the monitors."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmm.clock import GuestClock
from vmm.devices.board import Board
from vmm.devices.timers import NEVER
from vmm.devices.virtio.balloon import Balloon
from vmm.hw.processor import Processor
from vmm.memory.block import VmBlock
from vmm.memory.dma import DeviceMemory, GivenBack
from vmm.memory.errors import OutOfFrames
from vmm.memory.frames import FrameSource
from vmm.monitor import Stop, StopReason
from vmm.silicon import tsc
from vmm.silicon.cpu import Cpu
from vmm.state import MachineState, StateError

if TYPE_CHECKING:
    from vmm.bt.engine import TranslationEngine
    from vmm.bt.processor import TranslatingProcessor


class VirtualMachine:
    """One guest on the CPU of this process, built from a state over the memory in its block.

    `console` gets what the guest prints.  The clock stands still until `resume_clock`.  `engine` is asked for
    where the state says that the software monitor runs the guest; then `close` must be called in the end.
    Raises StateError for a state the devices refuse.
    """

    def __init__(self, cpu: Cpu, block: VmBlock, frames: FrameSource, state: MachineState,
                 console: Callable[[bytes], None], tsc_khz: int,
                 engine: Callable[[], TranslationEngine] | None = None) -> None:
        self.block = block
        self.frames = frames
        #: why a page of the guest cannot be had any more, if that happened
        self.lost = ""
        self.clock = GuestClock(tsc_khz, tsc.read, state.time_ns, state.cpu.tsc)
        self.board = Board(self.clock.now, time.time, self.clock.tsc, self.clock.tsc_to_ns, console,
                           self._on_reset, self._on_poweroff, self._on_debug_exit, state.memory_bytes,
                           DeviceMemory(block.p2m, frames), GivenBack(block.p2m), os.urandom)
        if state.devices:
            self.board.load(state.devices)
        self.monitor = state.monitor
        self.processor: Processor
        self._translating: TranslatingProcessor | None = None
        if state.monitor == "bt":
            if engine is None:
                raise StateError("a guest of the software monitor, and no engine to translate its code")
            from vmm.bt.processor import TranslatingProcessor  # guests of hw do not pay for it

            self._translating = TranslatingProcessor(cpu, block, frames, self.board, self.clock, state.cpu,
                                                     engine())
            self.processor = self._translating
        elif state.monitor == "hw":
            self.processor = Processor(cpu, block, frames, self.board, self.clock, state.cpu)
        else:
            raise StateError(f"a guest of monitor {state.monitor!r}: there are hw and bt")

    # -- running -----------------------------------------------------------------------------------

    def run(self, deadline_ns: int) -> Stop:
        """Run until CLOCK_MONOTONIC `deadline_ns` at the latest; says why it returned."""
        self.resume_clock()
        before = self._pages_counted()
        stop = self.processor.run(deadline_ns)
        if self.lost:
            stop = Stop(StopReason.CRASHED, self.lost)
        self.board.uart.flush()
        accounting = self.block.accounting
        for name, count in self._pages_counted().items():
            if count != before[name]:
                setattr(accounting, name, getattr(accounting, name) + count - before[name])
        return stop

    def _pages_counted(self) -> dict[str, int]:
        """What happened to pages while the guest ran here or before, by the names of its accounts."""
        return {"cow_breaks": self.block.p2m.cow_breaks, **self.balloon.counters}

    def next_wake(self) -> int | None:
        """CLOCK_MONOTONIC ns at which a halted guest has something to do; None: only input wakes it."""
        deadline = self.board.timers.next
        return None if deadline >= NEVER else self.clock.host_ns(deadline)

    def wake_pending(self) -> bool:
        """Whether a halted guest would wake now (HLT with IF clear waits for an NMI alone), or has to be run
        because a device of it waits to be served."""
        return self.board.virtio.waiting or self.processor.wakes()

    @property
    def balloon(self) -> Balloon:
        """What takes memory from the guest and gives it back."""
        return self.board.balloon

    @property
    def halted(self) -> bool:
        """Whether the guest waits in HLT."""
        return self.processor.halted

    def feed(self, data: bytes) -> None:
        """Console input."""
        self.board.uart.feed(data)

    def power_button(self) -> None:
        """Ask the guest's operating system to power off."""
        self.board.acpi.power_button()

    def add_steal(self, ns: int) -> None:
        """Tell the guest of time it wanted to run and did not."""
        if ns > 0:
            try:
                self.processor.add_steal(ns)
            except OutOfFrames:
                return      # said next time, with a frame in stock
        self.block.accounting.steal_ns += ns

    def leave_cpu(self) -> None:
        """Off the CPU, before somebody else changes what its pages map to."""
        self.processor.evict()

    # -- state -------------------------------------------------------------------------------------

    def pause_clock(self) -> None:
        """Guest time stands still from now on."""
        self.processor.evict()
        self.clock.stop()

    def resume_clock(self, since_ns: int = 0) -> None:
        """Guest time goes on.  `since_ns`: as if it had at this CLOCK_MONOTONIC."""
        if not self.clock.running:
            self.processor.evict()
            self.clock.start(since_ns)
            self.processor.sync_clock()

    def capture(self) -> MachineState:
        """Everything but the memory; the clock stands still afterwards."""
        self.pause_clock()
        return MachineState(memory_bytes=self.block.memory_bytes, cpu=self.processor.capture(),
                            time_ns=self.clock.now(), devices=self.board.save(), monitor=self.monitor)

    def close(self) -> None:
        """The guest is not here any more; more than once does no harm."""
        if self._translating is not None:
            self._translating.close()

    def translations(self, address: int | None = None, most: int = 200) -> str:
        """The translation units of a guest's code as a listing, or those with `address` in them."""
        if self._translating is None:
            raise ValueError("the guest runs under the hardware-assisted monitor: nothing is translated")
        return self._translating.listing(address, most)

    # -- ends --------------------------------------------------------------------------------------

    def _end(self, stop: Stop) -> None:
        self.processor.verdict = stop
        self.processor.cpu.stop()

    def _on_reset(self) -> None:
        self._end(Stop(StopReason.RESET, "reset requested by the guest"))

    def _on_poweroff(self) -> None:
        self._end(Stop(StopReason.POWEROFF, "powered off by the guest"))

    def _on_debug_exit(self, status: int) -> None:
        self._end(Stop(StopReason.EXIT, f"wrote {status} to the debug-exit port", status))
