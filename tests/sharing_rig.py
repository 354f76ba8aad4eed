# SPDX-License-Identifier: GPL-2.0-or-later
"""A host for page sharing: a real pool, real books and P2Ms, and guests that write when they are told."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import trio

from hostd.books import Books
from hostd.errors import Failed
from hostd.sharing import PageHash, Scanner, Sharing
from hostd.sharing.scanner import Hash
from vmm.memory import reclaim
from vmm.memory.block import VmBlock
from vmm.memory.frames import Magazine
from vmm.memory.physical import GuestMemory
from vmm.memory.pool import PAGE, PAGE_SHIFT, Pool

PAGES = 256


class Guest:
    """One that remembers what it wrote."""

    def __init__(self, host: SharingHost, block: VmBlock, image: str) -> None:
        self.block: VmBlock | None = block
        self.image = image
        self.content: dict[int, bytes] = {}
        self._host = host
        self._p2m = block.p2m

    @property
    def memory(self) -> VmBlock:
        assert self.block is not None, "the guest has ended"
        return self.block

    def fill(self, page: int, content: bytes) -> None:
        """Have a page full of repetitions of `content`."""
        self.content[page] = (content * (PAGE // len(content) + 1))[:PAGE]
        GuestMemory(self._p2m, self._host.magazine).write(page << PAGE_SHIFT, self.content[page])
        self.report()

    def discard(self, page: int) -> None:
        """Give a page back."""
        self.content.pop(page, None)
        self._p2m.discard(page, ballooned=True)
        self.report()

    def report(self) -> None:
        p2m = self._p2m
        self._host.books.reported(self.memory, [page for page, _ in p2m.dropped], p2m.freed, p2m.fetched)
        p2m.dropped, p2m.freed, p2m.fetched = [], [], []

    def restart(self) -> None:
        """Another life of the same VM."""
        self._host.books.free(self.memory)
        self.block = self._host.books.new(PAGES << PAGE_SHIFT)
        self._p2m, self.content = self.block.p2m, {}

    def end(self) -> None:
        block, self.block = self.memory, None
        self._host.books.free(block)
        self._host.guests.remove(self)

    def intact(self) -> bool:
        """Whether all that it wrote is there, and nothing else."""
        return all(self._p2m.contents(page) == self.content.get(page, bytes(PAGE))
                   for page in range(self._p2m.pages))

    def count(self, kind: str) -> int:
        return self.memory.memory_counts()[kind]

    def frame(self, page: int) -> int:
        return self._p2m.for_read(page << PAGE_SHIFT, self._host.magazine) >> PAGE_SHIFT


class Directly:
    """A Reclaimer for guests that run in no worker: done on the spot."""

    def __init__(self, books: Books) -> None:
        self._books = books
        #: pages that were asked for, by what for
        self.asked: dict[str, list[int]] = {"freeze": [], "merge": [], "drop_zeros": []}
        #: called before anything is done
        self.interfere: list[Guest] = []
        self.before_freeze: Callable[[], None] = lambda: None

    def _begin(self, what: str, vm: Guest, pages: np.ndarray) -> VmBlock:
        self.asked[what] += pages.tolist()
        if vm in self.interfere:
            self.interfere.remove(vm)
            vm.end()
        if vm.block is None:
            raise Failed("the guest has ended")
        return vm.block

    async def freeze(self, vm: Guest, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.before_freeze()
        block = self._begin("freeze", vm, pages)
        pages, frames = reclaim.freeze(block.p2m, pages)
        self._books.frozen(block, pages, frames)
        self._books.pin(frames)
        return pages, frames

    async def merge(self, vm: Guest, pages: np.ndarray, frames: np.ndarray) -> int:
        block = self._begin("merge", vm, pages)
        self._books.pin(frames)
        done, freed = reclaim.merge(block.p2m, pages, frames)
        self._books.merged(block, pages[done], frames[done], freed)
        self._books.unpin(frames[~done])
        return int(done.sum())

    async def drop_zeros(self, vm: Guest, pages: np.ndarray) -> int:
        block = self._begin("drop_zeros", vm, pages)
        done, freed = reclaim.drop_zeros(block.p2m, pages)
        self._books.zeroed(freed)
        return int(done.sum())


class SharingHost:
    """Guests, and `sharing`, which scans when it is told."""

    def __init__(self, pool_bytes: int = 16 << 20, frames: int = 2500) -> None:
        self.pool = Pool(pool_bytes)
        self.books = Books(self.pool)
        self.magazine = Magazine(self.books.lend(0, frames))
        self.guests: list[Guest] = []
        self.rate = 1 << 20
        self.reclaimer = Directly(self.books)
        self.use(PageHash(self.pool, np.random.default_rng(7)))

    def use(self, hash: Hash) -> None:
        """Begin anew, with this hash."""
        self.scanner = Scanner(hash, self.pool.frames, np.random.default_rng(8))
        self.sharing: Sharing[Guest] = Sharing(
            self.scanner, self.reclaimer, self.books, lambda: self.guests, lambda guest: guest.image,
            lambda: self.rate)

    def guest(self, image: str = "debian", pages: int = PAGES) -> Guest:
        self.guests.append(Guest(self, self.books.new(pages << PAGE_SHIFT), image))
        return self.guests[-1]

    def clone(self, source: Guest) -> Guest:
        self.guests.append(Guest(self, self.books.clone(source.memory), source.image))
        self.guests[-1].content = dict(source.content)
        return self.guests[-1]

    def scan(self, times: int = 1) -> None:
        """So many scans, each a whole pass unless the rate says otherwise."""
        async def run() -> None:
            for _ in range(times):
                await self.sharing.step(1.0)
        trio.run(run)

    def check(self) -> None:
        """Books, pins and contents are as they should be."""
        assert self.books.check() == []
        assert all(guest.intact() for guest in self.guests)
        counts = self.books.counts()
        assert counts.total == counts.free + counts.granted + counts.private + counts.shared + counts.overhead

    def end(self) -> None:
        """Nobody is left, and so is no frame in use."""
        for guest in list(self.guests):
            guest.end()
        self.scan()
        counts = self.books.counts()
        assert len(self.scanner.table) == 0
        assert (counts.private, counts.shared, counts.granted) == (0, 0, len(self.magazine))
        owners = self.books.shares(np.arange(self.pool.frames))
        assert not owners.any(), "frames have owners that are not there"
