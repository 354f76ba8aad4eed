# SPDX-License-Identifier: GPL-2.0-or-later
"""What this host holds already of guests that arrive: shared frames by a digest of their contents.

Guests of one *family* were booted from the same files.  While guests of a family arrive, the shared frames of
those that live here, and of those that arrived before, are pinned and known by digest; and so are the private
pages of one of them, which become shared frames when somebody names their contents.

A digest is enough to know a page by: it is a cryptographic one, so nobody can make two pages with the same.

Invariant: every frame in `_frames` is shared and pinned once on its behalf: nobody writes it, and its digest
is exact.  A private page is only where to look: it is frozen first, and its digest compared again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import asynccontextmanager

import numpy as np
import trio

from hostd.definition import Definition
from hostd.errors import HostError
from hostd.guests import Guests
from hostd.memory import MachineMemory
from hostd.migration.belongings import family
from hostd.reclaiming import Reclaimer
from hostd.snapshot.layout import page_digest
from hostd.vm import Vm
from vmm.memory.frames import FrameAllocator
from vmm.memory.pool import Pool


class ContentIndex:
    """Of one family, while somebody needs it."""

    def __init__(self, guests: Guests, memory: MachineMemory) -> None:
        self.users = 0
        self._guests = guests
        self._memory = memory
        self._reclaimer = Reclaimer(guests, memory)
        self._frames: dict[bytes, int] = {}
        #: pinned frames, those among them that another has the digest of too
        self._pinned: set[int] = set()
        self._private: dict[bytes, tuple[Vm, int]] = {}
        self._examined: Vm | None = None
        self._lock = trio.Lock()

    def __bool__(self) -> bool:
        """Whether it is worth asking."""
        return bool(self._frames or self._private)

    async def refresh(self, members: Sequence[Vm], template: str | None) -> None:
        """Learn what the members of the family, which live here, have now."""
        async with self._lock:
            leaves = [vm.block.leaf().copy() for vm in members if vm.block is not None]
            if not leaves:
                return
            shared = np.unique(np.concatenate([FrameAllocator.split(leaf)[1] for leaf in leaves]))
            fresh = shared[~np.isin(shared, np.fromiter(self._pinned, dtype=np.int64))]
            self._pin(fresh)
            for frame, digest in zip(fresh.tolist(), await _digests(self._memory.pool, fresh)):
                self._frames.setdefault(digest, frame)
            await self._examine(next((vm for vm in members if vm.name == template), members[0]))

    async def _examine(self, vm: Vm) -> None:
        """Learn what one guest has in private pages; of the others it is to be hoped that they share."""
        if self._examined is not None or vm.block is None:
            return
        self._examined = vm
        leaf = vm.block.leaf().copy()               # its worker changes it meanwhile
        pages = np.flatnonzero(FrameAllocator.is_private(leaf))
        frames, _ = FrameAllocator.split(leaf)
        for page, digest in zip(pages.tolist(), await _digests(self._memory.pool, frames)):
            self._private.setdefault(digest, (vm, page))

    async def find(self, digests: Sequence[bytes]) -> np.ndarray:
        """For each digest a shared frame with such contents, 0 where there is none."""
        wanted = {self._private[digest][1]: digest for digest in digests
                  if digest not in self._frames and digest in self._private}
        if wanted:
            await self._freeze(wanted)
        return np.array([self._frames.get(digest, 0) for digest in digests], dtype=np.int64)

    async def _freeze(self, wanted: dict[int, bytes]) -> None:
        """Have private pages of the examined guest become shared frames, by page."""
        vm = self._examined
        assert vm is not None
        async with self._lock:
            for digest in wanted.values():
                self._private.pop(digest, None)
            try:
                pages, frames = await self._reclaimer.freeze(vm, np.array(sorted(wanted), dtype=np.int64))
            except HostError:
                return                              # it is being changed, or is gone: then they are sent
            self._pinned.update(frames.tolist())
            for page, frame, digest in zip(pages.tolist(), frames.tolist(),
                                           await _digests(self._memory.pool, frames)):
                if digest == wanted[page]:
                    self._frames.setdefault(digest, frame)

    def _pin(self, frames: np.ndarray) -> None:
        self._memory.books.pin(frames)
        self._pinned.update(frames.tolist())

    def close(self) -> None:
        """Nobody needs it any more."""
        self._memory.books.unpin(np.fromiter(self._pinned, dtype=np.int64))
        self._pinned.clear()
        self._frames.clear()


class Indexes:
    """The indexes of all families of which guests arrive at the moment."""

    def __init__(self, guests: Guests, memory: MachineMemory) -> None:
        self._guests = guests
        self._memory = memory
        self._open: dict[Hashable, ContentIndex] = {}

    @asynccontextmanager
    async def of(self, definition: Definition) -> AsyncIterator[ContentIndex]:
        """The index for a guest that arrives, up to date as of now."""
        key = family(definition)
        index = self._open.setdefault(key, ContentIndex(self._guests, self._memory))
        index.users += 1
        try:
            await index.refresh(self.members(definition), definition.template)
            yield index
        finally:
            index.users -= 1
            if not index.users:
                del self._open[key]
                index.close()

    def members(self, definition: Definition) -> list[Vm]:
        """VMs of the same family that have memory here."""
        return [vm for vm in self._guests.vms.values()
                if vm.block is not None and family(vm.definition) == family(definition)]


async def _digests(pool: Pool, frames: np.ndarray) -> list[bytes]:
    if not len(frames):
        return []
    return await trio.to_thread.run_sync(lambda: [page_digest(pool.page(frame)) for frame in frames.tolist()])
