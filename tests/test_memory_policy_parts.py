# SPDX-License-Identifier: GPL-2.0-or-later
"""The parts of the memory policy: entitlement, states, working sets, victims, admission."""

from __future__ import annotations

import subprocess
import sys
from random import Random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hostd.policy import Claim, Commitment, Settings, State, Tuning, WorkingSet, admit, entitlements, settle
from hostd.policy.admission import Kept
from hostd.policy.pressure import next_state
from hostd.policy.stock import low, most, refill
from hostd.policy.victims import NEW, aged, coldest

# -- entitlement


def revoked(claims: list[Claim], capacity: int, tax: float) -> list[int]:
    """Min-funding revocation as the paper words it: page by page, from whoever pays the fewest shares for its
    last one."""
    k = 1 / (1 - tax)
    pages = [claim.high for claim in claims]

    def pays(i: int) -> float:
        active = min(pages[i], claims[i].active)
        return claims[i].shares / (active + k * (pages[i] - active))

    while sum(pages) > capacity and (givers := [i for i, claim in enumerate(claims) if pages[i] > claim.low]):
        pages[min(givers, key=pays)] -= 1
    return pages


@st.composite
def claims_of(draw: st.DrawFn, most: int = 200) -> Claim:
    high = draw(st.integers(0, most))
    return Claim(draw(st.integers(1, 1000)), draw(st.integers(0, most)), draw(st.integers(0, high)), high)


@settings(deadline=None)
@given(st.lists(claims_of(), max_size=6), st.integers(0, 1000), st.sampled_from([0.0, 0.5, 0.75, 0.9]))
def test_entitlements_are_what_revocation_page_by_page_ends_with(claims: list[Claim], capacity: int,
                                                                 tax: float) -> None:
    expected = revoked(claims, capacity, tax)
    assert entitlements(claims, capacity, tax) == pytest.approx(expected, abs=len(claims))


@given(st.lists(claims_of(1 << 22), max_size=60), st.integers(0, 1 << 28), st.floats(0, 0.99))
def test_entitlements_fit_waste_nothing_and_keep_within_their_bounds(claims: list[Claim], capacity: int,
                                                                     tax: float) -> None:
    given_ = entitlements(claims, capacity, tax)
    assert all(claim.low <= pages <= claim.high for claim, pages in zip(claims, given_))
    lows, highs = (sum(claim[i] for claim in claims) for i in (2, 3))
    assert sum(given_) <= max(capacity, lows)
    assert sum(given_) >= min(max(capacity, lows), highs) - 2 * len(claims)


def test_an_idle_page_costs_four_active_ones() -> None:
    busy, idle = entitlements([Claim(100, 1000, 0, 1000), Claim(100, 0, 0, 1000)], 500, 0.75)
    assert (busy, idle) == pytest.approx((400, 100), abs=1)
    assert entitlements([Claim(100, 1000, 0, 1000), Claim(100, 0, 0, 1000)], 500, 0) == pytest.approx(
        (250, 250), abs=1)


def test_entitlements_follow_shares() -> None:
    assert entitlements([Claim(200, 1000, 0, 1000), Claim(100, 1000, 0, 1000)], 900, 0.75) == pytest.approx(
        (600, 300), abs=1)
    assert entitlements([Claim(200, 1000, 0, 1000), Claim(100, 1000, 500, 1000)], 900, 0.75) == pytest.approx(
        (400, 500), abs=1)
    assert entitlements([], 900, 0.75) == []


@given(st.lists(claims_of(), min_size=1, max_size=6), st.integers(0, 1000))
def test_entitlements_do_not_move_when_they_are_followed(claims: list[Claim], capacity: int) -> None:
    given_ = entitlements(claims, capacity, 0.75)
    followed = [claim._replace(high=pages) for claim, pages in zip(claims, given_)]
    assert entitlements(followed, max(capacity, sum(given_)), 0.75) == given_


# -- states

THRESHOLDS = (60, 40, 20, 10)


@pytest.mark.parametrize(("before", "free", "after"), [
    (State.HIGH, 60, State.HIGH), (State.HIGH, 40, State.HIGH), (State.HIGH, 39, State.SOFT),
    (State.HIGH, 19, State.HARD), (State.HIGH, 9, State.LOW), (State.HIGH, -5, State.LOW),
    (State.SOFT, 59, State.SOFT), (State.SOFT, 60, State.HIGH), (State.SOFT, 20, State.SOFT),
    (State.HARD, 39, State.HARD), (State.HARD, 40, State.SOFT), (State.HARD, 60, State.HIGH),
    (State.LOW, 19, State.LOW), (State.LOW, 20, State.HARD), (State.LOW, 40, State.SOFT),
])
def test_states_have_hysteresis(before: State, free: int, after: State) -> None:
    assert next_state(before, free, THRESHOLDS) is after


