# SPDX-License-Identifier: GPL-2.0-or-later
"""What the daemon has done to the pages of a guest for the host's sake, whoever has the guest at the moment.

A running guest's worker does it (vmm/memory/reclaim.py, through hostd/leases.py); a paused guest's memory is
the daemon's own.  The books follow.  A guest that somebody is changing (starting, cloning, moving, stopping)
is left alone: all methods raise Conflict then.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np
import trio

from hostd.errors import Conflict, HostError
from hostd.guests import Guests
from hostd.lifecycle import State
from hostd.memory import MachineMemory
from hostd.protocol import Reclaimed, Reclaiming
from hostd.stores import slots_at
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
        books = self._memory.books
        async with self._held(vm) as block:
            def settle(done: np.ndarray, frames: np.ndarray) -> None:
                books.frozen(block, done, frames)
                books.pin(frames)

            return await self._carry_out(vm, block, "freeze", settle, pages)

    async def merge(self, vm: Vm, pages: np.ndarray, frames: np.ndarray) -> int:
        """Let private pages share frozen `frames` where the contents are the same; how many did."""
        books = self._memory.books
        async with self._held(vm) as block:
            def settle(done: np.ndarray, freed: np.ndarray) -> None:
                merged = np.isin(pages, done)
                books.merged(block, pages[merged], frames[merged], freed)
                books.unpin(frames[~merged])

            # Invariant: a frame named in a request is pinned until the answer: nobody else gets it meanwhile
            books.pin(frames)
            try:
                done, _ = await self._carry_out(vm, block, "merge", settle, pages, frames)
            except BaseException:
                books.unpin(frames)
                raise
        vm.memory_state.merged += len(done)
        return len(done)

    async def drop_zeros(self, vm: Vm, pages: np.ndarray) -> int:
        """Private pages full of zeros give up their frames; how many did."""
        books = self._memory.books
        async with self._held(vm) as block:
            done, _ = await self._carry_out(vm, block, "zeros", lambda _, freed: books.zeroed(freed), pages)
        vm.memory_state.zeroed += len(done)
        return len(done)

    async def watch(self, vm: Vm, pages: np.ndarray) -> None:
        """Have the next use of these pages noticed: the present bit of the P2M entry comes back with it."""
        async with self._held(vm) as block:
            await self._carry_out(vm, block, "watch", lambda *_: None, pages)

    async def swap_out(self, vm: Vm, pages: np.ndarray) -> int:
        """Put pages that are watched, private or shared, into the swap file; how many were, and were not used
        meanwhile.

        Raises NotStored, nothing having changed for the guest, when the swap file does not take them.
        """
        books, swap = self._memory.books, self._memory.books.stores.swap
        if swap is None:
            return 0
        done = frames = put = _NONE
        async with self._held(vm) as block:
            def settle_frozen(frozen: np.ndarray, their: np.ndarray) -> None:
                nonlocal done, frames
                books.frozen(block, frozen, their)
                done, frames = books.pin_shared(block, pages)

            await self._carry_out(vm, block, "freeze", settle_frozen, pages)
        try:
            contents = [self._memory.pool.page(frame) for frame in frames.tolist()]
            offsets = await trio.to_thread.run_sync(swap.write, contents)
            slots = np.array(offsets, dtype=np.int64)
            try:
                async with self._held(vm) as block:
                    def settle(put: np.ndarray, _: np.ndarray) -> None:
                        stored = np.isin(done, put)
                        books.stored(block, done[stored], slots[stored].astype(np.uint64))

                    put, _ = await self._carry_out(vm, block, "store", settle, done, frames, slots)
            finally:
                swap.free(slots[~np.isin(done, put)].tolist())
        finally:
            books.unpin(frames)
            await self._thaw(vm, done[~np.isin(done, put)])
        vm.memory_state.swapped_out += len(put)
        return len(put)

    async def _thaw(self, vm: Vm, pages: np.ndarray) -> None:
        """Pages were frozen in vain: have the guest write to them without a new frame for each.  If it is not
        to be had, that is all it loses."""
        books = self._memory.books
        with suppress(HostError):
            async with self._held(vm) as block:
                passage, pages, frames = books.thawing(block, pages)
                worker = None if vm.worker is None else vm.worker.index

                def settle(done: np.ndarray, unused: np.ndarray) -> None:
                    books.arrived(block, worker, passage, done, frames, unused)

                try:
                    if len(pages):
                        await self._carry_out(vm, block, "thaw", settle, pages, frames)
                except BaseException:
                    books.returned(passage, frames)
                    raise

    async def install(self, vm: Vm, store: int, pages: np.ndarray, frames: np.ndarray) -> int:
        """Pages that are in a remote `store` (Stores.open_remote), each named once, have come: they are in
        `frames`, on loan to the daemon (Books.frames_for_loading), or all zeroes where that is 0.  How many
        the guest still had a use for; all frames are the guest's or free afterwards, also when this raises.

        Waits for whoever is changing the VM.  Raises NotFound, Conflict or Failed if the guest is gone.
        """
        books, filled = self._memory.books, frames[frames != 0]
        passage = books.send(filled)
        try:
            async with self._guests.changing(vm):
                block = _block_of(vm)
                worker = None if vm.worker is None else vm.worker.index

                def settle(done: np.ndarray, unused: np.ndarray) -> None:
                    books.arrived(block, worker, passage, done, filled, unused)

                done, _ = await self._carry_out(vm, block, "install", settle, pages, frames,
                                                slots_at(store, pages))
        except BaseException:
            books.returned(passage, filled)
            raise
        return len(done)

    @asynccontextmanager
    async def _held(self, vm: Vm) -> AsyncIterator[VmBlock]:
        if vm.lock.locked():
            raise Conflict(f"VM {vm.name} is being changed")
        async with self._guests.changing(vm):
            yield _block_of(vm)

    async def _carry_out(self, vm: Vm, block: VmBlock, what: Reclaiming,
                         settle: Callable[[np.ndarray, np.ndarray], None], pages: np.ndarray,
                         frames: np.ndarray = _NONE,
                         slots: np.ndarray = _NONE) -> tuple[np.ndarray, np.ndarray]:
        """The pages for which it was done, and the frames that came of it, with which `settle` was called."""
        if vm.worker is None:
            answer = carry_out(what, block.p2m, pages, frames, slots)
            settle(*answer)
            return answer
        return _arrays(await self._guests.leases.reclaim(
            vm, what, lambda answer: settle(*_arrays(answer)),
            *(array.astype(np.int64).tobytes() for array in (pages, frames, slots))))


def _arrays(answer: Reclaimed) -> tuple[np.ndarray, np.ndarray]:
    return np.frombuffer(answer.pages, dtype=np.int64), np.frombuffer(answer.frames, dtype=np.int64)


def _block_of(vm: Vm) -> VmBlock:
    """The memory of a guest that runs or is paused.  Raises Conflict where there is none."""
    if vm.block is None or (vm.worker is None and vm.state is not State.PAUSED):
        raise Conflict(f"VM {vm.name} is {vm.state}")
    return vm.block
