# SPDX-License-Identifier: GPL-2.0-or-later
"""All guests of a host that was suspended, out of their files.

The file of common pages is everybody's; beyond that each guest stands for itself: one whose file is no good,
or whose VM is gone, is left out, and its file is kept where `hostctl restore` can have it.

Invariant: the set is gone, durably, before the first of its guests goes on: no moment is lived twice.  A
daemon that is killed before that finds the set again; one that is killed after it has lost running guests.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import trio

from hostd import storage
from hostd.errors import HostError, NotFound
from hostd.guests import Guests
from hostd.inventory import RESUMED, SUFFIX, SUSPENDED
from hostd.lifecycle import State, Trigger
from hostd.memory import MachineMemory
from hostd.restoring import Restorer
from hostd.saved import SavedVm, saved_in
from hostd.saving import readable
from hostd.snapshot import Base, Folder, Snapshot, Unusable
from hostd.suspending import PAGES
from hostd.vm import Vm
from vmm.memory.block import VmBlock
from vmm.memory.records import PageStore

log = logging.getLogger(__name__)

BROKEN = ".broken"


class _Member(NamedTuple):
    """One guest of the set."""

    snapshot: Snapshot
    saved: SavedVm


class _Set:
    """What is in the directory: members that are good, by name, and what is wrong with the others."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.good: dict[str, _Member] = {}
        self.bad: dict[str, str] = {}
        self._folder = Folder(directory)
        self._pages: Snapshot | None = None

    def read(self, memory: Mapping[str, int]) -> None:
        """Open and verify all.  `memory`: of the VMs there are, in bytes.  Takes its time."""
        names = sorted(path.name.removesuffix(SUFFIX) for path in self.directory.glob("*" + SUFFIX)
                       if path.name != PAGES)
        try:
            self._pages = self._common()
        except Exception as error:
            self.bad = dict.fromkeys(names, _why(error))
            return
        for name in names:
            try:
                self.good[name] = self._member(name, memory.get(name))
            except Exception as error:
                self.bad[name] = _why(error)

    def _common(self) -> Snapshot:
        """The file of common pages, verified: for all members at once."""
        snapshot = Snapshot.open(self.directory / PAGES)
        snapshot.close()
        pages = self._folder(Base(PAGES, snapshot.id))
        pages.verify()
        return pages

    def _member(self, name: str, memory: int | None) -> _Member:
        snapshot = self._folder.open(name + SUFFIX)
        try:
            saved = saved_in(snapshot)
            if saved.definition.name != name or any(base.name != PAGES for base in snapshot.bases) \
                    or not snapshot.index["base"].all():
                raise Unusable(f"{snapshot.path} cannot be used: it is not of this set")
            snapshot.verify()
        finally:
            snapshot.close()                        # it has no pages of its own
        if memory is None:
            raise NotFound(f"there is no VM {name}, or its definition cannot be read")
        if memory != snapshot.memory_bytes:
            raise Unusable(f"VM {name} is defined with memory of {memory} bytes, and it was suspended with "
                           f"{snapshot.memory_bytes}")
        return _Member(snapshot, saved)

    def drop(self, name: str, why: str) -> None:
        """This member is no good after all."""
        self.bad[name] = why
        self.good.pop(name, None)

    @property
    def stores(self) -> list[PageStore]:
        """Where all records are."""
        return self._pages.stores if self._pages is not None else []

    def take_away(self) -> Path:
        """Have the set be there no more, durably; where it went, to be `clear`ed.  Raises Failed, and then it
        is there."""
        aside = _unused(self.directory.with_name(SUSPENDED + BROKEN)) if self.bad \
            else self.directory.with_name(RESUMED)
        with storage.told_plainly(self.directory):
            os.rename(self.directory, aside)
            try:
                storage.sync_directory(aside.parent)
            except BaseException:
                os.rename(aside, self.directory)
                raise
        return aside

    def close(self) -> None:
        self._folder.close()