@given(st.sampled_from(State), st.integers(-10, 100))
def test_a_state_stays_while_nothing_changes(before: State, free: int) -> None:
    after = next_state(before, free, THRESHOLDS)
    assert next_state(after, free, THRESHOLDS) is after


def test_states_are_written_in_lower_case() -> None:
    assert [state.label for state in State] == ["high", "soft", "hard", "low"]


# -- working sets

def test_a_new_guest_counts_as_active() -> None:
    assert WorkingSet(Random(0)).estimate == 1.0


def test_a_guest_that_wakes_is_believed_at_once_and_one_that_sleeps_in_time() -> None:
    working_set = WorkingSet(Random(0))
    working_set.feed(10, 100)
    assert working_set.estimate == pytest.approx(0.1)
    working_set.progress(80, 100)                   # within the period
    assert working_set.estimate == pytest.approx(0.45)
    working_set.feed(90, 100)
    assert working_set.estimate == pytest.approx(0.5)
    working_set.feed(90, 100)
    up = working_set.estimate
    assert up == pytest.approx(0.7)
    falls = []
    for _ in range(40):
        working_set.feed(0, 100)
        falls.append(working_set.estimate)
    assert falls == sorted(falls, reverse=True) and falls[0] > up / 3
    assert falls[-1] < 0.01


def test_a_period_in_which_nothing_was_watched_says_nothing() -> None:
    working_set = WorkingSet(Random(0))
    working_set.feed(50, 100)
    working_set.feed(0, 0)
    working_set.progress(0, 0)
    assert working_set.estimate == pytest.approx(0.5)
    with pytest.raises(ValueError, match="3 pages touched of 2 watched"):
        working_set.feed(3, 2)


@given(st.lists(st.tuples(st.integers(0, 100), st.booleans())))
def test_estimates_are_parts_and_at_least_half_of_the_last_one(periods: list[tuple[int, bool]]) -> None:
    working_set = WorkingSet(Random(0))
    for touched, ends in periods:
        (working_set.feed if ends else working_set.progress)(touched, 100)
        assert 0 <= working_set.estimate <= 1
        if ends:
            assert working_set.estimate >= touched / 200


def test_estimates_are_about_right() -> None:
    """Half of the pages active, twenty periods: the mean of the estimate is a little above, as the greatest
    of several must be."""
    random, estimates = Random(1), []
    working_set = WorkingSet(Random(2))
    active = set(random.sample(range(32_768), 16_384))
    for _ in range(20):
        watched = working_set.choose(32_768)
        assert len(watched) == len(set(watched)) == 100
        working_set.feed(len(active.intersection(watched)), 100)
        estimates.append(working_set.estimate)
    assert 0.47 < np.mean(estimates) < 0.6


def test_pages_to_watch_are_the_guests_own() -> None:
    working_set = WorkingSet(Random(0))
    assert working_set.choose(7) == list(range(7))
    assert working_set.choose(0) == []
    assert working_set.choose(1000) != working_set.choose(1000)


# -- victims

