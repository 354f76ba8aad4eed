# SPDX-License-Identifier: GPL-2.0-or-later
"""The snapshot format, version 1, as bytes: header and tail (docs/SNAPSHOT.md describes them for others).

    header   128 bytes: magic, version, sizes, and the digests of the tail and of the header itself
    data     records of pages (vmm/memory/records.py)
    tail     a digest for each MiB of the data, the index, the table of bases, the state, the definition

All is known that is about to be read: the header says how long each part is, the parts fill the file exactly,
and no part is longer than its limit here.  A file that is anything else is refused with `Unusable`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

import numpy as np

from hostd.errors import Invalid
from vmm.memory.pool import PAGE
from vmm.memory.records import UNIT

MAGIC = b"\x89HSNAP\r\n"
VERSION = 1
#: the data begins behind the header, at a place that is a whole number of units
HEADER = 128
#: the data is checksummed in pieces of this size
PIECE = 1 << 20

#: the largest page number is below 2**28: enough for a file that holds the frames of a whole host
MAX_MEMORY = 1 << 40
MAX_PAGES = 1 << 24
#: offsets have 32 bits
MAX_DATA = (UNIT << 32) - HEADER
MAX_BASES = 64
MAX_STATE = 16 << 20
MAX_DEFINITION = 1 << 20

ID_SIZE = 16
PAGE_DIGEST = 16
DIGEST = 32

#: one row for each page with contents, ascending by page; base 0 is the file itself, offsets are in units
INDEX = np.dtype([("page", "<u4"), ("base", "<u4"), ("offset", "<u4"), ("digest", "u1", PAGE_DIGEST)])

_START = Struct("<8sI")
_FIELDS = Struct("<8sII16sQQIIII32s")
_MAX_NAME = 255


class Unusable(Invalid):
    """The file is not a whole snapshot of a version that is read here; the sentence says why."""


class Base(NamedTuple):
    """Another file that holds some of the pages: its file name, without a directory, and its id."""

    name: str
    id: bytes


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """What header, tail and data are checked with: SHA-256, which most processors compute themselves."""
    return hashlib.sha256(data).digest()


def page_digest(page: bytes | memoryview) -> bytes:
    """What tells contents of pages apart: the first 16 bytes of their SHA-256."""
    return hashlib.sha256(page).digest()[:PAGE_DIGEST]


def pieces(data_bytes: int) -> int:
    """How many pieces so much data has."""
    return -(-data_bytes // PIECE)


@dataclass(frozen=True)
class Header:
    """The fields of the header; sizes in bytes."""

    id: bytes
    memory_bytes: int
    data_bytes: int
    pages: int
    bases: int
    bases_bytes: int
    state_bytes: int
    definition_bytes: int
    tail_digest: bytes

    @property
    def tail_at(self) -> int:
        """Where the tail begins."""
        return HEADER + self.data_bytes

    @property
    def tail_bytes(self) -> int:
        """How long the tail is."""
        return (pieces(self.data_bytes) * DIGEST + self.pages * INDEX.itemsize
                + self.bases_bytes + self.state_bytes + self.definition_bytes)

    @property
    def file_bytes(self) -> int:
        """How long the file is."""
        return self.tail_at + self.tail_bytes

    def pack(self) -> bytes:
        """The header as the file has it."""
        fields = _FIELDS.pack(MAGIC, VERSION, self.bases, self.id, self.memory_bytes, self.data_bytes,
                              self.pages, self.bases_bytes, self.state_bytes, self.definition_bytes,
                              self.tail_digest)
        return fields + digest(fields)

    @staticmethod
    def unpack(data: bytes) -> Header:
        """The header that `data`, the first bytes of a file, is.  Raises Unusable."""
        if len(data) < _START.size or not data.startswith(MAGIC):
            raise Unusable("it does not begin as a snapshot does")
        version = _START.unpack_from(data)[1]
        if version != VERSION:
            raise Unusable(f"it has version {version} of the format, and this hostd reads version {VERSION}")
        if len(data) < HEADER:
            raise Unusable(f"it is torn: a header has {HEADER} bytes, and {len(data)} are there")
        if digest(data[:_FIELDS.size]) != data[_FIELDS.size:HEADER]:
            raise Unusable("it is damaged: the checksum of its header is wrong")
        (_, _, bases, id, memory_bytes, data_bytes, pages, bases_bytes, state_bytes, definition_bytes,
         tail_digest) = _FIELDS.unpack_from(data)
        header = Header(id, memory_bytes, data_bytes, pages, bases, bases_bytes, state_bytes,
                        definition_bytes, tail_digest)
        header._check()
        return header

    def _check(self) -> None:
        for what, value, most in (
                ("memory", self.memory_bytes, MAX_MEMORY), ("data", self.data_bytes, MAX_DATA),
                ("pages", self.pages, min(MAX_PAGES, self.memory_bytes // PAGE)),
                ("bases", self.bases, MAX_BASES), ("base table", self.bases_bytes, MAX_BASE_TABLE),
                ("state", self.state_bytes, MAX_STATE),
                ("definition", self.definition_bytes, MAX_DEFINITION)):
            if value > most:
                raise Unusable(f"its header is wrong: {what} of {value}, where at most {most} is possible")
        for what, value, whole in ("memory", self.memory_bytes, PAGE), ("data", self.data_bytes, UNIT):
            if value % whole:
                raise Unusable(f"its header is wrong: {what} of {value} bytes is not a multiple of {whole}")


@dataclass(frozen=True)
class Tail:
    """What stands behind the data."""

    piece_digests: bytes
    #: an array of `INDEX`
    index: np.ndarray
    bases: tuple[Base, ...]
    state: bytes
    definition: bytes

    def pack(self) -> bytes:
        """The tail as the file has it."""
        return b"".join((self.piece_digests, self.index.tobytes(), pack_bases(self.bases), self.state,
                         self.definition))

    @staticmethod
    def unpack(header: Header, data: bytes) -> Tail:
        """The tail that `data` is, which belongs to `header`.  Raises Unusable."""
        if len(data) != header.tail_bytes or digest(data) != header.tail_digest:
            raise Unusable("it is damaged: the checksum of its index and state is wrong")
        parts = []
        at = 0
        for size in (pieces(header.data_bytes) * DIGEST, header.pages * INDEX.itemsize, header.bases_bytes,
                     header.state_bytes, header.definition_bytes):
            parts.append(data[at:at + size])
            at += size
        digests, rows, bases, state, definition = parts
        index = np.frombuffer(rows, dtype=INDEX)
        _check_index(header, index)
        return Tail(digests, index, _unpack_bases(header, bases), state, definition)


def _check_index(header: Header, index: np.ndarray) -> None:
    page, base, offset = index["page"], index["base"], index["offset"]
    if len(page) and (np.any(page[1:] <= page[:-1]) or page[-1] >= header.memory_bytes // PAGE):
        raise Unusable("its index is wrong: pages that do not ascend, or are not in the memory")
    if np.any(base > header.bases):
        raise Unusable(f"its index is wrong: it names a base beyond the {header.bases} there are")
    own = offset[base == 0]
    if len(own) and (own.min() < HEADER // UNIT or own.max() >= header.tail_at // UNIT):
        raise Unusable("its index is wrong: a page outside of the data")


def pack_bases(bases: tuple[Base, ...]) -> bytes:
    """The table of bases: for each its id, the length of its name in a byte, and the name in UTF-8."""
    table = b""
    for base in bases:
        name = base.name.encode()
        table += base.id + bytes([len(name)]) + name
    return table


def _unpack_bases(header: Header, table: bytes) -> tuple[Base, ...]:
    bases = []
    at = 0
    for _ in range(header.bases):
        name_at = at + ID_SIZE + 1
        end = name_at + (table[name_at - 1] if name_at <= len(table) else 0)
        if not name_at < end <= len(table):
            raise Unusable("its table of bases is wrong: a base without a name")
        bases.append(Base(_file_name(table[name_at:end]), table[at:at + ID_SIZE]))
        at = end
    if at != len(table):
        raise Unusable("its table of bases is wrong: something follows the last base")
    ids = {base.id for base in bases}
    if len(ids) != len(bases) or header.id in ids:
        raise Unusable("its table of bases is wrong: a base is named twice, or is the file itself")
    return tuple(bases)


def _file_name(raw: bytes) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        name = ""
    if not is_file_name(name):
        raise Unusable(f"its table of bases is wrong: {raw!r} is not the name of a file")
    return name


def is_file_name(name: str) -> bool:
    """Whether a base can be named so: a name in the same directory, and nothing that leads out of it."""
    return (name.isprintable() and "/" not in name and name not in ("", ".", "..")
            and len(name.encode()) <= _MAX_NAME)


MAX_BASE_TABLE = MAX_BASES * (ID_SIZE + 1 + _MAX_NAME)
