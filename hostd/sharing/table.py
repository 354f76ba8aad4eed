# SPDX-License-Identifier: GPL-2.0-or-later
"""What the scanner remembers of contents: shared frames that have them, and pages that wait for an equal."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

_HALF = np.uint64(32)


class Table:
    """Shared frames by the hash of their contents.

    Invariant: every frame in it is shared and pinned once on the table's behalf, so nobody writes it and its
    hash is exact; there is one entry of `_order` for each of `_frames`.
    """

    def __init__(self) -> None:
        self._frames: dict[int, int] = {}
        self._order: deque[tuple[int, int]] = deque()

    def __len__(self) -> int:
        return len(self._frames)

    def add(self, hashes: np.ndarray, frames: np.ndarray) -> np.ndarray:
        """Take pinned frames in.  The answer is those that are not needed: another has their hash."""
        spare = []
        for key, frame in zip(hashes.tolist(), frames.tolist(), strict=True):
            if key in self._frames:
                spare.append(frame)
            else:
                self._frames[key] = frame
                self._order.append((key, frame))
        return np.array(spare, dtype=np.int64)

    def frames(self, hashes: np.ndarray) -> np.ndarray:
        """The frame with each of these hashes, 0 where there is none."""
        get = self._frames.get
        return np.array([get(key, 0) for key in hashes.tolist()], dtype=np.int64)

    def all_frames(self) -> np.ndarray:
        """Every frame in it."""
        return np.fromiter(self._frames.values(), dtype=np.int64, count=len(self._frames))

    def sweep(self, shares: Callable[[np.ndarray], np.ndarray], most: int, least: int = 1) -> np.ndarray:
        """Drop entries of frames that fewer than `least` pages have, and say which they were.

        It looks at the next `most` of them; `shares` tells how many owners frames have, the pin included.
        """
        looked = [self._order.popleft() for _ in range(min(most, len(self._order)))]
        if not looked:
            return np.empty(0, dtype=np.int64)
        frames = np.array([frame for _, frame in looked], dtype=np.int64)
        wanted = shares(frames) > least
        for entry, keep in zip(looked, wanted.tolist(), strict=True):
            if keep:
                self._order.append(entry)
            else:
                del self._frames[entry[0]]
        return frames[~wanted]


class Waiting:
    """Pages that have not changed for a pass, by hash: one a slot, the last that came.

    A page is a number, not 0 (`Scanner`'s places).  What is in a slot is only where to look: who looks
    compares the hash.  `clear` is called between passes and puts hashes in other slots, so that two which
    fell into one slot do not do so for ever.
    """

    def __init__(self, key: np.random.Generator) -> None:
        self._key = key
        self.clear(0)

    def clear(self, pages: int) -> None:
        """Forget all, and have room for about `pages` pages."""
        bits = max(14, pages.bit_length() + 1)
        self._slots = np.zeros(1 << bits, dtype=np.int64)
        self._factor = self._key.integers(0, 1 << 64, dtype=np.uint64) | np.uint64(1)
        self._shift = np.uint64(64 - bits)

    def at(self, hashes: np.ndarray) -> np.ndarray:
        """The slots of these hashes."""
        # hashes of like contents are evenly spaced, which a product alone would keep
        return (hashes ^ hashes >> _HALF) * self._factor >> self._shift

    def get(self, slots: np.ndarray) -> np.ndarray:
        """The pages in slots; 0 is none."""
        return self._slots[slots]

    def put(self, slots: np.ndarray, places: np.ndarray) -> None:
        """Have these pages wait, instead of those that did."""
        self._slots[slots] = places