def histories(scans: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The histories from accessed flags of shape (scans, pages), the oldest scan first."""
    history = np.zeros(scans.shape[1], dtype=np.uint8)
    for accessed in scans:
        history = aged(history, accessed)
    return history


def test_the_coldest_pages_go_first() -> None:
    pages = np.array([10, 11, 12, 13], dtype=np.int64)
    scans = np.array([[1, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=bool)       # the last is the newest
    assert coldest(pages, histories(scans), 3).tolist() == [11, 10, 12]
    assert coldest(pages, histories(scans), 9).tolist() == [11, 10, 12, 13]
    assert coldest(pages, histories(scans), 0).tolist() == coldest(pages, histories(scans), -1).tolist() == []
    none = np.array([], dtype=np.int64)
    assert coldest(none, np.array([], dtype=np.uint8), 5).tolist() == []


@given(st.integers(1, 50), st.integers(0, 12), st.randoms(use_true_random=False), st.integers(0, 60))
def test_no_page_that_stays_is_colder_than_one_that_goes(pages: int, scans: int, random: Random,
                                                         count: int) -> None:
    flags = np.array([[random.random() < 0.3 for _ in range(pages)] for _ in range(scans)], dtype=bool)
    flags = flags.reshape(scans, pages)
    numbers = np.arange(1000, 1000 + pages, dtype=np.int64)
    victims = coldest(numbers, histories(flags), count)
    assert len(victims) == len(set(victims.tolist())) == min(count, pages)

    def rest(page: int) -> int:
        """Scans since it was last used, as far as the history goes."""
        used = np.flatnonzero(flags[:, page])
        return min(8, scans - 1 - int(used[-1])) if len(used) else 8

    gone = set((victims - 1000).tolist())
    assert min((rest(page) for page in gone), default=8) >= max(
        (rest(page) for page in range(pages) if page not in gone), default=0)


def test_a_history_forgets_after_eight_scans() -> None:
    history = np.array([NEW], dtype=np.uint8)
    for _ in range(8):
        assert history[0]
        history = aged(history, np.array([False]))
    assert not history[0] and history.dtype == np.uint8
    assert aged(history, np.array([True]))[0] == NEW


def test_the_policy_needs_no_numpy_but_for_victims() -> None:
    code = "import sys, hostd.policy; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- settings and admission

def test_settings_default_as_esx_has_them() -> None:
    assert settle(128 * 256) == Settings(0, 128 * 256, 1280)
    assert settle(1) == Settings(0, 1, 1)
    assert settle(100, 10, 50, 7) == Settings(10, 50, 7)


@pytest.mark.parametrize(("reservation", "limit", "shares", "sentence"), [
    (-1, None, None, "reservation cannot be negative"),
    (300, 256, None, r"reservation of 1\.171875 MiB is more than the limit of 1 MiB"),
    (None, 513, None, r"limit of 2\.00390625 MiB is not above 0 and at most the VM's memory of 2 MiB"),
    (None, 0, None, "limit of 0 MiB"),
    (None, None, 0, "shares must be 1 or more"),
])
def test_settings_that_contradict_each_other_are_refused(reservation: int | None, limit: int | None,
                                                         shares: int | None, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        settle(512, reservation, limit, shares)


def test_admission_is_by_reservation_and_by_ratio() -> None:
    pool = 1024 * 256
    fifty = [Commitment(128 * 256, 10 * 256, 512)] * 50
    assert admit(pool, 8, fifty, Commitment(128 * 256, 256, 512)) is None
    assert admit(pool, 8, fifty, Commitment(128 * 256, 422 * 256, 512)) is None
    assert admit(pool, 8, fifty, Commitment(512 * 256, 423 * 256, 512)) == (
        "a reservation of 423 MiB with 2 MiB of overhead does not fit the 424 MiB of the host's 1024 MiB "
        "that are neither reserved nor kept")
    assert admit(pool, 6.25, fifty, Commitment(128 * 256, 0, 512)) == (
        "memory of 128 MiB beside the 6400 MiB of other VMs is more than the 6400 MiB that an overcommit "
        "ratio of 6.25 allows on a host of 1024 MiB")


@example(10, [], Commitment(10, 5, 5), 1.0, Kept())
@given(st.integers(0, 10_000), st.lists(st.builds(Commitment, *[st.integers(0, 3000)] * 3), max_size=6),
       st.builds(Commitment, *[st.integers(0, 3000)] * 3), st.floats(0.1, 10),
       st.builds(Kept, st.integers(0, 500), st.integers(0, 5000)))
def test_whoever_is_admitted_fits(pool: int, others: list[Commitment], request: Commitment,
                                  ratio: float, kept: Kept) -> None:
    everyone = [*others, request]
    overhead = max(kept.overhead, sum(one.overhead for one in everyone))
    fits = (sum(one.reservation for one in everyone) + overhead + kept.stock <= pool
            and sum(one.memory for one in everyone) <= int(pool * ratio))
    assert (admit(pool, ratio, iter(others), request, kept) is None) == fits


@given(st.integers(4096, 1 << 24), st.integers(1, 64))
def test_the_stock_of_all_workers_is_a_small_part_of_the_pool(pool: int, workers: int) -> None:
    size = refill(pool, workers)
    assert 0 < low(size) < size
    assert workers * most(size) <= pool * 5 // 128 + workers * 20
    assert size == 2048 or workers * (size + 1) > pool // 32, "and no smaller than it need be"


@pytest.mark.parametrize("bad", [
    {"thresholds": (0.06, 0.06, 0.02, 0.01)}, {"thresholds": (0.06, 0.04, 0.02, 0)},
    {"tax": 1.0}, {"tax": -0.1},
])
def test_tuning_that_makes_no_sense_is_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=f"the (idle-memory )?{next(iter(bad))}"):
        Tuning(**bad)
