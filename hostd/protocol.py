# SPDX-License-Identifier: GPL-2.0-or-later
"""What the daemon and a worker say to each other.

Messages are tagged MessagePack maps, each preceded by its length (u32, little endian), on a Unix stream
socket the worker inherits.  A stream keeps order, and that order is the protocol: a guest is with a worker
from `Adopt` until the worker's `Stopped`, `Released` or `Refused`, and nothing about it is sent outside that
time.  `vm` is a *lease*, a name the daemon gives to one life of one VM ("web#17") and never uses again, so a
message about a past life of a VM cannot be mistaken for one about the present.
"""

from __future__ import annotations

import struct
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import msgspec

from hostd.model import TranslatorView
from vmm.memory.stamp import Stamp

LENGTH = struct.Struct("<I")
#: no message comes near this (a machine state is tens of KiB, console and input pieces are bounded)
MAX_MESSAGE = 16 << 20
#: the largest machine state a worker is handed; what else is in the message has room beside it
MAX_STATE = MAX_MESSAGE // 2
#: the largest piece of console input or output in one message
MAX_CHUNK = 64 << 10

Request = Literal["adopt", "release"]
Reclaiming = Literal["freeze", "thaw", "merge", "zeros", "store", "watch", "install"]
Logging = Literal["start", "collect", "stop"]
#: how a guest can end by itself
Ending = Literal["poweroff", "reset", "crashed", "exit"]


