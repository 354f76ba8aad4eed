# SPDX-License-Identifier: GPL-2.0-or-later
"""Who owns which machine frame.

The daemon owns the pool and lends frames to workers in extents (a worker's magazine); a worker puts them
into P2M entries on first touch and on copy-on-write.  The P2M arrays live in the pool itself, so what a dead
worker had done is read from them, not asked of it.

Invariant: a frame is free, or overhead of one VM, or on loan to a worker and not yet used, or in exactly
one P2M entry as private, or in n >= 1 P2M entries as shared.  `FrameAllocator.count` counts each of these;
they add up to the pool.  A share count may be too high for a moment (a worker's drop still under way), never
too low.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vmm.memory.errors import OutOfFrames
from vmm.memory.p2mbits import FRAME_MASK, KIND_MASK, KIND_SHIFT, Kind
from vmm.memory.pool import PAGE_SHIFT, Pool

Extent = tuple[int, int]   # first frame, how many

FREE, OVERHEAD, LOAN = 0, 1, 2   # LOAN + n: lent to borrower n
_PRIVATE, _SHARED = np.uint64(Kind.PRIVATE << KIND_SHIFT), np.uint64(Kind.SHARED << KIND_SHIFT)


class FrameSource(Protocol):
    """Where a P2M gets its frames: zeroed, one at a time; `take` for a page that has none, `exchange` for one
    that shares its frame and is to have one of its own.  Both raise OutOfFrames."""

    def take(self) -> int: ...

    def exchange(self) -> int: ...

    def __len__(self) -> int: ...


class Magazine:
    """The frames a worker holds in stock."""

    def __init__(self, extents: Iterable[Extent] = ()) -> None:
        self._extents: list[Extent] = []
        self._next = self._end = 0
        self._stock = 0
        for first, count in extents:
            self.add(first, count)

    def add(self, first: int, count: int) -> None:
        """Take `count` frames from `first` into stock."""
        self._extents.append((first, count))
        self._stock += count

    def take(self) -> int:
        """One zeroed frame.  Raises OutOfFrames."""
        if self._next == self._end:
            self._open_extent()
        frame = self._next
        self._next += 1
        self._stock -= 1
        return frame

    exchange = take

    def give(self, count: int) -> list[Extent]:
        """Take `count` frames out of stock, if that many are there."""
        given = []
        while count > 0 and self._stock:
            if self._next == self._end:
                self._open_extent()
            use = min(count, self._end - self._next)
            given.append((self._next, use))
            self._next += use
            self._stock -= use
            count -= use
        return given

    def _open_extent(self) -> None:
        if not self._extents:
            raise OutOfFrames("no frame in stock")
        self._next, count = self._extents.pop()
        self._end = self._next + count

    def rest(self) -> np.ndarray:
        """All that are left, which are not in stock any more."""
        return np.array([self.take() for _ in range(self._stock)], dtype=np.int64)

    def __len__(self) -> int:
        return self._stock


@dataclass(frozen=True)
class FrameCount:
    """Frames of the pool by state, each counted for itself; `on_loan`: lent, and in no guest's page."""

    free: int
    overhead: int
    on_loan: int
    private: int
    shared: int

    @property
    def total(self) -> int:
        """All of them: the pool, unless the ledger is wrong."""
        return self.free + self.overhead + self.on_loan + self.private + self.shared


def _extents(free: np.ndarray) -> list[Extent]:
    """Frame numbers, ascending, as extents; the longest last: `pop` serves from the largest extent."""
    if not len(free):
        return []
    breaks = np.flatnonzero(np.diff(free) != 1) + 1
    starts = free[np.concatenate(([0], breaks))]
    ends = free[np.concatenate((breaks - 1, [len(free) - 1]))] + 1
    order = np.argsort(ends - starts)
    return [(int(starts[i]), int(ends[i] - starts[i])) for i in order]


