# SPDX-License-Identifier: GPL-2.0-or-later
"""What two hosts say to each other about guests that move, and within which bounds.

S is the source, the host that connects; T is the target.  A control message is a tagged MessagePack array in
a frame of its own.  All bounds that concern one message alone are in the types here, so that a message which
was decoded is within them; when which message may come is in hostd/migration/order.py, and what it must
agree with in hostd/migration/rules.py.
"""

from __future__ import annotations

from struct import Struct
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from hostd.migration.wire import Frame, Kind, ProtocolError, frame
from hostd.model import MAX_MEMORY, MIN_MEMORY, Monitor, Sha256, VmName
from vmm.memory.pool import PAGE

#: of any guest
MAX_PAGES = MAX_MEMORY // PAGE
#: pages in one batch, and in one batch of digests
BATCH = 256
DIGESTS = 1024
#: batches of digests that may be without an answer at a time
WINDOW = 8
#: pages that may be wanted in one message
URGENT = 64
#: bytes in one piece of a blob, of console output and input
PIECE = 256 << 10
CHUNK = 64 << 10
MAX_STATE = 8 << 20
MAX_LIFE = 1 << 20
MAX_REASON = 1000
#: bytes of a bitmap of all pages a guest can have, in a frame of zstd
MAX_BITMAP = MAX_PAGES // 8 + 1024

_U32 = Meta(ge=0, lt=1 << 32)
Purpose = Literal["migrate", "join", "resume", "resolve", "console"]
Outcome = Literal["committed", "aborted", "running"]
Token = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
Software = Annotated[str, Meta(max_length=64, pattern=r"^[\x20-\x7e]*\Z")]
Capability = Annotated[str, Meta(min_length=1, max_length=32, pattern=r"^[a-z0-9-]+\Z")]
Capabilities = Annotated[list[Capability], Meta(max_length=64)]
#: one sentence, printed at the other end: no control characters
Reason = Annotated[str, Meta(max_length=MAX_REASON, pattern=r"^[^\x00-\x1f\x7f-\x9f]*\Z")]
Count = Annotated[int, Meta(ge=0, le=MAX_PAGES)]
PageNumber = Annotated[int, Meta(ge=0, lt=MAX_PAGES)]
Round = Annotated[int, Meta(ge=1, lt=1 << 32)]
Connections = Annotated[int, Meta(ge=1, le=16)]
Word = Annotated[int, _U32]
#: leaf, subleaf, and of EAX, EBX, ECX, EDX the bits that are features
Leaf = tuple[Word, Word, Word, Word, Word, Word]
Blob = tuple[Sha256, Annotated[int, Meta(ge=0, le=1 << 36)]]
Blobs = Annotated[list[Blob], Meta(max_length=16)]
Bitmap = Annotated[bytes, Meta(max_length=MAX_BITMAP)]
Nanoseconds = Annotated[int, Meta(ge=0, lt=1 << 62)]
Position = Annotated[int, Meta(ge=0, lt=1 << 62)]
Chunk = Annotated[bytes, Meta(max_length=CHUNK)]


class Message(msgspec.Struct, tag=True, array_like=True, frozen=True, forbid_unknown_fields=True):
    """The base of all control messages."""


class About(Message, frozen=True):
    """The base of those about one migration, which its token names."""

    token: Token


# --- the beginning, the same in every version ---------------------------------------------------------------

class Hello(Message, frozen=True):
    """S: what the connection is for.  Answer: Welcome, or Refuse."""

    purpose: Purpose
    software: Software
    capabilities: Capabilities


class Welcome(Message, frozen=True):
    """T: the capabilities it has, too; those that both named are in force."""

    software: Software
    capabilities: Capabilities


class Refuse(Message, frozen=True):
    """T: no, and nothing has happened here.  The end of the connection."""

    reason: Reason


# --- migrate: an offer, and blobs that the target lacks -----------------------------------------------------

class Offer(About, frozen=True):
    """S: a guest.  Answer: Accept, or Refuse.

    `definition` and `image` (what the definition's image is, None without one) are JSON of hostd.model.
    """

    name: VmName
    definition: Annotated[bytes, Meta(max_length=64 << 10)]
    memory_bytes: Annotated[int, Meta(ge=MIN_MEMORY, le=MAX_MEMORY, multiple_of=PAGE)]
    monitor: Monitor
    state_version: Annotated[int, _U32]
    #: the features that the guest was shown
    cpu: Annotated[list[Leaf], Meta(max_length=64)]
    tsc_khz: Annotated[int, Meta(ge=1, lt=1 << 32)]
    resident_pages: Count
    blobs: Blobs
    image: Annotated[bytes, Meta(max_length=64 << 10)] | None = None
    connections: Connections = 1
    #: guests here that were booted from the same files, and are likely to follow
    siblings: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    #: only the answer is of interest
    dry_run: bool = False


