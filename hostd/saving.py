# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests into files: a snapshot of one that goes on, and all of them when the host is suspended.

A guest stands still only while its memory is copied by sharing; what goes into the file are the frames of the
copy, which nobody writes.  Suspended guests stand still until the host is back, so theirs are saved as they
are: each frame once, in one file of pages whose page numbers are the frames', with a small snapshot for each
guest that refers to it.  Slots of pages that were in files already follow the frames, so that the set depends
on no other file.

Invariant: the set of a suspended host is in the directory `suspended` as a whole, or not at all: it is
written under another name, synced, and renamed.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import trio

from hostd import storage
from hostd.copies import copy_guest
from hostd.errors import Conflict, Failed, HostError, Invalid
from hostd.guests import Guests, Step
from hostd.inventory import SUFFIX, SUSPENDED, SUSPENDING
from hostd.lifecycle import State
from hostd.memory import MachineMemory
from hostd.model import PAGE, SnapshotView
from hostd.saved import Life, SavedVm, encode_saved
from hostd.snapshot import Folder, Snapshot, SnapshotWriter
from hostd.vm import Vm
from vmm.memory.p2mbits import FRAME_MASK, KIND_MASK, KIND_SHIFT, STORED, Kind
from vmm.memory.pool import PAGE_SHIFT
from vmm.memory.records import StoreError

if TYPE_CHECKING:
    from vmm.memory.block import VmBlock

log = logging.getLogger(__name__)

SNAPSHOTS = "snapshots"
#: the file of common pages; no VM has such a name
PAGES = "_pages.snap"

#: pages between two looks at whether somebody still wants this
_PIECE = 512
#: small snapshots that are written at a time
_WRITERS = 4


class Saver:
    """`directory` is the host's state directory."""

    def __init__(self, guests: Guests, memory: MachineMemory, directory: Path) -> None:
        self._guests = guests
        self._memory = memory
        self._directory = directory

    # --- one guest

    async def snapshot(self, vm: Vm, to: Path | None, base: Path | None, step: Step) -> SnapshotView:
        """Save the guest as it is at this moment, in a new file; what is in `base` is not written again.

        Raises Conflict for a file that exists or a VM without memory, Invalid and NotFound for a base that
        cannot be one, Failed where the disk is full; cancelled or failed, it leaves nothing.
        """
        path = self._place(vm, to, base)
        step("reading the base" if base else "copying memory", 0.0)
        folder = Folder(path.parent)
        basis: Snapshot | None = None
        try:
            if base is not None:
                basis = await trio.to_thread.run_sync(_verified, folder, base.name)
            async with self._guests.changing(vm):
                definition = encode_saved(SavedVm(definition=vm.definition))
                copy = await copy_guest(self._guests, self._memory, vm)
            try:
                await trio.to_thread.run_sync(
                    _write_guest, path, copy.block, copy.state, definition, basis, step)
            finally:
                self._guests.free_copy(copy.block)
        finally:
            folder.close()
            if basis is not None:
                basis.close()
        return SnapshotView(file=str(path), size=path.stat().st_size, pause_s=copy.pause_s)

    def _place(self, vm: Vm, to: Path | None, base: Path | None) -> Path:
        for path in filter(None, (to, base)):
            if not path.is_absolute():
                raise Invalid(f"{path} must be an absolute path: the daemon works in a directory of its own")
        if to is None:
            moment = time.time()
            name = time.strftime("%Y%m%dT%H%M%S", time.gmtime(moment)) + f".{int(moment * 1000) % 1000:03}"
            to = (base.parent if base else self._snapshots()) / f"{vm.name}-{name}{SUFFIX}"
        if base is not None and base.parent != to.parent:
            raise Invalid(f"a snapshot lies beside its base: {to} is not in {base.parent}")
        if to.exists():
            raise Conflict(f"{to} exists already: give the snapshot another name")
        return to

    def _snapshots(self) -> Path:
        directory = self._directory / SNAPSHOTS
        with storage.told_plainly(directory):
            directory.mkdir(mode=0o700, exist_ok=True)
        return directory

    # --- the host

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
                        _check_wanted()
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


def _verified(folder: Folder, name: str) -> Snapshot:
    """A snapshot that can be a base, closed again if it cannot."""
    snapshot = folder.open(name)
    try:
        snapshot.verify()
    except BaseException:
        snapshot.close()
        raise
    return snapshot


