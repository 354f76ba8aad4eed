# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's frames out of its worker's stock: as many as it may have, and no more.

Its limit is on pages that have a frame, shared or not: so neither what others do to the frames that it shares
nor its own writes to them change how many it may touch.  One that is blocked gets no frame at all, and what
counts are those that it has for itself.
"""

from __future__ import annotations

import sys

import numpy as np

from hostd.protocol import Most
from vmm.memory.errors import OutOfFrames
from vmm.memory.frames import FrameAllocator, FrameSource
from vmm.memory.p2m import P2M


class Ration:
    """A FrameSource for one guest.

    Invariant: the guest takes no frame unless fewer than `most.own` are private to it, and none for a page
    that had none unless fewer than `most.pages` have one: `_own` and `_pages` are never more than what was
    missing when they were last counted, less what was taken since.
    """

    def __init__(self, stock: FrameSource, p2m: P2M, most: Most) -> None:
        self._stock = stock
        self._p2m = p2m
        self.set(most)

    def set(self, most: Most) -> None:
        """Let the guest have so many frames."""
        self._most = most
        self._limited = most != Most()
        self._pages = self._own = 0
        #: the guest was refused a frame because of its ration alone
        self.used_up = False

    def recount(self) -> None:
        """The host did something to its pages: frames are missing, or are there, that nobody took."""
        self.set(self._most)

    def take(self) -> int:
        """One zeroed frame, for a page that has none.  Raises OutOfFrames."""
        if self._limited:
            if self._pages <= 0 or self._own <= 0:
                self._count()
                self._check(min(self._pages, self._own))
            frame = self._stock.take()
            self._pages -= 1
            self._own -= 1
            return frame
        return self._stock.take()

    def exchange(self) -> int:
        """One zeroed frame, for a page that shares another.  Raises OutOfFrames."""
        if self._limited:
            if self._own <= 0:
                self._count()
            self._check(self._own)
            self._own -= 1
        return self._stock.take()

    def _count(self) -> None:
        """Count what is missing."""
        leaf = np.frombuffer(self._p2m.leaf, dtype=np.uint64)
        private = int(np.count_nonzero(FrameAllocator.is_private(leaf)))
        shared = int(np.count_nonzero(FrameAllocator.is_shared(leaf)))
        pages, own = (sys.maxsize if most is None else most for most in self._most)
        self._pages, self._own = pages - private - shared, own - private

    def _check(self, left: int) -> None:
        """Raise OutOfFrames if that is nothing."""
        self.used_up = left <= 0
        if self.used_up:
            raise OutOfFrames(f"the guest has as many frames as it may: {self._most}")

    def __len__(self) -> int:
        stock = len(self._stock)
        return min(stock, max(0, min(self._pages, self._own))) if self._limited else stock
