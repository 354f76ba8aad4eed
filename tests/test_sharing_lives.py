# SPDX-License-Identifier: GPL-2.0-or-later
"""Page sharing while guests come, are cloned and go, some just when something is to be done to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hostd.sharing import Candidates, ScanGuest
from tests.sharing_rig import PAGES, SharingHost


@pytest.fixture
def host() -> Iterator[SharingHost]:
    host = SharingHost()
    yield host
    host.check()
    host.end()


# -- who comes and goes -------------------------------------------------------------------------------------


def test_frames_are_given_up_when_their_guests_have_gone(host: SharingHost) -> None:
    guests = [host.guest() for _ in range(3)]
    for guest in guests:
        for page in range(25):
            guest.fill(page, b"page %d" % page)
    host.scan()
    assert (len(host.scanner.table), host.books.counts().shared) == (25, 25)
    guests[0].end()
    guests[1].end()
    host.scan()
    assert len(host.scanner.table) == 25
    guests[2].fill(0, b"mine")                          # the last that had this frame lets it go
    host.scan()
    assert len(host.scanner.table) == 24
    guests[2].end()
    host.scan()
    assert (len(host.scanner.table), host.books.counts().granted) == (0, len(host.magazine))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_guest_that_ends_in_the_middle(host: SharingHost, which: int) -> None:
    guests = [host.guest() for _ in range(3)]
    for guest in guests:
        guest.fill(0, b"\0")
        for page in range(1, 20):
            guest.fill(page, b"page %d" % page)
    host.reclaimer.interfere.append(guests[which])
    host.scan(3)
    host.check()
    assert [guest.count("private") for guest in host.guests] == [0, 0]


def test_a_life_that_ended_is_not_mistaken_for_the_next(host: SharingHost) -> None:
    """What was found out about the one is not done to the other."""
    for guest in host.guest(), host.guest():
        guest.fill(2, b"shared")
    host.scan()
    restarted = host.guest()
    restarted.fill(2, b"shared")
    for guest in host.guest(), host.guest():
        guest.fill(7, b"to be frozen")
    host.reclaimer.asked["merge"].clear()
    host.reclaimer.before_freeze = restarted.restart
    host.scan()
    assert host.reclaimer.asked["merge"] == [7]
    assert host.sharing.refused == 1


def test_nobody_is_a_mate_after_the_end(host: SharingHost) -> None:
    host.guest("other").fill(2, b"something else")
    first = host.guest("debian")
    first.fill(5, b"same")
    host.scan()
    first.end()
    host.guest("debian").fill(5, b"same")
    host.scan()
    assert host.reclaimer.asked["freeze"] == host.reclaimer.asked["merge"] == []


def test_hints_do_not_outlive_the_places_they_name(host: SharingHost) -> None:
    guests = [host.guest("other"), host.guest("other"), host.guest("debian")]
    guests[2].fill(200, b"in a place far up")
    host.scan()
    for guest in guests[1:]:
        guest.end()
    host.scan()
    host.guest("debian").fill(200, b"in a place far up")
    host.scan()
    assert host.reclaimer.asked["freeze"] == []


def test_a_page_that_became_equal_to_a_shared_one_before_it_was_frozen(host: SharingHost) -> None:
    """Its frame is one too many for the table, and only the guest's from then on."""
    guests = [host.guest() for _ in range(4)]
    for guest in guests[:2]:
        guest.fill(1, b"known")
    host.scan()
    for guest in guests[2:]:
        guest.fill(2, b"to be frozen")

    def change() -> None:
        for guest in guests[2:]:
            guest.fill(2, b"known")

    host.reclaimer.before_freeze = change
    host.scan()
    assert len(host.reclaimer.asked["freeze"]) == 2 and len(host.scanner.table) == 1
    host.check()
    for guest in guests[2:]:
        guest.fill(2, b"own")
    host.check()
    assert host.books.counts().shared == 1


# -- places -------------------------------------------------------------------------------------------------


def test_guests_that_come_after_others_went(host: SharingHost) -> None:
    """Of other sizes, and with pages that wait and are hinted at over it."""
    first, second, third = host.guest("a", 256), host.guest("b", 300), host.guest("c", 256)
    for guest in first, third:
        for page in range(30):
            guest.fill(page, b"waiting %d" % page)
    second.fill(299, b"the last page")
    host.scan()
    second.end()
    host.scan()
    assert third.count("shared") == first.count("shared") == 30
    fourth, fifth = host.guest("b", 400), host.guest("b", 256)
    for page in range(200, 230):
        fourth.fill(page, b"hinted %d" % page)
        fifth.fill(page, b"hinted %d" % page)
    fourth.fill(399, b"the last page")
    first.end()
    host.scan()
    assert fourth.count("shared") == fifth.count("shared") == 30
    fifth.fill(255, b"the last page")
    host.scan(3)
    assert fourth.frame(399) == fifth.frame(255)