def _check_wanted() -> None:
    """Raise trio.Cancelled in this thread if its work was called off."""
    trio.from_thread.check_cancelled()


@contextmanager
def readable() -> Iterator[None]:
    """Say in the host's words that a page cannot be read from its file."""
    try:
        yield
    except StoreError as error:
        raise Failed(f"a page of its memory is lost: {error}") from None


def _numbers(entries: np.ndarray) -> np.ndarray:
    return (entries & np.uint64(FRAME_MASK)) >> np.uint64(PAGE_SHIFT)


def _framed(leaf: np.ndarray) -> np.ndarray:
    """Which pages have a frame."""
    kinds = (leaf & np.uint64(KIND_MASK)) >> np.uint64(KIND_SHIFT)
    return (kinds == np.uint64(Kind.PRIVATE)) | (kinds == np.uint64(Kind.SHARED))


def _stored(leaf: np.ndarray) -> np.ndarray:
    """Which pages are in a file."""
    return ((leaf & np.uint64(STORED)) != 0) & ~_framed(leaf)


def _write_guest(path: Path, block: VmBlock, state: bytes, definition: bytes, base: Snapshot | None,
                 step: Step) -> None:
    """A whole guest, whose memory nobody writes, into one file."""
    leaf = block.leaf()
    pages, stored = np.flatnonzero(_framed(leaf)), np.flatnonzero(_stored(leaf))
    frames = _numbers(leaf[pages]).astype(np.int64)
    with SnapshotWriter(path, block.memory_bytes, state=state, definition=definition, base=base) as writer:
        for start in range(0, len(pages), _PIECE):
            _check_wanted()
            step("writing pages", 0.1 + 0.8 * start / len(pages))
            piece = slice(start, start + _PIECE)
            writer.add_frames(pages[piece], frames[piece], block.pool.view)
        _add_slots(writer, stored, _numbers(leaf[stored]), block.p2m.fetch)
        step("syncing", 0.95)
        _check_wanted()
        writer.finish()


def _add_slots(writer: SnapshotWriter, pages: np.ndarray, slots: np.ndarray,
               fetch: Callable[[int, memoryview], None]) -> None:
    """Pages that are in a file already."""
    contents = memoryview(bytearray(PAGE))
    for page, slot in zip(pages.tolist(), slots.tolist()):
        _check_wanted()
        with readable():
            fetch(slot, contents)
        writer.add_page(page, contents)


def _write_pages(path: Path, blocks: Sequence[VmBlock]) -> np.ndarray:
    """All that is in the memory of these guests: frames under their own numbers, and after the last frame the
    slots, which are the answer."""
    pool, fetch = blocks[0].pool, blocks[0].p2m.fetch
    frames, slots = _everything(blocks)
    with SnapshotWriter(path, (pool.frames + len(slots)) * PAGE) as writer:
        for start in range(0, len(frames), _PIECE):
            _check_wanted()
            piece = frames[start:start + _PIECE]
            writer.add_frames(piece, piece, pool.view)
        _add_slots(writer, pool.frames + np.arange(len(slots)), slots, fetch)
        writer.finish()
    return slots


def _everything(blocks: Sequence[VmBlock]) -> tuple[np.ndarray, np.ndarray]:
    """Frames and slots of the guests, each once."""
    leaves = [block.leaf() for block in blocks]
    frames = np.concatenate([_numbers(leaf[_framed(leaf)]) for leaf in leaves])
    slots = np.concatenate([_numbers(leaf[_stored(leaf)]) for leaf in leaves])
    return np.unique(frames).astype(np.int64), np.unique(slots)


def _write_member(path: Path, member: _Member, pages: Snapshot, slots: np.ndarray) -> None:
    """One guest as references to the file of common pages."""
    block = member.block
    leaf = block.leaf()
    own = np.flatnonzero(_framed(leaf) | _stored(leaf))
    numbers = _numbers(leaf[own])
    sources = np.where(_framed(leaf[own]), numbers,
                       block.pool.frames + np.searchsorted(slots, numbers)).astype(np.int64)
    there = np.isin(sources, pages.index["page"])          # the others are full of zeroes
    with SnapshotWriter(path, block.memory_bytes, state=member.state,
                        definition=member.saved) as writer:
        writer.refer(own[there], writer.add_base(pages), sources[there])
        writer.finish()
