# SPDX-License-Identifier: GPL-2.0-or-later
"""The books of machine memory: they balance whatever guests, clones and dying workers do, in any order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hostd.books import Books
from hostd.errors import Failed, Invalid
from vmm.memory.block import VmBlock
from vmm.memory.frames import Magazine
from vmm.memory.physical import GuestMemory
from vmm.memory.pool import Pool

PAGE = 4096
GUEST = 1 << 20
WORKERS = 2


class Hand:
    """A worker's side: a magazine, and guests that write."""

    def __init__(self, memory: Books, index: int) -> None:
        self.magazine = Magazine(memory.lend(index, 400))

    def write(self, block: VmBlock, page: int, data: bytes) -> None:
        GuestMemory(block.p2m, self.magazine).write(page * PAGE, data)


def read(block: VmBlock, page: int) -> bytes:
    return GuestMemory(block.p2m, Magazine()).read(page * PAGE, 8)


def report(memory: Books, block: VmBlock) -> None:
    """What the worker does after a turn."""
    p2m = block.p2m
    memory.reported(block, [page for page, _ in p2m.dropped], p2m.freed, p2m.fetched)
    p2m.dropped, p2m.freed, p2m.fetched = [], [], []


@pytest.fixture
def memory() -> Iterator[Books]:
    memory = Books(Pool(16 << 20))
    yield memory
    assert memory.check() == []


def test_a_guest_takes_what_it_touches_and_gives_it_back(memory: Books) -> None:
    hand = Hand(memory, 0)
    free = memory.counts().free
    block = memory.new(GUEST)
    hand.write(block, 3, b"something")
    hand.write(block, 9, b"else")
    assert VmBlock.memory_counts(block)["private"] == VmBlock.memory_counts(block)["resident"] == 2
    assert memory.counts().private == 2
    memory.free(block)
    assert memory.counts().free == free + 2
    assert memory.counts().private == 0


def test_clones_share_until_they_write(memory: Books) -> None:
    hand = Hand(memory, 0)
    template = memory.new(GUEST)
    for page in range(4):
        hand.write(template, page, b"template")
    clones = [memory.clone(template) for _ in range(3)]
    assert (memory.counts().shared, memory.counts().private) == (4, 0)
    hand.write(clones[0], 1, b"clone no")
    report(memory, clones[0])
    assert [read(block, 1) for block in (template, *clones)] == [
        b"template", b"clone no", b"template", b"template"]
    assert (VmBlock.memory_counts(clones[0])["private"], VmBlock.memory_counts(clones[0])["shared"]) == (1, 3)
    for block in (template, *clones):
        memory.free(block)
    assert (memory.counts().shared, memory.counts().private) == (0, 0)


def test_clones_of_one_moment_have_one_snapshot(memory: Books) -> None:
    hand = Hand(memory, 0)
    template = memory.new(GUEST)
    hand.write(template, 0, b"x")
    first, second = memory.clone(template), memory.clone(template)
    assert memory.snapshot(template) == memory.snapshot(first) == memory.snapshot(second) != 0
    hand.write(template, 0, b"y")
    report(memory, template)
    third = memory.clone(template)
    assert memory.snapshot(third) not in (0, memory.snapshot(first))


def test_a_report_that_never_came_costs_no_frame(memory: Books) -> None:
    hand = Hand(memory, 0)
    template = memory.new(GUEST)
    hand.write(template, 0, b"template")
    clone = memory.clone(template)
    hand.write(clone, 0, b"clone")              # the worker dies before it says so
    memory.free(clone)
    memory.reclaim(0)
    memory.free(template)
    counts = memory.counts()
    assert counts.free + counts.overhead == counts.total


def test_a_report_after_another_worker_s_death_is_counted_once(memory: Books) -> None:
    hands = [Hand(memory, 0), Hand(memory, 1)]
    template = memory.new(GUEST)
    hands[0].write(template, 0, b"template")
    clones = [memory.clone(template) for _ in range(3)]
    hands[1].write(clones[0], 0, b"mine")       # the report is under way...
    memory.free(clones[1])
    memory.reclaim(0)                           # ...while worker 0 dies with its guest...
    report(memory, clones[0])                   # ...and arrives
    memory.free(template)
    assert read(clones[2], 0) == b"template"
    assert memory.counts().shared == 1


