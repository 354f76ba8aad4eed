# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages on the wire: batches of contents, batches of digests, and bitmaps of pages.

    batch      u16 n, u8 coding of the full contents, u8 coding of the deltas, u32 bytes of full contents,
               n page numbers (u32, ascending), n kinds (u8), full contents, deltas
    digests    n page numbers (u32, ascending), n digests of 16 bytes
    bitmap     a bit for each page of the guest, lowest bit first, in a frame of zstd

Full contents are the 4096 bytes of each page of kind FULL, in the order of the pages; a delta is what has
changed in a page: its contents XOR those that were sent for it before.  Both are either as they are (coding
RAW) or one frame of zstd.  What comes from the other end is checked whole before any of it is used, and
nothing is decompressed beyond the length that the kinds of pages call for.
"""

from __future__ import annotations

import threading
from enum import IntEnum
from struct import Struct
from typing import NamedTuple

import numpy as np
import zstandard

from hostd.migration.messages import BATCH, DIGEST_ROW, DIGESTS
from hostd.migration.views import Kind
from hostd.migration.wire import ProtocolError
from hostd.snapshot.layout import PAGE_DIGEST, page_digest
from vmm.memory.pool import PAGE

#: fastest of zstd's regular levels: 7000 pages of programs take 55 ms and a third of their size; the levels
#: below it save 10 to 20 ms of that and send a tenth to half as much more
LEVEL = 1
#: contents remembered for deltas
REMEMBERED = 32 << 20
#: a page that was not sent in so many rounds is not remembered any more
_ROUNDS = 2

_HEADER = Struct("<HBBI")
_ROW = 4 + 1
_NOWHERE = -1


class PageKind(IntEnum):
    """How a page of a batch is sent."""

    FULL = 0     # its contents
    ZERO = 1     # zeroes, and nothing is sent
    DELTA = 2    # what changed in it
    ABSENT = 3   # never touched, or given back: it reads as zeroes


class Coding(IntEnum):
    """How contents are packed."""

    RAW = 0
    ZSTD = 1


class Counts(NamedTuple):
    """Pages, and the bytes they took, by kind."""

    pages: dict[Kind, int]
    bytes: dict[Kind, int]


def _counts(kinds: np.ndarray, full_bytes: int, delta_bytes: int) -> Counts:
    full = int(np.count_nonzero(kinds == PageKind.FULL))
    delta = int(np.count_nonzero(kinds == PageKind.DELTA))
    zero = len(kinds) - full - delta
    sizes: dict[Kind, int] = {"full": full_bytes + full * _ROW, "delta": delta_bytes + delta * _ROW,
                              "zero": zero * _ROW}
    return Counts({"full": full, "delta": delta, "zero": zero}, sizes)


class Batch(NamedTuple):
    """What came: pages (n, int64, ascending), their kinds (n, uint8), and (m, 4096) bytes, which are its
    reader's own, for those m of kind FULL or DELTA, in the order of the pages; and how many pages and bytes
    of it are of each kind."""

    pages: np.ndarray
    kinds: np.ndarray
    contents: np.ndarray
    counts: Counts


class Encoded(NamedTuple):
    """A batch as it is sent."""

    payload: bytes
    counts: Counts


class _Contexts(threading.local):
    """zstd's contexts: worth keeping, and good for one thread at a time."""

    def __init__(self) -> None:
        self.compress = zstandard.ZstdCompressor(
            level=LEVEL, write_checksum=False, write_content_size=True, write_dict_id=False).compress
        self.decompress = zstandard.ZstdDecompressor().decompress


_contexts = _Contexts()


# --- batches of pages ---------------------------------------------------------------------------------------

