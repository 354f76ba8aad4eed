# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest arrives: its memory is filled, its state tried, and at the word Commit it is this host's and runs.

Invariant: until its record is written nobody here knows of the guest, and whatever happens leaves nothing of
it; from then on it is this host's, whatever happens (docs/MIGRATION.md, the commit protocol).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec
import numpy as np
import trio

from hostd.definition import Definition
from hostd.errors import Conflict, Failed, HostError
from hostd.lifecycle import State, Trigger
from hostd.migration.fetching import Fetching
from hostd.migration.here import Here
from hostd.migration.index import ContentIndex
from hostd.migration.memory_in import IncomingMemory
from hostd.migration.messages import Commit, Final, Missing
from hostd.migration.pages import decode_digests, pack_bits, unpack_bitmap
from hostd.migration.progress import Progress
from hostd.migration.wire import ProtocolError
from hostd.protocol import MAX_STATE, Input
from hostd.saved import SavedVm
from hostd.storage import Prepared
from hostd.vm import Signal, Vm
from vmm import loadable
from vmm.memory.block import VmBlock

log = logging.getLogger(__name__)

Stage = Literal["copying", "ready", "committing", "committed", "over"]


class Arrival:
    """One guest.  Its `block` is its own until it is committed: `drop` gives it back."""

    def __init__(self, here: Here, token: str, definition: Definition, index: ContentIndex, share: bool,
                 connections: int, progress: Progress) -> None:
        """Raises Failed when there is no memory for it."""
        self.token = token
        self.definition = definition
        self.progress = progress
        self.stage: Stage = "copying"
        #: what goes on on the first connection: cancelled when nothing can come of it any more
        self.scope = trio.CancelScope()
        #: why, then
        self.broken = ""
        self.fetching: Fetching | None = None
        self._here = here
        self._index = index
        self._connections = connections
        self._block: VmBlock | None = here.memory.books.new(definition.memory)
        self._memory = IncomingMemory(here.memory, self._block, share)
        #: connections that have ended each round, and what the others wait for
        self._ended: Counter[int] = Counter()
        self._changed = trio.Event()
        self._final: tuple[Final, SavedVm] | None = None
        #: when that was
        self._ready_ns = 0
        #: its definition, to be in the inventory
        self._prepared: Prepared | None = None
        #: batches that are being installed, and who waits for the last of them
        self._installing = 0
        self._idle = Signal()
        #: Commit has been carried out, or was not to be
        self.settled = trio.Event()

    async def prepare(self, peer: str) -> None:
        """Put on the disk what `commit` needs there: the guest stands still then, and a disk that is full is
        one for which it stays where it is.  Raises Failed."""
        here = self._here
        await trio.to_thread.run_sync(here.handovers.prepare, self.token, self.definition, peer)
        self._prepared = await trio.to_thread.run_sync(here.inventory.prepare, self.definition)

    def break_off(self, why: str) -> None:
        """Nothing will come of it."""
        if self.stage in ("copying", "ready"):
            self.stage, self.broken = "over", why
            self.scope.cancel()
            self._changed.set()

    async def drop(self) -> None:
        """Give its memory back, if nobody else has it.  Not to be cancelled."""
        # Invariant: other connections may still be at it, and the frames are nobody else's until they are not
        while self._installing:
            await self._idle.wait()
        if self._prepared is not None:
            self._prepared.discard()
        if self._block is not None:
            self._memory.close()
            block, self._block = self._block, None
            self._here.guests.free_copy(block)

    # --- memory

    async def pages(self, payload: bytes) -> None:
        """A batch of pages.  Raises ProtocolError, Conflict when nothing comes of the guest, and Failed when
        memory is short and stays so."""
        self._check_copying()
        self._installing += 1
        try:
            self.progress.count(await self._memory.install(payload))
        finally:
            self._installing -= 1
            self._idle.notify()

    def _check_copying(self) -> None:
        if self.stage == "over":
            raise Conflict(self.broken)
        if self.stage != "copying":
            raise ProtocolError("pages came after the last of them")

    async def digests(self, seq: int, payload: bytes) -> Missing:
        """Take the contents of those pages that this host has; the answer says which it lacks."""
        pages, digests = decode_digests(payload, len(self._memory.known))
        if self._memory.known[pages].any():
            raise ProtocolError("digests came of pages that have come already")
        frames = await self._index.find(digests)
        found = frames != 0
        self._memory.share_with(pages[found], frames[found])
        self.progress.pages["deduplicated"] += int(np.count_nonzero(found))
        return Missing(seq, pack_bits(~found))

    async def end_round(self, number: int) -> None:
        """A connection has ended this round: wait until all have."""
        self._ended[number] += 1
        self.progress.round = number
        if self._ended[number] == self._connections:
            changed, self._changed = self._changed, trio.Event()
            changed.set()
        while self._ended[number] < self._connections:
            self._check_copying()
            await self._changed.wait()
        self._memory.share = False

    # --- the guest

    async def finish(self, final: Final) -> None:
        """All that is needed to run it is here.  Raises ProtocolError, Failed."""
        block = self._block
        assert block is not None
        if self._installing:
            raise ProtocolError("the guest came while pages of it were still coming")
        self.stage = "ready"
        try:
            saved = msgspec.json.decode(final.life, type=SavedVm)
            loadable.check(final.state, block, self.definition.vmm, self._here.tsc_khz())
        except (ValueError, RecursionError) as error:       # of JSON, of UTF-8, or a StateError
            raise Failed(f"its state cannot be loaded here: {error}") from None
        if saved.life is None or saved.life.paused != final.paused:
            raise ProtocolError("a guest came that is not in the middle of its life")
        if len(final.state) > MAX_STATE:
            raise Failed("its state is too large for a worker")
        if final.ballooned:
            block.mark_ballooned(unpack_bitmap(final.ballooned, block.pages))
        if final.pages_left:
            left = unpack_bitmap(final.left, block.pages)
            if len(left) != final.pages_left:
                raise ProtocolError(f"{final.pages_left} pages are said to be left, and {len(left)} named")
            self.fetching = Fetching(self._here, self._memory, left, self.progress)
        self._memory.close()
        self._final = final, saved
        self._ready_ns = time.monotonic_ns()

    async def commit(self, commit: Commit, peer: str, tell: Callable[[], Awaitable[None]]) -> Vm:
        """It is this host's from here on, and runs; `tell` is called then.  Raises HostError if it is not.
        Not to be cancelled."""
        heard = time.monotonic_ns()
        elapsed = commit.elapsed_ns + max(0, heard - self._ready_ns - commit.held_ns) // 2
        assert self._final is not None
        final, saved = self._final
        self.stage = "committing"
        try:
            await trio.to_thread.run_sync(self._here.handovers.commit, self.token, self.definition, peer)
        except HostError:
            self.stage = "over"
            self.settled.set()
            raise
        # Invariant: from here on nothing is raised that would have the source told that it is not
        self.stage = "committed"
        vm = Vm(self.definition, self._here.events)
        vm.block, self._block = self._block, None
        here = self._here
        here.departures.forget(vm.name)
        here.guests.add(vm)
        async with vm.lock:
            vm.follow(Trigger.START)
            if saved.life is not None:
                saved.life.give_to(vm)
            if self.fetching is not None:
                self.fetching.begin(vm)
            if final.paused:
                vm.parked = final.state
                vm.follow(Trigger.PAUSE)
            else:
                await self._run(vm, final.state, heard - elapsed, commit.typed)
            self.progress.downtime = (elapsed + time.monotonic_ns() - heard) / 1e9
            try:
                await tell()
            except HostError as error:
                log.info("the source is not told, and will ask", extra={"vm": vm.name, "why": str(error)})
            await self._keep()
        return vm

    async def _run(self, vm: Vm, state: bytes, since_ns: int, typed: bytes) -> None:
        """What goes wrong here is the guest's own affair: it is this host's."""
        try:
            await self._here.guests.hand_over(vm, state, Trigger.LOADED, since_ns)
            if typed and vm.worker is not None:
                vm.worker.send(Input(vm.lease, typed))
        except HostError as error:
            log.error("guest arrived, and does not run", extra={"vm": vm.name, "why": str(error)})
            if vm.state is State.STARTING:
                vm.parked = state
                vm.follow(Trigger.PAUSE, "no worker was left to run it")

    async def _keep(self) -> None:
        """Have the definition in the inventory, where the next daemon finds it without the record."""
        prepared, self._prepared = self._prepared, None
        try:
            if prepared is not None:
                await trio.to_thread.run_sync(prepared.commit)
                await trio.to_thread.run_sync(self._here.handovers.kept, self.token)
        except HostError as error:
            log.error("definition not written, or record not: that stands for it",
                      extra={"vm": self.definition.name, "why": str(error)})
        self.settled.set()
