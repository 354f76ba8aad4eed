# SPDX-License-Identifier: GPL-2.0-or-later
"""How bytes travel between two hosts: a preamble, then frames (docs/MIGRATION.md).

    preamble   8 bytes magic, u16 highest version, u16 lowest version its sender speaks
    frame      u32 length of the payload, u8 kind, payload

All numbers are little-endian.  Nothing is believed of the other end: the length of a frame is compared with
what may come now before one byte of its payload is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from struct import Struct
from typing import NamedTuple

from hostd.errors import Failed

MAGIC = b"\x89HMIGR\r\n"
PREAMBLE = Struct("<8sHH")
HEADER = Struct("<IB")


class ProtocolError(Failed):
    """The other host said something it must not say; the sentence is about what."""


class Kind(IntEnum):
    """What a frame carries."""

    CONTROL = 0   # one message, MessagePack (hostd/migration/messages.py)
    PAGES = 1     # pages and their contents (hostd/migration/pages.py)
    DIGESTS = 2   # pages and the digests of their contents
    BLOB = 3      # a piece of a kernel or initrd


class Frame(NamedTuple):
    kind: Kind
    payload: bytes


class Spoken(NamedTuple):
    """Versions of the protocol, as a preamble states them."""

    highest: int
    lowest: int


def preamble(versions: Spoken) -> bytes:
    """What each end sends first."""
    return PREAMBLE.pack(MAGIC, *versions)


def frame(kind: Kind, payload: bytes) -> bytes:
    """The payload as it goes on the wire."""
    return HEADER.pack(len(payload), kind) + payload


class Splitter:
    """A preamble and frames out of a stream of bytes.

    Invariant: when `take` has given None, less is kept than the largest frame that may come now, since a
    frame's header is judged as soon as it is there.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Bytes that came."""
        self._buffer += data

    @property
    def kept(self) -> int:
        """How many bytes wait for the rest of what they belong to."""
        return len(self._buffer)

    def preamble(self) -> Spoken | None:
        """The preamble, or None if it has not come yet.  Raises ProtocolError for anything else."""
        start = bytes(self._buffer[:PREAMBLE.size])
        if start[:len(MAGIC)] != MAGIC[:len(start)]:
            raise ProtocolError("the other end does not speak the migration protocol")
        if len(start) < PREAMBLE.size:
            return None
        del self._buffer[:PREAMBLE.size]
        _, highest, lowest = PREAMBLE.unpack(start)
        if not 0 < lowest <= highest:
            raise ProtocolError(f"the other end speaks versions {lowest} to {highest}, which are none")
        return Spoken(highest, lowest)

    def take(self, limits: Mapping[Kind, int]) -> Frame | None:
        """The next frame, or None if it is not all there.

        `limits` says how long the payload of each kind of frame may be that can come now.  Raises
        ProtocolError for a frame of any other kind or length.
        """
        buffer = self._buffer
        if len(buffer) < HEADER.size:
            return None
        length, number = HEADER.unpack_from(buffer)
        kind = _KINDS.get(number)
        limit = None if kind is None else limits.get(kind)
        if kind is None or limit is None:
            raise ProtocolError(f"a frame of kind {number} came, which was not due")
        if length > limit:
            raise ProtocolError(f"a frame of {length} bytes came, where at most {limit} are allowed")
        end = HEADER.size + length
        if len(buffer) < end:
            return None
        payload = bytes(memoryview(buffer)[HEADER.size:end])
        del buffer[:end]
        return Frame(kind, payload)


_KINDS = {int(kind): kind for kind in Kind}
