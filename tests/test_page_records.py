# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages as records: every page comes back, and nothing but a record is taken for one."""

from __future__ import annotations

import os
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from vmm.memory.pool import PAGE
from vmm.memory.records import (
    MAX_RECORD,
    UNIT,
    Coding,
    PageStore,
    RecordError,
    StoreError,
    decode_into,
    encode,
)
from vmm.memory.stamp import Stamp

_FIXED = random.Random(4)

#: pages of every coding, and of every compressibility between a few bytes and none
pages = st.one_of(
    st.builds(lambda word: word * 512, st.binary(min_size=8, max_size=8)),
    st.builds(lambda noise, rest: (noise + bytes([rest]) * PAGE)[:PAGE],
              st.integers(0, PAGE).flatmap(lambda n: st.integers(0, 2**32).map(
                  lambda seed: random.Random(seed).randbytes(n))), st.integers(0, 255)),
    st.builds(lambda text: (text * PAGE)[:PAGE], st.binary(min_size=1, max_size=200)))


def decoded(record: bytes) -> bytes:
    out = bytearray(PAGE)
    decode_into(record, memoryview(out))
    return bytes(out)


def made(payload: bytes, coding: int, zero: int = 0, padding: bytes | None = None) -> bytes:
    """A record with a right checksum, of whatever is given."""
    rest = struct.pack("<HBB", len(payload), coding, zero) + payload
    rest += bytes(-(len(rest) + 4) % UNIT) if padding is None else padding
    return struct.pack("<I", zlib.crc32(rest)) + rest


def refused(data: bytes) -> str:
    """Why `data` is no record; what was in the page is still in it."""
    before = _FIXED.randbytes(PAGE)
    out = bytearray(before)
    with pytest.raises(RecordError) as refusal:
        decode_into(data, memoryview(out))
    assert out == before
    return str(refusal.value)


@given(pages)
def test_every_page_comes_back(page: bytes) -> None:
    record = encode(memoryview(page))
    assert len(record) % UNIT == 0 and UNIT <= len(record) <= MAX_RECORD
    assert decoded(record) == page
    assert decoded(record + b"another one") == page


def test_each_coding_is_used_where_it_is_best() -> None:
    noise = random.Random(1).randbytes(PAGE)
    for page, coding, size in ((noise, Coding.RAW, MAX_RECORD), (b"12345678" * 512, Coding.FILLED, UNIT),
                               (noise[:2000] + bytes(PAGE - 2000), Coding.ZSTD, 2048)):
        record = encode(page)
        assert (record[6], len(record)) == (coding, size)


@pytest.mark.parametrize("length", [0, 4095, 4097])
def test_only_pages_are_encoded(length: int) -> None:
    with pytest.raises(ValueError, match=f"a page of {length} bytes"):
        encode(bytes(length))


@pytest.mark.parametrize("page", [b"fill-ing" * 512, bytes(4000) + b"few" * 32,
                                  random.Random(2).randbytes(PAGE)])
