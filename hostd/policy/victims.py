# SPDX-License-Identifier: GPL-2.0-or-later
"""Which pages of a guest to swap out: those it has not used for longest, as far as is known.

Every scan of accessed flags goes into a history of eight bits a page, the newest in the highest: the number
falls while a page rests and jumps when it is used, so the coldest page has the smallest (the aging form of
least recently used).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: a page that was just used: what came in since the last scan starts with it
NEW = 0x80


def aged(history: NDArray[np.uint8], accessed: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The histories after one more scan; shapes (pages,)."""
    return (history >> np.uint8(1)) | np.where(accessed, np.uint8(NEW), np.uint8(0))


def coldest(pages: NDArray[np.int64], history: NDArray[np.uint8], count: int) -> NDArray[np.int64]:
    """The `count` coldest of these guest-physical pages, or all if there are fewer; the coldest first.

    `history` is that of each of `pages`, in their order, which also decides between pages equally cold.  The
    caller leaves out what swapping would gain nothing from: zero pages, shared ones, those just restored.
    """
    order = np.argsort(history, kind="stable")
    return pages[order[:max(count, 0)]]
