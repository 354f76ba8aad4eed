# SPDX-License-Identifier: GPL-2.0-or-later
"""That no guest has more machine memory than it may have at the moment, from one fault to the next.

A guest's worker gives it frames up to its ration (hostd/ration.py) and no more.  Who is refused
one stands still; some of its pages are swapped out at once, whatever else the host is doing, and it goes on.

Where nothing can be swapped out it stands still until the keeper decides again, and tries again then.  One
with a balloon driver gets a little room once a decision, to give something back, up to a leeway above its
limit; any other gets none, for there would be no end to that.  There is one to a migration, in the middle of
which no page is swapped out: a guest goes beyond its limit until it is over.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from hostd.leases import Leases
from hostd.protocol import Most, SetRation
from hostd.vm import Vm

log = logging.getLogger(__name__)

#: pages by which a guest at its limit is made to fit
ROOM = 128
#: pages above its limit that a balloon driver may be given to run in, all in all: one that never gives
#: anything back comes to a stand with them
LEEWAY = 4096
#: seconds after which a guest that is being changed is looked at again: it may be migrating by then
PATIENCE_S = 1.0
#: what is said of a guest that cannot be made to
STANDS_STILL = ("it stands still: it may have no more memory, none of its pages can be swapped out, and no "
                "balloon driver gives some back; a higher limit, or swap, lets it go on")


class Rationing:
    """`evict` swaps out so many pages of a guest, and those that it shares, too, if it is told so: the answer
    is how many it did, None if the guest was not to be had."""

    def __init__(self, leases: Leases, evict: Callable[[Vm, int, bool], Awaitable[int | None]]) -> None:
        self._evict = evict
        self._refused: set[Vm] = set()
        self._came = trio.Event()
        leases.on_limit = self._on_limit

    def _on_limit(self, vm: Vm) -> None:
        vm.memory_state.waits = True
        self._refused.add(vm)
        self._came.set()

    def set(self, vm: Vm, most: Most) -> None:
        """The keeper's decision: let the guest have so many frames.  One that is blocked, for want of memory
        (`most.own`), gets no room beyond them."""
        if most != vm.ration or not vm.strict:
            self._say(vm, "")
        if most != vm.ration or vm.strict:
            self._tell(vm, most)
        vm.strict = most.own is not None

    def _tell(self, vm: Vm, most: Most) -> None:
        """A guest that was refused a frame tries again when this arrives."""
        vm.ration = most
        vm.memory_state.waits = False
        if vm.worker is not None:
            vm.worker.send(SetRation(vm.lease, most))

    async def run(self) -> None:
        """Make room for those that were refused a frame, until cancelled."""
        at_work: set[Vm] = set()

        async def serve(vm: Vm) -> None:
            try:
                await self._make_room(vm)
            finally:
                at_work.discard(vm)
            if vm in self._refused:
                self._came.set()

        async with trio.open_nursery() as nursery:
            while True:
                await self._came.wait()
                self._came = trio.Event()
                # whoever is refused again while somebody is at it comes after that
                for vm in self._refused - at_work:
                    self._refused.discard(vm)
                    at_work.add(vm)
                    nursery.start_soon(serve, vm)

    async def _make_room(self, vm: Vm) -> None:
        lease = vm.lease
        while vm.lease == lease and lease:
            # what it shares counts against its limit, but is none of its own frames
            done = await self._evict(vm, ROOM, vm.ration.own is None)
            if vm.lease != lease:
                return
            if done is not None:
                self._made(vm, done)
                return
            if vm.away:
                if vm.ration.own is None:
                    self._give_room(vm)
                return
            with trio.move_on_after(PATIENCE_S):
                async with vm.lock:             # until whoever is changing it has done that
                    pass

    def _made(self, vm: Vm, room: int) -> None:
        """So many pages of a guest that was refused a frame were swapped out."""
        assert vm.block is not None
        beyond = vm.block.memory_counts()["resident"] - (vm.definition.limit_bytes >> 12)
        driver = vm.balloon is not None and vm.balloon.driver and beyond < LEEWAY
        self._say(vm, "" if room or driver else STANDS_STILL)
        if room:
            vm.memory_state.waits = vm in self._refused     # it may have gone on, and used that up
            return
        if driver and not vm.strict:                # it has to run to give something back
            self._give_room(vm)
        vm.strict = True

    def _give_room(self, vm: Vm) -> None:
        assert vm.block is not None
        self._tell(vm, Most(vm.block.memory_counts()["resident"] + ROOM))

    def _say(self, vm: Vm, reason: str) -> None:
        """What a user should know of the guest, if it is news."""
        if reason == vm.reason or STANDS_STILL not in (reason, vm.reason):
            return
        if reason:
            log.warning("guest stands still", extra={"vm": vm.name, "why": reason})
        vm.reason = reason
        vm.activity.notify()
