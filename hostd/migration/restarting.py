# SPDX-License-Identifier: GPL-2.0-or-later
"""What an earlier daemon left open of hand-overs, settled by this one.

A guest that was being handed over has ended with the daemon; what is open is whose VM it is now.  Until that
is known nobody may start it here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from hostd.errors import HostError
from hostd.migration.doubt import Doubt
from hostd.migration.handover import FOLLOWS, Next, Record, Word
from hostd.migration.here import Here
from hostd.migration.peers import Peer
from hostd.migration.progress import Progress
from hostd.vm import Vm

log = logging.getLogger(__name__)


class Restarting:
    """Made before the first guest is started."""

    def __init__(self, here: Here, note: Callable[[Progress], None],
                 autostart: Callable[[Vm], object]) -> None:
        """`note` is told of each hand-over that is in doubt.  `autostart` starts a VM that is this host's
        after all, if it is to run when the host does."""
        self._here = here
        self._note = note
        self._autostart = autostart
        # Invariant: only what an earlier daemon left; this one's own records come and go from now on
        self._fenced, self._unkept = here.handovers.fenced(), here.handovers.unkept()
        self._doubts = {record.vm: Doubt(record.token) for record in self._fenced}
        for record in self._fenced:
            vm = here.guests.vms.get(record.vm)
            if vm is not None:
                vm.away = vm.reason = here.handovers.doubt_sentence(record.token)
        for record in self._unkept:
            if record.definition is not None and record.vm not in here.guests.vms:
                here.guests.add(Vm(record.definition, here.events))

    async def run(self) -> None:
        """Until all is settled."""
        async with trio.open_nursery() as nursery:
            for record in self._unkept:
                nursery.start_soon(self._keep, record)
            for record in self._fenced:
                nursery.start_soon(self._settle, record, self._doubts[record.vm])

    async def recover(self, vm: Vm) -> bool:
        """A user says that the VM is this host's; whether that was open."""
        doubt = self._doubts.get(vm.name)
        if doubt is None:
            return False
        doubt.recover()
        while self._doubts.get(vm.name) is doubt:
            await vm.activity.wait()
        return True

    async def _keep(self, record: Record) -> None:
        """A guest that came here, and ended before its definition was in the inventory."""
        vm = self._here.guests.vms.get(record.vm)
        try:
            if vm is not None:
                await trio.to_thread.run_sync(self._here.inventory.save, [vm.definition])
            await trio.to_thread.run_sync(self._here.handovers.kept, record.token)
        except HostError as error:
            log.error("definition not written: the record stands for it",
                      extra={"vm": record.vm, "why": str(error)})

    async def _settle(self, record: Record, doubt: Doubt) -> None:
        here, vm, peer = self._here, self._here.guests.vms.get(record.vm), None
        progress = Progress(record.token, record.vm, "out", record.peer, phase="in doubt")
        self._note(progress)
        try:
            peer = Peer(record.peer, here.config().migration)
            committed = await doubt.resolve(peer)
            word: Word = "reclaimed" if doubt.recovered else "committed" if committed else "aborted"
            follows: Next = FOLLOWS["restarted", word]
            if follows == "depart":
                await trio.to_thread.run_sync(here.inventory.remove, record.vm)
                if vm is not None:
                    here.departures.add(vm.name, record.peer, record.token)
                    here.guests.forget(vm)
            await trio.to_thread.run_sync(here.handovers.forget, record.token)
            progress.end("done" if follows == "depart" else "failed", "an earlier hostd ended during it")
            log.info("hand-over settled", extra={"vm": record.vm, "peer": record.peer, "outcome": follows})
        except HostError as error:
            progress.end("failed", str(error))
            log.error("hand-over not settled", extra={"vm": record.vm, "why": str(error)})
            return
        finally:
            del self._doubts[record.vm]
            if vm is not None:
                vm.activity.notify()
        if follows == "depart":
            here.farewells.owe(peer, record.token)
        elif vm is not None:
            vm.away, vm.reason = "", "it ended with an earlier hostd, while it was being handed over"
            if vm.definition.autostart:
                self._autostart(vm)
