# SPDX-License-Identifier: GPL-2.0-or-later
"""The swap file: pages that were evicted from machine memory, compressed, in the state directory.

It holds records (vmm/memory/records.py) at slots (hostd/slots.py).  It is of use to one run of the daemon
only: what an earlier run has left is dropped, nothing is ever synced.  Whoever reads a slot must own it until
the page is read: a slot without owners may hold another page at any moment.

All methods may be called by several threads; compressing and writing happen outside of the lock.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hostd import storage
from hostd.errors import Failed
from hostd.slots import NoRoom, Slots
from vmm.memory.pool import PAGE
from vmm.memory.records import UNIT, PageStore, encode

#: slots have 32 bits
MAX_SWAP = UNIT << 32
#: the slot of every page of zeroes
ZERO = 0

_ZEROES = bytes(PAGE)
#: a hole shorter than this is not worth a system call
_WORTH_PUNCHING = 64 << 10
#: nor is giving back less than this
_WORTH_TRIMMING = 1 << 20

_KEEP_SIZE, _PUNCH_HOLE = 1, 2     # fallocate(2)
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class NotStored(Failed):
    """The swap file takes no pages now.  Nothing was written."""


class Full(NotStored):
    """It may not, or cannot, grow."""


@dataclass(frozen=True)
class SwapStats:
    """What is in the swap file."""

    #: records, and the guest pages that refer to one of them (clones share records)
    records: int
    pages: int
    #: size of all records
    stored_bytes: int
    #: length of the file, and what it takes on the disk
    file_bytes: int
    disk_bytes: int
    limit_bytes: int


class SwapFile:
    """A new, empty swap file at `path`, which never grows beyond `limit_bytes`.  Raises Failed."""

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self.path = path
        self.limit_bytes = min(limit_bytes, MAX_SWAP)
        self._slots = Slots(self.limit_bytes // UNIT)
        self._lock = threading.Lock()
        #: units freed since holes were punched last
        self._unpunched = 0
        #: units the file may have on the disk
        self._extent = 0
        with storage.told_plainly(path):
            # a new file, not the old one emptied: a process of an earlier run may still be reading that
            path.unlink(missing_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        #: for those who read in other processes, too
        self.store = PageStore(fd, name=str(path))

    @property
    def fd(self) -> int:
        """The file; -1 when it is closed."""
        return self.store.fd

    def write(self, pages: Sequence[memoryview]) -> list[int]:
        """Store pages of 4096 bytes; returns their slots, in order, with one owner each: `ZERO` for zeroes.

        Raises Full when the limit or the disk does not allow all of them, and NotStored when the disk refuses
        them otherwise; then none is stored.
        """
        records = [b"" if page == _ZEROES else encode(page) for page in map(bytes, pages)]
        kept = [record for record in records if record]
        with self._lock:
            try:
                starts = self._slots.alloc([len(record) // UNIT for record in kept])
            except NoRoom:
                raise Full(f"no room for {len(kept)} pages in {self.path}: "
                           f"its limit is {self.limit_bytes} bytes") from None
            self._extent = max(self._extent, self._slots.end)
        try:
            for start, data in _runs(starts, kept):
                self._put(start * UNIT, data)
        except BaseException:
            with self._lock:
                self._slots.free(starts)
                self._trim(at_once=True)
            raise
        slots = iter(starts)
        return [next(slots) if record else ZERO for record in records]

    def _put(self, at: int, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                done = os.pwrite(self.fd, view, at)
                view = view[done:]
                at += done
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise Full(f"no space left for {self.path.name} in {self.path.parent}") from None
            raise NotStored(f"cannot write {self.path}: {error.strerror}") from None

    def read_into(self, slot: int, out: memoryview) -> None:
        """Put the page of a slot into `out` (4096 bytes).  Raises StoreError."""
        if slot == ZERO:
            out[:] = _ZEROES
        else:
            self.store.read_into(slot, out)

    def retain(self, slots: Iterable[int]) -> None:
        """One more owner for each slot.  Raises KeyError for one that is not in use."""
        with self._lock:
            self._slots.retain(slot for slot in slots if slot != ZERO)

    def free(self, slots: Iterable[int]) -> None:
        """One owner less for each slot.  Raises KeyError for one that is not in use."""
        with self._lock:
            self._unpunched += self._slots.free(slot for slot in slots if slot != ZERO)
            self._trim()

    def _trim(self, at_once: bool = False) -> None:
        """Give back to the disk what is free, when it is worth while."""
        slots = self._slots
        if at_once or not len(slots) or (self._extent - slots.end) * UNIT >= _WORTH_TRIMMING:
            with suppress(OSError):
                os.ftruncate(self.fd, slots.end * UNIT if len(slots) else 0)
                self._extent = slots.end
        if self._unpunched * UNIT >= max(_WORTH_TRIMMING, slots.used * UNIT // 4):
            self._unpunched = 0
            for first, size in slots.holes.longer_than(_WORTH_PUNCHING // UNIT):
                # where the file system has no holes this fails, and the space waits for other pages
                _fallocate(self.fd, _KEEP_SIZE | _PUNCH_HOLE, first * UNIT, size * UNIT)

    def stats(self) -> SwapStats:
        """The figures of this moment."""
        with self._lock:
            disk = os.fstat(self.fd)
            return SwapStats(records=len(self._slots), pages=self._slots.owners,
                             stored_bytes=self._slots.used * UNIT, file_bytes=disk.st_size,
                             disk_bytes=disk.st_blocks * 512, limit_bytes=self.limit_bytes)

    def close(self) -> None:
        """Remove the file."""
        self.store.close()
        with suppress(OSError):
            self.path.unlink()


def _runs(starts: Sequence[int], records: Sequence[bytes]) -> Iterator[tuple[int, bytes]]:
    """Records that lie side by side, joined."""
    first = 0
    for i in range(1, len(starts) + 1):
        if i == len(starts) or starts[i] != starts[i - 1] + len(records[i - 1]) // UNIT:
            yield starts[first], b"".join(records[first:i])
            first = i
