# SPDX-License-Identifier: GPL-2.0-or-later
"""A keyed hash of pages, for many pages at once.

The hash of a page is the sum of its 1024 doublewords, each times its own secret 64-bit key, modulo 2**64
(multilinear hashing: D. Lemire and O. Kaser, Strongly universal string hashing is fast, 2014).  Two different
pages chosen without knowledge of the keys collide with a probability of at most 2**-33: doublewords differ by
less than 2**32, so at most 31 of the 64 bits of a product say nothing.  Keys for quadwords would not do:
pages that differ in top bits only would collide every second time, or with odd keys always.  The hash of a
page of zeros is 0.
"""

from __future__ import annotations

import numpy as np

from vmm.memory.pool import PAGE, Pool

_WORDS = PAGE // 8
#: pages copied and hashed at once; together they fit a CPU's own cache
_PIECE = 64
_HALF = np.uint64(32)


class PageHash:
    """Hashes of frames of a pool.  Not thread safe: it has one buffer."""

    def __init__(self, pool: Pool, key: np.random.Generator) -> None:
        self._words = np.frombuffer(pool.q, dtype=np.uint64).reshape(-1, _WORDS)
        self._low, self._high = key.integers(0, 1 << 64, (2, _WORDS), dtype=np.uint64)
        self._buffer = np.empty((_PIECE, _WORDS), dtype=np.uint64)

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """One uint64 for each frame number (int64); for one beyond the pool it says nothing."""
        hashes = np.empty(len(frames), dtype=np.uint64)
        for start in range(0, len(frames), _PIECE):
            piece = frames[start:start + _PIECE]
            words = self._buffer[:len(piece)]
            np.take(self._words, piece, axis=0, out=words, mode="clip")
            # low * K + high * L, with K the key of `_low` and L = K * 2**32 + the key of `_high`
            sums = np.einsum("ij,j->i", words, self._low)
            np.right_shift(words, _HALF, out=words)
            sums += np.einsum("ij,j->i", words, self._high)
            hashes[start:start + _PIECE] = sums
        return hashes
