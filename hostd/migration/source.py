# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest leaves: offered to the other host, copied while it runs, handed over (hostd/migration/leaving.py).

What goes wrong before it is handed over, a cancellation too, ends with the guest running on here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress

import msgspec
import trio

from hostd.errors import Conflict, HostError, TimedOut
from hostd.lifecycle import State, Trigger
from hostd.migration import belongings, capabilities, precopy
from hostd.migration.conversation import Conversation
from hostd.migration.copying import Copying
from hostd.migration.dirty import DirtyLog
from hostd.migration.here import Here
from hostd.migration.leaving import Leaving
from hostd.migration.memory_out import OutgoingMemory
from hostd.migration.messages import PIECE, Accept, BlobPiece, Join, Joined, Offer
from hostd.migration.peers import Peer
from hostd.migration.progress import Progress
from hostd.migration.views import MigrateRequest
from hostd.vm import Vm
from vmm.state import STATE_VERSION

#: handing over an idle guest takes so long beside the time that words travel: stopping it, loading its state,
#: writing a record (measured)
OVERHEAD_S = 0.012
#: how long it is waited for that the other host hears of a cancellation
_PARTING_S = 1.0


class Emigration:
    """One guest's way out."""

    def __init__(self, here: Here, vm: Vm, request: MigrateRequest, peer: Peer, progress: Progress) -> None:
        self.progress = progress
        self.leaving = Leaving(here, vm, peer, progress)
        #: it is over, or nothing but the other host's answer is of any effect
        self.settled = trio.Event()
        self._here = here
        self._vm = vm
        self._request = request
        self._peer = peer
        config = here.config().migration
        self._connections = request.connections or config.connections
        self._downtime_s = (request.downtime_ms or config.downtime_ms) / 1e3
        self._patience = trio.CancelScope()
        #: by a host that shuts down; and then with the guest elsewhere, or perhaps
        self._called_off = self._abandoned = False

    async def run(self) -> None:
        """Raises HostError if the guest is still here, or was never to go."""
        if self._request.timeout is not None:
            self._patience.deadline = trio.current_time() + self._request.timeout
        try:
            # Invariant: once Commit was said the inner scope is shielded, up to its end, where the guest is
            # either gone or here: who calls it off later than that is not told that it came of it
            with self._patience, self.leaving.scope:
                async with self._here.guests.changing(self._vm):
                    self._vm.check(Trigger.MOVE)
                    self._vm.check_whole()
                    with self._not_at_home():
                        await self._migrate()
                return
        finally:
            self.settled.set()
        raise self._why_called_off()

    def _why_called_off(self) -> HostError:
        name = self._vm.name
        if self._abandoned:
            return Conflict(f"the host is shutting down while VM {name} is handed over to {self._peer.name}: "
                            "once it is back it asks whether that has it")
        if self._called_off or self._request.timeout is None:
            return Conflict(f"VM {name} was not handed over: the host is shutting down")
        return TimedOut(f"VM {name} was not handed over within {self._request.timeout:g} seconds: "
                        "it runs on here")

    @contextmanager
    def _not_at_home(self) -> Iterator[None]:
        """Tell whoever else wants to change the VM that they cannot."""
        vm = self._vm
        vm.away = f"VM {vm.name} is being migrated to {self._peer.name}: wait for that, or cancel it"
        try:
            yield
        finally:
            vm.away = ""

    async def _migrate(self) -> None:
        async with self._peer.open("migrate") as talk:
            self.progress.phase = "offering"
            accept = await self._offer(talk)
            if self._request.dry_run:
                self.progress.end("done")
                return
            try:
                await self._send_blobs(talk, accept)
                async with self._joined(talk, accept.connections) as talks:
                    await self._copy(talks, accept.dedup)
            except BaseException as error:
                await self._part(talk, error)
                raise

    async def _part(self, talk: Conversation, error: BaseException) -> None:
        """Tell the other host that nothing will come of it, if it does not know."""
        reason = str(error) if isinstance(error, HostError) else "it was called off"
        with trio.move_on_after(_PARTING_S, shield=True), suppress(HostError):
            await talk.give_up(reason)

    def call_off(self) -> None:
        """The host goes down: what can be called off is."""
        self._called_off = True
        self._patience.cancel()

    def abandon(self) -> None:
        """It is down, and has called off what could be: what is in doubt, or elsewhere, stays so."""
        self._abandoned = self.leaving.scope.shield
        self.leaving.scope.shield = False

    # --- what goes before memory

    async def _offer(self, talk: Conversation) -> Accept:
        here, vm = self._here, self._vm
        vm.check(Trigger.MOVE)                      # it may have ended while the other host was called
        portable = belongings.pack(vm.definition, here.images)
        monitor = self._request.vmm or vm.definition.vmm
        definition = msgspec.structs.replace(portable.definition, vmm=monitor)
        assert vm.block is not None
        self._memory = OutgoingMemory(vm.block)
        self._definition = definition
        await talk.send(Offer(
            token=self.progress.token, name=vm.name, definition=msgspec.json.encode(definition),
            memory_bytes=definition.memory, monitor=monitor, state_version=STATE_VERSION,
            cpu=capabilities.shown(vm.definition.vmm), tsc_khz=here.tsc_khz(),
            resident_pages=len(self._memory.resident()),
            blobs=[(sha256, here.images.blob_size(sha256)) for sha256 in belongings.blobs_of(definition)],
            image=None if portable.image is None else portable.image.encode(),
            connections=self._connections, siblings=self._siblings(), dry_run=self._request.dry_run))
        return await talk.expect(Accept)

    def _siblings(self) -> int:
        """VMs that were booted from the same files, and have memory: it is likely that they follow."""
        family = belongings.family(self._vm.definition)
        return sum(vm.block is not None and belongings.family(vm.definition) == family
                   for vm in self._here.guests.vms.values()) - 1

    async def _send_blobs(self, talk: Conversation, accept: Accept) -> None:
        for sha256 in accept.missing_blobs:
            data = await trio.to_thread.run_sync(self._here.images.read_blob, sha256)
            for offset in range(0, len(data), PIECE):
                await talk.send(BlobPiece(sha256, offset, data[offset:offset + PIECE]))

    @asynccontextmanager
    async def _joined(self, first: Conversation, connections: int) -> AsyncIterator[list[Conversation]]:
        """As many connections as were agreed on."""
        async with AsyncExitStack() as stack:
            talks = [first]
            for index in range(1, connections):
                talk = await stack.enter_async_context(self._peer.open("join"))
                await talk.send(Join(self.progress.token, index))
                await talk.expect(Joined)
                talks.append(talk)
            yield talks

    # --- memory

    async def _copy(self, talks: list[Conversation], dedup: bool) -> None:
        """Pages while the guest runs, and then the guest."""
        self.progress.phase = "copying"
        copying = Copying(talks, self._memory, self.progress)
        written = DirtyLog(self._here.guests, self._vm)
        try:
            await written.start()
            left, later = self._memory.resident(), True
            if self._request.mode != "postcopy" or self._vm.state is State.PAUSED:
                overhead_s = OVERHEAD_S + 2 * talks[0].rtt_ns / 1e9
                plan = precopy.Plan(self._request.mode, self._downtime_s, overhead_s,
                                    talks[0].agreed("postcopy"), dedup)
                left, later = await precopy.copy(self._here.guests, self._vm, copying, written, left, plan,
                                                 self.progress)
            # what follows is over soon, or not to be given up
            await self.leaving.run(talks, copying, written, left, later, self._definition)
        finally:
            with trio.CancelScope(shield=True):
                self._here.guests.throttle(self._vm, None)
                await written.stop()
