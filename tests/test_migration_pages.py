# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages on the wire: what goes in comes out over many rounds, and nothing else is believed."""

from __future__ import annotations

import hashlib
from struct import Struct

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from hostd.migration.messages import BATCH, DIGESTS
from hostd.migration.pages import (
    BatchEncoder,
    Coding,
    PageKind,
    decode_batch,
    decode_digests,
    encode_digests,
    pack_bitmap,
    pack_bits,
    unpack_bitmap,
    unpack_bits,
)
from hostd.migration.wire import ProtocolError
from vmm.memory.pool import PAGE

HEADER = Struct("<HBBI")
PAGES = 48
EVERYTHING = np.ones(PAGES, dtype=bool)


def contents_of(seeds: list[int]) -> np.ndarray:
    """A page for each seed: of 0 zeroes, of an even one text, of an odd one noise."""
    rows = np.zeros((len(seeds), PAGE), dtype=np.uint8)
    for row, seed in zip(rows, seeds):
        if seed:
            row[:] = np.random.default_rng(seed).integers(0, 256 if seed & 1 else 2, PAGE, dtype=np.uint8)
    return rows


class Target:
    """Memory that batches are installed in, as a target does it."""

    def __init__(self) -> None:
        self.memory = np.full((PAGES, PAGE), 0xEE, dtype=np.uint8)
        self.known = np.zeros(PAGES, dtype=bool)

    def install(self, payload: bytes) -> np.ndarray:
        batch = decode_batch(payload, PAGES, self.known)
        filled = (batch.kinds == PageKind.FULL) | (batch.kinds == PageKind.DELTA)
        delta = batch.kinds[filled] == PageKind.DELTA
        pages = batch.pages[filled]
        batch.contents[delta] ^= self.memory[pages[delta]]
        self.memory[batch.pages[~filled]] = 0
        self.memory[pages] = batch.contents
        self.known[batch.pages] = True
        return batch.kinds


rounds = st.lists(st.dictionaries(st.integers(0, PAGES - 1), st.integers(0, 9), min_size=1), min_size=1,
                  max_size=8)


@settings(max_examples=60, deadline=None)
@given(rounds, st.booleans(), st.booleans(), st.integers(0, 20))
def test_memory_is_the_same_after_any_rounds(rounds: list[dict[int, int]], delta: bool, zstd: bool,
                                             remembered: int) -> None:
    encoder = BatchEncoder(PAGES, delta=delta, zstd=zstd, remembered=remembered * PAGE)
    source, target = np.full((PAGES, PAGE), 0xEE, dtype=np.uint8), Target()
    for written in rounds:
        encoder.new_round()
        pages = np.array(sorted(written))
        source[pages] = contents_of([written[page] for page in pages.tolist()])
        for half in np.array_split(pages, 2):
            if len(half):
                encoded = encoder.encode(half, source[half])
                target.install(encoded.payload)
                assert sum(encoded.counts.pages.values()) == len(half)
                assert sum(encoded.counts.bytes.values()) == len(encoded.payload) - HEADER.size
        assert np.array_equal(source, target.memory)


def test_pages_sent_again_and_again_are_sent_as_what_changed() -> None:
    encoder, target = BatchEncoder(PAGES), Target()
    pages = np.arange(4)
    contents = contents_of([1, 3, 5, 0])
    kinds = []
    for _ in range(4):
        contents[:3, 17] += 1
        encoder.new_round()
        kinds.append(target.install(encoder.encode(pages, contents).payload).tolist())
        assert np.array_equal(target.memory[:4], contents)
    full = [PageKind.FULL] * 3 + [PageKind.ZERO]
    delta = [PageKind.DELTA] * 3 + [PageKind.ZERO]
    assert kinds == [full, full, delta, delta]


def test_what_is_remembered_is_bounded_and_old_pages_make_room() -> None:
    encoder = BatchEncoder(PAGES, remembered=2 * PAGE)
    contents = contents_of([1, 3, 5])

    def delta(first: int) -> int:
        encoder.new_round()
        return encoder.encode(np.arange(first, first + 3), contents).counts.pages["delta"]

    assert [delta(0) for _ in range(4)] == [0, 0, 2, 2]
    assert [delta(10) for _ in range(6)] == [0, 0, 0, 2, 2, 2]