@pytest.mark.parametrize("rate", [0, 5])
def test_lives_that_are_over_take_no_place(host: SharingHost, rate: int) -> None:
    """However many there are in a pass, or while sharing is disabled."""
    host.rate = rate
    stays = host.guest()
    for page in range(PAGES):
        stays.fill(page, b"%d" % page)
    for _ in range(20):
        guest = host.guest()
        host.scan()
        guest.end()
        assert host.scanner.passes == 0
        assert len(host.scanner._last) <= 1 + 4 * PAGES
    host.check()


# -- clones -------------------------------------------------------------------------------------------------


def test_a_guest_joins_the_frames_of_clones(host: SharingHost) -> None:
    template = host.guest("debian")
    for page in range(20):
        template.fill(page, b"page %d" % page)
    clones = [host.clone(template) for _ in range(3)]
    host.scan(2)
    assert host.sharing.scanned == 20, "what they share is looked at once"
    booted = host.guest("alpine")
    for page in range(20):
        booted.fill(page + 50, b"page %d" % page)
    host.scan()
    assert [booted.frame(page + 50) for page in range(20)] == [clones[0].frame(page) for page in range(20)]
    assert host.books.counts().shared == 20


def test_frames_of_clones_are_given_up_with_them(host: SharingHost) -> None:
    template = host.guest()
    template.fill(1, b"shared")
    clone = host.clone(template)
    host.scan()
    assert len(host.scanner.table) == 1
    template.fill(1, b"written")
    clone.fill(1, b"written to")
    host.scan()
    assert len(host.scanner.table) == 0


def test_the_last_of_the_clones_keeps_its_frames(host: SharingHost) -> None:
    template = host.guest()
    template.fill(1, b"shared")
    clones = [host.clone(template) for _ in range(2)]
    host.scan()
    for guest in template, clones[0]:
        guest.end()
        host.scan()
        host.check()
    assert host.books.counts().shared == len(host.scanner.table) == 1


def test_while_memory_is_short_nothing_is_kept_that_one_guest_alone_has(host: SharingHost) -> None:
    guests = [host.guest() for _ in range(2)]
    for guest in guests:
        for page in range(25):
            guest.fill(page, b"page %d" % page)
    host.scan()
    host.sharing.urgent = True
    host.scan()
    assert len(host.scanner.table) == 25
    guests[1].end()
    host.scan()
    assert len(host.scanner.table) == 0
    assert len(host.books.sole(guests[0].memory)) == 25, "they can be swapped out"
    later = host.guest()
    later.fill(3, b"page 3")
    host.scan(6)
    assert later.frame(3) == guests[0].frame(3), "an equal is found all the same"


def test_clones_that_end_before_their_frames_are_pinned(host: SharingHost) -> None:
    template = host.guest()
    template.fill(1, b"shared")
    clone, first, second = host.clone(template), host.guest("a"), host.guest("b")
    scan = host.scanner.scan

    def scan_and_end(*arguments: Any) -> Candidates:
        found = scan(*arguments)
        assert len(found.strangers) == 1
        template.end()
        clone.end()
        host.scanner.scan = scan                        # type: ignore[method-assign]
        return found

    host.scanner.scan = scan_and_end                    # type: ignore[method-assign,assignment]
    for guest in first, second:
        guest.fill(7, b"something else")
    host.scan()
    assert len(host.scanner.table) == 0
    host.scan(2)
    assert first.frame(7) == second.frame(7)


def test_an_array_that_is_no_p2m_any_more(host: SharingHost) -> None:
    """A guest ends while it is scanned, and its P2M array becomes something else."""
    first, second = host.guest(), host.guest()
    for guest in first, second:
        guest.fill(4, b"page")
    junk = np.random.default_rng(1).integers(0, 1 << 64, PAGES, dtype=np.uint64)
    found = host.scanner.scan([ScanGuest("junk", "debian", junk)], 1 << 20)
    assert found.scanned == 0 and not len(found.strangers), "no such frame is in the pool"
    host.scan()
    assert first.frame(4) == second.frame(4)
