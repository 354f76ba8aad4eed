# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's frames out of its worker's stock: as many of its own as it may have, and no more."""

from __future__ import annotations

import numpy as np

from vmm.memory.errors import OutOfFrames
from vmm.memory.frames import FrameAllocator, FrameSource
from vmm.memory.p2m import P2M


class Ration:
    """A FrameSource for one guest.

    Invariant: with a ration of `most` the guest takes no frame unless fewer than that are private to it:
    `_left` is never more than what was missing when they were last counted, less what was taken since.
    """

    def __init__(self, stock: FrameSource, p2m: P2M, most: int | None) -> None:
        self._stock = stock
        self._p2m = p2m
        self.set(most)

    def set(self, most: int | None) -> None:
        """Let the guest have `most` frames of its own; None: all that there are."""
        self._most = most
        self._left = 0
        #: the guest was refused a frame because of its ration alone
        self.used_up = False

    def recount(self) -> None:
        """The host did something to its pages: frames are missing, or are there, that nobody took."""
        self.set(self._most)

    def take(self) -> int:
        """One zeroed frame.  Raises OutOfFrames."""
        if self._most is None:
            return self._stock.take()
        if self._left <= 0:
            private = FrameAllocator.is_private(np.frombuffer(self._p2m.leaf, dtype=np.uint64))
            self._left = self._most - int(np.count_nonzero(private))
        self.used_up = self._left <= 0
        if self.used_up:
            raise OutOfFrames(f"the guest has all of the {self._most} frames that it may have")
        frame = self._stock.take()
        self._left -= 1
        return frame

    def __len__(self) -> int:
        return len(self._stock) if self._most is None else min(len(self._stock), max(0, self._left))
