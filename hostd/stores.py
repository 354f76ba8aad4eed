# SPDX-License-Identifier: GPL-2.0-or-later
"""Where pages of guests are: in the swap file, in the snapshots guests are restored from, or at another host.

A slot is a store's number (8 bits, 0 is the swap file) and an offset in it in units of 64 bytes (32 bits); if
the store is another host, the number of the guest's page instead.
Each guest page in a slot owns it; a slot of the swap file without an owner is free, a snapshot of which no
page is needed any more is closed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import numpy as np

from hostd.errors import Failed
from hostd.openslots import SWAP
from hostd.protocol import Store
from hostd.swapfile import SwapFile
from vmm.memory.records import PageStore, StoreError
from vmm.memory.stamp import Stamp

_OFFSET = (1 << 32) - 1
_MOST_STORES = 256


class Stores:
    """All open stores; `swap` may be None: nothing is swapped then."""

    def __init__(self, swap: SwapFile | None = None) -> None:
        self.swap = swap
        #: by number; no file: another host
        self._files: dict[int, tuple[PageStore | None, Callable[[], None]]] = {}
        #: numbers of the files
        self._numbers: dict[Stamp, int] = {}
        #: pages in each, and those who hold it
        self._owned: dict[int, int] = {}
        #: called with the number of a store that is closed
        self.on_close: Callable[[int], None] = lambda number: None

    def open(self, store: PageStore) -> int:
        """Have pages in a file, and hold it until `let_go`; its number.  It has one, however often it is
        opened: a hundred guests may be restored from the same snapshot.

        `store` stays the caller's, and has a stamp.  Raises Failed when there are too many.
        """
        assert store.stamp is not None
        if store.stamp not in self._numbers:
            try:
                file = store.copy()
            except StoreError as error:
                raise Failed(str(error)) from None
            try:
                self._numbers[store.stamp] = self._open(file, file.close)
            except BaseException:
                file.close()
                raise
        number = self._numbers[store.stamp]
        self._owned[number] += 1
        return number

    def let_go(self, number: int) -> None:
        """It is needed for the pages in it only."""
        self._disown(number, 1)

    def open_remote(self, close: Callable[[], None]) -> int:
        """Have pages at another host, until `close` is called when none is needed any more; its number.
        `slots_at` says in which slots they are, and they come by Reclaimer.install.

        Nothing is owned yet: `retain` must follow.  Raises Failed when there are too many.
        """
        return self._open(None, close)

    def _open(self, store: PageStore | None, close: Callable[[], None]) -> int:
        number = next((number for number in range(1, _MOST_STORES) if number not in self._files), None)
        if number is None:
            raise Failed(f"guests have pages in {_MOST_STORES - 1} snapshots and at other hosts, the most "
                         f"there can be: stop one that was restored, or wait for one that is being fetched")
        self._files[number] = store, close
        self._owned[number] = 0
        return number

    def _disown(self, number: int, count: int) -> None:
        """A file is of no use if no page is in it."""
        self._owned[number] -= count
        if not self._owned[number]:
            file, close = self._files.pop(number)
            del self._owned[number]
            if file is not None and file.stamp is not None:
                del self._numbers[file.stamp]
            close()
            self.on_close(number)

    def told(self, numbers: Iterable[int]) -> list[Store]:
        """The swap file and each of these stores, as other processes open them, whatever their names are now.

        Who opens one must have a page in it: else it may be closed by then, and its number mean another.
        """
        files = {number: self._files[number][0] for number in numbers if number != SWAP}
        if self.swap is not None:
            files[SWAP] = self.swap.store
        return [Store(number, f"/proc/{os.getpid()}/fd/{file.fd}", file.name, file.stamp)
                if file is not None else Store(number) for number, file in files.items()]

    def fetch(self, slot: int, into: memoryview) -> None:
        """Read the page in a slot.  Raises StoreError."""
        number, offset = slot >> 32, slot & _OFFSET
        if number == SWAP and self.swap is not None:
            self.swap.read_into(offset, into)
        elif number in self._files:
            file = self._files[number][0]
            if file is None:
                raise StoreError("a page that is still at another host")
            file.read_into(offset, into)
        else:
            raise StoreError(f"no store {number} is open")

    def retain(self, slots: np.ndarray) -> None:
        """Each of these slots has an owner more."""
        for number, offsets in _by_store(slots):
            if number == SWAP and self.swap is not None:
                self.swap.retain(offsets)
            else:
                self._owned[number] += len(offsets)

    def release(self, slots: np.ndarray) -> None:
        """Each of these slots has an owner less."""
        for number, offsets in _by_store(slots):
            if number == SWAP and self.swap is not None:
                self.swap.free(offsets)
            else:
                self._disown(number, len(offsets))


def slots_at(number: int, pages: np.ndarray) -> np.ndarray:
    """The slots of a guest's pages that are at another host."""
    return pages.astype(np.uint64) | np.uint64(number << 32)


def _by_store(slots: np.ndarray) -> list[tuple[int, list[int]]]:
    numbers = slots >> np.uint64(32)
    return [(int(number), (slots[numbers == number] & np.uint64(_OFFSET)).tolist())
            for number in np.unique(numbers)]
