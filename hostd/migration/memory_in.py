# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory of a guest that arrives: batches of pages become frames of a block that nobody runs yet.

Pages of the first round may be *shared* from the start, with this guest as their only owner: others that
arrive later, or live here, and have the same contents then need not be sent (hostd/migration/index.py).

Invariant: between two awaits every frame taken is in the P2M; so the block can be freed at any of them, and
no frame is lost.
"""

from __future__ import annotations

import numpy as np

from hostd.memory import MachineMemory
from hostd.migration.pages import Batch, PageKind
from hostd.stores import slots_at
from vmm.memory.block import VmBlock
from vmm.memory.p2mbits import FRAME_MASK, KIND_MASK, KIND_SHIFT, PRIVATE_BITS, Kind
from vmm.memory.pool import PAGE, PAGE_SHIFT

_SHIFT = np.uint64(PAGE_SHIFT)
_PRIVATE, _SHARED = (np.uint64(kind << KIND_SHIFT) for kind in (Kind.PRIVATE, Kind.SHARED))


class IncomingMemory:
    """Of a guest in `block`.  `share`: what comes first is to be shared."""

    def __init__(self, memory: MachineMemory, block: VmBlock, share: bool) -> None:
        self.share = share
        #: pages of which contents came: others cannot have changed since
        self.known = np.zeros(block.pages, dtype=bool)
        self.pages = block.pages
        self._memory = memory
        self._block = block
        self._frames = np.frombuffer(block.pool.view, dtype=np.uint8).reshape(-1, PAGE)

    async def install(self, batch: Batch) -> None:
        """Have the guest's pages be as the batch says.  Raises Failed when memory is short and stays so."""
        filled = (batch.kinds == PageKind.FULL) | (batch.kinds == PageKind.DELTA)
        await self._memory.room_for(int(np.count_nonzero(filled)))
        self._empty(batch.pages[~filled])
        pages, contents = batch.pages[filled], batch.contents
        delta = batch.kinds[filled] == PageKind.DELTA
        contents[delta] ^= self._contents(pages[delta])
        self._fill(pages, contents)
        self.known[batch.pages] = True

    def _contents(self, pages: np.ndarray) -> np.ndarray:
        """Of pages that are known: those without a frame are zeroes."""
        entries = self._block.leaf()[pages]
        framed = (entries & np.uint64(FRAME_MASK)) != 0
        contents = np.zeros((len(pages), PAGE), dtype=np.uint8)
        contents[framed] = self._frames[_numbers(entries[framed])]
        return contents

    def _fill(self, pages: np.ndarray, contents: np.ndarray) -> None:
        leaf = self._block.leaf()
        self._drop_shared(pages)
        own = (leaf[pages] & np.uint64(KIND_MASK)) == _PRIVATE
        self._frames[_numbers(leaf[pages[own]])] = contents[own]
        fresh = pages[~own]
        if not len(fresh):
            return
        frames = self._frames_with(contents[~own])
        leaf[fresh] = frames.astype(np.uint64) << _SHIFT | np.uint64(PRIVATE_BITS)
        if self.share:
            first = ~self.known[fresh]
            self._memory.books.freeze(self._block, fresh[first])

    async def frames_with(self, contents: np.ndarray) -> np.ndarray:
        """Frames, on loan to the daemon, with these contents, (n, 4096) bytes.  Raises Failed when memory is
        short and stays so."""
        await self._memory.room_for(len(contents))
        return self._frames_with(contents)

    def _frames_with(self, contents: np.ndarray) -> np.ndarray:
        magazine = self._memory.books.frames_for_loading(len(contents))
        frames = np.array([magazine.take() for _ in range(len(contents))], dtype=np.int64)
        self._frames[frames] = contents
        return frames

    def _empty(self, pages: np.ndarray) -> None:
        """These pages read as zero: they need no frames."""
        self._drop_shared(pages)
        leaf = self._block.leaf()
        own = pages[(leaf[pages] & np.uint64(KIND_MASK)) == _PRIVATE]
        frames = _numbers(leaf[own])
        leaf[own] = 0
        self._memory.books.reported(self._block, (), frames.tolist(), ())

    def _drop_shared(self, pages: np.ndarray) -> None:
        leaf = self._block.leaf()
        shared = pages[(leaf[pages] & np.uint64(KIND_MASK)) == _SHARED]
        leaf[shared] = 0
        self._memory.books.reported(self._block, shared.tolist(), (), ())

    def share_with(self, pages: np.ndarray, frames: np.ndarray) -> None:
        """Pages of which nothing came yet have what is in these shared frames."""
        self._memory.books.share(self._block, pages, frames)
        self.known[pages] = True

    def put_elsewhere(self, pages: np.ndarray) -> int:
        """These pages are at another host, whatever came of them; the number of the store that stands for
        it.  Raises Failed when there are too many of these."""
        self._empty(pages)
        books = self._memory.books
        store = books.stores.open_remote(lambda: None)
        slots = slots_at(store, pages)
        books.stores.retain(slots)
        books.refer(self._block, pages, slots)
        return store

    def ballooned(self, pages: np.ndarray) -> None:
        """The guest had given these pages back; those without a frame are marked so."""
        leaf = self._block.leaf()
        leaf[pages[leaf[pages] == 0]] = np.uint64(Kind.BALLOONED << KIND_SHIFT)


def _numbers(entries: np.ndarray) -> np.ndarray:
    return ((entries & np.uint64(FRAME_MASK)) >> _SHIFT).astype(np.int64)
