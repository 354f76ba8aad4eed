# SPDX-License-Identifier: GPL-2.0-or-later
"""All guests into files, when the host is suspended.

Suspended guests stand still until the host is back, so their memory is saved as it is: each frame once, in
one file of pages whose page numbers are the frames', with a small snapshot for each guest that refers to it.
Slots of pages that were in files already follow the frames, so that the set depends on no other file.

Invariant: the set of a suspended host is in the directory `suspended` as a whole, or not at all: it is
written under another name, synced, and renamed.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import trio

from hostd import storage
from hostd.errors import HostError
from hostd.guests import Guests
from hostd.inventory import SUFFIX, SUSPENDED, SUSPENDING
from hostd.lifecycle import State
from hostd.model import PAGE
from hostd.saved import Life, SavedVm, encode_saved
from hostd.saving import PIECE, check_wanted, framed, numbers_of, stored
from hostd.snapshot import Snapshot, SnapshotWriter
from hostd.vm import Vm
from vmm.memory.records import StoreError

if TYPE_CHECKING:
    from vmm.memory.block import VmBlock

log = logging.getLogger(__name__)

#: the file of common pages; no VM has such a name
PAGES = "_pages.snap"

#: small snapshots that are written at a time
_WRITERS = 4


class Suspender:
    """`directory` is the host's state directory."""

    def __init__(self, guests: Guests, directory: Path) -> None:
        self._guests = guests
        self._directory = directory

    async def suspend(self, alive: Callable[[], None]) -> set[str]:
        """Save all guests that run or are paused, for a daemon that is started later; the answer is their
        names, and they are paused then.  A guest that cannot be saved goes on, and the log says why.
        `alive` is called, in any thread, as often as a step is done."""
        async with AsyncExitStack() as held:
            # Invariant: all locks are held until the set is written, so nobody touches the guests' memory
            parked = []
            for vm in list(self._guests.vms.values()):
                try:
                    await held.enter_async_context(self._guests.changing(vm))
                    vm.check_whole()
                    paused = vm.state is State.PAUSED
                    if vm.state is State.RUNNING:
                        await self._guests.park(vm)
                except HostError as error:
                    _tell(vm, str(error))
                    continue
                if vm.state is State.PAUSED:
                    parked.append((vm, paused))
            if not parked:
                return set()
            began = time.monotonic()
            try:
                members = [_member(vm, paused) for vm, paused in parked]
                lost = await trio.to_thread.run_sync(self._write_set, members, alive)
            except Exception as error:
                # a mistake of ours, too, must not keep the guests from being powered off instead
                log.error("host not suspended", extra={"why": str(error)},
                          exc_info=not isinstance(error, HostError))
                lost = {vm.name: f"the host is not suspended: {error}" for vm, _ in parked}
            for vm, paused in parked:
                if vm.name in lost:
                    await self._go_on(vm, paused, lost[vm.name])
            saved = {vm.name for vm, _ in parked} - lost.keys()
            if saved:
                log.info("host suspended", extra={"guests": len(saved),
                                                  "seconds": round(time.monotonic() - began, 3)})
            return saved

    async def _go_on(self, vm: Vm, paused: bool, why: str) -> None:
        """The guest is not saved."""
        _tell(vm, why)
        if not paused:
            try:
                await self._guests.unpark(vm)
            except HostError as error:
                log.error("guest does not go on", extra={"vm": vm.name, "why": str(error)})

    def _write_set(self, members: Sequence[_Member], alive: Callable[[], None]) -> dict[str, str]:
        """Write the set of all members whose memory can be read; why the others are not in it, by name.
        Nothing is there if there is none."""
        partial, whole = self._directory / SUSPENDING, self._directory / SUSPENDED
        with storage.told_plainly(partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(mode=0o700)
        try:
            slots, unreadable = _write_pages(partial / PAGES, [member.block for member in members], alive)
            lost = {member.vm.name: why for member in members if (why := _lost(member.block, unreadable))}
            if len(lost) < len(members):
                _write_members(partial, [member for member in members if member.vm.name not in lost], slots,
                               alive)
                _rename(partial, whole)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return lost


def _tell(vm: Vm, why: str) -> None:
    log.warning("guest not suspended", extra={"vm": vm.name, "why": why})


class _Member(NamedTuple):
    """One guest of the set."""

    vm: Vm
    block: VmBlock
    state: bytes
    saved: bytes


def _member(vm: Vm, paused: bool) -> _Member:
    """A parked guest; `paused`: by a user."""
    assert vm.block is not None
    return _Member(vm, vm.block, vm.parked,
                   encode_saved(SavedVm.of(vm.definition, vm.block, Life.of(vm, paused))))


def _write_pages(path: Path, blocks: Sequence[VmBlock],
                 alive: Callable[[], None]) -> tuple[np.ndarray, dict[int, str]]:
    """All that is in the memory of these guests: frames under their own numbers, and after the last frame the
    slots, which are the answer, with those that cannot be read, and why."""
    pool, fetch = blocks[0].pool, blocks[0].p2m.fetch
    frames, slots = _everything(blocks)
    unreadable: dict[int, str] = {}
    with SnapshotWriter(path, (pool.frames + len(slots)) * PAGE) as writer:
        for start in range(0, len(frames), PIECE):
            _check_wanted(alive)
            piece = frames[start:start + PIECE]
            writer.add_frames(piece, piece, pool.view)
        contents = memoryview(bytearray(PAGE))
        for page, slot in enumerate(slots.tolist(), pool.frames):
            _check_wanted(alive)
            try:
                fetch(slot, contents)
            except StoreError as error:
                unreadable[slot] = f"a page of its memory is lost: {error}"
            else:
                writer.add_page(page, contents)
        writer.finish()
    return slots, unreadable


def _check_wanted(alive: Callable[[], None]) -> None:
    check_wanted()
    alive()


def _everything(blocks: Sequence[VmBlock]) -> tuple[np.ndarray, np.ndarray]:
    """Frames and slots of the guests, each once."""
    leaves = [block.leaf() for block in blocks]
    frames = np.concatenate([numbers_of(leaf[framed(leaf)]) for leaf in leaves])
    slots = np.concatenate([_slots(block) for block in blocks])
    return np.unique(frames).astype(np.int64), np.unique(slots)


def _slots(block: VmBlock) -> np.ndarray:
    leaf = block.leaf()
    return numbers_of(leaf[stored(leaf)])


def _lost(block: VmBlock, unreadable: Mapping[int, str]) -> str | None:
    """Why the guest's memory is not whole, if it is not."""
    return next((unreadable[slot] for slot in _slots(block).tolist() if slot in unreadable), None)


def _write_members(directory: Path, members: Sequence[_Member], slots: np.ndarray,
                   alive: Callable[[], None]) -> None:
    pages = Snapshot.open(directory / PAGES)
    try:
        def write(member: _Member) -> None:
            _write_member(directory / f"{member.vm.name}{SUFFIX}", member, pages, slots)

        # most of the time the disk is waited for
        with ThreadPoolExecutor(_WRITERS) as writers:
            for _ in writers.map(write, members):
                _check_wanted(alive)
    finally:
        pages.close()


def _write_member(path: Path, member: _Member, pages: Snapshot, slots: np.ndarray) -> None:
    """One guest as references to the file of common pages."""
    block = member.block
    leaf = block.leaf()
    own = np.flatnonzero(framed(leaf) | stored(leaf))
    numbers = numbers_of(leaf[own])
    sources = np.where(framed(leaf[own]), numbers,
                       block.pool.frames + np.searchsorted(slots, numbers)).astype(np.int64)
    there = np.isin(sources, pages.index["page"])          # the others are full of zeroes
    with SnapshotWriter(path, block.memory_bytes, state=member.state,
                        definition=member.saved) as writer:
        writer.refer(own[there], writer.add_base(pages), sources[there])
        writer.finish()


def _rename(partial: Path, whole: Path) -> None:
    """Give the set its name, durably, or not at all."""
    with storage.told_plainly(whole):
        os.rename(partial, whole)
        try:
            storage.sync_directory(whole.parent)
        except BaseException:
            os.rename(whole, partial)
            raise
