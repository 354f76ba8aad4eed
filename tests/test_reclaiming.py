# SPDX-License-Identifier: GPL-2.0-or-later
"""What is done to pages for the host's sake, under random guests: nobody sees it, and no frame is lost.

Guests come, boot, write, are cloned, snapshot and restored, give pages back, are moved and go; the daemon
shares and swaps; and workers die, also with answers and reports unsent.
"""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hostd.books import Books
from hostd.stores import Stores
from hostd.swapfile import SwapFile
from vmm.memory.block import VmBlock
from vmm.memory.frames import FrameAllocator, Magazine
from vmm.memory.p2mbits import WRITABLE
from vmm.memory.physical import GuestMemory
from vmm.memory.pool import Pool
from vmm.memory.reclaim import carry_out
from vmm.memory.records import UNIT, PageStore, encode
from vmm.memory.stamp import Stamp

PAGE = 4096
GUEST = 1 << 20
PAGES = GUEST // PAGE
NONE = np.zeros(0, dtype=np.int64)
#: few contents, so that pages are often alike
CONTENTS = (bytes(8), b"alike   ", b"another ", b"third   ")

guests = st.integers(0, 7)
workers = st.integers(0, 1)
#: whether the guest's worker dies before it says what it did
dies = st.sampled_from((False,) * 7 + (True,))
some_pages = st.lists(st.integers(0, 15), min_size=1, max_size=12, unique=True).map(
    lambda pages: np.array(sorted(pages), dtype=np.int64))


class Life:
    """A guest with a worker, and what must be in its pages."""

    def __init__(self, block: VmBlock, worker: int, expected: dict[int, bytes]) -> None:
        self.block, self.worker, self.expected = block, worker, expected
        #: traces, as the software monitor has them
        self.remapped: list[int] = []
        block.p2m.on_remap = self.remapped.append