def test_a_full_pool_is_told_and_leaves_nothing(memory: Books) -> None:
    blocks = []
    with pytest.raises(Failed, match="not enough machine memory"):
        for _ in range(10_000):
            blocks.append(memory.new(GUEST))
    used = memory.counts()
    for block in blocks:
        memory.free(block)
    assert memory.counts().free == used.free + used.overhead - 1    # frame 0 is nobody's


def test_a_worker_gets_what_there_is(memory: Books) -> None:
    assert sum(count for _, count in memory.lend(0, 1 << 20)) == memory.counts().granted
    assert memory.lend(1, 1) == []


@pytest.mark.parametrize(("size", "sentence"), [
    (17 << 20, "memory of 17 MiB is more than the host's pool of 16 MiB"),
    (16 << 20, "more than the host's pool"),
    ((1 << 20) + 1, "not a whole number of 4 KiB pages"),
])
def test_a_guest_that_can_never_fit(memory: Books, size: int, sentence: str) -> None:
    with pytest.raises(Invalid, match=sentence):
        memory.check_size(size)


class Comings(RuleBasedStateMachine):
    """Guests come, write, are cloned, moved and go; workers die with reports unsent."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Books(Pool(16 << 20))
        self.hands = [Hand(self.memory, index) for index in range(WORKERS)]
        #: (block, worker, what was last written by page)
        self.guests: list[tuple[VmBlock, int, dict[int, bytes]]] = []
        self.serial = 0

    def guest(self, number: int) -> tuple[VmBlock, int, dict[int, bytes]]:
        return self.guests[number % len(self.guests)]

    @rule(worker=st.integers(0, WORKERS - 1))
    def new(self, worker: int) -> None:
        if len(self.guests) < 8:
            self.guests.append((self.memory.new(GUEST), worker, {}))

    @rule(number=st.integers(0, 7), pages=st.lists(st.integers(0, 20), max_size=5), tell=st.booleans())
    def write(self, number: int, pages: list[int], tell: bool) -> None:
        if self.guests:
            block, worker, content = self.guest(number)
            for page in pages:
                if len(self.hands[worker].magazine):
                    self.serial += 1
                    content[page] = self.serial.to_bytes(8, "little")
                    self.hands[worker].write(block, page, content[page])
            if tell:
                report(self.memory, block)

    @rule(number=st.integers(0, 7), worker=st.integers(0, WORKERS - 1))
    def clone(self, number: int, worker: int) -> None:
        if self.guests and len(self.guests) < 8:
            block, _, content = self.guest(number)
            report(self.memory, block)              # a guest is released before it is cloned
            self.guests.append((self.memory.clone(block), worker, dict(content)))

    @rule(number=st.integers(0, 7), worker=st.integers(0, WORKERS - 1))
    def move(self, number: int, worker: int) -> None:
        if self.guests:
            block, _, content = self.guest(number)
            report(self.memory, block)
            self.guests[number % len(self.guests)] = block, worker, content

    @rule(number=st.integers(0, 7))
    def go(self, number: int) -> None:
        if self.guests:
            block, _, _ = self.guests.pop(number % len(self.guests))
            report(self.memory, block)
            self.memory.free(block)

    @rule(worker=st.integers(0, WORKERS - 1))
    def die(self, worker: int) -> None:
        for guest in [guest for guest in self.guests if guest[1] == worker]:
            self.guests.remove(guest)
            self.memory.free(guest[0])
        self.memory.reclaim(worker)
        self.hands[worker] = Hand(self.memory, worker)

    @invariant()
    def balanced(self) -> None:
        """But for what a worker has not told yet."""
        untold = {f" of the guest at {block.first} " for block, _, _ in self.guests if block.p2m.dropped}
        assert [wrong for wrong in self.memory.check() if not any(guest in wrong for guest in untold)] == []
        counts = self.memory.counts()
        assert counts.total == counts.free + counts.granted + counts.private + counts.shared + counts.overhead

    @invariant()
    def intact(self) -> None:
        for block, _, content in self.guests:
            for page, data in content.items():
                assert read(block, page) == data

    def teardown(self) -> None:
        for worker in range(WORKERS):
            self.die(worker)
        stock = sum(len(hand.magazine) for hand in self.hands)
        counts = self.memory.counts()
        assert (counts.private, counts.shared, counts.granted) == (0, 0, stock)


TestComings = Comings.TestCase
TestComings.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
