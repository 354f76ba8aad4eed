# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a machine state can be loaded: tried on a board of its own, before anybody depends on it."""

from __future__ import annotations

import os
import time

from vmm.clock import GuestClock
from vmm.devices.board import Board
from vmm.memory.block import VmBlock
from vmm.memory.dma import DeviceMemory, GivenBack
from vmm.memory.frames import Magazine
from vmm.silicon import states, tsc
from vmm.state import MachineState, StateError, decode


def check(data: bytes, block: VmBlock, monitor: str, tsc_khz: int) -> MachineState:
    """The state in `data`, which fits the memory in `block` and `monitor`, and whose CPU and devices load.

    Raises StateError.  Nothing in the block changes.
    """
    state = decode(data)
    if state.memory_bytes != block.memory_bytes:
        raise StateError(f"a machine state for {state.memory_bytes} bytes of memory, and there are "
                         f"{block.memory_bytes}")
    if state.monitor != monitor:
        raise StateError(f"a machine state of monitor {state.monitor}, and {monitor} is to run it")
    states.check(state.cpu)
    clock = GuestClock(tsc_khz, tsc.read, state.time_ns, state.cpu.tsc)
    board = Board(clock.now, time.time, clock.tsc, clock.tsc_to_ns, _ignore, _nothing, _nothing, _ignore,
                  state.memory_bytes, DeviceMemory(block.p2m, Magazine()), GivenBack(block.p2m), os.urandom)
    if state.devices:
        board.load(state.devices)
    return state


def _ignore(value: object) -> None:
    pass


def _nothing() -> None:
    pass
