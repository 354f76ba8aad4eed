# SPDX-License-Identifier: GPL-2.0-or-later
"""The files a worker reads pages of its guests from (hostd/stores.py is the daemon's side)."""

from __future__ import annotations

from collections.abc import Iterable

from hostd.protocol import Store
from vmm.memory.records import PageStore, StoreError

_OFFSET = (1 << 32) - 1
#: the number of the swap file
SWAP = 0


class OpenSlots:
    """Stores by number, opened when a guest comes that may need them."""

    def __init__(self) -> None:
        #: None: its pages are at another host
        self._stores: dict[int, PageStore | None] = {}

    def open(self, stores: Iterable[Store]) -> None:
        """Open those that are not yet.  Raises StoreError."""
        for store in stores:
            if store.number not in self._stores:
                self._stores[store.number] = _open(store)

    def close(self, number: int) -> None:
        """The number may come to mean another file."""
        store = self._stores.pop(number, None)
        if store is not None:
            store.close()

    def elsewhere(self, slot: int) -> int | None:
        """The guest's page, if the slot says that it is at another host."""
        number = slot >> 32
        return slot & _OFFSET if number in self._stores and self._stores[number] is None else None

    def is_swap(self, slot: int) -> bool:
        """Whether the slot is in the swap file, and not in a snapshot's."""
        return slot >> 32 == SWAP

    def fetch(self, slot: int, into: memoryview) -> None:
        """Read the page in a slot.  Raises StoreError."""
        store = self._stores.get(slot >> 32)
        if store is None:
            raise StoreError(f"no store {slot >> 32} is open here")
        store.read_into(slot & _OFFSET, into)


def _open(store: Store) -> PageStore | None:
    return PageStore(store.path, store.name, store.stamp) if store.path else None
