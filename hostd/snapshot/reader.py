# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshots as they are read: opened, verified as a whole, and then read page by page.

`Snapshot.open` has read header and tail and found them right; `verify` reads the data, too, and after it
every bit of the file, and of its bases, is known to be as it was written.  A snapshot that was not verified
may be read nevertheless: each record has a checksum of its own.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np

from hostd.errors import Failed, NotFound
from hostd.snapshot.layout import DIGEST, HEADER, PIECE, Base, Header, Tail, Unusable, digest, pieces
from vmm.memory.pool import PAGE
from vmm.memory.records import PageStore, StoreError
from vmm.memory.stamp import Stamp

#: finds the open snapshot that a base's name and id mean.  Raises NotFound, Unusable, Failed
Resolver = Callable[[Base], "Snapshot"]

#: threads that hash: more gain nothing where the data comes from a disk
_HASHERS = 2


class Snapshot:
    """An open snapshot file."""

    def __init__(self, path: Path, store: PageStore, header: Header, tail: Tail) -> None:
        self.path = path
        self.id = header.id
        self.memory_bytes = header.memory_bytes
        self.data_bytes = header.data_bytes
        self.file_bytes = header.file_bytes
        self.state = tail.state
        self.definition = tail.definition
        self.bases = tail.bases
        #: an array of `layout.INDEX`: a row for each page that is not all zeroes, ascending by page
        self.index = tail.index
        #: where the records are: of a row of the index, in the store of the number `base`
        self.stores = [store]
        self._piece_digests = tail.piece_digests
        self._base_files: list[Snapshot] = []
        self._data_verified = False

    @classmethod
    def open(cls, path: Path, resolve: Resolver | None = None) -> Snapshot:
        """Open a snapshot, and through `resolve` its bases, which stay the resolver's to close.

        Without `resolve` the file is only good as a base.  Raises NotFound, Failed, and Unusable for a file
        that is not a whole snapshot or does not fit its bases.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except FileNotFoundError:
            raise NotFound(f"there is no snapshot {path}") from None
        except OSError as error:
            raise Failed(f"cannot open {path}: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise Unusable(f"{path} cannot be used: it is not a regular file")
        # before anything is read: what is verified later on is the file of this moment, or is found out
        store = PageStore(fd, str(path), Stamp.of(fd))
        try:
            snapshot = cls(path, store, *_read(fd))
            if resolve is not None:
                snapshot._attach(resolve)
        except Unusable as error:
            store.close()
            raise Unusable(f"{path} cannot be used: {error}") from None
        except OSError as error:
            store.close()
            raise Failed(f"cannot read {path}: {error.strerror}") from None
        except BaseException:
            store.close()
            raise
        return snapshot

    def _attach(self, resolve: Resolver) -> None:
        """Open the bases.  Invariant: every row of the index is of a record that is listed by the file that
        holds it, under the same digest, so no base need be asked for bases of its own."""
        for number, base in enumerate(self.bases, 1):
            try:
                file = resolve(base)
            except NotFound as error:
                raise Unusable(f"its base is missing: {error}") from None
            if file.id != base.id:
                raise Unusable(f"its base {base.name} has been replaced by another snapshot")
            rows = self.index[self.index["base"] == number]
            if not file.has_records(rows["offset"], rows["digest"]):
                raise Unusable(f"its index is wrong: a page that its base {base.name} does not have")
            self._base_files.append(file)
            self.stores.append(file.stores[0])

    @cached_property
    def own(self) -> np.ndarray:
        """Rows of the index, one for each record in this file, ascending by offset."""
        rows = self.index[self.index["base"] == 0]
        return rows[np.unique(rows["offset"], return_index=True)[1]]

    def has_records(self, offsets: np.ndarray, digests: np.ndarray) -> bool:
        """Whether at each of these offsets a record of this file begins whose page has that digest."""
        if not len(offsets):
            return True
        if not len(self.own):
            return False
        rows = self.own[np.minimum(np.searchsorted(self.own["offset"], offsets), len(self.own) - 1)]
        return np.array_equal(rows["offset"], offsets) and np.array_equal(rows["digest"], digests)

    def rows(self, pages: np.ndarray) -> np.ndarray:
        """The rows of the index of these pages.  Raises KeyError where one of them has no contents."""
        places = np.searchsorted(self.index["page"], pages)
        if len(places) and (places.max() >= len(self.index)
                            or not np.array_equal(self.index["page"][places], pages)):
            raise KeyError(f"a page that {self.path} does not have")
        return self.index[places]

    def read_into(self, page: int, out: memoryview) -> None:
        """Put a page into `out` (4096 bytes).  Raises StoreError where its record is not whole."""
        place = int(np.searchsorted(self.index["page"], page))
        if place == len(self.index) or self.index["page"][place] != page:
            out[:] = bytes(PAGE)
            return
        base = int(self.index["base"][place])
        if base >= len(self.stores):
            raise StoreError(f"page {page} of {self.path} is in its base {self.bases[base - 1].name}, "
                             f"which is not open")
        self.stores[base].read_into(int(self.index["offset"][place]), out)

    def verify(self) -> None:
        """Check all data, of this file and of its bases, each once.  Raises Unusable, Failed.

        The bases must be open: a snapshot opened without a resolver that has some raises ValueError.
        """
        if len(self._base_files) != len(self.bases):
            raise ValueError(f"{self.path} was opened without its bases")
        for file in self, *self._base_files:
            file._verify_data()

    def _verify_data(self) -> None:
        if self._data_verified:
            return
        with ThreadPoolExecutor(_HASHERS) as pool:
            try:
                wrong = [piece for found in pool.map(self._wrong_pieces, range(_HASHERS)) for piece in found]
            except OSError as error:
                raise Failed(f"cannot read {self.path}: {error.strerror}") from None
        if wrong:
            raise Unusable(f"{self.path} cannot be used: it is damaged in the MiB of pages that begins at "
                           f"{HEADER + min(wrong) * PIECE:#x}")
        self._data_verified = True

    def _wrong_pieces(self, first: int) -> list[int]:
        """Of every `_HASHERS`th piece from `first`, those that are not as written."""
        buffer = memoryview(bytearray(min(PIECE, self.data_bytes)))
        wrong = []
        for piece in range(first, pieces(self.data_bytes), _HASHERS):
            at = piece * PIECE
            part = buffer[:min(PIECE, self.data_bytes - at)]
            read = os.preadv(self.stores[0].fd, [part], HEADER + at)
            if read != len(part) or digest(part) != self._piece_digests[piece * DIGEST:(piece + 1) * DIGEST]:
                wrong.append(piece)
        return wrong

    def close(self) -> None:
        """Close this file, and none of its bases."""
        self.stores[0].close()


def _read(fd: int) -> tuple[Header, Tail]:
    """Header and tail of a file.  Raises Unusable, OSError."""
    header = Header.unpack(os.pread(fd, HEADER, 0))
    size = os.fstat(fd).st_size
    if size < header.file_bytes:
        raise Unusable(f"it is torn: {size} bytes of {header.file_bytes} are there")
    if size > header.file_bytes:
        raise Unusable(f"it is damaged: it has {size} bytes instead of {header.file_bytes}")
    return header, Tail.unpack(header, os.pread(fd, header.tail_bytes, header.tail_at))


class Folder:
    """The snapshots of a directory, as a resolver for bases that lie beside their snapshots: each is opened
    and verified once, however many refer to it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: dict[Base, Snapshot] = {}

    def __call__(self, base: Base) -> Snapshot:
        """The file of that name, as a base.  Raises NotFound, Unusable, Failed."""
        if base not in self._open:
            self._open[base] = Snapshot.open(self._directory / base.name)
        return self._open[base]

    def open(self, name: str) -> Snapshot:
        """A snapshot of the directory with its bases; the caller's to close."""
        return Snapshot.open(self._directory / name, self)

    def close(self) -> None:
        """Close the bases."""
        for snapshot in self._open.values():
            snapshot.close()
        self._open.clear()
