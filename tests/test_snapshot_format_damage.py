# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshot files that are torn, tampered with, too new, or made to do harm: refused in one sentence."""

from __future__ import annotations

import os
import random
import re
import struct
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostd.errors import HostError
from hostd.snapshot import Base, Folder, Snapshot, SnapshotWriter, Unusable
from hostd.snapshot.layout import HEADER, INDEX, Header, Tail, digest, pack_bases
from vmm.memory.pool import PAGE
from vmm.memory.records import StoreError

MEMORY = 8 * PAGE


def small(directory: Path) -> Path:
    """A snapshot of 660 bytes with all there is: pages of its own and of a base, state, definition."""
    with SnapshotWriter(directory / "base", MEMORY) as writer:
        writer.add_page(1, memoryview(b"ancient " * 512))
        writer.finish()
    base = Snapshot.open(directory / "base")
    with SnapshotWriter(directory / "guest", MEMORY, state=b"state", definition=b"{}", base=base) as writer:
        for page, word in (1, b"ancient "), (2, b"filling "), (5, b"again   "):
            writer.add_page(page, memoryview(word * 512))
        writer.add_page(7, memoryview((b"compress" + bytes(PAGE))[:PAGE]))
        writer.finish()
    base.close()
    return directory / "guest"


def check(path: Path) -> None:
    """All that is done with a snapshot before a guest is made of it."""
    folder = Folder(path.parent)
    try:
        snapshot = folder.open(path.name)
        try:
            snapshot.verify()
        finally:
            snapshot.close()
    finally:
        folder.close()


def refused(path: Path) -> str:
    """Why the file cannot be used."""
    with pytest.raises(Unusable) as refusal:
        check(path)
    told = str(refusal.value)
    assert "\n" not in told and str(path) in told
    return told.removeprefix(f"{path} cannot be used: ")


def parts(path: Path) -> tuple[Header, bytes, Tail]:
    """A good file, taken apart."""
    whole = path.read_bytes()
    header = Header.unpack(whole[:HEADER])
    return header, whole[HEADER:header.tail_at], Tail.unpack(header, whole[header.tail_at:])


def forge(path: Path, header: Header, data: bytes, tail: bytes, **fields: Any) -> None:
    """Write a file whose checksums are right, whatever else is in it."""
    header = replace(header, **{"tail_digest": digest(tail), **fields})
    path.write_bytes(header.pack() + data + tail)


