# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests come up with the host and go down with it: started and powered off, or suspended and resumed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from hostd.config import Config
from hostd.errors import HostError
from hostd.guests import Guests
from hostd.inventory import Inventory
from hostd.lifecycle import AT_REST, Trigger
from hostd.vm import Vm

if TYPE_CHECKING:
    from hostd.resuming import Resumer
    from hostd.suspending import Suspender

log = logging.getLogger(__name__)


class Powering:
    """`config`, `suspender` and `resumer` are asked for when they are needed; `start` starts a VM at rest in
    the background."""

    def __init__(self, config: Callable[[], Config], guests: Guests, inventory: Inventory,
                 suspender: Callable[[], Suspender], resumer: Callable[[], Resumer],
                 start: Callable[[Vm], object]) -> None:
        self._config = config
        self._guests = guests
        self._suspender = suspender
        self._resumer = resumer
        self._start = start
        suspended = inventory.suspended()
        #: VMs that were suspended with the host, which nobody else is to start; None: it was not
        self._suspended = None if suspended is None else [
            vm for name, vm in guests.vms.items() if name in suspended]
        for vm in self._suspended or ():
            vm.follow(Trigger.START, "the host was suspended")
        for name in sorted(inventory.lost() & guests.vms.keys()):
            guests.vms[name].reason = "lost: the daemon ended while it resumed the host"
            log.error("guest lost: an earlier daemon ended while it resumed the host", extra={"vm": name})
        #: they are back, or will not come
        self._resumed = trio.Event()

    async def come_up(self) -> None:
        """Have those guests run that are to run when the host does."""
        try:
            if self._suspended is not None:
                await self._resumer().resume(self._suspended)
        finally:
            self._resumed.set()
        for vm in list(self._guests.vms.values()):
            if vm.definition.autostart and vm.state in AT_REST and not self._guests.closing:
                self._start(vm)

    async def go_down(self, alive: Callable[[], None]) -> None:
        """Stop all guests, by the power button as long as host.shutdown_timeout allows, or suspend them if
        host.on_shutdown says so: `alive` is called then, in any thread, for as long as that gets on."""
        self._guests.closing = True
        config = self._config().host
        suspended: set[str] = set()
        if config.on_shutdown == "suspend":
            await self._resumed.wait()
            for vm in self._guests.vms.values():
                self._guests.give_up_start(vm)
            suspended = await self._suspender().suspend(alive)
        async with trio.open_nursery() as nursery:
            for vm in list(self._guests.vms.values()):
                self._guests.give_up_start(vm)
                if vm.state not in AT_REST and vm.name not in suspended:
                    nursery.start_soon(self._stop_for_good, vm, config.shutdown_timeout)

    async def _stop_for_good(self, vm: Vm, timeout: float) -> None:
        try:
            await self._guests.stop(vm, force=False, timeout=timeout)
        except HostError as error:
            log.warning("guest not stopped", extra={"vm": vm.name, "why": str(error)})
