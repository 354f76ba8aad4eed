# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests into files: a snapshot of one that goes on.

A guest stands still only while its memory is copied by sharing; what goes into the file are the frames of the
copy, which nobody writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import trio

from hostd.copies import copy_guest
from hostd.errors import Failed, Invalid
from hostd.guests import Guests, Step
from hostd.inventory import SUFFIX
from hostd.memory import MachineMemory
from hostd.model import PAGE, SnapshotView
from hostd.newfile import check_free
from hostd.saved import SavedVm, encode_saved
from hostd.snapshot import Folder, Snapshot, SnapshotWriter
from hostd.vm import Vm
from vmm.memory.p2mbits import FRAME_MASK, KIND_MASK, KIND_SHIFT, STORED, Kind
from vmm.memory.pool import PAGE_SHIFT
from vmm.memory.records import StoreError

if TYPE_CHECKING:
    from vmm.memory.block import VmBlock

#: pages between two looks at whether somebody still wants this
PIECE = 512


class Saver:
    """`directory` is where snapshots go if nobody says otherwise."""

    def __init__(self, guests: Guests, memory: MachineMemory, directory: Path) -> None:
        self._guests = guests
        self._memory = memory
        self._directory = directory

    async def snapshot(self, vm: Vm, to: Path | None, base: Path | None, step: Step) -> SnapshotView:
        """Save the guest as it is at this moment, in a new file; what is in `base` is not written again.

        Raises Conflict for a file that exists or a VM without memory, Invalid and NotFound for a base that
        cannot be one, Failed where the file cannot be written; cancelled or failed, it leaves nothing.
        """
        path = self._place(vm, to, base)
        step("reading the base" if base else "copying memory", 0.0)
        folder = Folder(path.parent)
        basis: Snapshot | None = None
        try:
            if base is not None:
                basis = await trio.to_thread.run_sync(_verified, folder, base.name)
            async with self._guests.changing(vm):
                definition = vm.definition
                copy = await copy_guest(self._guests, self._memory, vm)
            try:
                saved = encode_saved(SavedVm.of(definition, copy.block))
                size = await trio.to_thread.run_sync(
                    _write_guest, path, copy.block, copy.state, saved, basis, step)
            finally:
                self._guests.free_copy(copy.block)
        finally:
            folder.close()
            if basis is not None:
                basis.close()
        return SnapshotView(file=str(path), size=size, pause_s=copy.pause_s)

    def _place(self, vm: Vm, to: Path | None, base: Path | None) -> Path:
        for path in filter(None, (to, base)):
            if not path.is_absolute():
                raise Invalid(f"{path} must be an absolute path: the daemon works in a directory of its own")
        if to is None:
            moment = time.time()
            name = time.strftime("%Y%m%dT%H%M%S", time.gmtime(moment)) + f".{int(moment * 1000) % 1000:03}"
            to = (base.parent if base else self._directory) / f"{vm.name}-{name}{SUFFIX}"
        if base is not None and base.parent != to.parent:
            raise Invalid(f"a snapshot lies beside its base: {to} is not in {base.parent}")
        check_free(to)
        return to


def _verified(folder: Folder, name: str) -> Snapshot:
    """A snapshot that can be a base, closed again if it cannot."""
    snapshot = folder.open(name)
    try:
        snapshot.verify()
    except BaseException:
        snapshot.close()
        raise
    return snapshot


def check_wanted() -> None:
    """Raise trio.Cancelled in this thread if its work was called off."""
    trio.from_thread.check_cancelled()


@contextmanager
def readable() -> Iterator[None]:
    """Say in the host's words that a page cannot be read from its file."""
    try:
        yield
    except StoreError as error:
        raise Failed(f"a page of its memory is lost: {error}") from None


def numbers_of(entries: np.ndarray) -> np.ndarray:
    return (entries & np.uint64(FRAME_MASK)) >> np.uint64(PAGE_SHIFT)


def framed(leaf: np.ndarray) -> np.ndarray:
    """Which pages have a frame."""
    kinds = (leaf & np.uint64(KIND_MASK)) >> np.uint64(KIND_SHIFT)
    return (kinds == np.uint64(Kind.PRIVATE)) | (kinds == np.uint64(Kind.SHARED))


def stored(leaf: np.ndarray) -> np.ndarray:
    """Which pages are in a file."""
    return ((leaf & np.uint64(STORED)) != 0) & ~framed(leaf)


def _write_guest(path: Path, block: VmBlock, state: bytes, definition: bytes, base: Snapshot | None,
                 step: Step) -> int:
    """A whole guest, whose memory nobody writes, into one file; its size."""
    leaf = block.leaf()
    pages, in_files = np.flatnonzero(framed(leaf)), np.flatnonzero(stored(leaf))
    frames = numbers_of(leaf[pages]).astype(np.int64)
    with SnapshotWriter(path, block.memory_bytes, state=state, definition=definition, base=base) as writer:
        for start in range(0, len(pages), PIECE):
            check_wanted()
            step("writing pages", 0.1 + 0.8 * start / len(pages))
            piece = slice(start, start + PIECE)
            writer.add_frames(pages[piece], frames[piece], block.pool.view)
        _add_slots(writer, in_files, numbers_of(leaf[in_files]), block.p2m.fetch)
        step("syncing", 0.95)
        check_wanted()
        return writer.finish()


def _add_slots(writer: SnapshotWriter, pages: np.ndarray, slots: np.ndarray,
               fetch: Callable[[int, memoryview], None]) -> None:
    """Pages that are in a file already."""
    contents = memoryview(bytearray(PAGE))
    for page, slot in zip(pages.tolist(), slots.tolist()):
        check_wanted()
        with readable():
            fetch(slot, contents)
        writer.add_page(page, contents)