class Resumer:
    """`directory` is the host's state directory."""

    def __init__(self, restorer: Restorer, guests: Guests, memory: MachineMemory, directory: Path) -> None:
        self._restorer = restorer
        self._guests = guests
        self._memory = memory
        self._directory = directory

    async def resume(self, vms: Sequence[Vm]) -> None:
        """Bring back the guests of the suspended host where they were.  `vms` are those of the set's files,
        in STARTING; those that cannot be brought back are halted, and the log says why."""
        began = time.monotonic()
        found = _Set(self._directory / SUSPENDED)
        await trio.to_thread.run_sync(found.read, {vm.name: vm.definition.memory for vm in vms})
        async with AsyncExitStack() as held:
            # Invariant: nobody does anything to these VMs from before they have memory until the set is gone
            waiting = await self._hold(held, vms)
            await self._build([vm for vm in waiting if vm.name in found.good], found)
            aside = await self._take_away(found)
            for name, why in found.bad.items():
                kept = (aside or found.directory) / (name + SUFFIX)
                log.error("guest not resumed", extra={"vm": name, "why": why, "kept": str(kept)})
            for vm in waiting:
                if vm.name in found.bad:
                    self._halt(vm, found.bad[vm.name])
            going = [(vm, vm.block) for vm in waiting if vm.block is not None]
        found.close()                               # what is still needed of it is open among the stores
        async with trio.open_nursery() as nursery:
            for vm, block in going:
                nursery.start_soon(self._go_on, vm, block, found.good[vm.name])
            if aside is not None:
                nursery.start_soon(trio.to_thread.run_sync, _clear, aside, found.bad)
        log.info("host resumed", extra={"guests": len(going),
                                        "seconds": round(time.monotonic() - began, 3)})

    async def _hold(self, held: AsyncExitStack, vms: Sequence[Vm]) -> list[Vm]:
        """Take the locks of those that still wait to be resumed."""
        waiting = []
        for vm in vms:
            try:
                await held.enter_async_context(self._guests.changing(vm))
            except HostError:
                continue                            # it was destroyed
            if vm.state is State.STARTING and not vm.boots:     # nor stopped, and perhaps started since
                waiting.append(vm)
        return waiting

    async def _take_away(self, found: _Set) -> Path | None:
        try:
            return await trio.to_thread.run_sync(found.take_away)
        except HostError as error:
            for name in list(found.good):
                found.drop(name, str(error))
            return None

    async def _build(self, vms: Sequence[Vm], found: _Set) -> None:
        """The memory of the guests: what several of them have is loaded once and shared, the rest is left in
        the file until it is needed.  Those that cannot have theirs are dropped."""
        try:
            await self._lay_out(vms, found)
        except Exception as error:
            for vm in vms:
                found.drop(vm.name, _why(error))

    async def _lay_out(self, vms: Sequence[Vm], found: _Set) -> None:
        books = self._memory.books
        if not vms:
            return
        # every record is in the one file of common pages: its offset is its name
        named = [found.good[vm.name].snapshot.index["offset"] for vm in vms]
        offsets, counts = np.unique(np.concatenate(named), return_counts=True)
        common = offsets[counts > 1]
        if len(common) > books.free_frames() // 2:
            common = common[:0]                     # the host has less memory now: all on demand
        with self._restorer.opened_stores(found.stores) as numbers:
            frames = await self._load(common, found.stores)
            try:
                for vm in vms:
                    member = found.good[vm.name]
                    try:
                        vm.block = books.new(vm.definition.memory)
                    except HostError as error:
                        found.drop(vm.name, str(error))
                        continue
                    rows = member.snapshot.index
                    shared = np.isin(rows["offset"], common)
                    books.share(vm.block, rows["page"][shared].astype(np.int64),
                                frames[np.searchsorted(common, rows["offset"][shared])])
                    self._restorer.refer(vm.block, rows[~shared], [0, *numbers])
                    member.saved.mark_ballooned(vm.block)
            finally:
                books.unpin(frames)

    async def _load(self, offsets: np.ndarray, stores: Sequence[PageStore]) -> np.ndarray:
        """Frames with the contents of these records, pinned."""
        books, pool = self._memory.books, self._memory.pool
        magazine = books.frames_for_loading(len(offsets))
        frames = np.array([magazine.take() for _ in range(len(offsets))], dtype=np.int64)
        books.pin(frames)
        books.loaded(len(frames))

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

    def _halt(self, vm: Vm, why: str) -> None:
        """The guest does not come back.  The caller holds its lock."""
        if vm.block is not None:
            block, vm.block = vm.block, None
            self._guests.free_copy(block)
        vm.follow(Trigger.POWER_OFF, f"not resumed: {why}")

    async def _go_on(self, vm: Vm, block: VmBlock, member: _Member) -> None:
        """Have one guest live on; what goes wrong here is that guest's affair."""
        life, state = member.saved.life, member.snapshot.state
        try:
            async with self._guests.changing(vm):
                if vm.block is not block:
                    return                          # somebody has ended it
                if life is not None:
                    life.give_to(vm)
                if life is not None and life.paused:
                    vm.parked = state
                    vm.follow(Trigger.PAUSE)
                    return
                await self._guests.launch(vm, state)
        except HostError as error:
            log.error("guest not resumed", extra={"vm": vm.name, "why": str(error)})


def _why(error: Exception) -> str:
    """What is told of it.  A mistake of ours, too, must not keep the daemon from starting for ever."""
    if not isinstance(error, HostError):
        log.error("suspended guests cannot be resumed", exc_info=error)
    return str(error)


def _unused(path: Path) -> Path:
    """A name with a number that nothing has."""
    names = (path.with_name(f"{path.name}-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def _clear(directory: Path, kept: Collection[str]) -> None:
    """Remove what is left of a set, all but the members that are `kept`, and what they need."""
    if not kept:
        shutil.rmtree(directory, ignore_errors=True)
        return
    for path in directory.glob("*" + SUFFIX):
        if path.name != PAGES and path.name.removesuffix(SUFFIX) not in kept:
            with suppress(OSError):
                path.unlink()
