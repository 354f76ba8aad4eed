# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest changes its monitor where it stands: hardware-assisted or by binary translation, back and forth.

Both monitors start from, and leave behind, the same MachineState, show the same CPU and run over the same
P2M.  So the worker gives the guest back and takes it again under the other monitor; its clock goes on.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec
import trio

from hostd.definition import Definition
from hostd.errors import Conflict, Failed
from hostd.guests import Guests, Step
from hostd.inventory import Inventory
from hostd.leases import NotTaken
from hostd.lifecycle import State, Trigger
from hostd.migration.views import SwitchedView
from hostd.vm import Vm
from vmm.state import StateError, decode, encode

if TYPE_CHECKING:
    from hostd.model import Monitor


class Switcher:
    """Changes the monitor of guests."""

    def __init__(self, guests: Guests, inventory: Inventory) -> None:
        self._guests = guests
        self._inventory = inventory

    async def switch(self, vm: Vm, monitor: Monitor, step: Step) -> SwitchedView:
        """Have `monitor` run the guest from here on, and whenever it is started.

        Raises Conflict for a guest that neither runs nor is paused, Failed if the monitor does not take it:
        it goes on as before then.
        """
        async with self._guests.changing(vm):
            if vm.state not in (State.RUNNING, State.PAUSED):
                raise Conflict(f"VM {vm.name} is {vm.state}: it must be running or paused to change its "
                               "monitor")
            before = vm.definition
            if monitor == before.vmm:
                return SwitchedView(monitor, 0.0)
            # Invariant: the definition is on disk before the guest runs under the monitor it names
            step("writing the definition", 0.2)
            with trio.CancelScope(shield=True):
                await self._define(vm, msgspec.structs.replace(before, vmm=monitor))
                try:
                    step("changing the monitor", 0.6)
                    pause_s = await self._change(vm, monitor)
                except BaseException as error:
                    await self._define(vm, before)
                    if isinstance(error, NotTaken):
                        raise Failed(f"VM {vm.name} goes on as before: {error}") from None
                    raise
            return SwitchedView(monitor, pause_s)

    async def _define(self, vm: Vm, definition: Definition) -> None:
        await trio.to_thread.run_sync(self._inventory.save, [definition])
        vm.definition = definition

    async def _change(self, vm: Vm, monitor: str) -> float:
        """For how many seconds the guest stood still.  Raises NotTaken if it goes on as before."""
        if vm.state is State.PAUSED:
            vm.parked = _under(monitor, vm.parked)
            return 0.0
        guests, worker = self._guests, vm.worker
        vm.follow(Trigger.MOVE)
        released = await guests.leases.release(vm)
        try:
            await guests.go_on(vm, released, worker, _under(monitor, released.state))
        except NotTaken:
            await guests.go_on(vm, released, worker)
            raise
        return (time.monotonic_ns() - released.at_ns) / 1e9


def _under(monitor: str, parked: bytes) -> bytes:
    """The same state, for a monitor to start from.  Raises NotTaken if there is something wrong with it."""
    try:
        state = decode(parked)
    except StateError as error:
        raise NotTaken(f"its state cannot be read: {error}") from None
    state.monitor = monitor
    return encode(state)
