# SPDX-License-Identifier: GPL-2.0-or-later
"""What `hostctl memory --check` finds: every frame that is lost, and every one that has an owner too many."""

from __future__ import annotations

import numpy as np
import pytest

from hostd.books import Books
from vmm.memory.block import VmBlock
from vmm.memory.frames import LOAN, Magazine
from vmm.memory.p2mbits import PRIVATE_BITS
from vmm.memory.physical import GuestMemory
from vmm.memory.pool import Pool

PAGE = 4096
GUEST = 1 << 20
PAGES = np.arange(4)


@pytest.fixture
def books() -> Books:
    return Books(Pool(4 << 20))


def shared(books: Books) -> tuple[VmBlock, np.ndarray]:
    """A guest of worker 0 that shares its first pages, with nobody so far, and their frames."""
    block = books.new(GUEST)
    memory = GuestMemory(block.p2m, Magazine(books.lend(0, len(PAGES))))
    for page in PAGES.tolist():
        memory.write(page * PAGE, b"something")
    books.freeze(block, PAGES)
    assert books.check() == []
    return block, (block.leaf()[PAGES] >> np.uint64(12) & np.uint64(0xFFFFF)).astype(np.int64)


def test_an_owner_too_many(books: Books) -> None:
    _, frames = shared(books)
    books.pin(frames[:2])
    assert books.check() == []
    books._allocator.retain(frames[:1])
    assert books.check() == ["shared frames have 3 owners that are no guests, and 2 are pinned"]


def test_an_owner_too_few(books: Books) -> None:
    block, frames = shared(books)
    books.pin(frames)
    twin = books.clone(block)
    books._allocator.drop(frames[:1])
    books._allocator.drop(frames[:1])
    assert f"frame {frames[0]} is charged to 2 pages and has 1 owners" in books.check()
    books.free(twin)


def test_a_charge_for_another_frame(books: Books) -> None:
    block, frames = shared(books)
    # a frame whose number has all the bits of the other's
    other = int(frames[0]) | 1 << 8
    books._charges[block.first].frames[0] = other
    assert (f"page 0 of the guest at {block.first} has the frame {frames[0]} in common with others, and is "
            f"charged with {other}") in books.check()


def test_frames_for_loading_that_came_nowhere(books: Books) -> None:
    books.frames_for_loading(3)
    assert books.check() == []
    books.loaded(3)
    assert books.check() == ["3 frames are lent to load guests, and 0 of them in use"]


def test_a_passage_that_is_over(books: Books) -> None:
    frames = books.frames_for_loading(3).rest()
    passage = books.send(frames)
    assert books.check() == []
    books.returned(passage, frames[:2])
    assert books.check() == [f"frames are on passage {passage}, which is over"]


def test_what_a_worker_lost(books: Books) -> None:
    block = books.new(GUEST)
    magazine = Magazine(books.lend(0, 10))
    GuestMemory(block.p2m, magazine).write(0, b"something")
    given = books.given(0)
    assert books.check_worker(0, 10, given, [block]) == ""
    assert books.check_worker(0, 9, given, []) == "", "the guest was taken back meanwhile"
    magazine.take()
    assert books.check_worker(0, len(magazine) + 1, given, [block]) == (
        "worker 0 has 9 frames, and 10 are lent to it")


def test_what_a_worker_was_given_after_it_was_asked(books: Books) -> None:
    books.lend(0, 10)
    given = books.given(0)
    books.lend(0, 5)
    block = books.new(GUEST)
    GuestMemory(block.p2m, books.frames_for_loading(2)).write(0, b"something")
    books.adopted(block, 0)
    assert books.check_worker(0, 10, given, [block]) == ""


def test_frames_add_up_because_they_are_counted(books: Books) -> None:
    block, _ = shared(books)
    before = books.counts()
    assert before.total == 1024
    stranger = int(np.flatnonzero(books._allocator.owners() < LOAN)[-1])
    block.leaf()[100] = np.uint64(stranger << 12 | PRIVATE_BITS)
    assert books.counts().total == 1025
    assert f"frame {stranger} is in use but not lent" in books.check()
