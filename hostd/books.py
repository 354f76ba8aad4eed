# SPDX-License-Identifier: GPL-2.0-or-later
"""The books of machine memory: who has which frames, and that none is lost, however a worker ends.

Shared frames and slots are counted by what the daemon knows, not by what the P2M says at the moment: each
page of a guest is charged with the frame, or the slot, that it was given in common with others, and it is
taken off the charge once, when its worker reports that the page let go of it, or when the guest goes.  So a
worker that dies with a report unsent, and a report that comes after the fact, both leave the books right.

Frames that a guest had for itself and lets go of are on loan to its worker, who answers for them from Adopt
on: reported, they are free; unreported, they come back when the worker dies.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from hostd.errors import Failed, Invalid
from hostd.model import PAGE, FrameCounts
from hostd.stores import Stores
from vmm.memory.block import VmBlock, clone_block, free_block, new_block
from vmm.memory.errors import OutOfFrames
from vmm.memory.frames import Extent, FrameAllocator, Magazine
from vmm.memory.p2mbits import FRAME_MASK, SHARED_BITS, STORED
from vmm.memory.pool import PAGE_SHIFT, Pool
from vmm.memory.reclaim import freeze

#: the borrower of frames that the daemon itself fills; workers come after it, and from `_PASSAGES` on frames
#: on their way to a guest
LOADER = 0
_PASSAGES = 1 << 13
#: pages of a guest that are told of at most when they are charged wrongly
_MOST_TOLD = 256


class Charge:
    """What the pages of one guest were given that others may have as well; 0 is nothing."""

    def __init__(self, pages: int) -> None:
        #: frame, and slot, of each page
        self.frames = np.zeros(pages, dtype=np.uint32)
        self.slots = np.zeros(pages, dtype=np.uint64)
        #: guests with the same number, not 0, share frames that have not changed since they were first shared
        self.snapshot = 0


class Books:
    """The ledger of the pool."""

    def __init__(self, pool: Pool, stores: Stores | None = None, reserve: int = 0,
                 on_freed: Callable[[], None] = lambda: None) -> None:
        """The first `reserve` frames are for the overhead of guests only.  `on_freed` is called whenever
        frames have come free, for whatever reason."""
        self._pool = pool
        self._allocator = FrameAllocator(pool, reserve, on_freed)
        self.stores = stores or Stores()
        #: blocks of all guests that have memory, and their charges, by first frame
        self._blocks: dict[int, VmBlock] = {}
        self._charges: dict[int, Charge] = {}
        self._snapshots = itertools.count(1)
        self._passages = itertools.count()
        #: passages that have not ended
        self._under_way: set[int] = set()
        #: frames for loading that are with whoever loads
        self._loading = 0
        #: by worker, frames that it was ever given: in grants, and as those of guests
        self._given: Counter[int] = Counter()
        #: owners of shared frames that are not guests (see `pin`)
        self._pins = 0

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
        self._open(block)
        return block

    def _open(self, block: VmBlock) -> Charge:
        self._blocks[block.first] = block
        charge = self._charges[block.first] = Charge(block.pages)
        block.p2m.fetch = self.stores.fetch
        return charge

    def frames_for_loading(self, count: int) -> Magazine:
        """Exactly so many frames, which the daemon fills; each is to be `loaded`, sent or `unused`."""
        with _short_of_memory():
            magazine = Magazine(self._allocator.lend(LOADER, count))
        self._loading += count
        return magazine

    def loaded(self, count: int) -> None:
        """So many frames for loading are in pages of guests, or pinned."""
        self._loading -= count

    def unused(self, frames: np.ndarray) -> None:
        """These frames for loading came into no guest."""
        self._loading -= len(frames)
        self._give_back(frames)

    def clone(self, source: VmBlock) -> VmBlock:
        """A second guest with the memory of `source`, which no worker has."""
        with _short_of_memory():
            block = clone_block(self._allocator, source)
        ours, charge = self._charges[source.first], self._open(block)
        shared = _shared_frames(source)
        if not ours.snapshot or not np.array_equal(ours.frames, shared):
            ours.frames, ours.snapshot = shared, next(self._snapshots)
        charge.frames, charge.snapshot = shared.copy(), ours.snapshot
        leaf = source.leaf()
        stored = np.flatnonzero(leaf & np.uint64(STORED))
        charge.slots[stored] = _numbers(leaf[stored])
        self.stores.retain(charge.slots[stored])
        return block

    def snapshot(self, block: VmBlock) -> int:
        """The number of the moment since which its shared frames have not changed; 0: none."""
        return self._charges[block.first].snapshot

    def free(self, block: VmBlock) -> None:
        """A guest that no worker has any more is gone."""
        del self._blocks[block.first]
        charge = self._charges.pop(block.first)
        self._allocator.drop(charge.frames[charge.frames != 0])
        self.stores.release(charge.slots[charge.slots != 0])
        leaf = block.leaf()
        leaf[FrameAllocator.is_shared(leaf)] = 0        # what is shared is in the charge
        free_block(self._allocator, block)

    # --- what workers report of guests

    def adopted(self, block: VmBlock, worker: int) -> None:
        """The guest goes to a worker."""
        self._given[worker] += self._allocator.settle(worker + 1, block.leaf())

    def reported(self, block: VmBlock, dropped: Sequence[int], freed: Sequence[int],
                 fetched: Sequence[int]) -> None:
        """Pages of the guest let go of their shared frames, frames it had for itself are given back, and
        pages have no use for their slots any more.  Raises ValueError for what cannot be."""
        charge = self._charges[block.first]
        if any(not 0 <= page < block.pages for page in (*dropped, *fetched)):
            raise ValueError("a page beyond the guest's memory")
        self._drop(charge, np.array(dropped, dtype=np.int64))
        self._release(charge, np.array(fetched, dtype=np.int64))
        self._give_back(np.array(freed, dtype=np.int64))

    def _drop(self, charge: Charge, pages: np.ndarray) -> None:
        frames = charge.frames[pages]
        charge.frames[pages] = 0
        self._allocator.drop(frames[frames != 0])

    def _release(self, charge: Charge, pages: np.ndarray) -> None:
        slots = charge.slots[pages]
        charge.slots[pages] = 0
        self.stores.release(slots[slots != 0])

    def _give_back(self, frames: np.ndarray) -> None:
        if not len(frames):
            return
        if frames.min() < 1 or frames.max() >= self._pool.frames or not self._allocator.lent(frames):
            raise ValueError("a frame that was not lent")
        self._allocator.give_back(frames)

    # --- for the host's sake (vmm/memory/reclaim.py); `pages` are those for which it was done

    def frozen(self, block: VmBlock, pages: np.ndarray, frames: np.ndarray) -> None:
        """Private frames of the guest became shared ones."""
        charge = self._charges[block.first]
        charge.snapshot = 0
        charge.frames[pages] = frames
        self._allocator.adopt_shared(frames)

    def pin(self, frames: np.ndarray) -> None:
        """One owner more for shared frames, who is no guest.  While they are pinned nobody reuses them."""
        self._pins += len(frames)
        self._allocator.retain(frames)

    def pin_shared(self, block: VmBlock, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Those of these pages of a guest that share a frame, alone or with others; and the frames, each
        pinned once."""
        frames = self._charges[block.first].frames[pages].astype(np.int64)
        there = frames != 0
        self.pin(frames[there])
        return pages[there], frames[there]

    def unpin(self, frames: np.ndarray) -> None:
        """The end of a pin, or of one that `merged` did not use up."""
        self._pins -= len(frames)
        self._allocator.drop(frames)

    def shares(self, frames: np.ndarray) -> np.ndarray:
        """How many owners each of these shared frames has, pins included."""
        return self._allocator.shares(frames)

    def sole(self, block: VmBlock) -> np.ndarray:
        """The pages of a guest whose shared frames have no other owner any more, nor a pin."""
        frames = self._charges[block.first].frames
        return np.flatnonzero((frames != 0) & (self.shares(frames) == 1))

    def thawing(self, block: VmBlock, pages: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        """Those of these pages of a guest that are `sole` are to have their frames for themselves again: the
        number of a passage (see `send`), the pages and the frames.

        Invariant: until `arrived` or `returned` the frames are with nobody but that passage, so that nobody
        pins what somebody may write.
        """
        pages = pages[np.isin(pages, self.sole(block))]
        charge = self._charges[block.first]
        frames = charge.frames[pages].astype(np.int64)
        charge.frames[pages] = 0
        self._allocator.make_private(frames)
        return self._pass(frames), pages, frames

    def merged(self, block: VmBlock, pages: np.ndarray, frames: np.ndarray, freed: np.ndarray) -> None:
        """Pages share `frames` now; they had been pinned once for each page, and the pin is used up."""
        charge = self._charges[block.first]
        charge.snapshot = 0
        charge.frames[pages] = frames
        self._pins -= len(frames)
        self._give_back(freed)

    def zeroed(self, freed: np.ndarray) -> None:
        """Pages full of zeros gave up their frames."""
        self._give_back(freed)

    def stored(self, block: VmBlock, pages: np.ndarray, slots: np.ndarray) -> None:
        """Pages let go of their shared frames; what was in them is in `slots`, which they own now."""
        charge = self._charges[block.first]
        self._drop(charge, pages)
        charge.slots[pages] = slots

    def refer(self, block: VmBlock, pages: np.ndarray, slots: np.ndarray) -> None:
        """Pages of a guest without frames: what is to be in them is in `slots`, which they own now."""
        self._charges[block.first].slots[pages] = slots
        block.leaf()[pages] = slots << np.uint64(PAGE_SHIFT) | np.uint64(STORED)

    def share(self, block: VmBlock, pages: np.ndarray, frames: np.ndarray) -> None:
        """Pages of a guest without frames share these, which are pinned: contents that several guests have,
        loaded once."""
        charge = self._charges[block.first]
        charge.snapshot = 0
        self._allocator.retain(frames)
        charge.frames[pages] = frames
        block.leaf()[pages] = frames.astype(np.uint64) << np.uint64(PAGE_SHIFT) | np.uint64(SHARED_BITS)

    def freeze(self, block: VmBlock, pages: np.ndarray) -> None:
        """Private pages of a guest that no worker has become shared ones, with it as their only owner."""
        self.frozen(block, *freeze(block.p2m, pages))

    def stores_of(self, block: VmBlock) -> list[int]:
        """Numbers of the stores in which pages of the guest are."""
        slots = self._charges[block.first].slots
        return [int(number) for number in np.unique(slots[slots != 0] >> np.uint64(32))]

    # --- from another host

    def send(self, frames: np.ndarray) -> int:
        """Frames that the daemon filled are on their way to a guest; the number of their passage.

        Invariant: until `arrived` or `returned` they are with nobody but that passage, so a worker's death
        on the way, or a guest's end, takes none of them along and gives none back twice.
        """
        self._loading -= len(frames)
        return self._pass(frames)

    def _pass(self, frames: np.ndarray) -> int:
        passage = _PASSAGES + next(self._passages) % _PASSAGES
        if len(frames):
            self._under_way.add(passage)
        self._allocator.pass_on(passage, frames)
        return passage

    def arrived(self, block: VmBlock, worker: int | None, passage: int, pages: np.ndarray,
                frames: np.ndarray, unused: np.ndarray) -> None:
        """`pages` of a guest with a worker (None: with none) have frames of this passage now instead of
        slots, all but the `unused` ones, which come back."""
        self._release(self._charges[block.first], pages)
        self._give_back(self._allocator.of(passage, unused))
        self._under_way.discard(passage)
        self._allocator.pass_on(LOADER if worker is None else worker + 1,
                                self._allocator.of(passage, frames))

    def returned(self, passage: int, frames: np.ndarray) -> None:
        """The guest has no use for these frames: those it has not taken along with its end come back, and
        the passage is over."""
        self._under_way.discard(passage)
        self._give_back(self._allocator.of(passage, frames))

    # --- workers

    def lend(self, worker: int, count: int) -> list[Extent]:
        """Frames for a worker's magazine: as many of `count` as there are, perhaps none."""
        count = min(count, self._allocator.free_frames())
        self._given[worker] += count
        return self._allocator.lend(worker + 1, count) if count else []

    def given_back(self, worker: int, extents: Sequence[Extent]) -> None:
        """Frames from a worker's magazine.  Raises ValueError for what cannot be."""
        if any(not 0 < first < first + count <= self._pool.frames for first, count in extents):
            raise ValueError("a frame that is none")
        for first, count in extents:
            frames = np.arange(first, first + count)
            if len(self._allocator.of(worker + 1, frames)) < count:
                raise ValueError("a frame that was not lent to it")
            self._give_back(frames)

    def reclaim(self, worker: int) -> int:
        """The worker is dead and its guests are freed: what it had in stock comes back."""
        return self._allocator.reclaim(worker + 1, self._leaves())

    def given(self, worker: int) -> int:
        """How many frames the worker was ever given."""
        return self._given[worker]

    def check_worker(self, worker: int, frames: int, given: int, held: Iterable[VmBlock]) -> str:
        """What is wrong, in a sentence, if a worker says that it has so many `frames`, in stock and in its
        guests' own pages; "" if that is right.  It had been `given` so many when it was asked; `held` are the
        guests that workers have.

        Invariant: all that changes what a worker has is told in messages.  Of those to it, what it counted
        is all that was sent before the question; of those from it, what the ledger knows is all that was sent
        before the answer.  So this is exact, however busy the host is, when the answer is looked at as it
        comes.
        """
        taken = {block.first for block in held}
        others = [block.leaf() for first, block in self._blocks.items() if first not in taken]
        lent = self._allocator.lent_to(worker + 1, others) - (self._given[worker] - given)
        if frames == lent:
            return ""
        return f"worker {worker} has {frames} frames, and {lent} are lent to it"

    # --- the books

    def free_frames(self) -> int:
        """Frames that can be had: those that nobody has, but for what is kept for overhead."""
        return self._allocator.free_frames()

    def counts(self) -> FrameCounts:
        count = self._allocator.count(self._leaves())
        return FrameCounts(total=count.total, free=count.free, granted=count.on_loan, private=count.private,
                           shared=count.shared, overhead=count.overhead)

    def check(self) -> list[str]:
        """Every disagreement between ledger and guests, a sentence each.

        What workers have not reported yet shows as one: true is what two checks say, all workers having
        answered in between.
        """
        charges = [charge.frames[charge.frames != 0] for charge in self._charges.values()]
        wrong = (self._allocator.check(self._leaves()) + self._allocator.check_shares(charges, self._pins)
                 + self._check_loans())
        for block in self._blocks.values():
            charge = self._charges[block.first]
            for what, has, owns in (("frame", _shared_frames(block), charge.frames),
                                    ("slot", _stored_slots(block), charge.slots)):
                for page in np.flatnonzero(has != owns)[:_MOST_TOLD].tolist():
                    wrong.append(f"page {page} of the guest at {block.first} has the {what} {has[page]} in "
                                 f"common with others, and is charged with {owns[page]}")
        return wrong

    def _check_loans(self) -> list[str]:
        """What the daemon itself has on loan is on its way to guests."""
        wrong = []
        loading = self._allocator.lent_to(LOADER, self._leaves())
        if loading > self._loading:
            wrong.append(f"{loading} frames are lent to load guests, and {self._loading} of them in use")
        for passage in self._allocator.borrowers().tolist():
            if passage >= _PASSAGES and passage not in self._under_way:
                wrong.append(f"frames are on passage {passage}, which is over")
        return wrong

    def _leaves(self) -> list[np.ndarray]:
        return [block.leaf() for block in self._blocks.values()]


def _numbers(entries: np.ndarray) -> np.ndarray:
    """Slots or frames in P2M entries."""
    return (entries & np.uint64(FRAME_MASK)) >> np.uint64(PAGE_SHIFT)


def _shared_frames(block: VmBlock) -> np.ndarray:
    """The shared frame of each page, 0 where it has none."""
    leaf = block.leaf().copy()
    return np.where(FrameAllocator.is_shared(leaf), _numbers(leaf), np.uint64(0)).astype(np.uint32)


def _stored_slots(block: VmBlock) -> np.ndarray:
    """The slot of each page, 0 where it is in none."""
    leaf = block.leaf().copy()
    return np.where((leaf & np.uint64(STORED)) != 0, _numbers(leaf), np.uint64(0))


@contextmanager
def _short_of_memory() -> Iterator[None]:
    """Say in the host's words that the pool is exhausted."""
    try:
        yield
    except OutOfFrames as error:
        raise Failed(f"not enough machine memory: {error}") from None