class Host(RuleBasedStateMachine):
    """Two workers, a few guests, and a daemon that does as it likes with their pages."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = TemporaryDirectory()
        self.swap = SwapFile(Path(self.directory.name) / "swap", 8 << 20)
        self.books = Books(Pool(16 << 20), Stores(self.swap))
        self.magazines = [Magazine(self.books.lend(worker, 200)) for worker in range(2)]
        self.lives: list[Life] = []
        #: frames frozen and pinned, as the table of shared pages does
        self.table: list[int] = []
        #: copies that nobody runs, and what is in them
        self.copies: list[tuple[VmBlock, dict[int, bytes]]] = []
        self.files = 0

    def teardown(self) -> None:
        self.swap.close()
        self.directory.cleanup()

    def life(self, number: int) -> Life:
        return self.lives[number % len(self.lives)]

    def report(self, life: Life) -> None:
        p2m = life.block.p2m
        self.books.reported(life.block, [page for page, _ in p2m.dropped], p2m.freed, p2m.fetched)
        p2m.dropped, p2m.freed, p2m.fetched = [], [], []

    @precondition(lambda self: len(self.lives) < 5)
    @rule(worker=workers)
    def create(self, worker: int) -> None:
        self.lives.append(Life(self.books.new(GUEST), worker, {}))

    @precondition(lambda self: len(self.lives) < 5)
    @rule(worker=workers, pages=some_pages, content=st.sampled_from(CONTENTS), given_up=st.booleans())
    def boot(self, worker: int, pages: np.ndarray, content: bytes, given_up: bool) -> None:
        block = self.books.new(GUEST)
        magazine = self.books.frames_for_loading(len(pages))
        memory = GuestMemory(block.p2m, magazine)
        written = pages[:len(pages) // 2] if given_up else pages
        for page in written.tolist():
            memory.write(page * PAGE, content)
        self.books.loaded(len(written))
        self.books.unused(magazine.rest())
        if given_up:
            self.books.free(block)
        else:
            self.adopt(block, worker, dict.fromkeys(pages.tolist(), content))

    def adopt(self, block: VmBlock, worker: int, expected: dict[int, bytes]) -> None:
        self.books.adopted(block, worker)
        self.lives.append(Life(block, worker, expected))

    @precondition(lambda self: self.lives and len(self.copies) < 3)
    @rule(number=guests)
    def snapshot(self, number: int) -> None:
        life = self.life(number)
        self.report(life)
        self.copies.append((self.books.clone(life.block), dict(life.expected)))

    @precondition(lambda self: self.copies and len(self.lives) < 5)
    @rule(which=st.integers(0, 2), worker=workers)
    def restore(self, which: int, worker: int) -> None:
        copy, expected = self.copies.pop(which % len(self.copies))
        path = Path(self.directory.name) / str(self.files)
        self.files += 1
        pages, records = np.array(sorted(expected), dtype=np.int64), b""
        offsets = []
        for page in pages.tolist():
            offsets.append(len(records) // UNIT)
            records += encode(copy.p2m.contents(page))
        path.write_bytes(records)
        self.books.free(copy)
        block, fd = self.books.new(GUEST), os.open(path, os.O_RDONLY)
        with closing(PageStore(fd, str(path), Stamp.of(fd))) as store:
            number = self.books.stores.open(store)
        slots = np.array(offsets, dtype=np.uint64) | np.uint64(number << 32)
        self.books.stores.retain(slots)
        self.books.refer(block, pages, slots)
        self.books.stores.let_go(number)
        self.adopt(block, worker, expected)

    @precondition(lambda self: 0 < len(self.lives) < 5)
    @rule(number=guests, worker=workers)
    def clone(self, number: int, worker: int) -> None:
        source = self.life(number)
        self.report(source)
        self.adopt(self.books.clone(source.block), worker, dict(source.expected))

    @precondition(lambda self: self.lives)
    @rule(number=guests, pages=some_pages, content=st.sampled_from(CONTENTS))
    def write(self, number: int, pages: np.ndarray, content: bytes) -> None:
        life = self.life(number)
        memory = GuestMemory(life.block.p2m, self.stocked(life.worker))
        for page in pages.tolist():
            memory.write(page * PAGE, content)
            life.expected[page] = content

    def stocked(self, worker: int) -> Magazine:
        magazine = self.magazines[worker]
        if len(magazine) < 50:
            for extent in self.books.lend(worker, 100):
                magazine.add(*extent)
        return magazine

    @precondition(lambda self: self.lives)
    @rule(number=guests, pages=some_pages, ballooned=st.booleans())
    def discard(self, number: int, pages: np.ndarray, ballooned: bool) -> None:
        life = self.life(number)
        for page in pages.tolist():
            life.block.p2m.discard(page, ballooned)
            life.expected.pop(page, None)

    @precondition(lambda self: self.lives)
    @rule(number=guests, pages=some_pages)
    def watch(self, number: int, pages: np.ndarray) -> None:
        carry_out("watch", self.life(number).block.p2m, pages, NONE, NONE)

    @precondition(lambda self: self.lives)
    @rule(number=guests, pages=some_pages, dies=dies)
    def freeze(self, number: int, pages: np.ndarray, dies: bool) -> None:
        life = self.life(number)
        self.report(life)
        done, frames = carry_out("freeze", life.block.p2m, pages, NONE, NONE)
        if dies:
            self.die(life.worker)
            return
        self.books.frozen(life.block, done, frames)
        self.books.pin(frames)
        self.table += frames.tolist()

    @precondition(lambda self: self.lives and self.table)
    @rule(number=guests, pages=some_pages, which=st.integers(0, 1000), dies=dies)
    def merge(self, number: int, pages: np.ndarray, which: int, dies: bool) -> None:
        life = self.life(number)
        self.report(life)
        leaf = life.block.leaf()
        frames = np.full(len(pages), self.table[which % len(self.table)], dtype=np.int64)
        self.books.pin(frames)
        before = leaf[pages].copy()
        done, freed = carry_out("merge", life.block.p2m, pages, frames, NONE)
        merged = np.isin(pages, done)
        assert (leaf[pages[~merged]] == before[~merged]).all()
        if dies:
            self.die(life.worker)
            self.books.unpin(frames)
            return
        self.books.merged(life.block, done, frames[merged], freed)
        self.books.unpin(frames[~merged])

    @precondition(lambda self: self.lives)
    @rule(number=guests, pages=some_pages, dies=dies)
    def zeros(self, number: int, pages: np.ndarray, dies: bool) -> None:
        life = self.life(number)
        _, freed = carry_out("zeros", life.block.p2m, pages, NONE, NONE)
        if dies:
            self.die(life.worker)
        else:
            self.books.zeroed(freed)

    @precondition(lambda self: self.lives)
    @rule(number=guests, pages=some_pages, used=some_pages, dies=dies)
    def swap_out(self, number: int, pages: np.ndarray, used: np.ndarray, dies: bool) -> None:
        life = self.life(number)
        self.report(life)
        self.books.frozen(life.block, *carry_out("freeze", life.block.p2m, pages, NONE, NONE))
        done, frames = self.books.pin_shared(life.block, pages)
        carry_out("watch", life.block.p2m, done, NONE, NONE)
        pool = life.block.pool
        slots = np.array(self.swap.write([pool.page(frame) for frame in frames.tolist()]), dtype=np.int64)
        memory = GuestMemory(life.block.p2m, self.stocked(life.worker))
        for page in used.tolist():
            memory.read(page * PAGE, 8)
        put, _ = carry_out("store", life.block.p2m, done, frames, slots)
        assert not np.isin(put, used).any()
        if dies:
            self.die(life.worker)
            self.swap.free(slots.tolist())
            self.books.unpin(frames)
            return
        stored = np.isin(done, put)
        self.books.stored(life.block, put, slots[stored].astype(np.uint64))
        self.swap.free(slots[~stored].tolist())
        self.books.unpin(frames)

    @precondition(lambda self: self.lives)
    @rule(number=guests, pages=some_pages, used=some_pages, reported=st.booleans(), dies=dies)
    def thaw(self, number: int, pages: np.ndarray, used: np.ndarray, reported: bool, dies: bool) -> None:
        """After freezing in vain.  The guest goes on meanwhile, and may not have said what it let go of."""
        life = self.life(number)
        self.report(life)
        self.books.frozen(life.block, *carry_out("freeze", life.block.p2m, pages, NONE, NONE))
        passage, pages, frames = self.books.thawing(life.block, pages)
        self.write(number, used, CONTENTS[3])
        if reported:
            self.report(life)
        done, unused = carry_out("thaw", life.block.p2m, pages, frames, NONE)
        assert not np.isin(done, used).any()
        assert (life.block.leaf()[done] & np.uint64(WRITABLE)).all()
        if dies:
            self.die(life.worker)
            self.books.returned(passage, frames)
            return
        self.books.arrived(life.block, life.worker, passage, done, frames, unused)

    @precondition(lambda self: self.table)
    @rule(which=st.integers(0, 1000))
    def forget(self, which: int) -> None:
        frame = self.table.pop(which % len(self.table))
        self.books.unpin(np.array([frame], dtype=np.int64))

    @precondition(lambda self: self.lives)
    @rule(number=guests)
    def destroy(self, number: int) -> None:
        life = self.lives.pop(number % len(self.lives))
        self.report(life)
        self.books.free(life.block)

    @precondition(lambda self: self.copies)
    @rule()
    def drop_copy(self) -> None:
        self.books.free(self.copies.pop()[0])

    @precondition(lambda self: self.lives)
    @rule(worker=workers)
    def die(self, worker: int) -> None:
        """What its guests had not reported comes back all the same."""
        for life in self.lives:
            if life.worker == worker:
                self.books.free(life.block)
        self.lives = [life for life in self.lives if life.worker != worker]
        self.books.reclaim(worker)
        self.magazines[worker] = Magazine(self.books.lend(worker, 200))

    @precondition(lambda self: self.lives)
    @rule(number=guests)
    def move(self, number: int) -> None:
        life = self.life(number)
        self.report(life)
        life.worker ^= 1
        self.books.adopted(life.block, life.worker)

    @invariant()
    def contents_are_what_was_written(self) -> None:
        for life in self.lives:
            for page in range(16):
                assert life.block.p2m.contents(page)[:8] == life.expected.get(page, bytes(8))
        for copy, expected in self.copies:
            for page in range(16):
                assert copy.p2m.contents(page)[:8] == expected.get(page, bytes(8))

    @invariant()
    def books_balance(self) -> None:
        unsaid = any(life.block.p2m.dropped or life.block.p2m.fetched for life in self.lives)
        assert unsaid or self.books.check() == []
        counts = self.books.counts()
        assert counts.free + counts.granted + counts.private + counts.shared + counts.overhead == counts.total

    @invariant()
    def nothing_is_lost(self) -> None:
        """What is lent is in stock, or was given back and not reported, or has no guest that shares it."""
        stock = sum(len(magazine) for magazine in self.magazines)
        limbo = sum(len(life.block.p2m.freed) for life in self.lives)
        blocks = [life.block for life in self.lives]
        in_use = {int(frame) for block in [*blocks, *(copy for copy, _ in self.copies)]
                  for frame in FrameAllocator.split(block.leaf())[1]}
        charged = {int(frame) for charge in self.books._charges.values()
                   for frame in charge.frames[charge.frames != 0]}
        assert self.books.counts().granted == stock + limbo + len((charged | set(self.table)) - in_use)
        for worker, magazine in enumerate(self.magazines):
            mine = [life.block for life in self.lives if life.worker == worker]
            frames = len(magazine) + sum(block.memory_counts()["private"] + len(block.p2m.freed)
                                         for block in mine)
            assert self.books.check_worker(worker, frames, self.books.given(worker), blocks) == ""


TestHost = Host.TestCase
TestHost.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