def test_a_record_cut_short_or_with_any_bit_flipped_is_refused(page: bytes) -> None:
    record = encode(page)
    for length in range(len(record)):
        refused(record[:length])
    flipped = bytearray(record)
    for bit in range(len(record) * 8):
        flipped[bit // 8] ^= 1 << bit % 8
        refused(bytes(flipped))
        flipped[bit // 8] ^= 1 << bit % 8


@given(st.one_of(st.binary(max_size=MAX_RECORD),
                 st.builds(made, st.binary(max_size=200), st.integers(0, 3), st.integers(0, 1))))
def test_anything_is_decoded_to_a_page_or_refused(data: bytes) -> None:
    out = memoryview(bytearray(PAGE))
    try:
        decode_into(data, out)
    except RecordError:
        return
    assert decoded(encode(out)) == out


@given(st.binary(max_size=100), st.integers(0, 60), st.integers(0, 255))
def test_a_compressed_page_that_is_damaged_under_a_right_checksum(noise: bytes, at: int, value: int) -> None:
    frame = bytearray(zstandard.compress((noise + bytes(PAGE))[:PAGE], 1))
    frame[at % len(frame)] = value
    test_anything_is_decoded_to_a_page_or_refused.hypothesis.inner_test(made(bytes(frame), Coding.ZSTD))


def _frame(content: bytes, size: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=size).compress(content)


#: a frame header (RFC 8878, 3.1.1.1) that promises an exbibyte; a window of 1 GiB for a page
_HUGE = b"\x28\xb5\x2f\xfd" + b"\xe0" + struct.pack("<Q", 1 << 60) + b"\x03\x00\x00\x41"
_WIDE = b"\x28\xb5\x2f\xfd" + b"\x40\xa0" + struct.pack("<H", PAGE - 256) + b"\x03\x80\x00\x41"


@pytest.mark.parametrize("record, why", [
    (made(bytes(PAGE - 1), Coding.RAW), "a page of 4095 bytes"),
    (made(bytes(PAGE + 1), Coding.RAW), "a page of 4097 bytes"),
    (made(bytes(7), Coding.FILLED), "a filling of 7 bytes"),
    (made(bytes(16), Coding.FILLED), "a filling of 16 bytes"),
    (made(bytes(8), 3), "coding 3 is none of 0 to 2"),
    (made(bytes(8), Coding.FILLED, zero=1), "where a record has zeroes"),
    (made(bytes(8), Coding.FILLED, padding=bytes(47) + b"x"), "where a record has zeroes"),
    (made(bytes(65535), Coding.ZSTD)[:MAX_RECORD], "bytes are left of a record of 65600"),
    (made(b"", Coding.ZSTD), "cannot be decompressed"),
    (made(b"not zstd", Coding.ZSTD), "cannot be decompressed"),
    (made(_frame(bytes(PAGE + 1)), Coding.ZSTD), "not 4096 bytes long"),
    (made(_frame(bytes(PAGE - 1)), Coding.ZSTD), "not 4096 bytes long"),
    (made(_frame(bytes(1 << 30)), Coding.ZSTD), "not 4096 bytes long"),
    (made(_frame(bytes(PAGE), size=False), Coding.ZSTD), "not 4096 bytes long"),
    (made(_frame(bytes(PAGE)) + b"more", Coding.ZSTD), "4 bytes of unused data"),
    (made(_frame(bytes(PAGE))[:-1], Coding.ZSTD), "cannot be decompressed"),
    (made(_HUGE, Coding.ZSTD), "not 4096 bytes long"),
    (made(_WIDE[:-1], Coding.ZSTD), "cannot be decompressed")])
def test_hostile_records(record: bytes, why: str) -> None:
    assert why in refused(record)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "pages"
    path.write_bytes(bytes(UNIT) + encode(b"page one" * 512) + encode(random.Random(3).randbytes(PAGE)))
    yield path


def test_a_store_reads_pages_by_their_place(file: Path) -> None:
    out = memoryview(bytearray(PAGE))
    for store in PageStore(file), PageStore(str(file)), PageStore(os.open(file, os.O_RDONLY)):
        store.read_into(1, out)
        assert out == b"page one" * 512
        store.read_into(2, out)
        assert out == random.Random(3).randbytes(PAGE)
        store.close()
        store.close()


def test_a_store_says_what_it_cannot_read(file: Path) -> None:
    out = memoryview(bytearray(b"unharmed" * 512))
    store = PageStore(file)
    with pytest.raises(StoreError, match=f"^{file} holds no page at 0x0: the checksum is wrong$"):
        store.read_into(0, out)
    with pytest.raises(StoreError, match="no page at 0x3fffffffc0: 0 bytes are left where a record has 64"):
        store.read_into((1 << 32) - 1, out)
    os.truncate(file, os.stat(file).st_size - UNIT)
    with pytest.raises(StoreError, match="holds no page at 0x80: 4096 bytes are left of a record of 4160"):
        store.read_into(2, out)
    store.close()
    with pytest.raises(StoreError, match=f"cannot read {file} at 0x40: Bad file descriptor"):
        store.read_into(1, out)
    with pytest.raises(StoreError, match=f"cannot open {file}.gone: No such file or directory"):
        PageStore(f"{file}.gone")
    assert out == b"unharmed" * 512
    named = PageStore(os.open(file.parent, os.O_RDONLY), name="the swap file")
    with pytest.raises(StoreError, match="cannot read the swap file at 0x40: Is a directory"):
        named.read_into(1, out)
    named.close()


def test_a_store_that_is_to_stay_as_it_was_says_when_it_has_changed(file: Path) -> None:
    out = memoryview(bytearray(PAGE))
    os.utime(file, ns=(0, 0))                       # long ago: clocks of file systems are coarse
    with file.open() as opened:
        stamp = Stamp.of(opened.fileno())
    store, again = PageStore(file, "web.snap", stamp), PageStore(file, "web.snap", stamp)
    store.read_into(1, out)
    file.rename(file.with_name("elsewhere"))        # which is no change of what is in it
    store.read_into(1, out)
    with open(file.with_name("elsewhere"), "r+b") as other:
        other.seek(UNIT)
        other.write(encode(b"page two" * 512))
    for reader in store, again:
        with pytest.raises(StoreError, match=r"^web\.snap was changed while pages of a guest were in it$"):
            reader.read_into(1, out)
        reader.close()
    assert out == b"page one" * 512
