# SPDX-License-Identifier: GPL-2.0-or-later
"""The balloon: pages given, taken back and reported, statistics, and drivers that tell lies."""

from __future__ import annotations

import struct

import pytest

from tests.virtio_rig import BUFFERS, GUEST_PAGES, PAGE, READY, ROUNDS, Bench, balloon_bench
from vmm.devices.virtio.balloon import MOST_PAGES, REPORTING, STATS_VQ, Balloon, Role
from vmm.devices.virtio.mmio import CONFIG, CONFIG_CHANGED, NEEDS_RESET, USED_BUFFER, Register
from vmm.memory.errors import OutOfFrames

INFLATE, DEFLATE, STATISTICS, REPORT = range(4)


@pytest.fixture
def bench() -> Bench:
    bench = balloon_bench()
    assert bench.driver.start() == READY
    bench.serve()
    return bench


def balloon(bench: Bench) -> Balloon:
    assert isinstance(bench.device, Balloon)
    return bench.device


def tell(bench: Bench, queue: int, pages: list[int], indirect: bool = False) -> None:
    """A request with the numbers of pages, in two pieces."""
    data = struct.pack(f"<{len(pages)}I", *pages)
    bench.ram.data[BUFFERS:BUFFERS + len(data)] = data
    half = len(data) // 2
    bench.driver.send(queue, [(BUFFERS, half, False), (BUFFERS + half, len(data) - half, False)], indirect)


def test_a_target_is_told(bench: Bench) -> None:
    device, driver = balloon(bench), bench.driver
    generation = driver.get(Register.GENERATION)
    device.target_pages = 1000
    assert bench.interrupted() == CONFIG_CHANGED
    assert driver.get(Register.GENERATION) != generation
    assert driver.get(CONFIG) == device.target_pages == 1000
    device.target_pages = 1000
    assert bench.interrupted() == 0
    for bad in (-1, GUEST_PAGES + 1):
        with pytest.raises(ValueError, match=f"of {bad} pages: the guest has {GUEST_PAGES}"):
            device.target_pages = bad
    device.target_pages = GUEST_PAGES


def test_a_target_waits_for_a_driver() -> None:
    bench = balloon_bench()
    device = balloon(bench)
    device.target_pages = 1000
    assert not device.driver_ok
    assert not bench.level
    bench.driver.start()
    assert device.driver_ok
    assert bench.driver.get(CONFIG) == 1000


def test_what_the_driver_says_it_gave(bench: Bench) -> None:
    device = balloon(bench)
    bench.driver.put(CONFIG + 4, 700)
    bench.driver.put(CONFIG, 5)                 # not the driver's to write
    assert (device.actual_pages, device.target_pages) == (700, 0)
    device.write(CONFIG + 5, 1, 1)
    assert device.actual == 700 & 0xFF | 0x100
    bench.driver.put(CONFIG + 4, 0xFFFF_FFFF)
    assert device.actual_pages == GUEST_PAGES
    bench.driver.start()
    assert device.actual_pages == 0


@pytest.mark.parametrize("indirect", [False, True])
def test_pages_are_given_and_taken_back(bench: Bench, indirect: bool) -> None:
    pages = [*range(100, 300), 7, 7]
    tell(bench, INFLATE, pages, indirect)
    assert bench.serve() == 1
    assert bench.pages.discarded == [(page, True) for page in pages]
    assert bench.driver.used(INFLATE) == [(0, 0)]
    assert bench.interrupted() == USED_BUFFER
    tell(bench, DEFLATE, pages[:150], indirect)
    bench.serve()
    assert bench.pages.deflated == pages[:150]
    assert bench.driver.used(DEFLATE) == [(0, 0)]
    assert balloon(bench).counters == {"inflated": 202, "deflated": 150, "reported": 0}


@pytest.mark.parametrize("queue", [INFLATE, DEFLATE])
def test_a_request_waits_for_a_frame(bench: Bench, queue: int) -> None:
    """A page is counted once, however often the request had to be looked at."""
    pages = list(range(600))
    tell(bench, queue, pages)
    refused = 0
    for access in range(1, 40):
        bench.ram.refuse = access
        try:
            bench.serve()
        except OutOfFrames:
            refused += 1
    assert refused > 5
    assert bench.driver.used(queue) == [(0, 0)]
    assert sum(balloon(bench).counters.values()) == 600
    assert [page for page, _ in bench.pages.discarded] + bench.pages.deflated == pages


