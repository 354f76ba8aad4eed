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
from hostd.migration.memory_in import IncomingMemory
from hostd.migration.messages import URGENT, Complete, Pages, Resumed, Want
from hostd.migration.pages import Batch, PageKind, decode_batch, pack_bitmap
from hostd.migration.progress import Progress
from hostd.migration.wire import ProtocolError
from hostd.nursery import open_team
from hostd.reclaiming import Reclaimer
from hostd.vm import Vm

if TYPE_CHECKING:
    from hostd.migration.here import Here

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
        self._vm = vm
        vm.fetching = self._want

    def _want(self, pages: list[int]) -> None:
        self._wanted.update(page for page in pages if self._left[page])
        self._stirred.set()

    async def run(self, talk: Conversation) -> None:
        """Until all pages are here, over this connection and those that follow it.  Raises Failed if they
        never will be, and the guest has crashed then."""
        self._progress.phase = "fetching"
        try:
            await self._serve(talk)
        except HostError as error:
            self._interrupted(error)
        await self._over.wait()
        if self._lost:
            raise Failed(self._lost)

    async def resume(self, talk: Conversation) -> None:
        """Go on over another connection, until that breaks."""
        self._scope.cancel()
        self._asked.clear()
        self._stirred.set()
        try:
            await talk.send(Resumed(self._progress.token,
                                    pack_bitmap(np.flatnonzero(self._left), len(self._left))))
            self._progress.phase = "fetching"
            await self._serve(talk)
        except HostError as error:
            self._interrupted(error)
            raise

    def _interrupted(self, error: HostError) -> None:
        if not self._over.is_set():
            self._progress.phase = "recovering"
            log.warning("post-copy interrupted: the guest waits", extra={"vm": self._progress.vm,
                                                                         "why": str(error)})

    async def give_up(self, why: str) -> None:
        """The pages will never come."""
        assert self._vm is not None
        if not self._over.is_set():
            self._lost = why
            await self._here.guests.crash(self._vm, why)
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
        frames[full] = await self._memory.frames_with(batch.contents)
        try:
            await self._reclaimer.install(self._vm, self._store, batch.pages, frames)
        except HostError as error:
            self._lost = f"the guest ended before all of its memory was here: {error}"
            self._end()
            raise
        pages = set(batch.pages.tolist())
        self._wanted -= pages
        self._asked -= pages
        self._left[batch.pages] = False
        self._progress.remaining_pages = int(np.count_nonzero(self._left))

    def _end(self) -> None:
        assert self._vm is not None
        self._vm.fetching = None
        self._over.set()
        self._scope.cancel()
