# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest while a worker has it: its machine, and its books."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from hostd.openslots import OpenSlots
from hostd.protocol import Adopt, BalloonView, Dirty, Listing, Logging, Reclaim, Reclaimed, Reported, Wanted
from hostd.ration import Ration
from hostd.scheduler import Usage
from hostd.translator import MAX_UNITS, Translator, excerpt
from vmm.machine import VirtualMachine
from vmm.memory import reclaim as reclaiming
from vmm.memory.block import VmBlock
from vmm.memory.errors import OutOfFrames
from vmm.memory.frames import FrameAllocator, FrameSource
from vmm.memory.records import StoreError
from vmm.monitor import Stop, StopReason
from vmm.silicon.cpu import Cpu, CpuShutdown
from vmm.state import decode, encode

log = logging.getLogger(__name__)


class Resident:
    """Raises StateError for a state that cannot be loaded."""

    def __init__(self, adopt: Adopt, cpu: Cpu, block: VmBlock, frames: FrameSource, tsc_khz: int,
                 console: Callable[[bytes], None], translator: Translator, slots: OpenSlots) -> None:
        self.lease = adopt.vm
        #: CLOCK_MONOTONIC ns of its entry among the worker's alarms that counts
        self.alarm: int | None = None
        self.ration = Ration(frames, block.p2m, adopt.ration)
        self.machine = VirtualMachine(cpu, block, self.ration, decode(adopt.state), console, tsc_khz,
                                      translator.engine)
        self._p2m = block.p2m
        self._slots = slots
        block.p2m.fetch = self._fetch
        block.p2m.logging = adopt.logging
        self.machine.resume_clock(adopt.since_ns)
        self._accounting = block.accounting
        # what it had before it came here; the run queue counts from zero
        self._before = Usage(block.accounting.run_ns, block.accounting.wait_ns, block.accounting.sleep_ns)
        self._stolen = 0
        #: pages at another host that it waits for, and those of them that were not told yet
        self._awaited: set[int] = set()
        self._wanted: list[int] = []
        #: what was told last: whether there is a balloon driver, and when it gave statistics
        self._heard = self._hear()

    def run(self, deadline_ns: int) -> Stop:
        """Run until CLOCK_MONOTONIC `deadline_ns` at the latest.

        A mistake of the monitor costs the guest that found it, not the others; but a CPU that shut down is of
        no use to anybody, and takes the process with it.
        """
        try:
            return self.machine.run(deadline_ns)
        except CpuShutdown:
            raise
        except Exception as error:
            log.exception("the monitor failed", extra={"vm": self.lease})
            return Stop(StopReason.CRASHED, f"the monitor failed: {type(error).__name__}: {error}")

    def _fetch(self, slot: int, into: memoryview) -> None:
        """Read a page that is in a file.  If that cannot be, the guest is lost; if the page is at another
        host, it waits."""
        page = self._slots.elsewhere(slot)
        if page is not None:
            if page not in self._awaited:
                self._awaited.add(page)
                self._wanted.append(page)
            raise OutOfFrames(f"page {page} is at another host")
        try:
            self._slots.fetch(slot, into)
            self._accounting.swapped_in += self._slots.is_swap(slot)
        except StoreError as error:
            self.machine.lost = f"a page of its memory is lost: {error}"
            raise OutOfFrames(str(error)) from None

    def reclaim(self, request: Reclaim) -> Reclaimed:
        """Do what the host asks to pages of the guest."""
        if request.what != "install":               # pages that were nowhere are mapped nowhere
            self.machine.leave_cpu()
        pages, frames, slots = (np.frombuffer(array, dtype=np.int64)
                                for array in (request.pages, request.frames, request.slots))
        done, came = reclaiming.carry_out(request.what, self._p2m, pages, frames, slots)
        self._awaited.difference_update(done.tolist())
        self.ration.recount()
        return Reclaimed(self.lease, done.astype(np.int64).tobytes(), came.astype(np.int64).tobytes())

    def dirty_log(self, what: Logging) -> Dirty:
        """Start, collect or stop the log of pages that are written."""
        self.machine.leave_cpu()
        pages = self._p2m.log(what)
        return Dirty(self.lease, pages.tobytes())

    def set_balloon(self, pages: int, statistics: bool) -> BalloonView:
        """Ask the guest for `pages` in all, and for its `statistics`, which come by `take_balloon`; the
        answer is what it said before."""
        balloon = self.machine.balloon
        if balloon.target_pages != pages:
            balloon.target_pages = pages
        view = self._balloon_view()
        if statistics:
            balloon.request_statistics()
        return view

    def take_balloon(self) -> BalloonView | None:
        """What its balloon driver says, if it came, went or gave statistics since the last call."""
        heard, self._heard = self._heard, self._hear()
        return None if heard == self._heard else self._balloon_view()

    def _hear(self) -> tuple[bool, int]:
        return self.machine.balloon.driver_ok, self.machine.balloon.received_ns

    def _balloon_view(self) -> BalloonView:
        balloon = self.machine.balloon
        # a driver that broke the rules says nothing new: its statistics would be the last for ever
        said = dict(balloon.statistics) if balloon.driver_ok else {}
        return BalloonView(self.lease, balloon.driver_ok, balloon.actual_pages, said)

    def take_report(self) -> Reported | None:
        """What its pages have let go of since the last call, if anything."""
        p2m = self._p2m
        if not (p2m.dropped or p2m.freed or p2m.fetched):
            return None
        report = Reported(self.lease, [page for page, _ in p2m.dropped], p2m.freed, p2m.fetched)
        p2m.dropped, p2m.freed, p2m.fetched = [], [], []
        return report

    def private_pages(self) -> int:
        """How many of its pages have a frame for themselves."""
        return int(np.count_nonzero(FrameAllocator.is_private(np.frombuffer(self._p2m.leaf, np.uint64))))

    def take_wanted(self) -> Wanted | None:
        """The pages at another host that it began to wait for since the last call, if any."""
        if not self._wanted:
            return None
        wanted, self._wanted = self._wanted, []
        return Wanted(self.lease, wanted)

    def listing(self, address: int | None) -> Listing:
        """Its translated code.  A mistake in showing it costs the guest nothing."""
        try:
            text, complete = excerpt(self.machine.translations(address, MAX_UNITS + 1))
        except Exception as error:
            log.exception("translations not listed", extra={"vm": self.lease})
            problem = f"its translations cannot be shown: {type(error).__name__}: {error}"
            return Listing(self.lease, "", True, problem)
        return Listing(self.lease, text, complete)

    def capture(self) -> tuple[bytes, int]:
        """Its state without memory; it is off the CPU from here on.  And at which CLOCK_MONOTONIC its clock
        stopped."""
        state = self.machine.capture()
        return encode(state), self.machine.clock.host_ns(state.time_ns)

    def close(self) -> None:
        """It is not run here any more: give back what the monitor took for it."""
        self.machine.close()

    def account(self, usage: Usage) -> None:
        """Publish where its time went."""
        before, accounting = self._before, self._accounting
        accounting.run_ns = before.run_ns + usage.run_ns
        accounting.wait_ns = before.wait_ns + usage.wait_ns
        accounting.sleep_ns = before.sleep_ns + usage.sleep_ns

    def tell_steal(self, wait_ns: int) -> None:
        """Let the guest know how long it waited for the CPU, in all, since it came here."""
        stolen, self._stolen = self._stolen, wait_ns
        if wait_ns > stolen:
            self.machine.add_steal(wait_ns - stolen)
