# SPDX-License-Identifier: GPL-2.0-or-later
"""That no guest has more machine memory than it may have at the moment, from one fault to the next.

A guest's worker gives it frames of its own up to its ration (hostd/ration.py) and no more.  Who is refused
one stands still; some of its pages are swapped out at once, whatever else the host is doing, and it goes on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from hostd.leases import Leases
from hostd.protocol import SetRation
from hostd.vm import Vm

#: pages by which a guest at its limit is made to fit
ROOM = 128


class Rationing:
    """`evict` swaps out so many pages of a guest: the answer is how many it did, None if the guest was not to
    be had."""

    def __init__(self, leases: Leases, evict: Callable[[Vm, int], Awaitable[int | None]]) -> None:
        self._evict = evict
        self._refused: set[Vm] = set()
        self._came = trio.Event()
        leases.on_limit = self._on_limit

    def _on_limit(self, vm: Vm) -> None:
        self._refused.add(vm)
        self._came.set()

    def set(self, vm: Vm, most: int | None) -> None:
        """Let the guest have `most` frames that are its own; None: as many as there are."""
        if most != vm.ration:
            self._tell(vm, most)

    def _tell(self, vm: Vm, most: int | None) -> None:
        """A guest that was refused a frame tries again when this arrives."""
        vm.ration = most
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
            done = await self._evict(vm, ROOM)
            if done is None:
                async with vm.lock:             # until whoever is changing it has done that
                    continue
            if not done and vm.lease == lease and vm.block is not None:
                # nothing can be swapped.  It has to run to give something back by its balloon driver
                self._tell(vm, vm.block.memory_counts()["private"] + ROOM)
            return
