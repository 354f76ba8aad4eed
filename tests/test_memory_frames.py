# SPDX-License-Identifier: GPL-2.0-or-later
"""Who owns which frame: the ledger balances, and nobody reads another's bytes, whatever happens when."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vmm.memory.block import VmBlock, clone_block, free_block, new_block
from vmm.memory.errors import OutOfFrames
from vmm.memory.frames import FREE, FrameAllocator, LocalFrames, Magazine
from vmm.memory.physical import GuestMemory
from vmm.memory.pool import PAGE, Pool

MEMORY = 1 << 20
PAGES = MEMORY // PAGE
BORROWERS = 2


def test_magazine() -> None:
    magazine = Magazine([(10, 2)])
    magazine.add(40, 1)
    assert len(magazine) == 3
    assert sorted(magazine.take() for _ in range(3)) == [10, 11, 40]
    assert len(magazine) == 0
    with pytest.raises(OutOfFrames, match="no frame in stock"):
        magazine.take()
    magazine.add(50, 1)
    assert magazine.take() == 50


def test_nothing_changes_when_there_is_not_enough() -> None:
    allocator = FrameAllocator(Pool(64 * PAGE))
    first = allocator.alloc_run(10)
    for too_many in (lambda: allocator.lend(0, 54), lambda: allocator.alloc_run(54)):
        with pytest.raises(OutOfFrames):
            too_many()
    assert allocator.free_frames() == 53
    assert sum(count for _, count in allocator.lend(0, 53)) == 53
    with pytest.raises(OutOfFrames, match="1 frames wanted, only 0 of 64 are free"):
        allocator.lend(0, 1)
    allocator.free_run(first, 10)
    assert allocator.alloc_run(10) == first


def test_scattered_frames_are_no_run() -> None:
    allocator = FrameAllocator(Pool(65 * PAGE))
    runs = [allocator.alloc_run(8) for _ in range(8)]
    for run in runs[::2]:
        allocator.free_run(run, 8)
    with pytest.raises(OutOfFrames, match="no 9 contiguous frames"):
        allocator.alloc_run(9)
    assert sum(count for _, count in allocator.lend(1, 32)) == 32


def test_what_is_kept_for_runs_is_never_lent() -> None:
    allocator = FrameAllocator(Pool(65 * PAGE), reserve=16)
    assert allocator.free_frames() == 48
    with pytest.raises(OutOfFrames):
        allocator.lend(0, 49)
    lent = [frame for first, count in allocator.lend(0, 48) for frame in range(first, first + count)]
    allocator.give_back(lent[::2])
    runs = [allocator.alloc_run(8) for _ in range(2)]
    assert allocator.free_frames() == 24
    with pytest.raises(OutOfFrames, match="no 2 contiguous frames"):
        allocator.alloc_run(2)
    allocator.free_run(runs[0], 8)
    assert (allocator.free_frames(), allocator.count([]).free) == (24, 32)
    assert allocator.alloc_run(8) == runs[0]
    allocator.give_back(lent[1::2])
    assert allocator.alloc_run(16) > runs[1], "beyond the reserve there is room for runs, too"
    assert allocator.free_frames() == 32
    assert allocator.check([]) == []


def test_frame_zero_is_never_given() -> None:
    allocator = FrameAllocator(Pool(16 * PAGE))
    assert all(first > 0 for first, _ in allocator.lend(0, 15))


def test_local_frames_keep_to_their_limit() -> None:
    frames = LocalFrames(FrameAllocator(Pool(64 * PAGE)), limit=3)
    assert len(frames) == 3
    assert len({frames.take() for _ in range(3)}) == 3
    with pytest.raises(OutOfFrames):
        frames.take()


def test_check_finds_what_is_wrong() -> None:
    allocator = FrameAllocator(Pool(4 << 20))
    frames = LocalFrames(allocator, limit=10)
    blocks = [new_block(allocator, MEMORY) for _ in range(2)]
    GuestMemory(blocks[0].p2m, frames).write_u32(0, 1)
    leaves = [block.leaf() for block in blocks]
    assert allocator.check(leaves) == []
    leaves[1][5] = leaves[0][0]
    frame = int(leaves[0][0]) >> 12
    assert f"frame {frame} is private to more than one guest page" in allocator.check(leaves)
    leaves[1][5] = 0
    clone = clone_block(allocator, blocks[0])
    leaves.append(clone.leaf())
    leaves[1][5] = leaves[0][0]
    assert f"frame {frame} is shared by more entries than counted" in allocator.check(leaves)


class Guest:
    """A block, who serves it with frames, and what must be read from its pages."""

    def __init__(self, block: VmBlock, borrower: int, content: dict[int, bytes]) -> None:
        self.block = block
        self.borrower = borrower
        self.content = content


class Ledger(RuleBasedStateMachine):
    """Guests of two borrowers that come, write, are cloned, report late, and go."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(3 << 20)
        self.allocator = FrameAllocator(self.pool, reserve=2 * VmBlock.frames_for(MEMORY))
        self.magazines = [Magazine() for _ in range(BORROWERS)]
        self.guests: list[Guest] = []
        self.serial = 0

    def pick(self, number: int) -> Guest:
        return self.guests[number % len(self.guests)]

    def leaves(self) -> list[np.ndarray]:
        return [guest.block.leaf() for guest in self.guests]

    def report(self, guest: Guest) -> None:
        self.allocator.drop(frame for _, frame in guest.block.p2m.dropped)
        guest.block.p2m.dropped = []

    @rule(borrower=st.integers(0, BORROWERS - 1))
    def create(self, borrower: int) -> None:
        try:
            self.guests.append(Guest(new_block(self.allocator, MEMORY), borrower, {}))
        except OutOfFrames:
            assert self.allocator.free_frames() < 4 * VmBlock.frames_for(MEMORY)

    @rule(borrower=st.integers(0, BORROWERS - 1), count=st.integers(1, 120))
    def lend(self, borrower: int, count: int) -> None:
        free = self.allocator.free_frames()
        try:
            for first, length in self.allocator.lend(borrower, count):
                self.magazines[borrower].add(first, length)
        except OutOfFrames:
            assert count > free

    @precondition(lambda self: self.guests)
    @rule(number=st.integers(0, 9), pages=st.sets(st.integers(0, PAGES - 1), max_size=20), tell=st.booleans())
    def write(self, number: int, pages: set[int], tell: bool) -> None:
        guest = self.pick(number)
        memory = GuestMemory(guest.block.p2m, self.magazines[guest.borrower])
        for page in sorted(pages):
            self.serial += 1
            data = self.serial.to_bytes(8, "little")
            try:
                memory.write(page * PAGE + 100, data)
            except OutOfFrames:
                assert not len(self.magazines[guest.borrower])
            else:
                guest.content[page] = data
        if tell:
            self.report(guest)

    @precondition(lambda self: self.guests)
    @rule(number=st.integers(0, 9), borrower=st.integers(0, BORROWERS - 1))
    def clone(self, number: int, borrower: int) -> None:
        guest = self.pick(number)
        self.report(guest)
        try:
            block = clone_block(self.allocator, guest.block)
        except OutOfFrames:
            return
        self.guests.append(Guest(block, borrower, dict(guest.content)))

    @precondition(lambda self: self.guests)
    @rule(number=st.integers(0, 9))
    def destroy(self, number: int) -> None:
        guest = self.guests.pop(number % len(self.guests))
        self.report(guest)
        free_block(self.allocator, guest.block)

    @rule(borrower=st.integers(0, BORROWERS - 1))
    def die(self, borrower: int) -> None:
        """The borrower is gone with its stock; its guests go over to the other one."""
        for guest in self.guests:
            if guest.borrower == borrower:
                self.report(guest)
                guest.borrower = 1 - borrower
        stock = len(self.magazines[borrower])
        assert self.allocator.reclaim(borrower, self.leaves()) >= stock
        self.magazines[borrower] = Magazine()

    @invariant()
    def balances(self) -> None:
        assert self.allocator.check(self.leaves()) == []
        count = self.allocator.count(self.leaves())
        assert count.total == self.pool.frames
        assert count.overhead == 1 + len(self.guests) * VmBlock.frames_for(MEMORY)
        assert count.on_loan >= sum(len(magazine) for magazine in self.magazines)

    @invariant()
    def everybody_reads_their_own(self) -> None:
        for guest in self.guests:
            memory = GuestMemory(guest.block.p2m, Magazine())
            for page in range(PAGES):
                assert memory.read(page * PAGE + 100, 8) == guest.content.get(page, bytes(8))

    @invariant()
    def free_frames_are_zero(self) -> None:
        free = np.flatnonzero(self.allocator._owner == FREE)
        assert not np.frombuffer(self.pool.view, dtype=np.uint64).reshape(-1, 512)[free].any()

    def teardown(self) -> None:
        while self.guests:
            self.destroy(0)
        for borrower in range(BORROWERS):
            self.die(borrower)
        count = self.allocator.count([])
        assert (count.free, count.overhead) == (self.pool.frames - 1, 1)


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=20, stateful_step_count=25, deadline=None,
                               suppress_health_check=[HealthCheck.too_slow])
