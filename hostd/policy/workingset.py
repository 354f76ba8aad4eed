# SPDX-License-Identifier: GPL-2.0-or-later
"""How much of its memory a guest actively uses, by statistical sampling (OSDI 2002, 5.3).

At the start of a period a few pages, drawn from all of the guest's memory, are made to fault; at its end,
those that did fault, over those watched, is the active fraction.  Watched pages that the guest does not have
(never touched, ballooned, swapped out) count as well, as touched if they came in meanwhile: so the estimate
is a part of the whole memory and reclaim does not move it.

Three estimates are kept, and the greatest holds, so that a guest that wakes up is believed at once and one
that falls asleep only in time: a slow moving average, a fast one, and the fast one as the period in progress
would have it.

A period here is one of the host's time, where ESX counts the VM's own: a guest that is halted touches
nothing, and is the first that can spare memory.
"""

from __future__ import annotations

from random import Random

#: pages watched per period
SAMPLES = 100
#: weight of the newest period in the two averages
SLOW = 1 / 8
FAST = 1 / 2


class WorkingSet:
    """The estimate for one VM.  Until a first period has ended all of its memory counts as active: who is new
    is not taxed for what is not known."""

    def __init__(self, random: Random, samples: int = SAMPLES) -> None:
        self._random = random
        self._samples = samples
        self._slow: float | None = None
        self._fast = 1.0
        self._current = 0.0

    def choose(self, pages: int) -> list[int]:
        """The guest-physical pages to watch in the next period, of a guest that has `pages`: ascending, each
        once."""
        return sorted(self._random.sample(range(pages), min(self._samples, pages)))

    def progress(self, touched: int, sampled: int) -> None:
        """In the period under way, `touched` of the `sampled` pages have been touched up to now."""
        if self._slow is not None and sampled:
            self._current = _average(self._fast, touched / sampled, FAST)

    def feed(self, touched: int, sampled: int) -> None:
        """A period is over.  One in which nothing was watched says nothing.

        Raises ValueError if more pages were touched than watched.
        """
        if not 0 <= touched <= sampled:
            raise ValueError(f"{touched} pages touched of {sampled} watched: it must be none to all of them")
        if not sampled:
            return
        active = touched / sampled
        if self._slow is None:
            self._slow = self._fast = active
        else:
            self._slow = _average(self._slow, active, SLOW)
            self._fast = _average(self._fast, active, FAST)
        self._current = 0.0

    @property
    def estimate(self) -> float:
        """The active part of the guest's memory, 0 to 1."""
        return 1.0 if self._slow is None else max(self._slow, self._fast, self._current)


def _average(before: float, now: float, weight: float) -> float:
    return before + weight * (now - before)
