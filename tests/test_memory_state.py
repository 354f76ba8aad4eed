# SPDX-License-Identifier: GPL-2.0-or-later
"""What is known of memory, as views show it: of a VM over its lives, and of the host."""

from __future__ import annotations

from collections import Counter

import pytest

from hostd.memory_state import HostMemoryState, MemoryState
from hostd.model import PAGE, PRESSURES, FrameCounts, MemoryEvents, MemoryUsage
from hostd.policy.pressure import State
from hostd.protocol import BalloonView
from hostd.swapfile import SwapStats

PAGES = {"assigned": 1000, "resident": 500, "private": 400, "shared": 100, "ballooned": 50, "stored": 30}


def said(**statistics: int) -> BalloonView:
    return BalloonView("vm#1", driver=True, pages=0, statistics=statistics)


def test_without_memory_there_is_nothing_to_tell() -> None:
    state = MemoryState(balloon_target=7, working_set=0.5)
    assert state.usage(None, said(free=4096)) == MemoryUsage()


def test_what_nobody_said_is_unknown() -> None:
    usage = MemoryState().usage(PAGES, None)
    assert (usage.assigned, usage.swapped, usage.ballooned) == (1000 * PAGE, 30 * PAGE, 50 * PAGE)
    assert usage.working_set is usage.target is usage.guest_free is usage.guest_total is None
    assert MemoryState().usage(PAGES, said()).guest_available is None


def test_what_was_said_is_in_bytes() -> None:
    state = MemoryState(balloon_target=200, working_set=0.25)
    usage = state.usage(PAGES, said(free=8192, available=12288, total=3 << 20, swap_in=1))
    assert (usage.target, usage.working_set) == (800 * PAGE, 250 * PAGE)
    assert (usage.guest_free, usage.guest_available, usage.guest_total) == (8192, 12288, 3 << 20)


def test_a_target_beyond_memory_is_none_of_it() -> None:
    assert MemoryState(balloon_target=5000).usage(PAGES, None).target == 0


def test_counters_go_on_in_the_next_life_and_the_rest_is_forgotten() -> None:
    state = MemoryState(balloon_target=200, working_set=0.25, merged=3, swapped_out=2)
    state.begin_life()
    assert (state.balloon_target, state.working_set) == (None, None)
    assert state.events(Counter()) == MemoryEvents(merged=3, swapped_out=2)


def test_what_the_guest_did_to_its_pages_is_in_its_accounts() -> None:
    accounts = Counter(cow_breaks=1, swapped_in=2, inflated=3, deflated=4, reported=5, run_ns=6)
    assert MemoryState().events(accounts) == MemoryEvents(
        broken=1, swapped_in=2, inflated=3, deflated=4, reported=5)


def frames(**counts: int) -> FrameCounts:
    return FrameCounts(**{"total": 100, "free": 50, "granted": 5, "private": 20, "shared": 20, "overhead": 5,
                          **counts})


def test_what_sharing_saves_is_what_is_referred_to_more_than_once() -> None:
    view = HostMemoryState().view(frames(), 70 * PAGE, None)
    assert view.saved == 50 * PAGE
    assert view.pool == view.free + view.lent + view.private + view.shared + view.overhead
    assert HostMemoryState().view(frames(), 19 * PAGE, None).saved == 0     # a guest let go meanwhile


def test_swap_is_told_as_guests_and_as_the_disk_see_it() -> None:
    stats = SwapStats(records=3, pages=5, stored_bytes=1000, file_bytes=8192, disk_bytes=8192,
                      limit_bytes=1 << 30)
    swap = HostMemoryState().view(frames(), 0, stats).swap
    assert (swap.used, swap.compressed, swap.limit) == (5 * PAGE, 1000, 1 << 30)
    assert HostMemoryState().view(frames(), 0, None).swap.limit == 0


@pytest.mark.parametrize("pressure", State)
def test_the_policy_s_states_have_their_names(pressure: State) -> None:
    assert HostMemoryState(pressure=pressure).view(frames(), 0, None).state == pressure.label
    assert len(PRESSURES) == len(State)
