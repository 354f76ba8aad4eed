# SPDX-License-Identifier: GPL-2.0-or-later
"""Pre-copy: rounds of pages while the guest runs, until it can be stopped for what is left."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import trio

from hostd.errors import Failed
from hostd.guests import Guests
from hostd.migration.convergence import GiveUp, PostCopy, PreCopy, Round, Stop, Throttle
from hostd.migration.copying import Copying
from hostd.migration.dirty import DirtyLog
from hostd.migration.progress import Progress
from hostd.migration.views import Mode
from hostd.vm import Vm


class Plan(NamedTuple):
    """How a guest is to go.  `postcopy`: both hosts can; `dedup`: the target may have pages already."""

    mode: Mode
    #: the longest it may stand still, and how long handing it over takes without any page
    downtime_s: float
    overhead_s: float
    postcopy: bool
    dedup: bool


async def copy(guests: Guests, vm: Vm, copying: Copying, written: DirtyLog, pages: np.ndarray, plan: Plan,
               progress: Progress) -> tuple[np.ndarray, bool]:
    """Send `pages`, and those that are written meanwhile, until it is time to stop the guest.

    The answer is the pages that are left, and whether they are to be fetched when it runs at the target.
    Raises Failed if it cannot go under these terms.
    """
    if plan.dedup:
        pages = await copying.name(pages)
    policy = PreCopy(plan.mode, plan.downtime_s, plan.postcopy, plan.overhead_s)
    while True:
        facts = await _round(copying, written, pages, progress)
        pages = facts.dirty
        answer = policy.after(Round(facts.pages, facts.carried, facts.seconds, len(facts.dirty)))
        progress.remaining_pages = len(pages)
        progress.dirty_rate = policy.dirty_rate
        progress.expected_downtime = policy.expected_downtime
        match answer:
            case Throttle(percent):
                guests.throttle(vm, percent)
                progress.throttle = percent
            case Stop():
                return pages, False
            case PostCopy():
                return pages, True
            case GiveUp(reason):
                raise Failed(f"VM {vm.name} stays here: {reason}")


class _Facts(NamedTuple):
    pages: int
    carried: int
    seconds: float
    dirty: np.ndarray


async def _round(copying: Copying, written: DirtyLog, pages: np.ndarray, progress: Progress) -> _Facts:
    began, sent, carried = trio.current_time(), sum(progress.bytes.values()), _carried(progress)
    await copying.send(pages)
    await copying.confirmed()
    dirty = await written.collect()
    seconds = trio.current_time() - began
    progress.throughput = (sum(progress.bytes.values()) - sent) / max(seconds, 1e-6)
    return _Facts(len(pages), _carried(progress) - carried, seconds, dirty)


def _carried(progress: Progress) -> int:
    return progress.pages["full"] + progress.pages["delta"]
