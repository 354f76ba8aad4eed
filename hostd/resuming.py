# SPDX-License-Identifier: GPL-2.0-or-later
"""All guests of a host that was suspended, out of their files."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import trio

from hostd import storage
from hostd.errors import HostError
from hostd.guests import Guests
from hostd.inventory import SUFFIX, SUSPENDED
from hostd.lifecycle import State, Trigger
from hostd.memory import MachineMemory
from hostd.restoring import Restorer
from hostd.saved import SavedVm, saved_in
from hostd.saving import readable
from hostd.snapshot import Folder, Snapshot, Unusable
from hostd.suspending import PAGES
from hostd.vm import Vm
from vmm.memory.records import PageStore

log = logging.getLogger(__name__)

BROKEN = ".broken"


class Resumer:
    """`directory` is the host's state directory."""

    def __init__(self, restorer: Restorer, guests: Guests, memory: MachineMemory, directory: Path) -> None:
        self._restorer = restorer
        self._guests = guests
        self._memory = memory
        self._directory = directory

    async def resume(self, vms: Sequence[Vm]) -> None:
        """Bring back the guests of the suspended host where they were.  `vms` are those of the set's files,
        in STARTING.  A set that is not whole is set aside, and they are halted."""
        began = time.monotonic()
        directory = self._directory / SUSPENDED
        folder = Folder(directory)
        try:
            files = await trio.to_thread.run_sync(_open_all, folder, [vm.name for vm in vms])
            waiting = [vm for vm in vms if vm.state is State.STARTING]
            await self._build(waiting, [files[vm.name][0] for vm in waiting])
            for vm in waiting:
                assert vm.block is not None
                files[vm.name][1].mark_ballooned(vm.block)
            await trio.to_thread.run_sync(_remove, directory)
        except Exception as error:
            # a mistake of ours, too, must not keep the daemon from starting for ever
            if not isinstance(error, HostError):
                log.exception("suspended guests cannot be resumed")
            self._set_aside(directory, vms, error)
            folder.close()
            return
        if not waiting:
            folder.close()
        async with trio.open_nursery() as nursery:
            for vm in waiting:
                snapshot, saved = files[vm.name]
                nursery.start_soon(self._go_on, vm, snapshot.state, saved)
        log.info("host resumed", extra={"guests": len(waiting),
                                        "seconds": round(time.monotonic() - began, 3)})

    async def _build(self, vms: Sequence[Vm], snapshots: Sequence[Snapshot]) -> None:
        """The memory of all guests, or of none: what several of them have is loaded once and shared, the rest
        is left in the file until it is needed."""
        books = self._memory.books
        if not vms:
            return
        for vm, snapshot in zip(vms, snapshots):
            if vm.definition.memory != snapshot.memory_bytes:
                raise Unusable(f"VM {vm.name} is defined with memory of {vm.definition.memory} bytes, and it "
                               f"was suspended with {snapshot.memory_bytes}")
        # every record is in the one file of common pages: its offset is its name
        offsets, counts = np.unique(np.concatenate([snapshot.index["offset"] for snapshot in snapshots]),
                                    return_counts=True)
        common = offsets[counts > 1]
        stores = next((snapshot.stores[1:] for snapshot in snapshots if len(snapshot.stores) > 1), [])
        if len(common) > books.free_frames() // 2:
            common = common[:0]                     # the host has less memory now: all on demand
        with self._restorer.opened_stores(stores) as numbers:
            frames = await self._load(common, stores)
            try:
                for vm, snapshot in zip(vms, snapshots):
                    vm.block = books.new(vm.definition.memory)
                    rows = snapshot.index
                    shared = np.isin(rows["offset"], common)
                    books.share(vm.block, rows["page"][shared].astype(np.int64),
                                frames[np.searchsorted(common, rows["offset"][shared])])
                    self._restorer.refer(vm.block, rows[~shared], [0, *numbers])
            except BaseException:
                for vm in vms:
                    if vm.block is not None:
                        block, vm.block = vm.block, None
                        self._guests.free_copy(block)
                raise
            finally:
                books.unpin(frames)

    async def _load(self, offsets: np.ndarray, stores: Sequence[PageStore]) -> np.ndarray:
        """Frames with the contents of these records, pinned."""
        books, pool = self._memory.books, self._memory.pool
        frames = books.frames_for_loading(len(offsets)).rest()
        books.pin(frames)

        def read() -> None:
            with readable():
                for offset, frame in zip(offsets.tolist(), frames.tolist()):
                    stores[0].read_into(offset, pool.page(frame))

        try:
            await trio.to_thread.run_sync(read)
        except BaseException:
            books.unpin(frames)
            raise
        return frames

    async def _go_on(self, vm: Vm, state: bytes, saved: SavedVm) -> None:
        """Have one guest live on; what goes wrong here is that guest's affair."""
        life = saved.life
        try:
            async with self._guests.changing(vm):
                if vm.state is not State.STARTING:
                    return
                if life is not None:
                    life.give_to(vm)
                if life is not None and life.paused:
                    vm.parked = state
                    vm.follow(Trigger.PAUSE)
                    return
                await self._guests.launch(vm, state)
        except HostError as error:
            log.error("guest not resumed", extra={"vm": vm.name, "why": str(error)})

    def _set_aside(self, directory: Path, vms: Sequence[Vm], error: Exception) -> None:
        aside = directory.with_name(SUSPENDED + BROKEN)
        log.error("suspended guests cannot be resumed: the set is set aside",
                  extra={"set": str(aside), "why": str(error)})
        try:
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(directory, aside)
        except OSError as problem:
            log.error("set not set aside", extra={"set": str(directory), "why": problem.strerror})
        for vm in vms:
            if vm.state is State.STARTING:
                vm.follow(Trigger.POWER_OFF, f"not resumed: {error}")


def _open_all(folder: Folder, names: Sequence[str]) -> dict[str, tuple[Snapshot, SavedVm]]:
    """The snapshots of a set, verified, by VM; or none is open, and an error raised."""
    found: dict[str, tuple[Snapshot, SavedVm]] = {}
    opened = []
    try:
        for name in names:
            snapshot = folder.open(name + SUFFIX)
            opened.append(snapshot)
            saved = saved_in(snapshot)
            if saved.definition.name != name or any(base.name != PAGES for base in snapshot.bases) \
                    or not snapshot.index["base"].all():
                raise Unusable(f"{snapshot.path} cannot be used: it is not of this set")
            found[name] = snapshot, saved
        for snapshot in opened:
            snapshot.verify()
    except BaseException:
        for snapshot in opened:
            snapshot.close()
        raise
    for snapshot in opened:
        snapshot.close()                            # they have no pages of their own
    return found


def _remove(directory: Path) -> None:
    """Take the set away, durably, before the first guest goes on: no moment is lived twice."""
    aside = directory.with_name(SUSPENDED + ".resumed")
    with storage.told_plainly(directory):
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(directory, aside)
        storage.sync_directory(directory.parent)
    shutil.rmtree(aside, ignore_errors=True)
