# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest at one moment, while it goes on: what clones and snapshots are made of."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, NamedTuple

import trio

from hostd.errors import Conflict, HostError
from hostd.guests import Guests
from hostd.lifecycle import State, Trigger
from hostd.memory import MachineMemory
from hostd.vm import Vm
from hostd.workers import Worker

if TYPE_CHECKING:
    from vmm.memory.block import VmBlock

log = logging.getLogger(__name__)


class Copy(NamedTuple):
    """Memory that nobody writes, in a block that is no VM's, a MachineState, and how long the guest stood
    still for them."""

    block: VmBlock
    state: bytes
    pause_s: float


async def copy_guest(guests: Guests, memory: MachineMemory, vm: Vm) -> Copy:
    """The guest as it is at this moment; a running one stands still for that.  The caller holds its lock, and
    gives the block to a VM, or to `Guests.free_copy`.

    Raises Conflict for a guest that is neither running nor paused, or whose memory is not all here.
    """
    if vm.state not in (State.RUNNING, State.PAUSED):
        raise Conflict(f"VM {vm.name} is {vm.state}: it must be paused or running")
    vm.check_whole()
    worker = vm.worker
    parked = await guests.park(vm) if vm.state is State.RUNNING else None
    assert vm.block is not None
    state = vm.parked
    try:
        block = memory.books.clone(vm.block)
    finally:
        if parked is not None:
            await _go_on(guests, vm, worker)
    pause_ns = 0 if parked is None else time.monotonic_ns() - parked.at_ns
    return Copy(block, state, pause_ns / 1e9)


async def _go_on(guests: Guests, vm: Vm, worker: Worker | None) -> None:
    """Have the worker go on with a guest that was copied since it gave it back, or else another one.  Should
    it not come to that, the copy is none the worse for it."""
    with trio.CancelScope(shield=True):
        try:
            await guests.hand_over(vm, vm.parked, Trigger.RESUME, target=worker, unchanged=True)
        except HostError as error:
            log.error("guest does not go on", extra={"vm": vm.name, "why": str(error)})
