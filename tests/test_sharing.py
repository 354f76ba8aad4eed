# SPDX-License-Identifier: GPL-2.0-or-later
"""Page sharing on real memory: who is offered what and when, and that no guest can tell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from hostd.sharing import ScanGuest, task
from hostd.sharing.task import BATCH, PERIOD
from tests.sharing_rig import PAGES, SharingHost


@pytest.fixture
def host() -> Iterator[SharingHost]:
    host = SharingHost()
    yield host
    host.check()
    host.end()


def unique(guest: int, page: int) -> bytes:
    return b"page %d of guest %d." % (page, guest)


# -- what is offered, and when ------------------------------------------------------------------------------


def test_guests_of_one_image_share_in_the_first_pass(host: SharingHost) -> None:
    guests = [host.guest() for _ in range(5)]
    for index, guest in enumerate(guests):
        for page in range(40):
            guest.fill(page, b"the same %d" % page if page < 30 else unique(index, page))
    host.scan()
    assert [(guest.count("private"), guest.count("shared")) for guest in guests] == [(10, 30)] * 5
    assert host.books.counts().shared == 30
    assert (host.sharing.merged, host.sharing.refused) == (4 * 30, 0)


def test_pages_in_other_places_are_found_once_they_are_stable(host: SharingHost) -> None:
    """Of guests from different images, and within one guest."""
    first, second = host.guest("debian"), host.guest("alpine")
    for page in range(20):
        first.fill(page, b"contents %d" % (page % 10))
        second.fill(page + 100, b"contents %d" % (page % 10))
    host.scan()
    assert host.books.counts().shared == 0
    host.scan()
    assert host.books.counts().shared == 10
    assert (first.count("private"), second.count("private")) == (0, 0)


def test_a_stranger_joins_a_shared_frame_at_once(host: SharingHost) -> None:
    first, second = host.guest(), host.guest()
    for guest in first, second:
        guest.fill(3, b"library")
    host.scan()
    stranger = host.guest("alpine")
    stranger.fill(77, b"library")
    host.scan()
    assert stranger.frame(77) == first.frame(3) == second.frame(3)


def test_unstable_pages_are_not_offered(host: SharingHost) -> None:
    first, second = host.guest("debian"), host.guest("alpine")
    for round in range(6):
        first.fill(1, b"round %d" % round)
        second.fill(2, b"round %d" % round)
        host.scan()
    assert host.reclaimer.asked == {"freeze": [], "merge": [], "drop_zeros": []}


def test_a_page_that_was_written_after_it_was_shared_must_be_stable(host: SharingHost) -> None:
    first, second = host.guest(), host.guest()
    for guest in first, second:
        guest.fill(5, b"now and then")
    host.scan()
    assert first.frame(5) == second.frame(5)
    first.fill(5, b"something else")
    host.scan()
    for _ in range(3):                                  # it has the old contents whenever it is looked at
        first.fill(5, b"now and then")
        host.scan()
        assert first.frame(5) != second.frame(5)
        first.fill(5, b"something else")
        host.scan()
    first.fill(5, b"now and then")
    host.scan(2)
    assert first.frame(5) == second.frame(5)


def test_pages_of_zeros_lose_their_frames(host: SharingHost) -> None:
    guest = host.guest()
    for page in range(10):
        guest.fill(page, b"\0" if page < 8 else b"\0\0x")
    host.scan()
    assert (guest.count("resident"), host.sharing.zeroed) == (2, 8)
    guest.fill(0, b"x")
    guest.fill(0, b"\0")
    host.scan()
    assert guest.count("resident") == 3, "it was written since, and is not known to stay as it is"
    host.scan()
    assert guest.count("resident") == 2


def test_discarded_pages_are_of_no_interest(host: SharingHost) -> None:
    first, second = host.guest(), host.guest()
    for guest in first, second:
        guest.fill(1, b"gone soon")
    first.discard(1)
    host.scan(3)
    assert second.count("private") == 1 and host.sharing.merged == 0


def test_what_is_shared_is_not_looked_at_again(host: SharingHost) -> None:
    for guest in host.guest(), host.guest():
        for page in range(50):
            guest.fill(page, b"page %d" % page)
    host.scan()
    scanned = host.sharing.scanned
    host.scan(3)
    assert host.sharing.scanned == scanned == 100


# -- the hash is only a hint --------------------------------------------------------------------------------


@pytest.mark.parametrize("same_image", [True, False])
def test_collisions_merge_nothing_that_differs(host: SharingHost, same_image: bool) -> None:
    """With a hash that has four values, of which one says zeros."""
    words = np.frombuffer(host.pool.q, dtype=np.uint64).reshape(-1, 512)
    host.use(lambda frames: words[frames, 0] % np.uint64(4))
    for index in range(4):
        guest = host.guest("debian" if same_image else str(index))
        for page in range(30):
            guest.fill(page, bytes([page + 1 + index // 2, index // 2]))
    for _ in range(6):
        host.scan()
        host.check()
    assert host.sharing.refused > 0
    assert host.sharing.zeroed == 0


def test_a_page_that_changes_between_scan_and_offer(host: SharingHost) -> None:
    guests = [host.guest() for _ in range(3)]
    for guest in guests:
        guest.fill(9, b"as it was scanned")
    found = host.scanner.scan([ScanGuest(guest, "debian", guest.memory.leaf()) for guest in guests], 100)
    assert [pages.tolist() for pages in found.freezes.values()] == [[9]]
    for guest, contents in zip(guests, (b"as it is frozen", b"as it was scanned", b"other"), strict=True):
        guest.fill(9, contents)
    host.use(host.scanner._hash)
    host.scan(4)
    assert host.sharing.merged == 0


# -- pace ---------------------------------------------------------------------------------------------------


def test_the_budget_is_kept_and_all_guests_have_their_turn(host: SharingHost) -> None:
    host.rate = 60
    guests = [host.guest() for _ in range(3)]
    for index, guest in enumerate(guests):
        for page in range(0, PAGES, 2):
            guest.fill(page, unique(index, page))
    total = 3 * PAGES // 2
    for done in range(1, total // 60 + 1):
        host.scan()
        assert host.sharing.scanned == 60 * done
        assert host.scanner.passes == 0
    host.scan()
    assert (host.sharing.scanned, host.scanner.passes) == (total, 1)


def test_no_rate_no_scan(host: SharingHost) -> None:
    host.rate = 0
    host.guest().fill(1, b"\0")
    host.scan(3)
    assert host.sharing.scanned == 0


def test_it_slows_down_when_there_is_nothing_to_find(host: SharingHost) -> None:
    host.rate = 1600
    guest = host.guest()
    for page in range(50):
        guest.fill(page, unique(0, page))
    assert host.sharing.view().rate == 1600
    host.scan(20)
    assert host.sharing.view().rate == 25
    host.sharing.urgent = True
    assert host.sharing.view().rate == 1600
    host.sharing.urgent = False
    host.guest("alpine").fill(1, b"another guest")
    host.scan()
    assert host.sharing.view().rate >= 400, "a new guest is worth a look"
    host.scan(20)
    assert host.sharing.view().rate == 25
    guest.fill(7, b"\0")
    rates = set()
    for _ in range(5):
        host.scan()
        rates.add(host.sharing.view().rate)
    assert 1600 in rates, "there was something to find"


def test_it_is_at_full_rate_again_when_much_memory_is_taken(host: SharingHost, monkeypatch: Any) -> None:
    host.rate = 1600
    guest = host.guest()
    for page in range(50):
        guest.fill(page, unique(0, page))
    host.scan(20)
    free = host.books.free_frames()
    monkeypatch.setattr(host.books, "free_frames", lambda: free - free // task._GROWTH)
    host.scan()
    assert host.sharing.view().rate == 25
    monkeypatch.setattr(host.books, "free_frames", lambda: free - free // task._GROWTH - 1)
    host.scan()
    assert host.sharing.view().rate >= 400
    host.scan(20)
    assert host.sharing.view().rate == 25, "it has not grown since"


async def slowed_down(host: SharingHost) -> None:
    """Until it looks at pages as slowly as it ever does; under a mock clock."""
    while host.sharing.view().rate > host.rate * task.SLOWEST:
        await trio.sleep(1)
    await trio.sleep(1)


async def next_scan(host: SharingHost) -> tuple[int, int]:
    """Pages scanned and passes once there are more, if that needs no waiting: as nobody is idle, a mock clock
    stands still meanwhile."""
    done = host.sharing.scanned, host.scanner.passes
    for _ in range(100_000):
        await trio.lowlevel.checkpoint()
        if (host.sharing.scanned, host.scanner.passes) != done:
            break
    return host.sharing.scanned, host.scanner.passes


def test_a_shortage_does_not_wait_for_the_next_scan(host: SharingHost) -> None:
    """The next one would be due long after."""
    host.rate = 4 * PAGES
    guest = host.guest()
    for page in range(PAGES):
        guest.fill(page, unique(0, page))

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.sharing.run)
            await slowed_down(host)
            done = host.sharing.scanned, host.scanner.passes
            host.sharing.urgent = True
            assert await next_scan(host) != done
            nursery.cancel_scope.cancel()

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0.001))


def test_a_shortage_is_no_reason_to_make_up_for_what_was_not_due(host: SharingHost) -> None:
    host.rate = 64
    guest = host.guest()
    for page in range(PAGES):
        guest.fill(page, unique(0, page))

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.sharing.run)
            await slowed_down(host)
            scanned, passes = host.sharing.scanned, host.scanner.passes
            host.sharing.urgent = True
            assert await next_scan(host) == (scanned + 64 * PERIOD, passes)
            nursery.cancel_scope.cancel()

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0.001))


def test_the_slowest_rate_is_more_than_none(host: SharingHost) -> None:
    host.rate = 1
    host.guest().fill(0, b"alone")
    host.scan(100)
    assert host.sharing.view().rate == task.SLOWEST
    scanned = host.sharing.scanned
    host.scan(int(4 / task.SLOWEST))
    assert host.sharing.scanned == scanned + 2, "every other look finds that it has seen all"


def test_the_task_keeps_the_pace(host: SharingHost) -> None:
    """And scans for as long as it runs, whoever comes in the meantime."""
    host.rate = 400
    first = host.guest()
    for page in range(PAGES):
        first.fill(page, unique(0, page))

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.sharing.run)
            began = trio.current_time()
            while not host.scanner.passes:
                await trio.sleep(0.1)
                assert host.sharing.scanned <= 400 * (trio.current_time() - began + PERIOD)
            second, third = host.guest("alpine"), host.guest("alpine")
            for guest in second, third:
                guest.fill(0, b"late")
            while second.frame(0) != third.frame(0):
                await trio.sleep(1)
            nursery.cancel_scope.cancel()

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0.001))


def test_batches_are_bounded() -> None:
    pages = BATCH * 3 // 2
    host = SharingHost(pool_bytes=32 << 20, frames=3 * pages)
    sizes: list[int] = []
    merge = host.reclaimer.merge

    async def noted(vm: object, pages: np.ndarray, frames: np.ndarray) -> int:
        sizes.append(len(pages))
        return await merge(vm, pages, frames)           # type: ignore[arg-type]

    host.reclaimer.merge = noted                        # type: ignore[method-assign,assignment]
    for guest in host.guest(pages=pages), host.guest(pages=pages):
        for page in range(pages):
            guest.fill(page, b"page %d" % page)
    host.scan()
    assert sizes == [BATCH, pages - BATCH]
    host.check()
    host.end()
