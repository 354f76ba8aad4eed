# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's side of page sharing: when to scan, how fast, and what is done about the candidates."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import trio

from hostd.errors import HostError
from hostd.sharing.scanner import Candidates, ScanGuest, Scanner

#: seconds between scans at the full rate; at slower ones they are as large, and farther apart
PERIOD = 0.25
#: seconds between looks whether there is something to scan
_IDLE_PERIOD = 1.0
#: seconds from the beginning of a pass to the next one's: what changes sooner is not worth sharing
_PASS = 10.0
#: the slowest rate, as a part of the full one, and how much slower a pass makes it that found next to nothing
SLOWEST, _SLOWER = 1 / 64, 1 / 4
#: one of so many free frames is taken: guests have new pages, which is worth a look at the full rate
_GROWTH = 128
#: a pass found something if that was more than one page of so many
_WORTH = 64
#: pages of one guest that are asked for at once
BATCH = 512
#: entries of the table looked at in one period for frames that nobody has, or nobody shares
_SWEEP = 4096


class SharingVm(Protocol):
    """A VM of the host; its `block` is a VmBlock while it has memory."""

    @property
    def block(self) -> HasLeaf | None: ...


class HasLeaf(Hashable, Protocol):
    """Something with a P2M array, equal to itself alone."""

    def leaf(self) -> np.ndarray: ...


V = TypeVar("V", bound=SharingVm)
_VContra = TypeVar("_VContra", contravariant=True)


