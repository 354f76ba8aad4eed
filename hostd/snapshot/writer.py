# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshots as they are written: at once whole and on the disk, or not there at all.

Contents are told apart by their digests: what the base, or the snapshot itself, has already is referred to
and not written again.  Records go to the file in the order in which pages are added; header, index and the
rest follow when all are there.
"""

from __future__ import annotations

import os
from io import FileIO
from pathlib import Path
from struct import Struct

import numpy as np

from hostd import storage
from hostd.errors import Failed, Invalid
from hostd.newfile import NewFile
from hostd.snapshot.layout import (
    HEADER,
    ID_SIZE,
    INDEX,
    MAX_BASES,
    MAX_DATA,
    MAX_DEFINITION,
    MAX_MEMORY,
    MAX_PAGES,
    MAX_STATE,
    PAGE_DIGEST,
    PIECE,
    Base,
    Header,
    Tail,
    digest,
    is_file_name,
    pack_bases,
    page_digest,
)
from hostd.snapshot.reader import Snapshot
from vmm.memory.pool import PAGE
from vmm.memory.records import UNIT, encode

#: pages that are copied out of the pool at a time: what is looked at twice is still in the cache
_CHUNK = 64
#: one row of layout.INDEX
_ROW = Struct(f"<III{PAGE_DIGEST}s")


class SnapshotWriter:
    """A snapshot on its way to `path`: add pages, then `finish`; to leave the `with` without it leaves
    nothing behind.  Raises Conflict if there is something of that name: nothing is replaced.

    `memory_bytes` bounds the page numbers.  With `base` only what neither it nor its own bases have is
    written.  For one thread at a time.  Everything that writes raises Failed for what the disk refuses;
    arguments that make no snapshot raise Invalid where a user may have chosen them, else ValueError.
    """

    def __init__(self, path: Path, memory_bytes: int, *, state: bytes = b"", definition: bytes = b"",
                 base: Snapshot | None = None) -> None:
        for what, size, most in (("memory", memory_bytes, MAX_MEMORY), ("state", len(state), MAX_STATE),
                                 ("definition", len(definition), MAX_DEFINITION)):
            if size > most:
                raise Invalid(f"a snapshot with {what} of {size} bytes: at most {most} are possible")
        if memory_bytes % PAGE:
            raise ValueError(f"memory of {memory_bytes} bytes is not a whole number of pages")
        self.path = path
        self.memory_bytes = memory_bytes
        self.id = os.urandom(ID_SIZE)
        self._state, self._definition = state, definition
        #: files that have pages, by number: at 0 this one
        self._files = [Base(path.name, self.id)]
        self._base_files: dict[int, Snapshot] = {}
        # Invariant: a page costs little more than its row, as there may be as many as the host has frames
        #: where contents are, by digest: number of the file << 32 | offset in units
        self._known: dict[bytes, int] = {}
        #: rows of layout.INDEX, as they come
        self._rows = bytearray()
        self._referred: list[np.ndarray] = []
        if base is not None:
            self._learn(base)
        self._file = NewFile(path)
        self._data = _Data(path, self._file.file)

    def __enter__(self) -> SnapshotWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    # --- bases

    def add_base(self, base: Snapshot) -> int:
        """A file that `refer` may name, by the number returned.  Raises Invalid for one that cannot be a
        base.  In the end only bases that hold pages are named in the file.
        """
        number = self._number(Base(base.path.name, base.id))
        self._base_files[number] = base
        return number

    def _number(self, base: Base) -> int:
        for number, file in enumerate(self._files):
            if file.id == base.id:
                return number
        if base.name == self.path.name:
            raise Invalid(f"{self.path} would replace its own base: give the snapshot another name")
        if not is_file_name(base.name):
            raise Invalid(f"a snapshot cannot name {base.name!r} as its base: rename that file")
        if len(self._files) > MAX_BASES:
            raise Invalid(f"a snapshot can have {MAX_BASES} bases at most")
        self._files.append(base)
        return len(self._files) - 1

    def _learn(self, base: Snapshot) -> None:
        """Know all contents of `base`, which may be in bases of its own.

        What is in one base too many for this file is forgotten: it is written once more.
        """
        numbers = [self.add_base(base)]
        for further in base.bases[:MAX_BASES - 1]:
            numbers.append(self._number(further))
        rows = base.index[base.index["base"] < len(numbers)]
        digests = rows["digest"].tobytes()
        for i, (number, offset) in enumerate(zip(rows["base"].tolist(), rows["offset"].tolist())):
            self._known[digests[i * PAGE_DIGEST:(i + 1) * PAGE_DIGEST]] = numbers[number] << 32 | offset

    def refer(self, pages: np.ndarray, base: int, base_pages: np.ndarray) -> None:
        """`pages` of the guest have the contents of `base_pages` of the base of that number, one by one.

        Raises KeyError for base pages without contents or in a base of the base.
        """
        rows = self._base_files[base].rows(base_pages)
        if rows["base"].any():
            raise KeyError("a page of the base that is in a base of its own")
        self._check_pages(pages)
        rows["page"] = pages
        rows["base"] = base
        self._referred.append(rows)

    # --- pages

    def add_page(self, page: int, contents: memoryview) -> None:
        """One page with its 4096 bytes."""
        self.add_frames(np.array([page]), np.array([0]), contents)

    def add_frames(self, pages: np.ndarray, frames: np.ndarray, view: memoryview) -> None:
        """Guest pages whose contents are frames of `view` (a multiple of 4096 bytes): page pages[i] is frame
        frames[i].  Pages of zeroes may be among them; no page may be added twice.

        Each page is copied before it is looked at, so that one that is written meanwhile gets some state it
        had, and the file is right in any case.
        """
        self._check_pages(pages)
        words = np.frombuffer(view, dtype=np.uint64).reshape(-1, PAGE // 8)
        for first in range(0, len(pages), _CHUNK):
            chunk = words[frames[first:first + _CHUNK]]
            contents = memoryview(chunk).cast("B")
            numbers = pages[first:first + _CHUNK]
            for i in np.flatnonzero(chunk.any(axis=1)).tolist():
                self._add(int(numbers[i]), contents[i * PAGE:(i + 1) * PAGE])

    def _add(self, page: int, contents: memoryview) -> None:
        name = page_digest(contents)
        place = self._known.get(name)
        if place is None:
            place = self._known[name] = self._data.append(encode(contents))
        self._rows += _ROW.pack(page, place >> 32, place & 0xFFFFFFFF, name)

    def _check_pages(self, pages: np.ndarray) -> None:
        if len(pages) and not 0 <= pages.min() <= pages.max() < self.memory_bytes // PAGE:
            raise ValueError("a page that is not in the memory of the guest")

    # --- the end

    def finish(self) -> int:
        """Complete the file and give it its name, durably; its size.  Raises Conflict if another file has it
        by then."""
        index = self._index()
        used = [number for number in range(1, len(self._files)) if np.any(index["base"] == number)]
        renumbered = np.zeros(len(self._files), dtype=np.uint32)
        renumbered[used] = np.arange(1, len(used) + 1)
        index["base"] = renumbered[index["base"]]
        bases = tuple(self._files[number] for number in used)
        piece_digests = self._data.finish()
        tail = Tail(piece_digests, index, bases, self._state, self._definition).pack()
        header = Header(id=self.id, memory_bytes=self.memory_bytes, data_bytes=self._data.size,
                        pages=len(index), bases=len(bases), bases_bytes=len(pack_bases(bases)),
                        state_bytes=len(self._state), definition_bytes=len(self._definition),
                        tail_digest=digest(tail))
        self._data.complete(header.pack(), tail)
        self._file.commit()
        return header.file_bytes

    def _index(self) -> np.ndarray:
        added = np.frombuffer(self._rows, dtype=INDEX)
        index = np.concatenate([added, *self._referred])
        index = index[np.argsort(index["page"], kind="stable")]
        if np.any(index["page"][1:] == index["page"][:-1]):
            raise ValueError("a page was added twice")
        if len(index) > MAX_PAGES:
            raise Failed(f"a snapshot of {len(index)} pages: at most {MAX_PAGES} are possible")
        return index


class _Data:
    """The file's data as it grows, written and hashed a piece at a time."""

    def __init__(self, path: Path, file: FileIO) -> None:
        self._path = path
        self._file = file
        self._pending = bytearray()
        self._digests: list[bytes] = []
        self.size = 0
        # the header comes last: a file that was not finished does not even look like a snapshot
        file.seek(HEADER)

    def append(self, record: bytes) -> int:
        """Returns the offset of the record in the file, in units."""
        offset = (HEADER + self.size) // UNIT
        self.size += len(record)
        if self.size > MAX_DATA:
            raise Failed(f"{self._path.name} would have more than {MAX_DATA} bytes of pages")
        self._pending += record
        if len(self._pending) >= PIECE:
            self._put(PIECE)
        return offset

    def finish(self) -> bytes:
        """No more records; returns the digests of all pieces."""
        if self._pending:
            self._put(len(self._pending))
        return b"".join(self._digests)

    def complete(self, header: bytes, tail: bytes) -> None:
        """Write the rest, and see to it that all is on the disk."""
        with storage.told_plainly(self._path):
            self._write(tail)
            self._file.seek(0)
            self._write(header)
            os.fsync(self._file.fileno())

    def _put(self, size: int) -> None:
        with memoryview(self._pending) as pending:
            piece = pending[:size]
            self._digests.append(digest(piece))
            with storage.told_plainly(self._path):
                self._write(piece)
            piece.release()
        del self._pending[:size]

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view):]
