# SPDX-License-Identifier: GPL-2.0-or-later
"""The rounds of a pre-copy: pages out of the memory of a guest that runs, over one connection or several."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import trio

from hostd.migration.conversation import Conversation
from hostd.migration.memory_out import OutgoingMemory
from hostd.migration.messages import BATCH, DIGESTS, WINDOW, Digests, Missing, Pages, RoundDone, RoundEnd
from hostd.migration.pages import BatchEncoder, Encoded, encode_digests, unpack_bits
from hostd.migration.progress import Progress
from hostd.nursery import open_team

#: batches that wait to be sent while the next one is made
_AHEAD = 2


def pieces(pages: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """The pages, some at a time."""
    return (pages[start:start + most] for start in range(0, len(pages), most))


class Copying:
    """`talks`: the connections, the first of which is the one that everything else goes over."""

    def __init__(self, talks: Sequence[Conversation], memory: OutgoingMemory, progress: Progress) -> None:
        self._talks = talks
        self._memory = memory
        self._progress = progress
        agreed = talks[0].agreed
        self._encoder = BatchEncoder(memory.pages, delta=agreed("delta"), zstd=agreed("zstd"))
        self._seq = 0

    async def name(self, pages: np.ndarray) -> np.ndarray:
        """Tell what is in the pages; the answer is those that the other host does not have, or need not be
        told of in this way."""
        pending: deque[np.ndarray] = deque()
        missing = []
        for piece in pieces(pages, DIGESTS):
            named, payload = await trio.to_thread.run_sync(self._digests, piece)
            missing.append(piece[~np.isin(piece, named)])
            if not len(named):
                continue
            await self._talks[0].send(Digests(self._seq, payload))
            self._seq += 1
            pending.append(named)
            if len(pending) == WINDOW:
                missing.append(await self._missing(pending.popleft()))
        while pending:
            missing.append(await self._missing(pending.popleft()))
        return np.sort(np.concatenate(missing)) if missing else pages

    def _digests(self, pages: np.ndarray) -> tuple[np.ndarray, bytes]:
        contents, _ = self._memory.read(pages)
        named = contents.view(np.uint64).any(axis=1)
        return pages[named], encode_digests(pages[named], contents[named]) if named.any() else b""

    async def _missing(self, named: np.ndarray) -> np.ndarray:
        answer = await self._talks[0].expect(Missing)
        lacking = unpack_bits(answer.bitmap, len(named))
        self._progress.pages["deduplicated"] += int(np.count_nonzero(~lacking))
        return named[lacking]

    async def send(self, pages: np.ndarray) -> None:
        """Send the pages as they are now, and say that the round is over."""
        self._progress.round += 1
        self._progress.remaining_pages = len(pages)
        self._encoder.new_round()
        made, wanted = trio.open_memory_channel[Encoded](_AHEAD)
        async with open_team() as listeners:
            listeners.start_soon(self._talks[0].listen)
            async with open_team() as team:
                for talk in self._talks:
                    team.start_soon(self._pump, talk, wanted.clone())
                wanted.close()
                async with made:
                    for piece in pieces(pages, BATCH):
                        await made.send(await trio.to_thread.run_sync(self._batch, piece))
            listeners.cancel_scope.cancel()
        for talk in self._talks:
            await talk.send(RoundEnd(self._progress.round))

    async def _pump(self, talk: Conversation, wanted: trio.MemoryReceiveChannel[Encoded]) -> None:
        async with wanted:
            async for batch in wanted:
                await talk.send(Pages(batch.payload))
                self._progress.count(batch.counts)
                self._progress.remaining_pages -= sum(batch.counts.pages.values())

    def _batch(self, pages: np.ndarray) -> Encoded:
        contents, absent = self._memory.read(pages)
        return self._encoder.encode(pages, contents, absent)

    async def confirmed(self) -> None:
        """Wait until the other host has installed all of the round."""
        for talk in self._talks:
            await talk.expect(RoundDone)