class Message(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The base of all messages."""


class Most(NamedTuple):
    """How many frames a guest may have; None: as many as there are."""

    #: pages of it that have one, for themselves or in common with others
    pages: int | None = None
    #: pages of it that have one for themselves
    own: int | None = None


class Store(msgspec.Struct, array_like=True, frozen=True):
    """A file with pages of a guest in it, and how to open it; no path: another host."""

    number: int
    path: str = ""
    #: what errors call it, and how it is to stay
    name: str = ""
    stamp: Stamp | None = None


# --- daemon to worker ---------------------------------------------------------------------------------------

class Adopt(Message, frozen=True):
    """Run this guest from `state` on; its block is at `base_frame` in the pool.  Answer: Adopted or
    Refused."""

    vm: str
    base_frame: int
    memory_bytes: int
    state: bytes
    #: 0: the guest was paused, and its clock goes on from where it stood; else it was running until this host
    #: monotonic time, and what passed since then has passed for it, too
    since_ns: int
    #: guests with the same number, not 0, share frames that have not changed since they were first shared
    snapshot: int
    weight: int
    cap: int
    #: where pages of the guest are that are not in its memory
    stores: list[Store] = []
    #: this worker had the guest last, and nobody has written to its memory since
    unchanged: bool = False
    #: its dirty log has been started, and goes on
    logging: bool = False
    ration: Most = Most()


class Release(Message, frozen=True):
    """Stop running this guest and forget it.  Answer: Released, or Refused if it is not here any more."""

    vm: str


class Input(Message, frozen=True):
    """Bytes typed at the guest's console."""

    vm: str
    data: bytes


class SetShare(Message, frozen=True):
    vm: str
    weight: int
    cap: int


class PowerButton(Message, frozen=True):
    """Press the ACPI power button."""

    vm: str


class Reclaim(Message, frozen=True):
    """Do something to pages of this guest for the host's sake (vmm/memory/reclaim.py).  The pages and what
    goes with them, frames or slots, are arrays of u64.  Answer: Reclaimed, or none if the guest has ended."""

    vm: str
    what: Reclaiming
    pages: bytes
    frames: bytes = b""
    slots: bytes = b""


class DirtyLog(Message, frozen=True):
    """Start, collect or stop the log of the pages of this guest that are written.  Answer: Dirty, or none if
    the guest has ended."""

    vm: str
    what: Logging


class SetBalloon(Message, frozen=True):
    """Ask the guest to give back so many pages in all; and, which wakes it, how its memory is doing.  Answer:
    BalloonView, at once by what it said before, and again when it has said how its memory is doing."""

    vm: str
    pages: int
    statistics: bool = False


class SetRation(Message, frozen=True):
    """The guest may have so many frames."""

    vm: str
    most: Most


class CloseStore(Message, frozen=True):
    """No guest needs anything from this file any more."""

    number: int


class ListTranslations(Message, frozen=True):
    """Show the code translated for this guest, around a linear address or anywhere.  Answer: Listing, or none
    if the guest has ended."""

    vm: str
    address: int | None


class WarmUp(Message, frozen=True):
    """A guest of the software monitor is about to come: have what translates its code ready."""


class Grant(Message, frozen=True):
    """Frames for the worker's magazine, as (first frame, count); [] when the pool is exhausted."""

    extents: list[tuple[int, int]]


class GiveBack(Message, frozen=True):
    """Memory is short: give back frames in stock that guests here will not need soon.  Answer: GivenBack, or
    none if there are no such frames."""


class Ping(Message, frozen=True):
    id: int
    #: if it is to count its frames: how many it was ever given
    given: int | None = None


class Quit(Message, frozen=True):
    """Stop everything and exit."""


# --- worker to daemon ---------------------------------------------------------------------------------------

class Hello(Message, frozen=True):
    """The first message: the silicon passed its self-test and is ready."""

    pid: int
    tsc_khz: int
    silicon: str


class Adopted(Message, frozen=True):
    vm: str


class Released(Message, frozen=True):
    """The guest is no longer here; `state` is its MachineState, captured at host monotonic time `at_ns`."""

    vm: str
    state: bytes
    at_ns: int


class Refused(Message, frozen=True):
    """The request about this guest was not carried out, and the guest is not here."""

    vm: str
    request: Request
    reason: str


class Stopped(Message, frozen=True):
    """The guest ended by itself and is no longer here.  `status` is the debug-exit port's."""

    vm: str
    why: Ending
    detail: str
    status: int | None


class Console(Message, frozen=True):
    """Bytes the guest wrote to its console."""

    vm: str
    data: bytes


class Listing(Message, frozen=True):
    """Translated code as text; `complete` if that is all of it.  `problem` is why there is none."""

    vm: str
    text: str
    complete: bool
    problem: str = ""


class NeedFrames(Message, frozen=True):
    """The magazine is low: `count` more frames are wanted."""

    count: int


class GivenBack(Message, frozen=True):
    """Frames that were in stock, as (first frame, count)."""

    extents: list[tuple[int, int]]


class AtLimit(Message, frozen=True):
    """The guest stands still: it wants a frame and has as many as it may (SetRation)."""

    vm: str


class Reported(Message, frozen=True):
    """What pages of this guest let go of: pages that had shared frames, private frames that were given back,
    and pages that need their slot no more."""

    vm: str
    dropped: list[int]
    freed: list[int]
    fetched: list[int]


class Reclaimed(Message, frozen=True):
    """The pages for which what was asked is done, and the frames that came of it (u64 arrays)."""

    vm: str
    pages: bytes
    frames: bytes


class Dirty(Message, frozen=True):
    """The pages that were written since the log was started or last collected, ascending (array of u64); none
    unless it was to be collected."""

    vm: str
    pages: bytes


class Wanted(Message, frozen=True):
    """This guest waits for pages that are at another host.  Said once for each until it is installed."""

    vm: str
    pages: list[int]


class BalloonView(Message, frozen=True):
    """How the memory of this guest is doing, as its driver says: pages it has given back, and its statistics
    by name (vmm/devices/virtio/balloon.py), if there are some; `driver`: there is one.  Said when it is asked
    for, and when the driver has come, gone or given statistics."""

    vm: str
    driver: bool
    pages: int
    statistics: dict[str, int]


class Pong(Message, frozen=True):
    """The worker is alive.  `wakeups` counts wake-up latencies by `hostd.scheduler`'s buckets, `wakeup_ns` is
    their sum; both, and what the translator did, since the worker started."""

    id: int
    wakeups: list[int]
    wakeup_ns: int
    translator: TranslatorView = TranslatorView()
    #: frames in stock and in its guests' own pages, if they were to be counted; and what the Ping said
    frames: int = 0
    given: int | None = None


ToWorker = (Adopt | Release | Input | SetShare | PowerButton | Reclaim | DirtyLog | SetBalloon
            | SetRation | CloseStore | ListTranslations | WarmUp | Grant | GiveBack | Ping | Quit)
ToDaemon = (Hello | Adopted | Released | Refused | Stopped | Console | Listing | NeedFrames | GivenBack
            | AtLimit | Reported | Reclaimed | Dirty | Wanted | BalloonView | Pong)

_encoder = msgspec.msgpack.Encoder()


class ProtocolError(Exception):
    """The other side sent something that is not a message."""


def encode(message: Message) -> bytes:
    """The message as it goes on the wire."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


Received = TypeVar("Received")


class Splitter(Generic[Received]):
    """Messages out of a stream of bytes: `Splitter[ToWorker](ToWorker)` reads what the daemon sent."""

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Received]:
        """All messages that `data` completes, in order.  Raises ProtocolError."""
        buffer = self._buffer
        buffer += data
        messages: list[Received] = []
        start, end = 0, len(buffer)
        while end - start >= LENGTH.size:
            (length,) = LENGTH.unpack_from(buffer, start)
            if length > MAX_MESSAGE:
                raise ProtocolError(f"a message of {length} bytes")
            body = start + LENGTH.size
            if end - body < length:
                break
            start = body + length
            try:
                messages.append(self._decoder.decode(bytes(buffer[body:start])))
            except (ValueError, RecursionError) as error:   # of msgspec, or of UTF-8
                raise ProtocolError(f"not a message: {error}") from None
        del buffer[:start]
        return messages
