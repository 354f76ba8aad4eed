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
from collections.abc import Sequence
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
from hostd.saving import PIECE, add_slots, check_wanted, framed, numbers_of, stored
from hostd.snapshot import Snapshot, SnapshotWriter
from hostd.vm import Vm

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

    async def suspend(self) -> set[str]:
        """Save all guests that run or are paused, for a daemon that is started later; the answer is their
        names, and they are paused then.  If it cannot be done they go on, and the log says why."""
        async with AsyncExitStack() as held:
            # Invariant: all locks are held until the set is written, so nobody touches the guests' memory
            members = []
            for vm in list(self._guests.vms.values()):
                try:
                    await held.enter_async_context(self._guests.changing(vm))
                    vm.check_whole()
                    paused = vm.state is State.PAUSED
                    if vm.state is State.RUNNING:
                        await self._guests.park(vm)
                except HostError as error:
                    log.info("guest not suspended", extra={"vm": vm.name, "why": str(error)})
                    continue
                if vm.state is State.PAUSED:
                    assert vm.block is not None
                    saved = encode_saved(SavedVm(definition=vm.definition, life=Life.of(vm, paused)))
                    members.append(_Member(vm, paused, vm.block, vm.parked, saved))
            if not members:
                return set()
            began = time.monotonic()
            try:
                await trio.to_thread.run_sync(self._write_set, members)
            except HostError as error:
                log.error("host not suspended", extra={"why": str(error)})
                for member in members:
                    if not member.paused:
                        await self._guests.unpark(member.vm)
                return set()
            log.info("host suspended", extra={"guests": len(members),
                                              "seconds": round(time.monotonic() - began, 3)})
            return {member.vm.name for member in members}

    def _write_set(self, members: Sequence[_Member]) -> None:
        partial, whole = self._directory / SUSPENDING, self._directory / SUSPENDED
        with storage.told_plainly(partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(mode=0o700)
        try:
            slots = _write_pages(partial / PAGES, [member.block for member in members])
            pages = Snapshot.open(partial / PAGES)
            try:
                def write(member: _Member) -> None:
                    _write_member(partial / f"{member.vm.name}{SUFFIX}", member, pages, slots)

                # most of the time the disk is waited for
                with ThreadPoolExecutor(_WRITERS) as writers:
                    for _ in writers.map(write, members):
                        check_wanted()
            finally:
                pages.close()
            with storage.told_plainly(whole):
                os.rename(partial, whole)
                storage.sync_directory(self._directory)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


class _Member(NamedTuple):
    """One guest of the set."""

    vm: Vm
    paused: bool
    block: VmBlock
    state: bytes
    saved: bytes


def _write_pages(path: Path, blocks: Sequence[VmBlock]) -> np.ndarray:
    """All that is in the memory of these guests: frames under their own numbers, and after the last frame the
    slots, which are the answer."""
    pool, fetch = blocks[0].pool, blocks[0].p2m.fetch
    frames, slots = _everything(blocks)
    with SnapshotWriter(path, (pool.frames + len(slots)) * PAGE) as writer:
        for start in range(0, len(frames), PIECE):
            check_wanted()
            piece = frames[start:start + PIECE]
            writer.add_frames(piece, piece, pool.view)
        add_slots(writer, pool.frames + np.arange(len(slots)), slots, fetch)
        writer.finish()
    return slots


def _everything(blocks: Sequence[VmBlock]) -> tuple[np.ndarray, np.ndarray]:
    """Frames and slots of the guests, each once."""
    leaves = [block.leaf() for block in blocks]
    frames = np.concatenate([numbers_of(leaf[framed(leaf)]) for leaf in leaves])
    slots = np.concatenate([numbers_of(leaf[stored(leaf)]) for leaf in leaves])
    return np.unique(frames).astype(np.int64), np.unique(slots)


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
