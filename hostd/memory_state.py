# SPDX-License-Identifier: GPL-2.0-or-later
"""What is known and wanted of memory beside what the P2Ms say: of one VM, and of the host.

Whoever carries out the memory policy writes it, the views read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hostd.model import PAGE, PRESSURES, FrameCounts, MemoryEvents, MemoryUsage, MemoryView, SwapUsage
from hostd.policy.pressure import State

if TYPE_CHECKING:
    from hostd.protocol import BalloonView
    from hostd.sharing import SharingView
    from hostd.swapfile import SwapStats


@dataclass
class MemoryState:
    """Of one VM; in pages.  The counters are for as long as it is defined."""

    #: what its balloon driver is asked for, altogether; None: nobody has asked
    balloon_target: int | None = None
    #: the part of its memory that it actively uses, 0 to 1; None: not known
    working_set: float | None = None
    #: somebody looked since the guest was last asked how its memory is doing
    looked: bool = field(default=False, init=False)
    #: its worker refused it a frame, since it has as many as it may, and nothing has changed since then
    waits: bool = field(default=False, init=False)
    #: what the host did to its pages; what the guest itself does is in its accounts (vmm/stats.py)
    merged: int = 0
    zeroed: int = 0
    swapped_out: int = 0

    def begin_life(self) -> None:
        """The guest starts anew: nothing is known of it."""
        self.balloon_target = self.working_set = None

    def usage(self, pages: Mapping[str, int] | None, balloon: BalloonView | None) -> MemoryUsage:
        """The view, for somebody who looks.  `pages`: VmBlock.memory_counts(), None for a VM without memory;
        `balloon`: what its driver said last."""
        if pages is None:
            return MemoryUsage()
        self.looked = True
        assigned, said = pages["assigned"], balloon.statistics if balloon else {}
        return MemoryUsage(
            assigned=assigned * PAGE, resident=pages["resident"] * PAGE, private=pages["private"] * PAGE,
            shared=pages["shared"] * PAGE, ballooned=pages["ballooned"] * PAGE,
            swapped=pages["stored"] * PAGE,
            working_set=None if self.working_set is None else round(self.working_set * assigned) * PAGE,
            target=None if self.balloon_target is None else max(0, assigned - self.balloon_target) * PAGE,
            guest_free=said.get("free"), guest_available=said.get("available"),
            guest_total=said.get("total"))

    def events(self, accounts: Mapping[str, int]) -> MemoryEvents:
        """The counters as a view; `accounts`: the VM's accounting fields by name."""
        return MemoryEvents(
            merged=self.merged, broken=accounts["cow_breaks"], zeroed=self.zeroed,
            swapped_out=self.swapped_out, swapped_in=accounts["swapped_in"], inflated=accounts["inflated"],
            deflated=accounts["deflated"], reported=accounts["reported"])


@dataclass
class HostMemoryState:
    """Of the host."""

    #: how short of memory it is
    pressure: State = State.HIGH
    #: workers that wait for frames
    waiting: int = 0
    #: how page sharing is doing, once it is
    sharing: Callable[[], SharingView] | None = None

    def view(self, frames: FrameCounts, references: int, swap: SwapStats | None) -> MemoryView:
        """The view.  `references`: bytes of all guests that are in shared frames."""
        sharing = None if self.sharing is None else self.sharing()
        return MemoryView(
            pool=frames.total * PAGE, free=frames.free * PAGE, lent=frames.granted * PAGE,
            private=frames.private * PAGE, shared=frames.shared * PAGE, overhead=frames.overhead * PAGE,
            # the guests go on while it is counted
            saved=max(0, references - frames.shared * PAGE), swap=_swap_usage(swap),
            state=PRESSURES[self.pressure], waiting=self.waiting,
            scan_rate=sharing.rate if sharing else 0.0, scanned=sharing.scanned if sharing else 0)


def _swap_usage(swap: SwapStats | None) -> SwapUsage:
    if swap is None:
        return SwapUsage()
    return SwapUsage(used=swap.pages * PAGE, compressed=swap.stored_bytes, limit=swap.limit_bytes)
