# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory of a guest that leaves, read while it runs.

What is read is consistent in the end, not at once.  The dirty log runs before the first page is read, and
the VM's lock keeps page sharing and swapping away, so a page whose frame or slot changes hands has been
written or given back by the guest itself: it is in the log, and is read again.
"""

from __future__ import annotations

import numpy as np

from hostd.errors import Failed
from vmm.memory.block import VmBlock
from vmm.memory.p2mbits import FRAME_MASK, KIND_MASK, KIND_SHIFT, STORED, Kind
from vmm.memory.pool import PAGE, PAGE_SHIFT
from vmm.memory.records import StoreError

_PRIVATE, _SHARED, _BALLOONED = (
    np.uint64(kind << KIND_SHIFT) for kind in (Kind.PRIVATE, Kind.SHARED, Kind.BALLOONED))


def _kinds(entries: np.ndarray) -> np.ndarray:
    return entries & np.uint64(KIND_MASK)


def _framed(entries: np.ndarray) -> np.ndarray:
    kinds = _kinds(entries)
    return (kinds == _PRIVATE) | (kinds == _SHARED)


def _numbers(entries: np.ndarray) -> np.ndarray:
    """Frames, or slots."""
    return (entries & np.uint64(FRAME_MASK)) >> np.uint64(PAGE_SHIFT)


class OutgoingMemory:
    """Of the guest in `block`.  Page numbers are arrays of int64, ascending."""

    def __init__(self, block: VmBlock) -> None:
        self.pages = block.pages
        self._block = block
        self._frames = np.frombuffer(block.pool.view, dtype=np.uint8).reshape(-1, PAGE)

    def resident(self) -> np.ndarray:
        """Pages that have contents: in a frame, or in a file.  All others read as zero."""
        leaf = self._block.leaf()
        return np.flatnonzero(_framed(leaf) | ((leaf & np.uint64(STORED)) != 0))

    def read(self, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copies of the pages, (n, 4096) bytes, and which of them have no contents (they are zeroes then).

        Takes its time: call it in a thread.  Raises Failed for a page that cannot be read from its file.
        """
        entries = self._block.leaf()[pages]
        contents = np.zeros((len(pages), PAGE), dtype=np.uint8)
        framed = _framed(entries)
        contents[framed] = self._frames[_numbers(entries[framed]).astype(np.int64)]
        stored = ((entries & np.uint64(STORED)) != 0) & ~framed
        for index in np.flatnonzero(stored).tolist():
            self._fetch(int(pages[index]), int(entries[index]), contents[index])
        return contents, ~(framed | stored)

    def _fetch(self, page: int, entry: int, into: np.ndarray) -> None:
        try:
            self._block.p2m.fetch((entry & FRAME_MASK) >> PAGE_SHIFT, into.data)
        except StoreError as error:
            # the guest may have brought it in meanwhile: then it is in the log
            if self._block.p2m.leaf[page] == entry:
                raise Failed(f"page {page} of its memory is lost: {error}") from None
