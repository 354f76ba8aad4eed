# SPDX-License-Identifier: GPL-2.0-or-later
"""The benchmarks of the scheduler: what counts as off, and that keys come back."""

from __future__ import annotations

import pytest

from hostd.bench import shares, wakeups
from hostd.bench.measures import Settings

WEIGHTS, CAPS, CROWDED = (shares.SCENARIOS[name] for name in ("shares", "caps", "caps-crowded"))


def test_shares_are_of_what_all_got_together() -> None:
    fair = [share.weight / 100 for share in WEIGHTS.shares]
    assert WEIGHTS.worst(fair, 40.0) == pytest.approx(1)
    assert WEIGHTS.worst([*fair[:-1], fair[-1] * 1.5], 40.0) == pytest.approx(1.5 * 30 / 34)
    assert WEIGHTS.worst([0, *fair[1:]], 40.0) == float("inf")


@pytest.mark.parametrize(("ten", "worst"), [(1.0, 1.0), (1.1, 1.1), (0.8, 1.25)])
def test_caps_that_leave_cpus_idle_are_of_real_time(ten: float, worst: float) -> None:
    assert CAPS.worst([ten, 2.5, 5.0], 10.0) == pytest.approx(worst)


def test_what_capped_guests_leave_is_for_the_others() -> None:
    assert CROWDED.worst([1.0, 2.5, 5.0, 4.0, 4.0], 10.0) == pytest.approx(1)
    assert CROWDED.worst([1.0, 2.5, 5.0, 2.0, 4.0], 10.0) == pytest.approx(1.5)


@pytest.mark.slow
def test_keys_are_timed() -> None:
    wanted = frozenset({"key-echo", "key-echo-crowded"})
    assert set(wakeups.measure(Settings(settle=0), wanted)) == wanted