class Reclaimer(Protocol[_VContra]):
    """Has it done by whoever runs the guest (vmm/memory/reclaim.py).  Raises HostError if the guest ended."""

    async def freeze(self, vm: _VContra, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pages whose frames are shared now, and these frames, each pinned once for the caller."""

    async def merge(self, vm: _VContra, pages: np.ndarray, frames: np.ndarray) -> int:
        """How many of the pages were equal to their frames, and have them now."""

    async def drop_zeros(self, vm: _VContra, pages: np.ndarray) -> int:
        """How many of the pages were full of zeros, and have no frame now."""


class Pins(Protocol):
    """The books, as far as page sharing needs them."""

    def free_frames(self) -> int: ...

    def pin(self, frames: np.ndarray) -> None: ...

    def unpin(self, frames: np.ndarray) -> None: ...

    def shares(self, frames: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class SharingView:
    """What page sharing did since the daemon started, in pages, and what it is doing."""

    scanned: int
    merged: int
    zeroed: int
    #: offered, but not as they were thought to be, or their guest had gone
    refused: int
    #: complete passes over all guests
    passes: int
    #: shared frames that the table knows
    frames: int
    #: the rate at this moment, in pages a second
    rate: float


class Sharing(Generic[V]):
    """The task.

    `guests` gives the VMs of the host, `image` what a VM was booted from, `rate` the configured pages a
    second, 0 for none; all are asked anew each time.
    """

    def __init__(self, scanner: Scanner, reclaimer: Reclaimer[V], pins: Pins,
                 guests: Callable[[], Sequence[V]], image: Callable[[V], Hashable],
                 rate: Callable[[], int]) -> None:
        self.scanned = self.merged = self.zeroed = self.refused = 0
        self._scanner = scanner
        self._reclaimer = reclaimer
        self._pins = pins
        self._guests = guests
        self._image = image
        self._rate = rate
        self._known: set[Hashable] = set()
        self._urgent = False
        self._roused = trio.Event()
        #: part of the full rate; frames that were free when it was last the whole
        self._pace, self._free = 1.0, 0
        #: the part of a page that is due
        self._due = 0.0
        #: what this pass has looked at and found
        self._pass = _Pass()

    @property
    def urgent(self) -> bool:
        """Memory is short: the full rate, whatever the last passes found."""
        return self._urgent

    @urgent.setter
    def urgent(self, urgent: bool) -> None:
        if urgent and not self._urgent:
            self._roused.set()
        self._urgent = urgent

    async def run(self) -> None:
        """Scan for ever."""
        due = began = trio.current_time()
        seconds = PERIOD
        while True:
            self._roused = trio.Event()
            passes = self._scanner.passes
            looked = await self.step(seconds)
            seconds = max(PERIOD / self._part, 0 if looked else _IDLE_PERIOD)
            due = max(due + seconds, trio.current_time())
            if self._scanner.passes != passes:
                due = began = due if self.urgent else max(due, began + _PASS)
            with trio.move_on_at(due):
                await self._roused.wait()
                # what has gone by was due at the pace there was: no more is made up for than one period
                seconds, due = min(seconds, PERIOD), trio.current_time()

    @property
    def _part(self) -> float:
        """The rate at this moment, of the full one."""
        return 1.0 if self._urgent else self._pace

    async def step(self, seconds: float) -> int:
        """One scan, of as many pages as are due in so many seconds, and all that follows from it.

        The answer is how many pages it looked at.
        """
        alive = [(block, vm) for vm in self._guests() if (block := vm.block) is not None]
        guests = [ScanGuest(block, self._image(vm), block.leaf()) for block, vm in alive]
        vms: dict[Hashable, V] = dict(alive)
        budget = self._budget(seconds)
        self._look_for_growth(set(vms))
        passes = self._scanner.passes
        found = await trio.to_thread.run_sync(self._scanner.scan, guests, budget)
        self.scanned += found.scanned
        self._pass.add(found)
        if self._scanner.passes != passes:
            self._pace = 1.0 if self._pass.worth else max(self._pace * _SLOWER, SLOWEST)
            self._pass = _Pass()
        await self._act(vms, found)
        # while memory is short, what a single page has is not kept for equals to come: it can be swapped out,
        # which frees nothing as long as the table has the frame, too
        least = 2 if self._urgent else 1
        self._unpin(self._scanner.table.sweep(self._pins.shares, _SWEEP, least))
        return found.scanned

    def _budget(self, seconds: float) -> int:
        """Whole pages that are due; a part of one counts the next time, or the slowest rates are none."""
        rate = self._rate()
        self._due = self._due + rate * seconds * self._part if rate else 0.0
        budget = int(self._due)
        self._due -= budget
        return budget

    def _look_for_growth(self, known: set[Hashable]) -> None:
        """The full rate from here on if there are guests, or pages, that there were not."""
        free = self._pins.free_frames()
        if known - self._known or free < self._free - self._free // _GROWTH:
            self._pace, self._free = 1.0, free
        self._known, self._free = known, max(free, self._free)

    def view(self) -> SharingView:
        """The figures of this moment."""
        return SharingView(scanned=self.scanned, merged=self.merged, zeroed=self.zeroed, refused=self.refused,
                           passes=self._scanner.passes, frames=len(self._scanner.table),
                           rate=self._rate() * self._part)

    async def _act(self, vms: dict[Hashable, V], found: Candidates) -> None:
        """Offer the candidates to those who run the guests: freezes first, for merges need their frames."""
        before = self.zeroed + self.merged
        # those that still have an owner are nobody else's until they are pinned
        strangers = found.strangers[self._pins.shares(found.strangers) > 0]
        self._pins.pin(strangers)
        self._unpin(self._scanner.adopted(strangers))
        for key, pages in found.zeros.items():
            with suppress(HostError):
                for vm, batch in _batches(vms, key, len(pages)):
                    self.zeroed += await self._reclaimer.drop_zeros(vm, pages[batch])
        for key, pages in found.freezes.items():
            with suppress(HostError):
                for vm, batch in _batches(vms, key, len(pages)):
                    self._unpin(self._scanner.frozen(key, *await self._reclaimer.freeze(vm, pages[batch])))
        for key, (pages, hashes) in found.merges.items():
            pages, frames = self._scanner.targets(key, pages, hashes)
            with suppress(HostError):
                for vm, batch in _batches(vms, key, len(pages)):
                    self.merged += await self._reclaimer.merge(vm, pages[batch], frames[batch])
        self.refused += found.pages - (self.zeroed + self.merged - before)

    def _unpin(self, frames: np.ndarray) -> None:
        if len(frames):
            self._pins.unpin(frames)


class _Pass:
    """What one pass over all guests came to."""

    def __init__(self) -> None:
        self.scanned = self.found = 0

    def add(self, found: Candidates) -> None:
        self.scanned += found.scanned
        self.found += found.pages

    @property
    def worth(self) -> bool:
        """Whether another at full rate promises anything."""
        return self.found * _WORTH > self.scanned


def _batches(vms: dict[Hashable, V], key: Hashable, count: int) -> Iterator[tuple[V, slice]]:
    """Slices of `count` pages, for as long as the VM leads the life in which they were scanned."""
    vm = vms[key]
    for start in range(0, count, BATCH):
        if vm.block is not key:
            return
        yield vm, slice(start, start + BATCH)