def test_absent_pages_are_told_from_zeroes_and_read_as_such() -> None:
    encoded = BatchEncoder(PAGES).encode(np.array([3, 9]), contents_of([0, 0]), np.array([False, True]))
    batch = decode_batch(encoded.payload, PAGES, ~EVERYTHING)
    assert batch.kinds.tolist() == [PageKind.ZERO, PageKind.ABSENT]
    assert batch.contents.shape == (0, PAGE)
    assert encoded.counts.pages == {"full": 0, "delta": 0, "zero": 2}


def test_noise_is_sent_as_it_is() -> None:
    encoded = BatchEncoder(PAGES).encode(np.array([0]), contents_of([1]))
    assert HEADER.unpack_from(encoded.payload)[1] == Coding.RAW
    assert len(encoded.payload) == HEADER.size + 5 + PAGE


@pytest.mark.parametrize("count", [0, BATCH + 1])
def test_a_batch_has_its_bounds(count: int) -> None:
    with pytest.raises(ValueError, match="a batch of"):
        BatchEncoder(1000).encode(np.arange(count), np.zeros((count, PAGE), dtype=np.uint8))


# --- what is not believed -----------------------------------------------------------------------------------

def batch_of(pages: list[int], kinds: list[int], full: bytes = b"", delta: bytes = b"",
             codings: tuple[int, int] = (0, 0), full_bytes: int | None = None,
             count: int | None = None) -> bytes:
    return (HEADER.pack(len(pages) if count is None else count, *codings,
                        len(full) if full_bytes is None else full_bytes)
            + np.array(pages, dtype="<u4").tobytes() + bytes(kinds) + full + delta)


SQUEEZE = zstandard.ZstdCompressor().compress
STREAMED = zstandard.ZstdCompressor(write_content_size=False).compress
PAGE_OF_A = b"a" * PAGE


