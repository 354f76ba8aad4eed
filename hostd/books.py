# SPDX-License-Identifier: GPL-2.0-or-later
"""The books of machine memory: who has which frames, and that none is lost, however a worker ends.

Shared frames are counted by what the daemon knows, not by what the P2M says at the moment: a guest that was
part of a clone is charged with the frames it then shared, and each is taken off its charge once, when its
worker reports that the guest broke the share, or when the guest goes.  So a worker that dies with a report
unsent, and a report that comes after the fact, both leave the books right.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from hostd.errors import Failed, Invalid
from hostd.model import PAGE, FrameCounts
from vmm.memory.block import VmBlock, clone_block, free_block, new_block
from vmm.memory.errors import OutOfFrames
from vmm.memory.frames import Extent, FrameAllocator, Magazine
from vmm.memory.pool import Pool

#: the borrower of frames that the daemon itself fills when it loads a guest; workers come after it
LOADER = 0


class Charge:
    """The shared frames one guest is counted for."""

    def __init__(self, frames: np.ndarray, snapshot: int) -> None:
        #: ascending; never changed, so that clones of one template have one array
        self.frames = frames
        self.snapshot = snapshot
        self._left = np.ones(len(frames), dtype=bool)

    def drop(self, frames: Sequence[int]) -> np.ndarray:
        """Those of `frames` that were still charged; they are no more."""
        places = np.searchsorted(self.frames, np.unique(np.array(frames, dtype=np.int64)))
        places = places[places < len(self.frames)]
        places = places[self._left[places] & np.isin(self.frames[places], frames)]
        self._left[places] = False
        return self.frames[places]

    def left(self) -> np.ndarray:
        """The frames still charged."""
        return self.frames[self._left]


class Books:
    """The ledger of the pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._allocator = FrameAllocator(pool)
        #: blocks of all guests that have memory, by first frame
        self._blocks: dict[int, VmBlock] = {}
        self._charges: dict[int, Charge] = {}
        self._snapshots = itertools.count(1)

    # --- guests

    def check_size(self, memory_bytes: int) -> None:
        """Raise Invalid for a guest that could never fit."""
        if memory_bytes % PAGE:
            raise Invalid(f"memory of {memory_bytes} bytes is not a whole number of 4 KiB pages")
        if memory_bytes + VmBlock.frames_for(memory_bytes) * PAGE > self._pool.size:
            raise Invalid(f"memory of {memory_bytes >> 20} MiB is more than the host's pool of "
                          f"{self._pool.size >> 20} MiB holds")

    def new(self, memory_bytes: int) -> VmBlock:
        """A guest's memory with nothing in it."""
        with _short_of_memory():
            block = new_block(self._allocator, memory_bytes)
        self._blocks[block.first] = block
        return block

    def frames_for_loading(self, count: int) -> Magazine:
        """Exactly the frames that the initial contents of a guest take."""
        with _short_of_memory():
            return Magazine(self._allocator.lend(LOADER, count))

    def clone(self, source: VmBlock) -> VmBlock:
        """A second guest with the memory of `source`, which no worker has."""
        with _short_of_memory():
            block = clone_block(self._allocator, source)
        self._blocks[block.first] = block
        shared = np.sort(FrameAllocator.split(source.leaf())[1])
        charge = self._charges.get(source.first)
        if charge is None or not np.array_equal(charge.frames, shared):
            charge = self._charges[source.first] = Charge(shared, next(self._snapshots))
        self._charges[block.first] = Charge(charge.frames, charge.snapshot)
        return block

    def snapshot(self, block: VmBlock) -> int:
        """The number of the moment since which its shared frames have not changed; 0: none."""
        charge = self._charges.get(block.first)
        return charge.snapshot if charge is not None else 0

    def free(self, block: VmBlock) -> None:
        """A guest that no worker has any more is gone."""
        del self._blocks[block.first]
        charge = self._charges.pop(block.first, None)
        if charge is not None:
            _, shared = FrameAllocator.split(block.leaf())
            self._allocator.drop(np.setdiff1d(charge.left(), shared))
        free_block(self._allocator, block)

    def dropped(self, block: VmBlock, frames: Sequence[int]) -> None:
        """The guest broke the shares of these frames."""
        charge = self._charges.get(block.first)
        if charge is not None:
            self._allocator.drop(charge.drop(frames))

    # --- workers

    def lend(self, worker: int, count: int) -> list[Extent]:
        """Frames for a worker's magazine: as many of `count` as there are, perhaps none."""
        count = min(count, self._allocator.free_frames())
        return self._allocator.lend(worker + 1, count) if count else []

    def reclaim(self, worker: int) -> int:
        """The worker is dead and its guests are freed: what it had in stock comes back."""
        return self._allocator.reclaim(worker + 1, self._leaves())

    # --- the books

    def counts(self) -> FrameCounts:
        count = self._allocator.count(self._leaves())
        return FrameCounts(total=count.total, free=count.free, granted=count.on_loan, private=count.private,
                           shared=count.shared, overhead=count.overhead)

    def check(self) -> list[str]:
        """Every disagreement between ledger and guests, a sentence each."""
        return self._allocator.check(self._leaves())

    def _leaves(self) -> list[np.ndarray]:
        return [block.leaf() for block in self._blocks.values()]


@contextmanager
def _short_of_memory() -> Iterator[None]:
    """Say in the host's words that the pool is exhausted."""
    try:
        yield
    except OutOfFrames as error:
        raise Failed(f"not enough machine memory: {error}") from None
