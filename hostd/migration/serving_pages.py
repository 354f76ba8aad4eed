# SPDX-License-Identifier: GPL-2.0-or-later
"""Post-copy at the source: the guest runs elsewhere, its pages follow, those it waits for first."""

from __future__ import annotations

import logging
from collections import deque

import numpy as np
import trio

from hostd.errors import HostError
from hostd.migration.conversation import Conversation, Declined
from hostd.migration.doubt import FIRST_S, LAST_S
from hostd.migration.links import LinkBroken
from hostd.migration.memory_out import OutgoingMemory
from hostd.migration.messages import Complete, Pages, Resume, Resumed, Want
from hostd.migration.pages import BatchEncoder, Encoded, unpack_bitmap
from hostd.migration.peers import Peer
from hostd.migration.progress import Progress
from hostd.migration.wire import ProtocolError
from hostd.nursery import open_team

log = logging.getLogger(__name__)

#: how long the other host may say nothing that is due, before it is called on another connection
SILENT_S = 30.0
#: pages sent unasked at a time: those that are asked for wait no longer than for so many
_PIECE = 64


async def serve(peer: Peer, talk: Conversation, memory: OutgoingMemory, left: np.ndarray,
                progress: Progress) -> None:
    """Until the other host has all pages, or says that it needs them no more.  A connection that breaks is
    made again, for as long as it takes."""
    try:
        await _Server(talk, memory, left, progress).run()
        return
    except HostError as error:
        log.warning("post-copy interrupted", extra={"vm": progress.vm, "why": str(error)})
    wait = FIRST_S
    while True:
        progress.phase = "recovering"
        try:
            async with peer.open("resume") as talk:
                await talk.send(Resume(progress.token))
                with trio.fail_after(SILENT_S):
                    resumed = await talk.expect(Resumed)
                left = unpack_bitmap(resumed.left, memory.pages)
                wait = FIRST_S
                await _Server(talk, memory, left, progress).run()
                return
        except Declined as error:
            log.error("the guest needs no more pages", extra={"vm": progress.vm, "why": str(error)})
            return
        except (HostError, trio.TooSlowError) as error:
            log.info("post-copy not resumed yet", extra={"vm": progress.vm, "why": str(error) or "no answer"})
        await trio.sleep(wait)
        wait = min(2 * wait, LAST_S)


class _Server:
    """One connection's part in it."""

    def __init__(self, talk: Conversation, memory: OutgoingMemory, left: np.ndarray,
                 progress: Progress) -> None:
        self._talk = talk
        self._memory = memory
        self._progress = progress
        self._encoder = BatchEncoder(memory.pages, delta=False, zstd=talk.agreed("zstd"))
        self._unsent = np.zeros(memory.pages, dtype=bool)
        self._unsent[left] = True
        progress.remaining_pages = len(left)
        self._wanted: deque[int] = deque()

    async def run(self) -> None:
        """Raises HostError when the connection breaks."""
        self._progress.phase = "fetching"
        async with open_team() as nursery:
            nursery.start_soon(self._push)
            await self._listen()
            nursery.cancel_scope.cancel()

    async def _listen(self) -> None:
        """Until the other host has everything."""
        while not isinstance(message := await self._talk.receive(), Complete):
            if not isinstance(message, Want):
                raise ProtocolError(f"{type(message).__name__} came where Want was due")
            self._wanted.extend(message.pages)

    async def _push(self) -> None:
        """Send all pages, and wait for the word that they are there.  Raises LinkBroken."""
        cursor = 0
        while self._unsent.any():
            if self._wanted:
                wanted = np.unique(np.array(self._wanted, dtype=np.int64))
                self._wanted.clear()
                pages = wanted[(wanted < len(self._unsent))][:_PIECE]
                self._wanted.extend(wanted[_PIECE:].tolist())
                pages = pages[self._unsent[pages]]
            else:
                ahead = np.flatnonzero(self._unsent[cursor:])[:_PIECE] + cursor
                cursor = int(ahead[-1]) + 1 if len(ahead) else 0
                pages = ahead
            if len(pages):
                self._unsent[pages] = False
                batch = await trio.to_thread.run_sync(self._batch, pages)
                await self._talk.send(Pages(batch.payload))
                self._progress.count(batch.counts)
                self._progress.remaining_pages -= len(pages)
        await trio.sleep(SILENT_S)
        raise LinkBroken(f"{self._talk.link.peer} does not say that all pages have come")

    def _batch(self, pages: np.ndarray) -> Encoded:
        contents, absent = self._memory.read(pages)
        return self._encoder.encode(pages, contents, absent)
