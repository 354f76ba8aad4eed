# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory of a guest that arrives: batches of pages become frames of a block that nobody runs yet.

Pages of the first round may be *shared* from the start, with this guest as their only owner: others that
arrive later, or live here, and have the same contents then need not be sent (hostd/migration/index.py).

A thread does what takes time, which is the kernel's search for memory above all: frames are written by
pwrite(2), which spares it the zeroing, and each page a fault.

Invariant: every frame taken is in the P2M, or in `_spare`, or with the thread; `close` gives back what is in
`_spare`, and comes after the last thread.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
import trio

from hostd.memory import MachineMemory
from hostd.migration.messages import BATCH
from hostd.migration.pages import Counts, PageKind, decode_batch
from hostd.stores import slots_at
from vmm.memory.block import VmBlock
from vmm.memory.p2mbits import FRAME_MASK, KIND_MASK, KIND_SHIFT, PRIVATE_BITS, Kind
from vmm.memory.pool import PAGE, PAGE_SHIFT, Pool

_SHIFT = np.uint64(PAGE_SHIFT)
_PRIVATE, _SHARED = (np.uint64(kind << KIND_SHIFT) for kind in (Kind.PRIVATE, Kind.SHARED))


class _Done(NamedTuple):
    """What a thread did with a batch."""

    #: of the spare frames, the first so many are used
    used: int
    #: pages that got frames, and those among them that had been unknown
    first: np.ndarray
    #: pages that let go of shared frames, and private frames that were let go of
    dropped: np.ndarray
    freed: np.ndarray
    counts: Counts


class IncomingMemory:
    """Of a guest in `block`.  `share`: what comes first is to be shared."""

    def __init__(self, memory: MachineMemory, block: VmBlock, share: bool) -> None:
        self.share = share
        self.pages = block.pages
        #: pages of which contents came: others cannot have changed since
        self.known = np.zeros(block.pages, dtype=bool)
        self._memory = memory
        self._block = block
        self._frames = np.frombuffer(block.pool.view, dtype=np.uint8).reshape(-1, PAGE)
        self._spare = np.zeros(0, dtype=np.int64)

    async def install(self, payload: bytes) -> Counts:
        """Have the guest's pages be as the batch in `payload` says.  Raises ProtocolError for what is no
        batch, Failed when memory is short and stays so."""
        spare = await self._take(BATCH)
        used = 0
        try:
            done = await trio.to_thread.run_sync(self._work, payload, spare)
            used = done.used
        finally:
            self._spare = np.concatenate((self._spare, spare[used:]))
            self._memory.books.loaded(used)
        self._memory.books.reported(self._block, done.dropped.tolist(), done.freed.tolist(), ())
        if self.share:
            self._memory.books.freeze(self._block, done.first)
        return done.counts

    async def _take(self, count: int) -> np.ndarray:
        """So many frames, on loan to the daemon."""
        while (lacking := count - len(self._spare)) > 0:        # another connection may be quicker
            await self._memory.room_for(lacking)
            self._spare = np.concatenate((self._spare, take(self._memory, lacking)))
        taken, self._spare = self._spare[:count], self._spare[count:]
        return taken

    def _work(self, payload: bytes, spare: np.ndarray) -> _Done:
        batch = decode_batch(payload, self.pages, self.known)
        leaf = self._block.leaf()
        filled = (batch.kinds == PageKind.FULL) | (batch.kinds == PageKind.DELTA)
        pages, contents = batch.pages[filled], batch.contents
        delta = batch.kinds[filled] == PageKind.DELTA
        contents[delta] ^= self._contents(pages[delta])
        own = _kind(leaf[pages]) == _PRIVATE
        fresh, frames = pages[~own], spare[:np.count_nonzero(~own)]
        # what can fail comes first: the guest lets go of nothing then
        write(self._block.pool, frames, contents[~own])

        shared = batch.pages[_kind(leaf[batch.pages]) == _SHARED]
        leaf[shared] = 0
        empty = batch.pages[~filled]
        gone = empty[_kind(leaf[empty]) == _PRIVATE]
        freed = _numbers(leaf[gone])
        leaf[gone] = 0
        self._frames[_numbers(leaf[pages[own]])] = contents[own]
        leaf[fresh] = frames.astype(np.uint64) << _SHIFT | np.uint64(PRIVATE_BITS)
        first = fresh[~self.known[fresh]]
        self.known[batch.pages] = True
        return _Done(len(fresh), first, shared, freed, batch.counts)

    def _contents(self, pages: np.ndarray) -> np.ndarray:
        """Of pages that are known: those without a frame are zeroes."""
        entries = self._block.leaf()[pages]
        framed = (entries & np.uint64(FRAME_MASK)) != 0
        contents = np.zeros((len(pages), PAGE), dtype=np.uint8)
        contents[framed] = self._frames[_numbers(entries[framed])]
        return contents

    def close(self) -> None:
        """Nothing comes any more: give back what was not used."""
        self._memory.books.unused(self._spare)
        self._spare = self._spare[:0]

    def share_with(self, pages: np.ndarray, frames: np.ndarray) -> None:
        """Pages of which nothing came yet have what is in these shared frames."""
        self._memory.books.share(self._block, pages, frames)
        self.known[pages] = True

    def put_elsewhere(self, pages: np.ndarray) -> int:
        """These pages are at another host, whatever came of them; the number of the store that stands for
        it.  Raises Failed when there are too many of these."""
        books, leaf = self._memory.books, self._block.leaf()
        store = books.stores.open_remote(lambda: None)
        shared = pages[_kind(leaf[pages]) == _SHARED]
        freed = _numbers(leaf[pages[_kind(leaf[pages]) == _PRIVATE]])
        slots = slots_at(store, pages)
        books.stores.retain(slots)
        leaf[pages] = 0
        books.reported(self._block, shared.tolist(), freed.tolist(), ())
        books.refer(self._block, pages, slots)
        return store


def take(memory: MachineMemory, count: int) -> np.ndarray:
    """Frames, on loan to the daemon.  Raises Failed when there are not so many."""
    return memory.books.frames_for_loading(count).rest()


def write(pool: Pool, frames: np.ndarray, contents: np.ndarray) -> None:
    """Fill frames, in runs of neighbours, with (n, 4096) bytes.  Takes its time."""
    if not len(frames):
        return
    starts = np.concatenate(([0], np.flatnonzero(np.diff(frames) != 1) + 1, [len(frames)]))
    data = np.ascontiguousarray(contents).data.cast("B")
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist()):
        os.pwrite(pool.fd, data[start * PAGE:end * PAGE], int(frames[start]) * PAGE)


def _kind(entries: np.ndarray) -> np.ndarray:
    return entries & np.uint64(KIND_MASK)


def _numbers(entries: np.ndarray) -> np.ndarray:
    return ((entries & np.uint64(FRAME_MASK)) >> _SHIFT).astype(np.int64)