class BatchEncoder:
    """Makes the batches that carry a guest of `pages` pages to one target, in whatever threads.

    A page that was sent twice is likely to be sent again: its contents are remembered, within `remembered`
    bytes, and from then on only what changed in it is sent.

    Invariant: what is remembered of a page is what the target has of it, if the batches of a round are all
    installed before those of the next one, no page is in two of a round, and none that was in a batch is told
    by its digest later.
    """

    def __init__(self, pages: int, *, delta: bool = True, zstd: bool = True,
                 remembered: int = REMEMBERED) -> None:
        slots = min(remembered // PAGE, pages) if delta else 0
        self._zstd = zstd
        self._lock = threading.Lock()
        self._sent = np.zeros(pages, dtype=bool)
        self._slot = np.full(pages, _NOWHERE, dtype=np.int32)
        self._contents = np.empty((slots, PAGE), dtype=np.uint8)
        #: of each slot: its page, and the round in which that was sent last
        self._page = np.full(slots, _NOWHERE, dtype=np.int64)
        self._used = np.zeros(slots, dtype=np.int64)
        self._round = 0

    def new_round(self) -> None:
        """Pages may be sent again from now on; those that were not for some rounds are forgotten."""
        with self._lock:
            self._round += 1
            self._forget(self._page[(self._page >= 0) & (self._used < self._round - _ROUNDS)])

    def encode(self, pages: np.ndarray, contents: np.ndarray, absent: np.ndarray | None = None) -> Encoded:
        """The batch of `pages` (n integers, ascending, at most BATCH), which contain `contents` ((n, 4096)
        bytes that nobody writes meanwhile); those of which `absent` (n, bool) is true are zeroes."""
        if not 0 < len(pages) <= BATCH or contents.shape != (len(pages), PAGE):
            raise ValueError(f"a batch of {len(pages)} pages with contents of shape {contents.shape}")
        kinds = np.where(np.bitwise_or.reduce(contents.view(np.uint64), axis=1) != 0,
                         np.uint8(PageKind.FULL), np.uint8(PageKind.ZERO))
        if absent is not None:
            kinds[absent] = PageKind.ABSENT
        with self._lock:
            deltas = self._recall(pages, contents, kinds)
        full_coding, full = self._pack(contents[kinds == PageKind.FULL])
        delta_coding, delta = self._pack(deltas)
        payload = b"".join((_HEADER.pack(len(pages), full_coding, delta_coding, len(full)),
                            pages.astype("<u4").tobytes(), kinds.tobytes(), full, delta))
        return Encoded(payload, _counts(kinds, len(full), len(delta)))

    def _recall(self, pages: np.ndarray, contents: np.ndarray, kinds: np.ndarray) -> np.ndarray:
        """Make deltas of those FULL pages that are remembered, and remember all that is worth it."""
        full = kinds == PageKind.FULL
        self._forget(pages[~full])
        slots = self._slot[pages]
        rows = np.flatnonzero(full & (slots >= 0))
        kinds[rows] = PageKind.DELTA
        deltas = contents[rows] ^ self._contents[slots[rows]]
        again = np.flatnonzero(full & (slots < 0) & self._sent[pages])
        free = np.flatnonzero(self._page < 0)[:len(again)]
        again = again[:len(free)]
        self._slot[pages[again]] = free
        self._page[free] = pages[again]
        rows = np.concatenate((rows, again))
        slots = self._slot[pages[rows]]
        self._contents[slots] = contents[rows]
        self._used[slots] = self._round
        self._sent[pages] = True
        return deltas

    def _forget(self, pages: np.ndarray) -> None:
        slots = self._slot[pages]
        self._page[slots[slots >= 0]] = _NOWHERE
        self._slot[pages] = _NOWHERE

    def _pack(self, contents: np.ndarray) -> tuple[Coding, bytes]:
        if self._zstd and len(contents):
            packed = _contexts.compress(contents.data)
            if len(packed) < contents.nbytes:
                return Coding.ZSTD, packed
        return Coding.RAW, contents.tobytes()


def decode_batch(payload: bytes, pages_of_guest: int, known: np.ndarray) -> Batch:
    """The batch in `payload`, for a guest of so many pages, of which `known` (bool, by page) came before.

    Takes its time.  Raises ProtocolError for anything but a batch that makes sense: deltas of pages that are
    not known do not.
    """
    if len(payload) < _HEADER.size:
        raise ProtocolError(f"a batch of pages of {len(payload)} bytes, which has no header")
    count, full_coding, delta_coding, full_bytes = _HEADER.unpack_from(payload)
    kinds_at = _HEADER.size + 4 * count
    full_at = kinds_at + count
    delta_at = full_at + full_bytes
    if not 0 < count <= BATCH or delta_at > len(payload):
        raise ProtocolError(f"a batch of {count} pages in {len(payload)} bytes")
    pages = _page_numbers(payload, _HEADER.size, count, pages_of_guest)
    kinds = np.frombuffer(payload, dtype=np.uint8, count=count, offset=kinds_at)
    if kinds.max() > max(PageKind):
        raise ProtocolError(f"a page of kind {kinds.max()}, which is none")
    full, delta = kinds == PageKind.FULL, kinds == PageKind.DELTA
    if not known[pages[delta]].all():
        raise ProtocolError("a change came of a page that was not sent before")
    view = memoryview(payload)
    filled = full | delta
    contents = np.empty((int(np.count_nonzero(filled)), PAGE), dtype=np.uint8)
    for which, coding, packed in ((full, full_coding, view[full_at:delta_at]),
                                  (delta, delta_coding, view[delta_at:])):
        at = which[filled]
        contents[at] = _unpack(packed, coding, int(np.count_nonzero(at)))
    return Batch(pages, kinds, contents, _counts(kinds, full_bytes, len(payload) - delta_at))


def _page_numbers(payload: bytes, offset: int, count: int, pages_of_guest: int) -> np.ndarray:
    pages = np.frombuffer(payload, dtype="<u4", count=count, offset=offset).astype(np.int64)
    if (pages[1:] <= pages[:-1]).any() or pages[-1] >= pages_of_guest:
        raise ProtocolError("pages came that do not ascend, or are not in the memory")
    return pages


def _unpack(packed: memoryview, coding: int, pages: int) -> np.ndarray:
    """(pages, 4096) bytes."""
    data: bytes | memoryview
    if coding == Coding.ZSTD and pages:
        data = _unzstd(packed, pages * PAGE)
    elif coding == Coding.RAW and len(packed) == pages * PAGE:
        data = packed
    else:
        raise ProtocolError(f"contents of {pages} pages came as {len(packed)} bytes in coding {coding}")
    return np.frombuffer(data, dtype=np.uint8).reshape(pages, PAGE)


def _unzstd(packed: memoryview, size: int) -> bytes:
    """Exactly `size` bytes.

    Invariant: no more than that is ever allocated: a frame which states another size is not begun with, and
    one that has more in it than it states ends with an error.
    """
    try:
        if zstandard.frame_content_size(packed) != size:
            raise ProtocolError(f"compressed contents came that are not {size} bytes")
        data = _contexts.decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ProtocolError(f"compressed contents came that cannot be decompressed: {error}") from None
    if len(data) != size:
        raise ProtocolError(f"compressed contents came that are {len(data)} bytes, not {size}")
    return data


# --- digests ------------------------------------------------------------------------------------------------

def encode_digests(pages: np.ndarray, contents: np.ndarray) -> bytes:
    """Digests (as in snapshots) of `contents`, (n, 4096) bytes of at most DIGESTS pages that ascend."""
    if not 0 < len(pages) <= DIGESTS or contents.shape != (len(pages), PAGE):
        raise ValueError(f"digests of {len(pages)} pages with contents of shape {contents.shape}")
    data = np.ascontiguousarray(contents).data.cast("B")
    digests = [page_digest(data[at:at + PAGE]) for at in range(0, len(data), PAGE)]
    return pages.astype("<u4").tobytes() + b"".join(digests)


def decode_digests(payload: bytes, pages_of_guest: int) -> tuple[np.ndarray, list[bytes]]:
    """Pages (n, int64, ascending) and the digest of each.  Raises ProtocolError."""
    count, rest = divmod(len(payload), DIGEST_ROW)
    if not 0 < count <= DIGESTS or rest:
        raise ProtocolError(f"digests of {len(payload)} bytes, which are of no number of pages")
    pages = _page_numbers(payload, 0, count, pages_of_guest)
    return pages, [payload[at:at + PAGE_DIGEST] for at in range(4 * count, len(payload), PAGE_DIGEST)]


# --- bitmaps ------------------------------------------------------------------------------------------------

def pack_bits(bits: np.ndarray) -> bytes:
    """Booleans as bits, lowest first: the bitmap of `Missing`."""
    return np.packbits(bits, bitorder="little").tobytes()


def unpack_bits(data: bytes, count: int) -> np.ndarray:
    """The `count` booleans that `pack_bits` was given; the session has checked the length of `data`."""
    return np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=count, bitorder="little").astype(bool)


def pack_bitmap(pages: np.ndarray, pages_of_guest: int) -> bytes:
    """A set of pages (integers) of a guest with so many."""
    bits = np.zeros(pages_of_guest, dtype=bool)
    bits[pages] = True
    return _contexts.compress(pack_bits(bits))


def unpack_bitmap(data: bytes, pages_of_guest: int) -> np.ndarray:
    """The pages (int64, ascending) that `pack_bitmap` was given.  Raises ProtocolError."""
    packed = _unzstd(memoryview(data), -(-pages_of_guest // 8))
    spare = -pages_of_guest % 8
    if spare and packed[-1] >> 8 - spare:
        raise ProtocolError("a bitmap came with pages that are not in the memory")
    return np.flatnonzero(unpack_bits(packed, pages_of_guest))
