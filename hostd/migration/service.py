# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations of this host: what users ask of them, and what other hosts do."""

from __future__ import annotations

import logging
import secrets
import socket
from collections.abc import Awaitable, Callable

import trio

from hostd.errors import Conflict, HostError, NotFound
from hostd.lifecycle import State, Trigger
from hostd.migration import evacuation, links, security
from hostd.migration.conversation import Conversation
from hostd.migration.departures import Departed
from hostd.migration.here import Here
from hostd.migration.links import Bandwidth
from hostd.migration.peers import Peer, certificate
from hostd.migration.progress import Progress
from hostd.migration.restarting import Restarting
from hostd.migration.source import Emigration
from hostd.migration.target import Target
from hostd.migration.totals import Totals
from hostd.migration.views import EvacuatedView, EvacuateRequest, MigrateRequest, MigrationView
from hostd.model import VmView
from hostd.operations import Operation, Operations
from hostd.vm import Vm

log = logging.getLogger(__name__)

#: migrations that are over are told of for as long as they are among the last of so many
REMEMBERED = 64
#: connections that come in, for each guest that may come in at a time: its own, those that ask about it, and
#: consoles
_CONNECTIONS = 24
#: states in which a VM has something to take along; a move between workers is over before it leaves
_MOVABLE = frozenset({State.RUNNING, State.PAUSED, State.MIGRATING})


class Migrations:
    """`host.migrations`."""

    def __init__(self, here: Here, operations: Operations, listener: socket.socket | None,
                 console: Callable[[Conversation], Awaitable[None]],
                 autostart: Callable[[Vm], object]) -> None:
        """`listener`: where other hosts call; `console` serves a console to one of them; `autostart` starts a
        VM."""
        self.totals = Totals()
        self._here = here
        self._operations = operations
        self._progress: list[Progress] = []
        #: guests on their way out, by name
        self._leaving: dict[str, Emigration] = {}
        self._bandwidth = Bandwidth(here.config().migration.bandwidth.bytes)
        self._target = Target(here, self._note, self.totals, console)
        self._restarting = Restarting(here, self._note, autostart)
        self._listener = listener

    # --- what users ask

    def migrate(self, name: str, request: MigrateRequest) -> Operation:
        """Have a guest go to another host.  Raises HostError for what is plainly wrong."""
        vm = self._vm(name)
        vm.check_home()
        if vm.state is not State.MIGRATING:         # a move between workers is over before this begins
            vm.check(Trigger.MOVE)
        self._here.admission.check_open()
        peer = self._peer(request)

        async def work(operation: Operation) -> MigrationView:
            progress = self._begin(vm, request, peer)
            operation.detail = progress.view
            return await self._carry_out(vm, request, peer, progress)

        return self._operations.start("migrate", name, work)

    def _peer(self, request: MigrateRequest | EvacuateRequest) -> Peer:
        config = self._here.config().migration
        self._bandwidth.rate = config.bandwidth.bytes
        limits = [self._bandwidth]
        if request.bandwidth is not None:
            limits.append(Bandwidth(request.bandwidth))
        return Peer(request.to, config, limits)

    def _begin(self, vm: Vm, request: MigrateRequest, peer: Peer) -> Progress:
        progress = Progress(secrets.token_hex(16), vm.name, "out", peer.name, request.mode)
        self._note(progress)
        return progress

    def _note(self, progress: Progress) -> None:
        over = [one for one in self._progress if one.over]
        for one in over[:max(0, len(over) - REMEMBERED + 1)]:
            self._progress.remove(one)
        self._progress.append(progress)

    async def _carry_out(self, vm: Vm, request: MigrateRequest, peer: Peer,
                         progress: Progress) -> MigrationView:
        emigration = Emigration(self._here, vm, request, peer, progress)
        try:
            if self._leaving.setdefault(vm.name, emigration) is not emigration:
                raise Conflict(f"VM {vm.name} is being migrated already: wait for that, or cancel it")
            await emigration.run()
        except BaseException as error:
            failed = isinstance(error, HostError)
            progress.end("failed" if failed else "cancelled", str(error) if failed else "")
            raise
        finally:
            if self._leaving.get(vm.name) is emigration:
                del self._leaving[vm.name]
            if not request.dry_run:
                self.totals.finished(progress.view())
                self._here.events.publish("vm.migrated", vm.name, to=peer.name, outcome=progress.phase,
                                          reason=progress.reason)
        return progress.view()

    def evacuate(self, request: EvacuateRequest) -> Operation:
        """Have all guests go that run or are paused.  Raises HostError for what is plainly wrong."""
        self._here.admission.check_open()
        peer = self._peer(request)
        single = evacuation.of_one(request)

        async def one(vm: Vm) -> None:
            await self._carry_out(vm, single, peer, self._begin(vm, single, peer))

        async def work(operation: Operation) -> EvacuatedView:
            vms = [vm for vm in self._here.guests.vms.values() if vm.state in _MOVABLE]
            return await evacuation.evacuate(vms, one, request.parallel, operation.step)

        return self._operations.start("evacuate", peer.name, work)

    async def recover(self, name: str) -> VmView:
        """A user says that a guest in doubt is this host's.  Raises Conflict for one that is not in doubt."""
        vm = self._vm(name)
        emigration = self._leaving.get(name)
        if emigration is not None and emigration.progress.phase == "in doubt":
            emigration.leaving.doubt.recover()
            while emigration.progress.phase == "in doubt":
                await vm.activity.wait()
        elif not await self._restarting.recover(vm):
            raise Conflict(f"VM {name} is this host's: there is nothing to recover")
        return vm.view()

    def list(self) -> list[MigrationView]:
        """Those under way, and the last that are over, oldest first."""
        return [progress.view() for progress in self._progress]

    def departed(self, name: str) -> Departed | None:
        """Where a guest went that was here, or all of it but memory."""
        vm = self._here.guests.vms.get(name)
        return self._here.departures.get(name) if vm is None or vm.state is State.MIGRATING else None

    def _vm(self, name: str) -> Vm:
        try:
            return self._here.guests.vms[name]
        except KeyError:
            gone = self.departed(name)
            raise NotFound(f"no VM {name}" + (f": it went to {gone.peer}" if gone else "")) from None

    # --- the daemon

    async def run(self) -> None:
        """Let guests come in, and settle what an earlier daemon left open, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._restarting.run)
            nursery.start_soon(self._here.farewells.run)
            if self._listener is not None:
                limit = self._here.config().migration.max_incoming * _CONNECTIONS
                await links.serve(self._listener, self._target.attend, self._tls, limit)

    def _tls(self) -> security.Tls | None:
        return certificate(self._here.config().migration)

    async def go_down(self) -> None:
        """Call off what can be called off, and wait for the rest as long as host.shutdown_timeout allows.
        What is in doubt then stays so for the next daemon; a guest that another host has, but not all of its
        memory, is lost."""
        leaving = list(self._leaving.values())
        for emigration in leaving:
            emigration.call_off()
        await self._target.go_down()
        with trio.move_on_after(self._here.config().host.shutdown_timeout):
            for emigration in leaving:
                await emigration.settled.wait()
        for emigration in leaving:
            emigration.abandon()
        for emigration in leaving:
            await emigration.settled.wait()
