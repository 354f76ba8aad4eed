# SPDX-License-Identifier: GPL-2.0-or-later
"""When a guest that is copied while it runs can be stopped for what is left, and what to do if it never can.

Round after round sends the pages that were written during the one before (Clark et al., *Live Migration of
Virtual Machines*, NSDI 2005).  The guest is stopped when what is left can be sent in the downtime allowed.
If the rounds do not shrink, it writes faster than the link carries: its CPU time is capped, step by step, as
QEMU's auto-converge does.  If that is no help either, the rest is fetched when it runs at the target
(post-copy), where both hosts can; where they cannot, it stays.

No clock, no I/O: a round's facts come in, and an answer goes out.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from hostd.migration.views import Mode

#: percent of a CPU that the guest is held to, one after another
STEPS = (70, 50, 30, 20, 10, 5)
#: a round has shrunk what is left if no more than this part of what it sent was written meanwhile
SHRUNK = 0.7
#: rounds in a row that may fail to shrink it: guests have their moments
PATIENCE = 1
#: seconds until it is seen what a throttle comes to, and a line is known: a host has its moments, too
SETTLE_S = 0.1
#: rounds there may be in all
MAX_ROUNDS = 60
#: so many of the last rounds are looked at for what a page costs: the largest of them knows best, since
#: waiting for the other end is the least part of it
MEMORY = 3
#: part of the downtime allowed that pages may take in any case, even if handing over alone takes all of it:
#: no throttling helps against a slow line's delay
LEAST_PART = 0.2
#: without post-copy, a guest that does not converge is stopped in mode "auto" if that takes no longer than so
#: many times the downtime allowed
FORCED = 10.0
#: seconds that a page with contents takes where none has been sent yet
UNKNOWN_COST_S = 4096 / 100e6


class Round(NamedTuple):
    """What came of a round: `pages` were sent, of them `carried` with contents (full or as a change, not as
    zeroes), in `seconds` until the other host had confirmed them; `dirty` pages were written meanwhile."""

    pages: int
    carried: int
    seconds: float
    dirty: int


@dataclass(frozen=True)
class Continue:
    """Send the dirty pages in another round."""


@dataclass(frozen=True)
class Throttle:
    """Hold the guest to so many percent of a CPU, and send the dirty pages in another round."""

    percent: int


@dataclass(frozen=True)
class Stop:
    """Stop the guest and send what is left.  `forced`: it will take longer than allowed."""

    forced: bool = False


@dataclass(frozen=True)
class PostCopy:
    """Stop the guest, hand it over, and have what is left fetched there."""


@dataclass(frozen=True)
class GiveUp:
    """It cannot go under these terms; `reason` says what would help."""

    reason: str


Answer = Continue | Throttle | Stop | PostCopy | GiveUp


class PreCopy:
    """The policy for one guest."""

    def __init__(self, mode: Mode, downtime_s: float, postcopy: bool, overhead_s: float) -> None:
        """`downtime_s`: the longest the guest may stand still; `postcopy`: both hosts can; `overhead_s`: how
        long handing over takes without any page (stopping, the last words there and back, loading)."""
        #: seconds the guest would stand still if it were stopped now; None: no round is over yet
        self.expected_downtime: float | None = None
        #: pages a second that it wrote to in the last round
        self.dirty_rate = 0.0
        #: what it is held to, in percent; None: not held
        self.throttle: int | None = None
        self._mode = mode
        self._allowed = downtime_s
        self._postcopy = postcopy
        self._overhead = overhead_s
        self._recent: deque[Round] = deque(maxlen=MEMORY)
        self._rounds = 0
        self._misses = 0
        #: seconds since the guest was throttled last, or copying began
        self._settling = 0.0

    def after(self, round: Round) -> Answer:
        """What follows the round.  Anything but Continue and Throttle is the last answer."""
        self._rounds += 1
        self._settling += round.seconds
        self._recent.append(round)
        self.dirty_rate = round.dirty / max(round.seconds, 1e-6)
        sending = self._left(round) * self._cost()
        self.expected_downtime = self._overhead + sending
        if sending <= max(self._allowed - self._overhead, LEAST_PART * self._allowed):
            return Stop()
        if self._rounds >= MAX_ROUNDS:
            return self._last_resort()
        if round.dirty <= SHRUNK * round.pages:
            self._misses = 0
            return Continue()
        self._misses += 1
        if self._misses <= PATIENCE or self._settling < SETTLE_S:
            return Continue()
        self._settling = 0.0
        lower = [step for step in STEPS if self.throttle is None or step < self.throttle]
        if not lower:
            return self._last_resort()
        self.throttle = lower[0]
        return Throttle(lower[0])

    def _left(self, round: Round) -> float:
        """Pages that there will be when it stands still: it goes on writing until then."""
        return round.dirty + self.dirty_rate * self._overhead if round.dirty else 0

    def _cost(self) -> float:
        """Seconds that sending a page with contents takes."""
        best = max(self._recent, key=lambda round: round.carried)
        return best.seconds / best.carried if best.carried else UNKNOWN_COST_S

    def _last_resort(self) -> Answer:
        assert self.expected_downtime is not None
        if self._mode != "precopy" and self._postcopy:
            return PostCopy()
        if self._mode != "precopy" and self.expected_downtime <= FORCED * self._allowed:
            return Stop(forced=True)
        held = "" if self.throttle is None else f", even at {self.throttle} % of a CPU"
        standing, allowed = self.expected_downtime * 1e3, self._allowed * 1e3
        return GiveUp(f"it writes to memory faster than the connection carries it{held}: it would stand "
                      f"still for {standing:.0f} ms, and {allowed:.0f} are allowed; allow more, give it more "
                      "bandwidth, or let it go by post-copy")
