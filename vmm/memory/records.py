# SPDX-License-Identifier: GPL-2.0-or-later
"""A page in a file: one page of guest memory as a record, and the files records are read from.

    bytes 0-3    CRC-32 (zlib's) of all that follows, the padding included
    bytes 4-5    length of the payload, little-endian as the checksum is
    byte  6      the coding of the payload
    byte  7      zero
    bytes 8...   payload, then zeroes up to a multiple of 64 bytes

A record has no place for its own address: a file's owner knows where in it each record begins, in units of
64 bytes, and nothing in a record can lead to reading more than `MAX_RECORD` bytes.  What a file holds may be
anybody's work: a record that is not exactly as above is refused, never half decoded.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from struct import Struct
from zlib import crc32

import zstandard

from vmm.memory.errors import FrameError
from vmm.memory.pool import PAGE
from vmm.memory.stamp import Stamp

#: offsets in a file and sizes of records are counted in units of so many bytes
UNIT = 64
#: a page that cannot be compressed: header and contents, padded
MAX_RECORD = PAGE + UNIT
MAX_UNITS = MAX_RECORD // UNIT

_HEADER = Struct("<IHBB")
_AFTER_CRC = Struct("<HBB")
_WORD = 8
#: fastest of zstd's regular levels: what a page costs is far below what its disk does
_LEVEL = 1


class RecordError(ValueError):
    """The bytes are not a record of a page."""


class StoreError(FrameError):
    """A file cannot give a page that is said to be in it."""


class Coding(IntEnum):
    """How the payload of a record makes a page."""

    RAW = 0       # the 4096 bytes themselves
    ZSTD = 1      # one zstd frame (RFC 8878) that states its content size
    FILLED = 2    # eight bytes, repeated


class _Contexts(threading.local):
    """zstd's contexts: worth keeping, and good for one thread at a time."""

    def __init__(self) -> None:
        self.compress = zstandard.ZstdCompressor(
            level=_LEVEL, write_checksum=False, write_content_size=True, write_dict_id=False).compress
        self.decompress = zstandard.ZstdDecompressor(max_window_size=PAGE).decompress


_contexts = _Contexts()


def units(size: int) -> int:
    """How many units `size` bytes take."""
    return -(-size // UNIT)


def encode(page: memoryview | bytes) -> bytes:
    """The record of one page (4096 bytes), padded: a multiple of 64 and at most `MAX_RECORD` bytes."""
    page = bytes(page)
    if len(page) != PAGE:
        raise ValueError(f"a page of {len(page)} bytes: it must have {PAGE}")
    word = page[:_WORD]
    if page == word * (PAGE // _WORD):
        coding, payload = Coding.FILLED, word
    else:
        coding, payload = Coding.ZSTD, _contexts.compress(page)
        if units(_HEADER.size + len(payload)) >= MAX_UNITS:
            coding, payload = Coding.RAW, page
    rest = _AFTER_CRC.pack(len(payload), coding, 0) + payload
    rest += bytes(-(len(rest) + 4) % UNIT)
    return crc32(rest).to_bytes(4, "little") + rest


def decode_into(data: memoryview | bytes, out: memoryview) -> None:
    """Put the page whose record begins `data` into `out` (4096 bytes).  More may follow the record.

    Raises RecordError for anything but a record; `out` is then as it was.
    """
    if len(data) < UNIT:
        raise RecordError(f"{len(data)} bytes are left where a record has {UNIT} or more")
    crc, length, coding, zero = _HEADER.unpack_from(data)
    size = units(_HEADER.size + length) * UNIT
    if size > len(data):
        raise RecordError(f"{len(data)} bytes are left of a record of {size}")
    data = memoryview(data)
    if crc32(data[4:size]) != crc:
        raise RecordError("the checksum is wrong")
    payload = data[_HEADER.size:_HEADER.size + length]
    if zero or any(data[_HEADER.size + length:size]):
        raise RecordError("there is something where a record has zeroes")
    decoder = _DECODERS.get(coding)
    if decoder is None:
        raise RecordError(f"coding {coding} is none of 0 to {max(_DECODERS)}")
    out[:] = decoder(payload)


def _raw(payload: memoryview | bytes) -> memoryview | bytes:
    if len(payload) != PAGE:
        raise RecordError(f"a page of {len(payload)} bytes, not {PAGE}")
    return payload


def _filled(payload: memoryview) -> bytes:
    if len(payload) != _WORD:
        raise RecordError(f"a filling of {len(payload)} bytes, not {_WORD}")
    return bytes(payload) * (PAGE // _WORD)


def _unzstd(payload: memoryview) -> memoryview | bytes:
    # the frame's own word on its size decides how much is allocated: it is heard first
    try:
        if zstandard.frame_content_size(payload) != PAGE:
            raise RecordError(f"a compressed page that is not {PAGE} bytes long")
        page = _contexts.decompress(payload, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise RecordError(f"a compressed page that cannot be decompressed: {error}") from None
    return _raw(page)


_DECODERS: dict[int, Callable[[memoryview], memoryview | bytes]] = {
    Coding.RAW: _raw, Coding.ZSTD: _unzstd, Coding.FILLED: _filled}


class PageStore:
    """A file of records, open for reading.

    Made of a path, or of a descriptor, which is from then on this object's to close; `name` is what errors
    call it.  Several threads may read at a time.  Raises StoreError where the file cannot be opened.

    With a `stamp` the file is to stay as it was then: records have checksums, but if another file is copied
    over this one, each record that is found is a good one, of something else.
    """

    def __init__(self, source: Path | str | int, name: str = "", stamp: Stamp | None = None) -> None:
        self.stamp = stamp
        if isinstance(source, int):
            self.fd = source
            self.name = name or f"page store {source}"
        else:
            self.name = name or os.fspath(source)
            try:
                self.fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise StoreError(f"cannot open {self.name}: {error.strerror}") from None
        self._forgotten = weakref.finalize(self, os.close, self.fd)
        self._forgotten.atexit = False

    def copy(self) -> PageStore:
        """The same file, to be closed on its own.  Raises StoreError."""
        try:
            return PageStore(os.dup(self.fd), self.name, self.stamp)
        except OSError as error:
            raise StoreError(f"cannot open {self.name}: {error.strerror}") from None

    def read_into(self, offset_units: int, out: memoryview) -> None:
        """Put the page whose record is at `offset_units` times 64 bytes into `out` (4096 bytes).

        Raises StoreError, with `out` as it was, where there is no whole record, or the file was changed.
        """
        at = offset_units * UNIT
        try:
            data = os.pread(self.fd, MAX_RECORD, at)
            # Invariant: looked at after the read, so that whatever was read before a change is of before it
            if self.stamp is not None and Stamp.of(self.fd) != self.stamp:
                raise StoreError(f"{self.name} was changed while pages of a guest were in it")
            decode_into(data, out)
        except RecordError as error:
            raise StoreError(f"{self.name} holds no page at {at:#x}: {error}") from None
        except OSError as error:
            raise StoreError(f"cannot read {self.name} at {at:#x}: {error.strerror}") from None

    def close(self) -> None:
        """No more reads.  To close twice does no harm."""
        self._forgotten()
        self.fd = -1
