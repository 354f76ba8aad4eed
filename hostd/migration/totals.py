# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations that are over, added up since the daemon started: what the metrics tell of them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

from hostd.migration.progress import OVER
from hostd.migration.views import KINDS, PHASES, MigrationView

#: of MigrationView.direction
DIRECTIONS: tuple[Literal["out", "in"], ...] = ("out", "in")
OUTCOMES = tuple(phase for phase in PHASES if phase in OVER)
UNDER_WAY = tuple(phase for phase in PHASES if phase not in OVER)
#: what bytes went for: pages by kind, and all that is no page
BYTES = (*KINDS, "other")

#: upper bounds of buckets, in seconds
DOWNTIME_BOUNDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
DURATION_BOUNDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


class Histogram:
    """How many values fell between which bounds.  `counts` has one bucket more, for what is larger."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Totals:
    """Counters by direction and outcome, or by direction and kind; every key is there from the start."""

    def __init__(self) -> None:
        self.migrations = {(direction, outcome): 0 for direction in DIRECTIONS for outcome in OUTCOMES}
        self.bytes = {(direction, kind): 0 for direction in DIRECTIONS for kind in BYTES}
        self.pages = {(direction, kind): 0 for direction in DIRECTIONS for kind in KINDS}
        #: by direction, of those that were done: how long the guest stood still, and how long it all took
        self.downtime: dict[str, Histogram] = {way: Histogram(DOWNTIME_BOUNDS) for way in DIRECTIONS}
        self.duration: dict[str, Histogram] = {way: Histogram(DURATION_BOUNDS) for way in DIRECTIONS}

    def finished(self, view: MigrationView) -> None:
        """Count a migration that has come to one of `OUTCOMES`.  A dry run is none."""
        direction = view.direction
        self.migrations[direction, view.phase] += 1
        for kind in BYTES:
            self.bytes[direction, kind] += view.bytes.get(kind, 0)
        for kind in KINDS:
            self.pages[direction, kind] += view.pages.get(kind, 0)
        if view.phase == "done":
            self.duration[direction].add(view.elapsed)
            if view.downtime is not None:
                self.downtime[direction].add(view.downtime)