def test_a_file_that_ends_anywhere_is_refused(tmp_path: Path) -> None:
    path = small(tmp_path)
    whole = path.read_bytes()
    check(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        why = refused(path)
        assert why.startswith("it is torn" if length >= 12 else "it does not begin as a snapshot does")
    path.write_bytes(whole + b"\0")
    assert refused(path) == f"it is damaged: it has {len(whole) + 1} bytes instead of {len(whole)}"


def test_a_file_with_any_bit_flipped_is_refused(tmp_path: Path) -> None:
    path = small(tmp_path)
    whole = bytearray(path.read_bytes())
    data_ends = parts(path)[0].tail_at
    for at in range(len(whole)):
        for bit in range(8):
            whole[at] ^= 1 << bit
            path.write_bytes(whole)
            why = refused(path)
            whole[at] ^= 1 << bit
        assert why.startswith(
            "it does not begin as a snapshot does" if at < 8 else
            "it has version" if at < 12 else
            "it is damaged: the checksum of its header" if at < HEADER else
            "it is damaged in the MiB of pages" if at < data_ends else
            "it is damaged: the checksum of its index")
    path.write_bytes(whole)
    check(path)


def test_the_first_damaged_piece_is_named(tmp_path: Path) -> None:
    rng = random.Random(3)
    with SnapshotWriter(tmp_path / "guest", 1000 * PAGE) as writer:
        for page in range(1000):
            writer.add_page(page, memoryview(rng.randbytes(PAGE)))
        writer.finish()
    with open(tmp_path / "guest", "r+b") as file:
        for at in 0x3F0000, 0x200000:
            file.seek(at)
            file.write(b"x")
    assert refused(tmp_path / "guest") == "it is damaged in the MiB of pages that begins at 0x100080"


@pytest.mark.parametrize("version", [0, 2, 3, 2**32 - 1])
def test_another_version_is_refused_by_name(tmp_path: Path, version: int) -> None:
    path = small(tmp_path)
    whole = path.read_bytes()
    # nothing else of another version is known, not even how long its header is
    for rest in whole[12:], b"", bytes(1000):
        path.write_bytes(whole[:8] + struct.pack("<I", version) + rest)
        assert refused(path) == f"it has version {version} of the format, and this hostd reads version 1"


@pytest.mark.parametrize("contents", [b"", b"\x7fELF", bytes(4096), b"\x89HSNAP"])
def test_files_that_are_no_snapshots(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "guest").write_bytes(contents)
    assert refused(tmp_path / "guest") == "it does not begin as a snapshot does"


@pytest.mark.parametrize("fields, why", [
    ({"memory_bytes": 1 << 62}, "memory of 4611686018427387904, where at most 1099511627776 is possible"),
    ({"memory_bytes": MEMORY + 1}, "memory of 32769 bytes is not a multiple of 4096"),
    ({"memory_bytes": 3 * PAGE}, "pages of 4, where at most 3 is possible"),
    ({"memory_bytes": 7 * PAGE}, "pages that do not ascend, or are not in the memory"),
    ({"memory_bytes": 0}, "pages of 4, where at most 0 is possible"),
    ({"data_bytes": 1 << 40}, "data of 1099511627776, where at most 274877906816 is possible"),
    ({"data_bytes": 191}, "data of 191 bytes is not a multiple of 64"),
    ({"data_bytes": 1 << 37}, "it is torn"),
    ({"data_bytes": 128}, "it is damaged: it has"),
    ({"pages": 2**32 - 1}, "pages of 4294967295, where at most 8 is possible"),
    ({"pages": 2**32 - 1, "memory_bytes": 1 << 40}, "where at most 16777216 is possible"),
    ({"bases": 2**32 - 1}, "bases of 4294967295, where at most 64 is possible"),
    ({"bases": 2}, "a base without a name"),
    ({"bases": 0}, "it names a base beyond the 0 there are"),
    ({"bases_bytes": 2**32 - 1}, "base table of 4294967295, where at most"),
    ({"bases_bytes": 20, "state_bytes": 6}, "a base without a name"),
    ({"bases_bytes": 22, "state_bytes": 4}, "something follows the last base"),
    ({"state_bytes": 2**32 - 1}, "state of 4294967295, where at most 16777216 is possible"),
    ({"definition_bytes": 2**32 - 1}, "definition of 4294967295, where at most 1048576 is possible"),
    ({"tail_digest": bytes(32)}, "the checksum of its index and state is wrong")])
def test_hostile_headers(tmp_path: Path, fields: dict[str, Any], why: str) -> None:
    path = small(tmp_path)
    header, data, tail = parts(path)
    forge(path, header, data, tail.pack(), **fields)
    assert why in refused(path)


def rows(*pages: tuple[int, int, int]) -> np.ndarray:
    """An index: page, base, offset."""
    return np.array([(*page, bytes(16)) for page in pages],
                    dtype=[*INDEX.descr[:3], ("digest", "V16")]).view(INDEX)


@pytest.mark.parametrize("index, why", [
    (rows((2, 0, 2), (1, 0, 3), (5, 0, 4), (7, 0, 2)), "pages that do not ascend"),
    (rows((1, 0, 2), (1, 0, 3), (5, 0, 4), (7, 0, 2)), "pages that do not ascend"),
    (rows((1, 0, 2), (2, 0, 3), (5, 0, 4), (8, 0, 2)), "are not in the memory"),
    (rows((1, 0, 2), (2, 0, 3), (5, 0, 4), (2**32 - 1, 0, 2)), "are not in the memory"),
    (rows((1, 2, 2), (2, 0, 3), (5, 0, 4), (7, 0, 2)), "a base beyond the 1 there are"),
    (rows((1, 2**32 - 1, 2), (2, 0, 3), (5, 0, 4), (7, 0, 2)), "a base beyond the 1 there are"),
    (rows((1, 0, 1), (2, 0, 3), (5, 0, 4), (7, 0, 2)), "a page outside of the data"),
    (rows((1, 0, 5), (2, 0, 3), (5, 0, 4), (7, 0, 2)), "a page outside of the data"),
    (rows((1, 0, 2**32 - 1), (2, 0, 3), (5, 0, 4), (7, 0, 2)), "a page outside of the data"),
    (rows((1, 1, 2), (2, 0, 3), (5, 0, 4), (7, 0, 2)), "a page that its base base does not have"),
    (rows((1, 1, 0), (2, 1, 3), (5, 0, 4), (7, 0, 2)), "a page that its base base does not have"),
    (rows((1, 1, 2**32 - 1), (2, 0, 3), (5, 0, 4), (7, 0, 2)), "a page that its base base does not have")])
def test_hostile_indexes(tmp_path: Path, index: np.ndarray, why: str) -> None:
    path = small(tmp_path)
    header, data, tail = parts(path)
    forge(path, header, data, replace(tail, index=index).pack())
    assert why in refused(path)


def test_a_base_must_have_the_very_contents(tmp_path: Path) -> None:
    path = small(tmp_path)
    header, data, tail = parts(path)
    index = tail.index.copy()
    index["digest"][0, 0] ^= 1
    forge(path, header, data, replace(tail, index=index).pack())
    assert refused(path) == "its index is wrong: a page that its base base does not have"


@pytest.mark.parametrize("name", ["", ".", "..", "../base", "/etc/passwd", "sub/base", "nul\0", "line\n",
                                  b"\xff"])
def test_hostile_names_of_bases(tmp_path: Path, name: str | bytes) -> None:
    path = small(tmp_path)
    header, data, tail = parts(path)
    raw = name if isinstance(name, bytes) else name.encode()
    table = tail.bases[0].id + bytes([len(raw)]) + raw
    packed = tail.pack().replace(pack_bases(tail.bases), table)
    forge(path, header, data, packed, bases_bytes=len(table))
    assert re.search("is not the name of a file$|a base without a name$", refused(path))


def with_bases(path: Path, good: tuple[Header, bytes, Tail], *bases: Base) -> None:
    """The same file with other bases."""
    header, data, tail = good
    tail = replace(tail, bases=bases)
    forge(path, header, data, tail.pack(), bases=len(bases), bases_bytes=len(pack_bases(bases)))


def test_bases_named_twice_and_bases_in_a_circle(tmp_path: Path) -> None:
    path = small(tmp_path)
    good = header, _, tail = parts(path)
    base, = tail.bases
    for wrong in Base("other", base.id), Base("guest", header.id):
        with_bases(path, good, base, wrong)
        assert refused(path).endswith("a base is named twice, or is the file itself")
    with_bases(path, good, base)
    # bases are asked for their records only, so a circle of them is as good as none
    with_bases(tmp_path / "base", parts(tmp_path / "base"), Base("guest", header.id))
    check(path)
    check(tmp_path / "base")


def test_a_name_as_long_as_names_can_be(tmp_path: Path) -> None:
    path = small(tmp_path)
    good = parts(path)
    os.rename(tmp_path / "base", tmp_path / ("n" * 255))
    with_bases(path, good, Base("n" * 255, good[2].bases[0].id))
    check(path)


def test_a_record_that_is_wrong_under_right_checksums_breaks_only_its_page(tmp_path: Path) -> None:
    path = small(tmp_path)
    header, data, tail = parts(path)
    data = bytes([data[0] ^ 1]) + data[1:]
    tail = replace(tail, piece_digests=digest(data))
    forge(path, header, data, tail.pack())
    check(path)
    snapshot = Folder(tmp_path).open("guest")
    out = memoryview(bytearray(b"unharmed" * 512))
    with pytest.raises(StoreError, match=f"^{path} holds no page at 0x80: the checksum is wrong$"):
        snapshot.read_into(2, out)
    assert out == b"unharmed" * 512
    snapshot.read_into(5, out)
    assert out == b"again   " * 512


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 95), st.integers(0, 255)), max_size=3),
       st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6))
def test_any_file_with_right_checksums_is_refused_or_read(header_bytes: list[tuple[int, int]],
                                                         tail_bytes: list[tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = small(Path(directory))
        whole = path.read_bytes()
        tail_at = parts(path)[0].tail_at
        fields, tail = bytearray(whole[:64]), bytearray(whole[tail_at:])
        for at, value in tail_bytes:
            tail[at % len(tail)] = value
        for at, value in header_bytes:
            fields[at % 64] = value
        head = bytes(fields) + digest(tail)
        path.write_bytes(head + digest(head) + whole[HEADER:tail_at] + tail)
        out = memoryview(bytearray(PAGE))
        with suppress(HostError):
            snapshot = Folder(path.parent).open("guest")
            with suppress(HostError):
                snapshot.verify()
            for page in snapshot.index["page"].tolist():
                with suppress(StoreError):
                    snapshot.read_into(page, out)