@pytest.mark.parametrize("queue", [INFLATE, DEFLATE])
@pytest.mark.parametrize("bad", [GUEST_PAGES, 0xFFFF_FFFF])
def test_a_page_that_is_not_there(bench: Bench, queue: int, bad: int) -> None:
    tell(bench, queue, [5, bad])
    bench.serve()
    assert bench.driver.get(Register.STATUS) & NEEDS_RESET
    assert bench.interrupted() == CONFIG_CHANGED
    assert not bench.pages.discarded
    assert not bench.pages.deflated
    assert not balloon(bench).driver_ok


def test_more_pages_than_there_are(bench: Bench) -> None:
    bench.driver.send(INFLATE, [(BUFFERS, 4 * GUEST_PAGES + 4, False)])
    bench.serve()
    assert bench.driver.get(Register.STATUS) & NEEDS_RESET
    assert not bench.pages.discarded


@pytest.mark.parametrize("length", [0, 3])
def test_a_request_without_a_page(bench: Bench, length: int) -> None:
    bench.driver.send(INFLATE, [(BUFFERS, length, False)])
    bench.serve()
    assert bench.driver.used(INFLATE) == [(0, 0)]
    assert not bench.pages.discarded


# -- free page reporting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("queue", [REPORT, Balloon.REPORTING_QUEUE])
def test_free_pages_are_discarded(bench: Bench, queue: int) -> None:
    """Only whole ones; by the number that Linux gives the queue, and by the standard's."""
    bench.driver.send(queue, [(10 * PAGE, 2 * PAGE, True), (20 * PAGE + 1, 2 * PAGE, True),
                              (30 * PAGE - 1, PAGE + 1, True), (40 * PAGE + 1, PAGE - 1, True), (0, 0, True)])
    bench.serve()
    assert bench.pages.discarded == [(page, False) for page in (10, 11, 21, 30)]
    assert bench.driver.used(queue) == [(0, 0)]
    assert balloon(bench).counters["reported"] == 4


def test_a_long_report_takes_several_passes(bench: Bench) -> None:
    bench.driver.send(REPORT, [(1 << 24, 8 << 20, True), (1 << 25, 8 << 20, True)], indirect=True)
    assert bench.serve() == 4096 // (ROUNDS * MOST_PAGES) + 1
    assert bench.pages.discarded == [
        (page, False) for first in (1 << 12, 1 << 13) for page in range(first, first + 2048)]


def test_a_long_report_goes_on_elsewhere(bench: Bench) -> None:
    bench.driver.send(REPORT, [(1 << 24, 16 << 20, True)])
    bench.serve_once()
    done = len(bench.pages.discarded)
    assert 0 < done < 4096
    other = balloon_bench()
    other.device.load(bench.device.save())
    other.ram.data[:] = bench.ram.data
    other.driver.given[:] = bench.driver.given
    other.serve()
    assert bench.pages.discarded + other.pages.discarded == [
        (page, False) for page in range(4096, 8192)]
    assert other.driver.used(REPORT) == [(0, 0)]
    assert balloon(other).counters["reported"] == 4096


def test_long_requests_on_all_queues_are_served_in_small_pieces_by_turns(bench: Bench) -> None:
    long = 16 * MOST_PAGES
    for queue in (INFLATE, DEFLATE):
        bench.driver.send(queue, [(BUFFERS, 4 * long, False)])
    for queue, start in ((REPORT, 1 << 24), (Balloon.REPORTING_QUEUE, 1 << 25)):
        bench.driver.send(queue, [(start, PAGE * long, True)])
    bench.serve_once(rounds=1)
    assert balloon(bench).counters == {"inflated": MOST_PAGES, "deflated": MOST_PAGES,
                                       "reported": 2 * MOST_PAGES}
    bench.serve()
    assert balloon(bench).counters == {"inflated": long, "deflated": long, "reported": 2 * long}