@pytest.mark.parametrize(("payload", "why"), [
    (b"", "no header"),
    (b"\1\0\0", "no header"),
    (batch_of([], []), "batch of 0 pages"),
    (batch_of([], [], count=BATCH + 1), "batch of 257 pages"),
    (batch_of([1, 2], [1, 1], count=3), "batch of 3 pages"),
    (batch_of([1], [1], full_bytes=1), "batch of 1 pages"),
    (batch_of([2, 1], [1, 1]), "do not ascend"),
    (batch_of([2, 2], [1, 1]), "do not ascend"),
    (batch_of([PAGES], [1]), "not in the memory"),
    (batch_of([0xFFFFFFFF], [1]), "not in the memory"),
    (batch_of([1], [4]), "kind 4"),
    (batch_of([1], [2], delta=PAGE_OF_A), "not sent before"),
    (batch_of([1], [0]), "contents of 1 pages"),
    (batch_of([1], [0], PAGE_OF_A[:-1]), "contents of 1 pages"),
    (batch_of([1], [0], PAGE_OF_A + b"a"), "contents of 1 pages"),
    (batch_of([1], [1], PAGE_OF_A), "contents of 0 pages"),
    (batch_of([1], [1], b"", b"a"), "contents of 0 pages"),
    (batch_of([1], [1], SQUEEZE(b""), codings=(1, 0)), "contents of 0 pages"),
    (batch_of([1], [0], PAGE_OF_A, codings=(2, 0)), "coding 2"),
    (batch_of([1], [0], PAGE_OF_A, codings=(1, 0)), "cannot be decompressed"),
    (batch_of([1], [0], b"", codings=(1, 0)), "cannot be decompressed|that are not"),
    (batch_of([1], [0], SQUEEZE(PAGE_OF_A)[:-1], codings=(1, 0)), "cannot be decompressed"),
    (batch_of([1], [0], SQUEEZE(PAGE_OF_A) + b"a", codings=(1, 0)), "cannot be decompressed"),
    (batch_of([1], [0], SQUEEZE(PAGE_OF_A) * 2, codings=(1, 0)), "cannot be decompressed"),
    (batch_of([1], [0], SQUEEZE(PAGE_OF_A * 2), codings=(1, 0)), "not 4096 bytes"),
    (batch_of([1], [0], SQUEEZE(bytes(1 << 26)), codings=(1, 0)), "not 4096 bytes"),
    (batch_of([1], [0], STREAMED(PAGE_OF_A), codings=(1, 0)), "not 4096 bytes"),
])
def test_a_batch_that_makes_no_sense_is_refused(payload: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        decode_batch(payload, PAGES, ~EVERYTHING)


@pytest.mark.parametrize("stated", [PAGE, 1 << 50])
def test_a_frame_that_lies_about_its_size_costs_nothing(stated: int) -> None:
    bomb = SQUEEZE(bytes(1 << 26))
    assert bomb[4] == 0xA4 or bomb[4] & 0xC0 == 0x80        # a content size of four bytes
    lie = bomb[:4] + bytes([0xC0 | bomb[4] & 0x3F]) if stated > 1 << 32 else bomb[:5]
    header = 5 if bomb[4] & 0x20 else 6                     # without a window descriptor, or with one
    size = stated.to_bytes(8 if stated > 1 << 32 else 4, "little")
    lie += bomb[5:header] + size + bomb[header + 4:]
    assert zstandard.frame_content_size(lie) == stated
    with pytest.raises(ProtocolError, match="compressed contents came"):
        decode_batch(batch_of([1], [0], lie, codings=(1, 0)), PAGES, EVERYTHING)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_damage_to_a_batch_is_worse_than_an_error(data: st.DataObject) -> None:
    encoder = BatchEncoder(PAGES)
    pages, contents = np.array([1, 4, 7, 9]), contents_of([2, 4, 1, 0])
    for _ in range(2):
        encoder.encode(pages[1:], contents[1:])
    payload = bytearray(encoder.encode(pages, contents).payload)
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(payload) - 1), st.integers(0, 255)),
                                        min_size=1, max_size=4)):
        payload[at] = value
    try:
        batch = decode_batch(bytes(payload[:data.draw(st.integers(0, len(payload)))]), PAGES, EVERYTHING)
    except ProtocolError:
        return
    filled = np.count_nonzero((batch.kinds == PageKind.FULL) | (batch.kinds == PageKind.DELTA))
    assert batch.contents.shape == (filled, PAGE)
    assert batch.pages.max() < PAGES


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_are_worse_than_an_error(payload: bytes) -> None:
    for decode in (lambda: decode_batch(payload, PAGES, EVERYTHING), lambda: decode_digests(payload, PAGES),
                   lambda: unpack_bitmap(payload, PAGES)):
        try:
            decode()
        except ProtocolError:
            continue


# --- digests and bitmaps ------------------------------------------------------------------------------------

def test_digests_are_those_of_snapshots() -> None:
    contents = contents_of([1, 2, 0])
    pages, digests = decode_digests(encode_digests(np.array([0, 5, 47]), contents), PAGES)
    assert pages.tolist() == [0, 5, 47]
    assert digests == [hashlib.sha256(row.tobytes()).digest()[:16] for row in contents]


@pytest.mark.parametrize("payload", [
    b"", bytes(19), bytes(21), bytes(20 * (DIGESTS + 1)), bytes(40),
    np.array([PAGES], dtype="<u4").tobytes() + bytes(16)])
def test_digests_that_make_no_sense_are_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_digests(payload, PAGES)


@given(st.integers(1, 300), st.data())
def test_bitmaps_come_back(count: int, data: st.DataObject) -> None:
    chosen = sorted(data.draw(st.sets(st.integers(0, count - 1))))
    assert unpack_bitmap(pack_bitmap(np.array(chosen, dtype=np.int64), count), count).tolist() == chosen
    bits = np.zeros(count, dtype=bool)
    bits[chosen] = True
    assert np.array_equal(unpack_bits(pack_bits(bits), count), bits)


@pytest.mark.parametrize("data", [
    b"", b"x", SQUEEZE(bytes(5)), SQUEEZE(bytes(1 << 20)), STREAMED(bytes(6)), SQUEEZE(b"\0" * 5 + b"\x10")])
def test_bitmaps_that_make_no_sense_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack_bitmap(data, 44)
