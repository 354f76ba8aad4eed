# SPDX-License-Identifier: GPL-2.0-or-later
"""A split virtqueue as its device sees it (virtio 1.2, 2.7).

All three parts lie in the guest's memory, where the guest can write anything at any time.  So each look is
bounded by the queue's size, whatever breaks the rules is `Malformed`, and nothing read once is trusted later.

Requests are taken and finished strictly one after another, which makes one index of both: what the device
has used is what it has taken.

Invariant: a request is finished or still to be taken.  A call that raises has changed nothing that counts: it
can be repeated (OutOfFrames), or the driver has to begin anew (Malformed, BadAddress).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import ClassVar, NamedTuple, Protocol

from vmm.devices.saved import DWORD, FLAG, QWORD, WORD, Kinds, Saved, one_of

#: the most descriptors a queue can have here; the free page reporting of Linux asks for no fewer
MOST_DESCRIPTORS = 32
_POWERS = tuple(1 << bit for bit in range(MOST_DESCRIPTORS.bit_length()))

DESCRIPTOR_BYTES = 16
NEXT, WRITE, INDIRECT = 1, 2, 4
#: of the driver's area: the driver wants no interrupt for used buffers (2.7.7)
NO_INTERRUPT = 1
#: a chain may be this long in all (2.7.5)
MOST_BYTES = 1 << 32

_DESCRIPTOR = struct.Struct("<QIHH")
_USED = struct.Struct("<II")


class Malformed(Exception):
    """The driver broke the rules of its queue, or of its device."""


class GuestRam(Protocol):
    """Guest-physical memory.

    Raises OutOfFrames when nothing was done and the same is to be tried later, and BadAddress where no memory
    is; a write across pages may then have been done in part.
    """

    def read(self, gpa: int, n: int) -> bytes: ...

    def write(self, gpa: int, data: bytes) -> None: ...


class Segment(NamedTuple):
    """A piece of a buffer: any address, at most 2**32 bytes."""

    address: int
    length: int


class Chain(NamedTuple):
    """A request: what the device may read, and what it may write (of which it may read nothing)."""

    head: int
    readable: tuple[Segment, ...]
    writable: tuple[Segment, ...]

    def read(self, memory: GuestRam, offset: int, length: int) -> bytes:
        """`length` bytes of what is readable, from `offset`; fewer at its end."""
        return b"".join(memory.read(piece.address, piece.length)
                        for piece in _cut(self.readable, offset, length))

    def write(self, memory: GuestRam, data: bytes) -> None:
        """Put `data`, no longer than that, at the begin of what is writable."""
        done = 0
        for piece in _cut(self.writable, 0, len(data)):
            memory.write(piece.address, data[done:done + piece.length])
            done += piece.length


def total(segments: Iterable[Segment]) -> int:
    """Bytes in all of them."""
    return sum(piece.length for piece in segments)


def _cut(segments: Iterable[Segment], offset: int, length: int) -> Iterable[Segment]:
    """The segments of a part of a buffer."""
    for address, size in segments:
        if offset >= size:
            offset -= size
            continue
        use = min(size - offset, length)
        if not use:
            return
        yield Segment(address + offset, use)
        offset = 0
        length -= use


class Ring(Saved):
    """One virtqueue: where its parts are, and how far the device has come."""

    __slots__ = ("descriptors", "device", "done", "driver", "indirect", "position", "ready", "size")

    SAVED: ClassVar[Kinds] = {
        "size": one_of(0, *_POWERS), "ready": FLAG, "indirect": FLAG, "descriptors": QWORD, "driver": QWORD,
        "device": QWORD, "position": WORD, "done": DWORD,
    }

    def __init__(self) -> None:
        #: descriptors; 0 after the driver asked for a number that cannot be
        self.size = MOST_DESCRIPTORS
        self.ready = False
        #: indirect descriptors were negotiated
        self.indirect = False
        #: guest-physical addresses of the descriptor table, the available and the used ring
        self.descriptors = self.driver = self.device = 0
        #: index of the request that is next, modulo 2**16
        self.position = 0
        #: how much of that request is done already, in units of its device's
        self.done = 0

    def resize(self, size: int) -> None:
        """The driver says how many descriptors there are."""
        self.size = size if size in _POWERS else 0

    def enable(self, indirect: bool) -> None:
        """The driver has placed the queue.  Raises Malformed (2.7, 2.7.2)."""
        if not self.size:
            raise Malformed(f"a queue has 1, 2, 4 ... {MOST_DESCRIPTORS} descriptors")
        if self.descriptors % 16 or self.driver % 2 or self.device % 4:
            raise Malformed("a part of a queue that is not aligned")
        self.indirect, self.ready = indirect, True
        self.position = self.done = 0

    def next(self, memory: GuestRam) -> Chain | None:
        """The request to be served next, not taken yet; None if there is none now.

        Raises Malformed, BadAddress, OutOfFrames.
        """
        index = int.from_bytes(memory.read(self.driver + 2, 2), "little")
        ahead = index - self.position & 0xFFFF
        if not ahead:
            return None
        if ahead > self.size:
            raise Malformed(f"{ahead} requests are said to be in a queue of {self.size}")
        slot = self.driver + 4 + 2 * (self.position % self.size)
        return self._walk(memory, int.from_bytes(memory.read(slot, 2), "little"))

    def finish(self, memory: GuestRam, chain: Chain, written: int) -> bool:
        """`chain`, the next request, is done: give it back with `written` bytes in it, from its begin.

        The answer is whether the driver wants to be interrupted.  Raises BadAddress and OutOfFrames.
        """
        flags = int.from_bytes(memory.read(self.driver, 2), "little")
        following = self.position + 1 & 0xFFFF
        memory.write(self.device + 4 + 8 * (self.position % self.size), _USED.pack(chain.head, written))
        memory.write(self.device + 2, following.to_bytes(2, "little"))
        self.position, self.done = following, 0
        return not flags & NO_INTERRUPT

    def restored(self) -> None:
        """A queue without a size is not used."""
        self.ready = self.ready and self.size > 0

    def _walk(self, memory: GuestRam, head: int) -> Chain:
        """Follow a chain of descriptors; no further than the queue is long (2.7.5.3.1)."""
        readable: list[Segment] = []
        writable: list[Segment] = []
        table, count, entry = memory.read(self.descriptors, DESCRIPTOR_BYTES * self.size), self.size, head
        direct = True
        while True:
            if entry >= count:
                raise Malformed(f"descriptor {entry} of a table of {count}")
            address, length, flags, following = _DESCRIPTOR.unpack_from(table, DESCRIPTOR_BYTES * entry)
            if flags & INDIRECT:
                count = length // DESCRIPTOR_BYTES
                if not self.indirect or not direct or flags & NEXT or length % DESCRIPTOR_BYTES:
                    raise Malformed("an indirect table where none may be")
                if not 0 < count <= self.size:
                    raise Malformed(f"an indirect table of {count} descriptors")
                table, entry, direct = memory.read(address, length), 0, False
                continue
            if len(readable) + len(writable) == self.size:
                raise Malformed("a chain longer than its queue")
            if flags & WRITE:
                writable.append(Segment(address, length))
            elif writable:
                raise Malformed("what the device reads stands behind what it writes")
            else:
                readable.append(Segment(address, length))
            if not flags & NEXT:
                break
            entry = following
        if total(readable) + total(writable) > MOST_BYTES:
            raise Malformed("a chain of more than 4 GiB")
        return Chain(head, tuple(readable), tuple(writable))