class Accept(About, frozen=True):
    """T: the guest may come.  `dedup`: send digests first; `connections`: so many are enough."""

    missing_blobs: Annotated[list[Sha256], Meta(max_length=16)] = []
    dedup: bool = False
    connections: Connections = 1


class Join(About, frozen=True):
    """S: a further connection for the memory of an accepted guest, the first one is 1.  Answer: Joined, or
    Refuse."""

    index: Annotated[int, Meta(ge=1, le=15)]


class Joined(About, frozen=True):
    """T: this connection may carry memory."""


# --- migrate and join: rounds -------------------------------------------------------------------------------

class Missing(Message, frozen=True):
    """T: of the digests with this number, a bit for each page whose contents it does not have (lowest bit
    first); it has installed the others."""

    seq: Word
    bitmap: Annotated[bytes, Meta(max_length=DIGESTS // 8)]


class RoundEnd(Message, frozen=True):
    """S: the round is over on this connection; rounds are counted from 1.  Answer: RoundDone."""

    round: Round


class RoundDone(Message, frozen=True):
    """T: the round is over on all connections, and all that was sent is installed."""

    round: Round


# --- migrate: handing over ----------------------------------------------------------------------------------

class Final(Message, frozen=True):
    """S: the guest has stopped; this is all of it beside its memory.  Answer: Ready, or Aborted.

    `state` is a machine state (vmm/state.py), `life` a hostd.saved.SavedVm.  With post-copy `pages_left` are
    those that come later, and `left` says which; `ballooned` are those the guest has given back
    (hostd.migration.pages.pack_bitmap).
    """

    state: Annotated[bytes, Meta(min_length=1, max_length=MAX_STATE)]
    life: Annotated[bytes, Meta(max_length=MAX_LIFE)]
    paused: bool
    pages_left: Count = 0
    left: Bitmap = b""
    #: those the guest has given back to its host (a bitmap, too)
    ballooned: Bitmap = b""


class Ready(About, frozen=True):
    """T: it has all it needs to run the guest, and waits for the word."""


class Commit(About, frozen=True):
    """S: the guest is yours.  `elapsed_ns`: how long it has stood still; `typed`: at its console meanwhile;
    `held_ns`: since Ready came, the rest of the time since it was said is the way there and back.  Answer:
    Committed, or Aborted."""

    elapsed_ns: Nanoseconds
    typed: Annotated[bytes, Meta(max_length=2048)] = b""
    held_ns: Nanoseconds = 0


class Committed(About, frozen=True):
    """T: the guest is mine, and that is on the disk."""


class Aborted(About, frozen=True):
    """T: the guest will not run here; all that came of it is dropped.  The end of the connection."""

    reason: Reason


class Cancel(Message, frozen=True):
    """S: forget the guest that was offered.  Not after Commit.  The end of the connection."""

    reason: Reason


class Forget(About, frozen=True):
    """S: the outcome is known here; no record of it is needed.  The end of the connection."""


# --- post-copy ----------------------------------------------------------------------------------------------

class Want(Message, frozen=True):
    """T: pages the guest is waiting for, ascending."""

    pages: Annotated[list[PageNumber], Meta(min_length=1, max_length=URGENT)]


class Complete(About, frozen=True):
    """T: it has all of the guest's pages."""


class Resume(About, frozen=True):
    """S: go on with a post-copy whose connection broke.  Answer: Resumed, or Refuse."""


class Resumed(About, frozen=True):
    """T: the pages that it lacks (hostd.migration.pages.pack_bitmap)."""

    left: Bitmap


# --- resolve ------------------------------------------------------------------------------------------------

class Resolve(About, frozen=True):
    """S: whose is the guest?  Answer: Resolved."""


class Resolved(About, frozen=True):
    """T: "committed": mine; "aborted": never mine by this token, whatever still arrives; "running": the
    question is still open, ask again."""

    outcome: Outcome


# --- console ------------------------------------------------------------------------------------------------

class Attach(Message, frozen=True):
    """S: the console of a guest, from a position on (None: from its present boot on)."""

    name: VmName
    since: Position | None = None


class ConsoleData(Message, frozen=True):
    """T: what the guest wrote, and the position of its first byte."""

    position: Position
    data: Chunk


class ConsoleInput(Message, frozen=True):
    """S: what was typed."""

    data: Chunk


class Bye(Message, frozen=True):
    """Either: that was all.  `come_back`: the guest is moving; ask again for where it went."""

    reason: Reason
    come_back: bool = False


Control = (Hello | Welcome | Refuse | Offer | Accept | Join | Joined | Missing | RoundEnd | RoundDone | Final
           | Ready | Commit | Committed | Aborted | Cancel | Forget | Want | Complete | Resume | Resumed
           | Resolve | Resolved | Attach | ConsoleData | ConsoleInput | Bye)


# --- binary frames ------------------------------------------------------------------------------------------

class Pages(NamedTuple):
    """S: a batch of pages, as hostd.migration.pages.decode_batch reads it."""

    payload: bytes


class Digests(NamedTuple):
    """S: pages and digests, as hostd.migration.pages.decode_digests reads them.  Answer: Missing.  `seq`
    counts from 0 on each connection."""

    seq: int
    payload: bytes


class BlobPiece(NamedTuple):
    """S: bytes of a blob the target lacks; the pieces of one blob follow each other without gaps."""

    sha256: str
    offset: int
    data: bytes


Said = Control | Pages | Digests | BlobPiece

#: page number and digest
DIGEST_ROW = 4 + 16
_SEQ = Struct("<I")
_BLOB = Struct("<32sQ")

#: the longest payload of each message; of one that is not here `_SMALL`
_SMALL = 4 << 10
_LONGEST: dict[type, int] = {
    Offer: 256 << 10,
    Final: MAX_STATE + MAX_LIFE + 2 * MAX_BITMAP + _SMALL,
    Resumed: MAX_BITMAP + _SMALL,
    ConsoleData: CHUNK + _SMALL,
    ConsoleInput: CHUNK + _SMALL,
    Pages: BATCH * (PAGE + 5) + _SMALL,
    Digests: _SEQ.size + DIGESTS * DIGEST_ROW,
    BlobPiece: _BLOB.size + PIECE,
}
_FRAMES: dict[type, Kind] = {Pages: Kind.PAGES, Digests: Kind.DIGESTS, BlobPiece: Kind.BLOB}

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Control)


def limits_of(messages: frozenset[type]) -> dict[Kind, int]:
    """How long a frame of each kind may be when any of these messages may come, and none else."""
    limits: dict[Kind, int] = {}
    for message in messages:
        kind = _FRAMES.get(message, Kind.CONTROL)
        limits[kind] = max(limits.get(kind, 0), _LONGEST.get(message, _SMALL))
    return limits


def encode(message: Said) -> bytes:
    """The message as it goes on the wire.  Raises ProtocolError for one longer than it may be."""
    kind, payload = _ENCODERS.get(type(message), _encode_control)(message)
    most = _LONGEST.get(type(message), _SMALL)
    if len(payload) > most:
        raise ProtocolError(f"{type(message).__name__} has {len(payload)} bytes: at most {most} can be sent")
    return frame(kind, payload)


def _encode_control(message: Any) -> tuple[Kind, bytes]:
    return Kind.CONTROL, _encoder.encode(message)


_ENCODERS: dict[type, Any] = {
    Pages: lambda pages: (Kind.PAGES, pages.payload),
    Digests: lambda digests: (Kind.DIGESTS, _SEQ.pack(digests.seq) + digests.payload),
    BlobPiece: lambda piece: (Kind.BLOB, _BLOB.pack(bytes.fromhex(piece.sha256), piece.offset) + piece.data),
}


def decode(frame: Frame) -> Said:
    """The message in a frame; pages and digests are not looked into.  Raises ProtocolError."""
    return _DECODERS[frame.kind](frame.payload)


def _decode_control(payload: bytes) -> Control:
    try:
        return _decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a message: {reason_of(error)}") from None
    except RecursionError:
        raise ProtocolError("not a message: it is nested too deeply") from None


def _decode_digests(payload: bytes) -> Digests:
    if len(payload) <= _SEQ.size or (len(payload) - _SEQ.size) % DIGEST_ROW:
        raise ProtocolError(f"digests of {len(payload)} bytes, which are no whole number of pages")
    return Digests(_SEQ.unpack_from(payload)[0], payload[_SEQ.size:])


def _decode_blob(payload: bytes) -> BlobPiece:
    if len(payload) <= _BLOB.size:
        raise ProtocolError(f"a piece of a blob of {len(payload)} bytes, which holds nothing")
    sha256, offset = _BLOB.unpack_from(payload)
    return BlobPiece(sha256.hex(), offset, payload[_BLOB.size:])


_DECODERS: dict[Kind, Any] = {Kind.CONTROL: _decode_control, Kind.PAGES: Pages,
                              Kind.DIGESTS: _decode_digests, Kind.BLOB: _decode_blob}


def reason_of(error: BaseException | str) -> str:
    """What went wrong as a Reason that can be sent: one printable line, cut to its bound."""
    text = "".join(character if character.isprintable() else " " for character in str(error))
    return text[:MAX_REASON]