@pytest.mark.parametrize("segments", [
    [(GUEST_PAGES * PAGE - PAGE, 2 * PAGE, True)],
    [((1 << 64) - PAGE, PAGE, True)],
    [(0, GUEST_PAGES * PAGE // 2, True)] * 3,               # the same pages again and again
    [(0, 0xFFFF_FFFF, True)],
])
def test_a_report_of_what_is_not_there(bench: Bench, segments: list[tuple[int, int, bool]]) -> None:
    bench.driver.send(REPORT, segments)
    bench.serve()
    assert bench.driver.get(Register.STATUS) & NEEDS_RESET
    assert not bench.pages.discarded


# -- statistics ---------------------------------------------------------------------------------------------


def report(bench: Bench, *statistics: tuple[int, int], tail: bytes = b"") -> None:
    data = b"".join(struct.pack("<HQ", *pair) for pair in statistics) + tail
    bench.ram.data[BUFFERS:BUFFERS + len(data)] = data
    bench.driver.send(STATISTICS, [(BUFFERS, len(data), False)])
    bench.serve()


def test_statistics_are_asked_for_and_come(bench: Bench) -> None:
    device = balloon(bench)
    report(bench, (4, 123), (5, 1 << 40))
    assert device.statistics == {"free": 123, "total": 1 << 40}
    assert device.received_ns == bench.now
    assert not bench.driver.used(STATISTICS)        # the buffer stays until they are wanted again
    bench.now += 10
    assert device.request_statistics()
    assert device.asked_ns == bench.now
    bench.serve()
    assert bench.driver.used(STATISTICS) == [(0, 0)]
    assert bench.interrupted() == USED_BUFFER
    bench.now += 10
    report(bench, *((tag, tag + 100) for tag in range(12)), tail=b"\1\2\3")
    assert device.statistics == {
        "swap_in": 100, "swap_out": 101, "major_faults": 102, "minor_faults": 103, "free": 104, "total": 105,
        "available": 106, "caches": 107, "huge_pages_allocated": 108, "huge_pages_failed": 109}
    assert (device.asked_ns, device.received_ns) == (bench.now - 10, bench.now)
    assert not device.wanted


def test_statistics_are_asked_for_before_there_is_a_buffer(bench: Bench) -> None:
    device = balloon(bench)
    assert device.request_statistics()
    bench.serve()
    assert device.wanted
    report(bench, (4, 9))
    assert device.statistics == {"free": 9}
    assert not device.wanted
    assert not bench.driver.used(STATISTICS)


def test_asking_twice_is_asking_once(bench: Bench) -> None:
    device = balloon(bench)
    report(bench, (4, 9))
    device.request_statistics()
    device.request_statistics()
    bench.serve()
    device.request_statistics()
    bench.serve()
    assert bench.driver.used(STATISTICS) == [(0, 0)]


def test_nobody_can_be_asked() -> None:
    bench = balloon_bench()
    assert not balloon(bench).request_statistics()
    bench.driver.start(REPORTING)
    assert not balloon(bench).request_statistics()


def test_a_driver_that_goes_leaves_an_empty_balloon(bench: Bench) -> None:
    before = bench.pages.emptied
    tell(bench, INFLATE, [1, 2, 3])
    bench.serve()
    assert bench.pages.emptied == before
    for _ in range(3):
        bench.driver.put(Register.STATUS, 0)
    assert bench.pages.emptied == before + 1, "once: it takes a look at all pages"


def test_statistics_go_with_their_driver(bench: Bench) -> None:
    report(bench, (4, 9))
    bench.driver.put(Register.STATUS, 0)
    assert balloon(bench).statistics == {}


def test_huge_statistics_are_read_in_part(bench: Bench) -> None:
    bench.driver.send(STATISTICS, [(BUFFERS, 100_000, False)])
    bench.serve()
    assert balloon(bench).driver_ok
    assert balloon(bench).statistics == {"swap_in": 0}


@pytest.mark.parametrize(("features", "roles"), [
    (STATS_VQ | REPORTING, [Role.INFLATE, Role.DEFLATE, Role.STATISTICS, Role.REPORT, Role.REPORT]),
    (STATS_VQ, [Role.INFLATE, Role.DEFLATE, Role.STATISTICS, None, None]),
    (REPORTING, [Role.INFLATE, Role.DEFLATE, Role.REPORT, None, Role.REPORT]),
    (0, [Role.INFLATE, Role.DEFLATE, None, None, None]),
])
def test_queues_are_there_by_features(features: int, roles: list[Role | None]) -> None:
    bench = balloon_bench()
    bench.driver.start(features)
    assert [balloon(bench).role(queue) for queue in range(5)] == roles


def test_a_state_with_a_target_beyond_memory() -> None:
    bench = balloon_bench()
    bench.device.load(bench.device.save() | {"target": 0xFFFF_FFFF})
    assert balloon(bench).target_pages == GUEST_PAGES
