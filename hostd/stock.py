# SPDX-License-Identifier: GPL-2.0-or-later
"""The frames that a worker has for its guests, and when it asks for more."""

from __future__ import annotations

from collections.abc import Iterable

from hostd.policy import stock as sizes
from hostd.protocol import GivenBack, NeedFrames
from vmm.memory.frames import Extent, Magazine


class Stock:
    """`refill` frames are asked for at once."""

    def __init__(self, refill: int) -> None:
        self.magazine = Magazine()
        self._refill = refill
        self._asked = False

    def wanted(self) -> NeedFrames | None:
        """Ask for frames before they run out."""
        if self._asked or len(self.magazine) >= sizes.low(self._refill):
            return None
        self._asked = True
        return NeedFrames(self._refill)

    def granted(self, extents: Iterable[Extent]) -> None:
        """They came, or what there was of them."""
        self._asked = False
        for first, count in extents:
            self.magazine.add(first, count)

    def spare(self, guests: bool) -> GivenBack | None:
        """What it can do without: all, but for what `guests`, if there are some, may soon need."""
        extents = self.magazine.give(len(self.magazine) - (sizes.low(self._refill) if guests else 0))
        return GivenBack(extents) if extents else None
