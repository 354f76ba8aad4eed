# SPDX-License-Identifier: GPL-2.0-or-later
"""What the daemon has done to the pages of a guest for the host's sake, whoever has the guest at the moment.

A running guest's worker does it (vmm/memory/reclaim.py, through hostd/leases.py); a paused guest's memory is
the daemon's own.  The books follow.  A guest that somebody is changing (starting, cloning, moving, stopping)
is left alone: all methods raise Conflict then.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import numpy as np
import trio

from hostd.errors import Conflict
from hostd.guests import Guests
from hostd.lifecycle import State
from hostd.memory import MachineMemory
from hostd.protocol import Reclaiming
from hostd.vm import Vm
from vmm.memory.reclaim import carry_out

if TYPE_CHECKING:
    from vmm.memory.block import VmBlock

_NONE = np.zeros(0, dtype=np.int64)


class Reclaimer:
    """`pages` are guest-physical page numbers, `frames` machine frames; arrays of int64.

    All methods raise HostError when the guest is not to be had, or ends meanwhile: nothing is done then.
    """

    def __init__(self, guests: Guests, memory: MachineMemory) -> None:
        self._guests = guests
        self._memory = memory

    async def freeze(self, vm: Vm, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Private pages become shared ones, so that nobody writes their frames any more.

        The answer is the pages for which it was done, and their frames, each pinned once (Books.unpin).
        """
        async with self._held(vm) as block:
            done, frames = await self._carry_out(vm, block, "freeze", pages)
            self._memory.books.frozen(block, done, frames)
            self._memory.books.pin(frames)
        return done, frames

    async def merge(self, vm: Vm, pages: np.ndarray, frames: np.ndarray) -> int:
        """Let private pages share frozen `frames` where the contents are the same; how many did."""
        books = self._memory.books
        async with self._held(vm) as block:
            # Invariant: a frame named in a request is pinned until the answer: nobody else gets it meanwhile
            books.pin(frames)
            try:
                done, freed = await self._carry_out(vm, block, "merge", pages, frames)
            except BaseException:
                books.unpin(frames)
                raise
            merged = np.isin(pages, done)
            books.merged(block, pages[merged], frames[merged], freed)
            books.unpin(frames[~merged])
        vm.memory_state.merged += len(done)
        self._guests.leases.feed_hungry()
        return len(done)

    async def drop_zeros(self, vm: Vm, pages: np.ndarray) -> int:
        """Private pages full of zeros give up their frames; how many did."""
        async with self._held(vm) as block:
            done, freed = await self._carry_out(vm, block, "zeros", pages)
            self._memory.books.zeroed(freed)
        vm.memory_state.zeroed += len(done)
        self._guests.leases.feed_hungry()
        return len(done)

    async def watch(self, vm: Vm, pages: np.ndarray) -> None:
        """Have the next use of these pages noticed: the present bit of the P2M entry comes back with it."""
        async with self._held(vm) as block:
            await self._carry_out(vm, block, "watch", pages)

    async def swap_out(self, vm: Vm, pages: np.ndarray) -> int:
        """Put private pages that are watched into the swap file; how many were, and were not used meanwhile.

        Raises Full, nothing having changed for the guest, when the swap file has no room.
        """
        books, swap = self._memory.books, self._memory.books.stores.swap
        if swap is None:
            return 0
        done, frames = await self.freeze(vm, pages)
        try:
            contents = [self._memory.pool.page(frame) for frame in frames.tolist()]
            offsets = await trio.to_thread.run_sync(swap.write, contents)
            slots = np.array(offsets, dtype=np.int64)
            put = _NONE
            try:
                async with self._held(vm) as block:
                    put, _ = await self._carry_out(vm, block, "store", done, frames, slots)
                    stored = np.isin(done, put)
                    books.stored(block, done[stored], slots[stored].astype(np.uint64))
            finally:
                swap.free(slots[~np.isin(done, put)].tolist())
        finally:
            books.unpin(frames)
        vm.memory_state.swapped_out += len(put)
        self._guests.leases.feed_hungry()
        return len(put)

    @asynccontextmanager
    async def _held(self, vm: Vm) -> AsyncIterator[VmBlock]:
        if vm.lock.locked():
            raise Conflict(f"VM {vm.name} is being changed")
        async with self._guests.changing(vm):
            if vm.block is None or (vm.worker is None and vm.state is not State.PAUSED):
                raise Conflict(f"VM {vm.name} is {vm.state}")
            yield vm.block

    async def _carry_out(self, vm: Vm, block: VmBlock, what: Reclaiming, pages: np.ndarray,
                         frames: np.ndarray = _NONE,
                         slots: np.ndarray = _NONE) -> tuple[np.ndarray, np.ndarray]:
        if vm.worker is None:
            return carry_out(what, block.p2m, pages, frames, slots)
        answer = await self._guests.leases.reclaim(vm, what, *(
            array.astype(np.int64).tobytes() for array in (pages, frames, slots)))
        return np.frombuffer(answer.pages, dtype=np.int64), np.frombuffer(answer.frames, dtype=np.int64)


