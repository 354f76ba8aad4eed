# SPDX-License-Identifier: GPL-2.0-or-later
"""How far a migration has come: written by whoever carries it out, read by everybody."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import trio

from hostd.migration.pages import Counts
from hostd.migration.views import MigrationView, Mode, Phase

#: a migration in one of these is over
OVER: frozenset[Phase] = frozenset({"done", "failed", "cancelled"})
#: in one of these it can still be called off, and nothing has happened then
REVOCABLE: frozenset[Phase] = frozenset({"connecting", "offering", "copying", "stopping"})


@dataclass
class Progress:
    """Of one migration; times are seconds, `began` and `ended` by trio's clock."""

    token: str
    vm: str
    direction: Literal["out", "in"]
    peer: str
    mode: Mode = "auto"
    phase: Phase = "connecting"
    reason: str = ""
    round: int = 0
    #: by views.Kind; bytes as they went over the wire, with "other" for all that is not pages
    pages: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    remaining_pages: int = 0
    dirty_rate: float = 0.0
    throughput: float = 0.0
    expected_downtime: float | None = None
    throttle: int | None = None
    downtime: float | None = None
    began: float = field(default_factory=trio.current_time)
    ended: float | None = None

    def count(self, counts: Counts) -> None:
        """A batch of pages has gone out, or has come."""
        self.pages.update(counts.pages)
        self.bytes.update(counts.bytes)

    def end(self, phase: Phase, reason: str = "") -> None:
        """It is over, one way or the other; what comes after that changes nothing."""
        if self.over:
            return
        self.phase, self.reason, self.ended = phase, reason, trio.current_time()
        self.throttle = None

    @property
    def over(self) -> bool:
        """Whether it is."""
        return self.ended is not None

    def view(self) -> MigrationView:
        """As users see it."""
        elapsed = (trio.current_time() if self.ended is None else self.ended) - self.began
        return MigrationView(
            token=self.token, vm=self.vm, direction=self.direction, peer=self.peer, mode=self.mode,
            phase=self.phase, reason=self.reason, round=self.round, pages=dict(self.pages),
            bytes=dict(self.bytes), remaining_pages=self.remaining_pages,
            dirty_rate=round(self.dirty_rate, 1), throughput=round(self.throughput),
            expected_downtime=self.expected_downtime, throttle=self.throttle, downtime=self.downtime,
            elapsed=round(elapsed, 6))
