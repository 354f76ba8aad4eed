# SPDX-License-Identifier: GPL-2.0-or-later
"""Post-copy at the target: the guest runs here, and its pages come from the host it left, those it waits for
first.

A connection that breaks does no harm: the guest waits until the source has made another one.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import trio

from hostd.errors import Failed, HostError
from hostd.migration.conversation import Conversation
from hostd.migration.memory_in import IncomingMemory, take, write
from hostd.migration.messages import URGENT, Complete, Pages, Resumed, Want
from hostd.migration.pages import Batch, PageKind, decode_batch, pack_bitmap
from hostd.migration.progress import Progress
from hostd.migration.wire import ProtocolError
from hostd.nursery import open_team
from hostd.reclaiming import Reclaimer
from hostd.vm import Vm

if TYPE_CHECKING:
    from hostd.migration.here import Here
    from vmm.memory.block import VmBlock

log = logging.getLogger(__name__)


class Fetching:
    """The pages `left` (numbers, ascending) of a guest."""

    def __init__(self, here: Here, memory: IncomingMemory, left: np.ndarray, progress: Progress) -> None:
        """Raises Failed when too many guests fetch pages already."""
        self._here = here
        self._memory = memory
        self._progress = progress
        self._reclaimer = Reclaimer(here.guests, here.memory)
        self._left = np.zeros(memory.pages, dtype=bool)
        self._left[left] = True
        #: no page is known here by which a change could be told: all come whole
        self._unknown = np.zeros(memory.pages, dtype=bool)
        self._store = memory.put_elsewhere(left)
        self._vm: Vm | None = None
        self._block: VmBlock | None = None
        #: pages the guest waits for, and that were not asked for on this connection
        self._wanted: set[int] = set()
        self._asked: set[int] = set()
        self._stirred = trio.Event()
        self._over = trio.Event()
        #: the connection in use
        self._scope = trio.CancelScope()
        self._lost = ""

    def begin(self, vm: Vm) -> None:
        """The guest is `vm`, and about to run."""
        self._vm, self._block = vm, vm.block
        vm.fetching = self._want

    def _want(self, pages: list[int]) -> None:
        self._wanted.update(page for page in pages if self._left[page])
        self._stirred.set()

    async def run(self, talk: Conversation) -> None:
        """Until all pages are here, over this connection and those that follow it.  Raises Failed if they
        never will be, and the guest has crashed then."""
        self._progress.phase = "fetching"
        async with open_team() as team:
            team.start_soon(self._outlive)
            try:
                await self._serve(talk)
            except HostError as error:
                self._interrupted(error)
            await self._over.wait()
            team.cancel_scope.cancel()
        if self._lost:
            raise Failed(self._lost)

    async def _outlive(self) -> None:
        """Once the guest has ended, as a user may have it, no page is waited for."""
        assert self._vm is not None
        while self._vm.block is self._block:
            await self._vm.activity.wait()
        self._lose("the guest ended before all of its memory was here")

    async def resume(self, talk: Conversation) -> None:
        """Go on over another connection, until that breaks."""
        self._scope.cancel()
        self._asked.clear()
        self._stirred.set()
        try:
            await talk.send(Resumed(self._progress.token,
                                    pack_bitmap(np.flatnonzero(self._left), len(self._left))))
            self._progress.phase = "fetching"
            self._tell("")
            await self._serve(talk)
        except HostError as error:
            self._interrupted(error)
            raise

    def _interrupted(self, error: HostError) -> None:
        if not self._over.is_set():
            self._progress.phase = "recovering"
            self._tell(f"memory of it is still at the host it came from, which must call again ({error}); if "
                       f"that is gone for good: hostctl destroy --force {self._progress.vm}")
            log.warning("post-copy interrupted: the guest waits", extra={"vm": self._progress.vm,
                                                                         "why": str(error)})

    def _tell(self, reason: str) -> None:
        """What a user should know of the guest."""
        if self._vm is not None and self._vm.block is self._block:
            self._vm.reason = reason
            self._vm.activity.notify()

    def _lose(self, why: str) -> None:
        """Not all pages will come."""
        self._lost = self._lost or why
        self._end()

    async def give_up(self, why: str) -> None:
        """The pages will never come."""
        assert self._vm is not None
        if self._over.is_set():
            return
        self._lost = why
        try:
            await self._here.guests.crash(self._vm, why)
        except HostError as error:
            log.info("the guest ended before", extra={"vm": self._vm.name, "why": str(error)})
        self._end()

    async def _serve(self, talk: Conversation) -> None:
        with trio.CancelScope() as self._scope:
            async with open_team() as team:
                team.start_soon(self._ask, talk)
                while self._left.any():
                    message = await talk.receive()
                    if not isinstance(message, Pages):
                        raise ProtocolError(f"{type(message).__name__} came, and Pages were due")
                    await self._install(await trio.to_thread.run_sync(
                        decode_batch, message.payload, len(self._left), self._unknown))
                team.cancel_scope.cancel()
            await talk.send(Complete(self._progress.token))
            self._end()

    async def _ask(self, talk: Conversation) -> None:
        """Tell the source what the guest waits for."""
        while True:
            wanted = sorted(self._wanted - self._asked)[:URGENT]
            if wanted:
                self._asked.update(wanted)
                await talk.send(Want(wanted))
                continue
            self._stirred = trio.Event()
            await self._stirred.wait()

    async def _install(self, batch: Batch) -> None:
        """Raises HostError when the guest is gone."""
        assert self._vm is not None
        full = batch.kinds == PageKind.FULL
        frames = np.zeros(len(batch.pages), dtype=np.int64)
        count = int(np.count_nonzero(full))
        await self._here.memory.room_for(count)
        frames[full] = taken = take(self._here.memory, count)
        # Invariant: frames that were taken come to `install`, which gives back what the guest does not want,
        # or go back from here
        try:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(write, self._here.memory.pool, taken, batch.contents)
        except BaseException:
            self._here.memory.books.unused(taken)
            raise
        try:
            await self._reclaimer.install(self._vm, self._store, batch.pages, frames)
        except HostError as error:
            self._lose(f"the guest ended before all of its memory was here: {error}")
            raise
        pages = set(batch.pages.tolist())
        self._wanted -= pages
        self._asked -= pages
        self._left[batch.pages] = False
        self._progress.count(batch.counts)
        self._progress.remaining_pages = int(np.count_nonzero(self._left))

    def _end(self) -> None:
        assert self._vm is not None
        self._vm.fetching = None
        self._over.set()
        self._scope.cancel()