class FrameAllocator:
    """The daemon's ledger of the pool.  Not thread safe: one owner.

    The first `reserve` frames are for runs only and never lent: when memory was short once, what is free lies
    scattered among guests' pages, and no run would be found there.
    """

    def __init__(self, pool: Pool, reserve: int = 0, on_freed: Callable[[], None] = lambda: None) -> None:
        self.pool = pool
        #: called whenever frames have come free; they may be lent again there and then
        self._on_freed = on_freed
        #: frames below are for runs
        self._lendable = 1 + min(reserve, pool.frames - 1)
        self._owner = np.zeros(pool.frames, dtype=np.int16)
        self._refs = np.zeros(pool.frames, dtype=np.uint32)
        self._owner[0] = OVERHEAD   # frame 0 stays empty: a zero entry never names memory
        self._rescan()
        # how many frames of `_owner` are FREE and OVERHEAD: a pool has millions, too many to count each time
        self._free, self._overhead = pool.frames - 1, 1
        #: of the free ones, those that are for runs
        self._kept = self._lendable - 1

    # -- taking ------------------------------------------------------------------------------------

    def owners(self) -> np.ndarray:
        """Whose each frame is: FREE, OVERHEAD, LOAN + borrower."""
        return self._owner.copy()

    def free_frames(self) -> int:
        """How many frames can be lent."""
        return self._free - self._kept

    def _rescan(self) -> None:
        self._runs = _extents(np.flatnonzero(self._owner[:self._lendable] == FREE))
        self._extents = _extents(np.flatnonzero(self._owner[self._lendable:] == FREE) + self._lendable)

    def _take(self, count: int, owner: int) -> list[Extent]:
        taken: list[Extent] = []
        want = count
        rescanned = False
        while want:
            if not self._extents:
                if rescanned:
                    break
                self._rescan()
                rescanned = True
                continue
            first, have = self._extents.pop()
            use = min(have, want)
            if use < have:
                self._extents.append((first + use, have - use))
            self._owner[first:first + use] = owner
            taken.append((first, use))
            want -= use
        if want:
            for first, use in taken:
                self._owner[first:first + use] = FREE
            self._rescan()
            raise OutOfFrames(f"{count} frames wanted, only {count - want} of {self.pool.frames} are free")
        self._free -= count
        return taken

    def alloc_run(self, count: int) -> int:
        """First of `count` contiguous zeroed frames of overhead.  Raises OutOfFrames."""
        first = self._find_run(count)
        if first is None:
            self._rescan()
            first = self._find_run(count)
        if first is None:
            raise OutOfFrames(f"no {count} contiguous frames are free in the pool")
        self._owner[first:first + count] = OVERHEAD
        self._count_run(first, count)
        return first

    def _find_run(self, count: int) -> int | None:
        """Cut a run off an extent; of those kept for runs if one is long enough."""
        for extents in self._runs, self._extents:
            for index in range(len(extents) - 1, -1, -1):
                first, have = extents[index]
                if have >= count:
                    extents[index:index + 1] = [(first + count, have - count)] if have > count else []
                    return first
        return None

    def _count_run(self, first: int, count: int) -> None:
        """`count` frames from `first` are overhead now; or, if it is negative, no longer."""
        self._free -= count
        self._overhead += count
        if first < self._lendable:
            self._kept -= count

    def free_run(self, first: int, count: int) -> None:
        """Give overhead back."""
        self._owner[first:first + count] = FREE
        self._count_run(first, -count)
        self.pool.release(first, count)
        self._on_freed()

    def lend(self, borrower: int, count: int) -> list[Extent]:
        """`count` zeroed frames on loan to `borrower` (0..30000).  Raises OutOfFrames."""
        return self._take(count, LOAN + borrower)

    # -- guests' pages -----------------------------------------------------------------------------

    @staticmethod
    def split(leaf: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Frames of the private and of the shared entries of a P2M leaf array."""
        leaf = leaf.copy()                              # a worker may be writing to it
        kinds = leaf & np.uint64(KIND_MASK)
        frames = ((leaf & np.uint64(FRAME_MASK)) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
        return frames[kinds == _PRIVATE], frames[kinds == _SHARED]

    def share(self, leaf: np.ndarray) -> None:
        """Count one more owner for every frame of `leaf`, whose entries have just become shared twice."""
        private, shared = self.split(leaf)
        assert not len(private), "a page that is counted as shared is private"
        np.add.at(self._refs, shared, 1)

    def adopt_shared(self, frames: np.ndarray) -> None:
        """Frames that were private become shared by their one owner."""
        self._refs[frames] = 1

    def make_private(self, frames: np.ndarray) -> None:
        """Frames that were shared are somebody's alone again."""
        self._refs[frames] = 0

    def drop(self, frames: Iterable[int]) -> None:
        """Entries that shared these frames let them go (copy-on-write breaks)."""
        array = np.fromiter(frames, dtype=np.int64) if not isinstance(frames, np.ndarray) else frames
        np.subtract.at(self._refs, array, 1)
        gone = np.unique(array[self._refs[array] == 0])
        self._free_frames(gone)

    def free_leaf(self, leaf: np.ndarray) -> None:
        """A guest is gone: its private frames are free, its shared ones have an owner less."""
        private, shared = self.split(leaf)
        self._free_frames(private)
        self.drop(shared)
        leaf[:] = 0

    def settle(self, borrower: int, leaf: np.ndarray) -> int:
        """A guest goes to a borrower, who answers for its private frames from now on: what it gives back and
        does not live to tell comes back with its stock.  The answer is how many these are."""
        private, _ = self.split(leaf)
        self._owner[private] = LOAN + borrower
        return len(private)

    def pass_on(self, borrower: int, frames: np.ndarray) -> None:
        """Frames on loan go to another borrower."""
        self._owner[frames] = LOAN + borrower

    def of(self, borrower: int, frames: np.ndarray) -> np.ndarray:
        """Those of these frames that are on loan to a borrower."""
        return frames[self._owner[frames] == LOAN + borrower]

    def give_back(self, frames: Iterable[int]) -> None:
        """Private frames that guests have let go of."""
        self._free_frames(np.unique(np.fromiter(frames, dtype=np.int64)))

    def lent(self, frames: np.ndarray) -> bool:
        """Whether all of these are on loan, and shared by nobody."""
        return bool((self._owner[frames] >= LOAN).all() and not self._refs[frames].any())

    @staticmethod
    def is_shared(leaf: np.ndarray) -> np.ndarray:
        """Which entries of a P2M leaf array share a frame."""
        return (leaf & np.uint64(KIND_MASK)) == _SHARED

    @staticmethod
    def is_private(leaf: np.ndarray) -> np.ndarray:
        """Which entries of a P2M leaf array have a frame for themselves."""
        return (leaf & np.uint64(KIND_MASK)) == _PRIVATE

    def retain(self, frames: np.ndarray) -> None:
        """Each of these frames, shared or about to be, has an owner more."""
        np.add.at(self._refs, frames, 1)

    def shares(self, frames: np.ndarray) -> np.ndarray:
        """How many owners are counted for each."""
        return self._refs[frames]

    def reclaim(self, borrower: int, leaves: Iterable[np.ndarray]) -> int:
        """A borrower is gone and its guests are freed: what it had in stock is free again.

        `leaves` are the P2M arrays of all guests that exist (a guest that moved took its frames along).
        Share counts stay: what other borrowers have dropped may still be on its way here, and would be
        dropped twice.  Returns the number of frames that came back.
        """
        stock = self._owner == LOAN + borrower
        stock &= self._refs == 0
        for leaf in leaves:
            private, _ = self.split(leaf)
            stock[private] = False
        back = np.flatnonzero(stock)
        self._free_frames(back)
        return len(back)

    def _free_frames(self, frames: np.ndarray) -> None:
        if not len(frames):
            return
        self._owner[frames] = FREE
        self._free += len(frames)
        frames = np.sort(frames)
        breaks = np.flatnonzero(np.diff(frames) != 1) + 1
        for run in np.split(frames, breaks):
            self.pool.release(int(run[0]), len(run))
        self._on_freed()

    # -- the books ---------------------------------------------------------------------------------

    def count(self, leaves: Iterable[np.ndarray]) -> FrameCount:
        """Frames by state, from the ledger and the P2M arrays of all guests."""
        private_frames = 0
        in_use, shared_frames = (np.zeros(self.pool.frames, dtype=bool) for _ in range(2))
        for leaf in leaves:
            private, shared = self.split(leaf)
            private_frames += len(private)
            in_use[private] = shared_frames[shared] = True
        in_use |= shared_frames
        on_loan = int(np.count_nonzero((self._owner >= LOAN) & ~in_use))
        return FrameCount(self._free, self._overhead, on_loan, private_frames,
                          int(np.count_nonzero(shared_frames)))

    def lent_to(self, borrower: int, leaves: Iterable[np.ndarray]) -> int:
        """How many frames a borrower has that nobody shares, but for those in these P2M arrays."""
        has = (self._owner == LOAN + borrower) & (self._refs == 0)
        for leaf in leaves:
            has[self.split(leaf)[0]] = False
        return int(np.count_nonzero(has))

    def borrowers(self) -> np.ndarray:
        """All that there are."""
        return np.unique(self._owner[self._owner >= LOAN]) - LOAN

    def check_shares(self, charged: Iterable[np.ndarray], pins: int) -> list[str]:
        """The same for share counts: owners are the pages `charged` with these frames, and `pins`."""
        none = np.zeros(0, dtype=np.int64)
        pages = np.bincount(np.concatenate([none, *charged]), minlength=self.pool.frames)
        wrong = [f"frame {frame} is charged to {pages[frame]} pages and has {self._refs[frame]} owners"
                 for frame in np.flatnonzero(pages > self._refs)[:8].tolist()]
        others = int(self._refs.sum()) - int(pages.sum())
        if others != pins:
            wrong.append(f"shared frames have {others} owners that are no guests, and {pins} are pinned")
        return wrong

    def check(self, leaves: Iterable[np.ndarray]) -> list[str]:
        """Every way in which ledger and P2M arrays disagree, a sentence each; empty if they balance."""
        wrong: list[str] = []
        for name, state, counted in ("free", FREE, self._free), ("overhead", OVERHEAD, self._overhead):
            there = int(np.count_nonzero(self._owner == state))
            if there != counted:
                wrong.append(f"{there} frames are {name}, {counted} are counted")
        private_refs = np.zeros(self.pool.frames, dtype=np.uint32)
        shared_refs = np.zeros(self.pool.frames, dtype=np.uint32)
        for leaf in leaves:
            private, shared = self.split(leaf)
            np.add.at(private_refs, private, 1)
            np.add.at(shared_refs, shared, 1)
        for frames, sentence in (
                (private_refs > 1, "private to more than one guest page"),
                ((private_refs > 0) & (shared_refs > 0), "both private and shared"),
                (((private_refs > 0) | (shared_refs > 0)) & (self._owner < LOAN), "in use but not lent"),
                (shared_refs > self._refs, "shared by more entries than counted")):
            for frame in np.flatnonzero(frames)[:8]:
                wrong.append(f"frame {int(frame)} is {sentence}")
        return wrong


class LocalFrames:
    """A FrameSource straight from an allocator, for a machine without a daemon."""

    def __init__(self, allocator: FrameAllocator, limit: int | None = None) -> None:
        self._allocator = allocator
        self._magazine = Magazine()
        self._left = limit if limit is not None else allocator.pool.frames

    def take(self) -> int:
        """One zeroed frame.  Raises OutOfFrames."""
        if not len(self._magazine):
            chunk = min(1024, self._left, self._allocator.free_frames())
            if not chunk:
                raise OutOfFrames("no frame left")
            self._left -= chunk
            for first, count in self._allocator.lend(0, chunk):
                self._magazine.add(first, count)
        return self._magazine.take()

    exchange = take

    def __len__(self) -> int:
        return len(self._magazine) + min(self._left, self._allocator.free_frames())
