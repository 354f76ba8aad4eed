# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshot files: what is written comes back, bases are shared, and a full disk leaves nothing behind."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import struct
import subprocess
import sys
import tempfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostd import storage
from hostd.errors import Conflict, Failed, Invalid, NotFound
from hostd.snapshot import Base, Folder, Snapshot, SnapshotWriter, Unusable
from hostd.snapshot.layout import HEADER, MAX_BASES, MAX_DEFINITION, MAX_STATE, PIECE, page_digest
from tests.test_bad_disk import with_disk
from vmm.memory.pool import PAGE, Pool
from vmm.memory.records import PageStore, StoreError

MEMORY = 64 * PAGE
Memory = dict[int, bytes]     # contents by page

#: few different contents, so that pages of one memory and of two memories share some
contents = st.one_of(st.just(bytes(PAGE)), st.integers(0, 12).map(lambda seed: filling(seed)))
memories = st.dictionaries(st.integers(0, 63), contents, max_size=40)


def filling(seed: int) -> bytes:
    """A page: noise, words or one word only."""
    rng = random.Random(seed)
    return (rng.randbytes(PAGE), rng.randbytes(8) * 512, (rng.randbytes(300) + bytes(PAGE))[:PAGE])[seed % 3]


def save(path: Path, memory: Memory, **options: object) -> None:
    view = memoryview(b"".join(memory.values()))
    with SnapshotWriter(path, MEMORY, **options) as writer:        # type: ignore[arg-type]
        writer.add_frames(np.array(list(memory), dtype=np.int64), np.arange(len(memory)), view)
        writer.finish()


def loaded(snapshot: Snapshot) -> Memory:
    """All pages that are not zeroes, read one by one."""
    out = memoryview(bytearray(PAGE))
    memory = {}
    for page in range(snapshot.memory_bytes // PAGE):
        snapshot.read_into(page, out)
        if any(out):
            memory[page] = bytes(out)
    return memory


def occupied(memory: Memory) -> Memory:
    return {page: memory[page] for page in sorted(memory) if any(memory[page])}


@given(memories, st.binary(max_size=100), st.binary(max_size=100))
def test_a_guest_comes_back(memory: Memory, state: bytes, definition: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "guest"
        save(path, memory, state=state, definition=definition)
        assert [file.name for file in path.parent.iterdir()] == ["guest"]
        snapshot = Folder(path.parent).open("guest")
        snapshot.verify()
        assert (snapshot.memory_bytes, snapshot.state, snapshot.definition) == (MEMORY, state, definition)
        assert loaded(snapshot) == occupied(memory)
        assert snapshot.index["page"].tolist() == list(occupied(memory))
        assert [bytes(row) for row in snapshot.index["digest"]] == [
            page_digest(page) for page in occupied(memory).values()]
        assert len(snapshot.own) == len(set(occupied(memory).values()))
        assert path.stat().st_size == snapshot.file_bytes
        snapshot.close()


@settings(max_examples=40)
@given(st.lists(memories, min_size=2, max_size=5))
def test_a_chain_of_snapshots_each_on_the_one_before(chain: list[Memory]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        folder = Folder(Path(directory))
        seen: set[bytes] = set()
        base: Snapshot | None = None
        for number, memory in enumerate(chain):
            save(Path(directory) / str(number), memory, base=base)
            base = folder.open(str(number))
            base.verify()
            assert loaded(base) == occupied(memory)
            fresh = set(occupied(memory).values()) - seen
            assert len(base.own) == len(fresh)
            # a base that nothing is in need not be kept
            assert len(base.bases) == len(set(base.index["base"].tolist()) - {0})
            seen = set(occupied(memory).values())


def test_absent_pages_take_no_space(tmp_path: Path) -> None:
    with SnapshotWriter(tmp_path / "large", 3 << 30) as writer:
        writer.add_page((3 << 18) - 1, memoryview(b"the last" * 512))
        writer.finish()
    snapshot = Folder(tmp_path).open("large")
    assert snapshot.file_bytes == HEADER + 64 + 32 + 28
    assert snapshot.index["page"].tolist() == [(3 << 18) - 1] and snapshot.memory_bytes == 3 << 30
    out = memoryview(bytearray(PAGE))
    snapshot.read_into((3 << 18) - 1, out)
    assert out == b"the last" * 512


def test_several_pieces_of_data_from_a_pool(tmp_path: Path) -> None:
    pool = Pool(8 << 20)
    rng = random.Random(5)
    frames = np.array(rng.sample(range(pool.frames), 900))
    for frame in frames.tolist():
        pool.page(frame)[:] = rng.randbytes(PAGE)
    pages = np.array(rng.sample(range(2000), 900))
    with SnapshotWriter(tmp_path / "guest", 2000 * PAGE) as writer:
        writer.add_frames(pages[:500], frames[:500], pool.view)
        writer.add_frames(pages[500:], frames[500:], pool.view)
        writer.finish()
    snapshot = Folder(tmp_path).open("guest")
    snapshot.verify()
    assert snapshot.data_bytes > 3 * PIECE
    assert loaded(snapshot) == {page: bytes(pool.page(frame))
                                for page, frame in zip(pages.tolist(), frames.tolist())}


def test_who_restores_reads_records_through_the_stores(tmp_path: Path) -> None:
    save(tmp_path / "base", {1: filling(1), 2: filling(2)})
    folder = Folder(tmp_path)
    save(tmp_path / "guest", {2: filling(2), 3: filling(3)}, base=folder.open("base"))
    snapshot = folder.open("guest")
    out = memoryview(bytearray(PAGE))
    for row, seed in zip(snapshot.index, (2, 3), strict=True):
        assert row["base"] == (1 if seed == 2 else 0)
        store = PageStore(snapshot.stores[row["base"]].name)
        store.read_into(int(row["offset"]), out)
        assert out == filling(seed)
        store.close()


def test_guests_that_share_one_file_of_common_pages(tmp_path: Path) -> None:
    pool = Pool(1 << 20)
    for frame in range(1, 100):
        pool.page(frame)[:] = filling(frame)
    frames = np.arange(1, 100)
    with SnapshotWriter(tmp_path / "pages", pool.size) as writer:
        writer.add_frames(frames, frames, pool.view)
        writer.finish()
    folder = Folder(tmp_path)
    common = folder.open("pages")
    for guest in range(5):
        with SnapshotWriter(tmp_path / f"guest{guest}", MEMORY, state=b"of %d" % guest) as writer:
            base = writer.add_base(common)
            writer.refer(np.arange(20), base, np.arange(guest + 1, guest + 21))
            writer.add_page(40, memoryview(filling(1000 + guest)))
            writer.finish()
    for guest in range(5):
        snapshot = folder.open(f"guest{guest}")
        snapshot.verify()
        assert snapshot.bases == (Base("pages", common.id),) and snapshot.state == b"of %d" % guest
        assert loaded(snapshot) == {
            **{page: filling(guest + 1 + page) for page in range(20)}, 40: filling(1000 + guest)}
    with SnapshotWriter(tmp_path / "wrong", MEMORY) as writer:
        base = writer.add_base(common)
        for pages in [0], [100], [1, 255], [256]:
            with pytest.raises(KeyError):
                writer.refer(np.arange(len(pages)), base, np.array(pages))
    folder.close()


def test_a_page_cannot_be_added_twice_or_outside_of_the_memory(tmp_path: Path) -> None:
    page = memoryview(filling(1))
    for number in -1, 64:
        with SnapshotWriter(tmp_path / "guest", MEMORY) as writer, pytest.raises(ValueError, match="not in"):
            writer.add_page(number, page)
    with SnapshotWriter(tmp_path / "guest", MEMORY) as writer:
        writer.add_page(1, page)
        writer.add_page(1, page)
        with pytest.raises(ValueError, match="added twice"):
            writer.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what, options", [
    ("memory of 1099511631872 bytes", {"memory_bytes": (1 << 40) + PAGE}),
    ("state of 16777217 bytes", {"state": bytes(MAX_STATE + 1)}),
    ("definition of 1048577 bytes", {"definition": bytes(MAX_DEFINITION + 1)})])
def test_what_is_too_large_for_a_snapshot(tmp_path: Path, what: str, options: dict[str, object]) -> None:
    with pytest.raises(Invalid, match=f"^a snapshot with {what}: at most"):
        SnapshotWriter(tmp_path / "guest", **{"memory_bytes": MEMORY, **options})     # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=["unnamed", "named"])
def files(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """File systems with and without files that have no name yet."""
    if request.param == "named":
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)    # opening one to write does not work, either
    return str(request.param)


def test_a_snapshot_that_is_given_up_leaves_nothing(files: str, tmp_path: Path) -> None:
    with SnapshotWriter(tmp_path / "guest", MEMORY) as writer:
        writer.add_page(1, memoryview(filling(2)))
        assert [path.name[:9] for path in tmp_path.iterdir()] == [storage.PARTIAL] * (files == "named")
    with pytest.raises(RuntimeError), SnapshotWriter(tmp_path / "guest", MEMORY) as writer:
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_of_two_snapshots_of_one_name_the_first_to_be_whole_is_kept(files: str, tmp_path: Path) -> None:
    with SnapshotWriter(tmp_path / "guest", MEMORY) as slow:
        slow.add_page(1, memoryview(filling(1)))
        save(tmp_path / "guest", {2: filling(2)})
        with pytest.raises(Conflict, match=f"^{tmp_path}/guest exists already: choose another name$"):
            slow.finish()
    with pytest.raises(Conflict), SnapshotWriter(tmp_path / "guest", MEMORY):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["guest"]
    assert loaded(Snapshot.open(tmp_path / "guest")) == {2: filling(2)}


def test_a_snapshot_whose_name_is_not_on_the_disk_is_none(files: str, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(storage, "sync_directory", fails)
    with pytest.raises(Failed, match=f"^cannot write {tmp_path}/guest: Input/output error$"):
        save(tmp_path / "guest", {1: filling(1)})
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_cannot_replace_its_own_base(tmp_path: Path) -> None:
    save(tmp_path / "first", {1: filling(1)})
    folder = Folder(tmp_path)
    save(tmp_path / "second", {1: filling(1), 2: filling(2)}, base=folder.open("first"))
    second = folder.open("second")
    for name in "second", "first":
        with pytest.raises(Invalid, match=f"^{tmp_path}/{name} would replace its own base: give"):
            save(tmp_path / name, {1: filling(1)}, base=second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_a_base_whose_name_cannot_be_told(tmp_path: Path) -> None:
    save(tmp_path / "new\nline", {1: filling(1)})
    with pytest.raises(Invalid, match=r"cannot name 'new\\nline' as its base: rename that file"):
        save(tmp_path / "guest", {}, base=Folder(tmp_path).open("new\nline"))


def test_more_bases_than_a_file_can_have(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    base: Snapshot | None = None
    memory: Memory = {}
    for number in range(MAX_BASES + 3):
        memory[number % 64] = random.Random(number).randbytes(PAGE)
        save(tmp_path / str(number), memory, base=base)
        base = folder.open(str(number))
        assert loaded(base) == occupied(memory)
    assert base is not None and len(base.bases) <= MAX_BASES
    with SnapshotWriter(tmp_path / "guest", MEMORY) as writer:
        for number in range(MAX_BASES):
            assert writer.add_base(folder.open(str(number))) == number + 1
        assert writer.add_base(folder.open("3")) == 4
        with pytest.raises(Invalid, match="64 bases at most"):
            writer.add_base(folder.open(str(MAX_BASES)))


def test_bases_that_are_missing_or_not_the_same_any_more(tmp_path: Path) -> None:
    base, guest = tmp_path / "base", tmp_path / "guest"
    save(base, {1: filling(1)})
    save(guest, {1: filling(1)}, base=Snapshot.open(base))
    alone = Snapshot.open(guest)
    with pytest.raises(StoreError, match=f"page 1 of {guest} is in its base base, which is not open"):
        loaded(alone)
    with pytest.raises(ValueError, match="opened without its bases"):
        alone.verify()
    whole = base.read_bytes()
    base.unlink()
    save(base, {1: filling(1)})
    with pytest.raises(Unusable, match=f"^{guest} cannot be used: its base base has been replaced"):
        Folder(tmp_path).open("guest")
    base.write_bytes(whole[:-1])
    with pytest.raises(Unusable, match=f"^{guest} cannot be used: {base} cannot be used: it is torn"):
        Folder(tmp_path).open("guest")
    base.unlink()
    with pytest.raises(Unusable, match=f"^{guest} cannot be used: its base is missing: there is no snapshot"):
        Folder(tmp_path).open("guest")
    base.write_bytes(whole[:HEADER] + bytes([whole[HEADER] ^ 1]) + whole[HEADER + 1:])
    snapshot = Folder(tmp_path).open("guest")
    with pytest.raises(Unusable, match=f"^{base} cannot be used: it is damaged in the MiB of pages that"):
        snapshot.verify()


def test_what_cannot_be_opened_or_written(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=f"^there is no snapshot {tmp_path}/none$"):
        Folder(tmp_path).open("none")
    os.mkfifo(tmp_path / "fifo")
    for path in tmp_path, tmp_path / "fifo", Path("/dev/zero"):
        with pytest.raises(Unusable, match=f"^{path} cannot be used: it is not a regular file$"):
            Snapshot.open(path)
    (tmp_path / "fifo").unlink()
    with pytest.raises(Failed, match=f"^cannot write {tmp_path}/none/guest: No such file or directory$"):
        save(tmp_path / "none" / "guest", {})
    (tmp_path / "directory").mkdir()
    with pytest.raises(Conflict, match=f"^{tmp_path}/directory exists already"):
        save(tmp_path / "directory", {})
    assert [path.name for path in tmp_path.iterdir()] == ["directory"]


_ON_A_FULL_DISK = """
import os, random, sys
from pathlib import Path
from hostd.errors import Failed
from hostd.snapshot import Snapshot, SnapshotWriter

directory = Path(sys.argv[1])
noise = random.Random(1)
def save(name, pages, state=b""):
    with SnapshotWriter(directory / name, 1 << 30, state=state) as writer:
        for page in range(pages):
            writer.add_page(page, memoryview(noise.randbytes(4096)))
        writer.finish()

save("guest", 100)
before = (directory / "guest").read_bytes()
told = set()
# pages that do not fit; a tail that does not fit; not even the first byte of a file
for pages, state in (1200, b""), (600, b""), (0, bytes(3 << 20)):
    try:
        save("other", pages, state)
    except Failed as error:
        told.add(str(error))
    assert os.listdir(directory) == ["guest"], os.listdir(directory)
    assert (directory / "guest").read_bytes() == before
print(*told)
Snapshot.open(directory / "guest").verify()
save("other", 100)
"""


def test_a_full_disk(tmp_path: Path) -> None:
    state = tmp_path / "state"
    told = subprocess.run([*with_disk(state, "size=2M"), sys.executable, "-c", _ON_A_FULL_DISK, str(state)],
                          capture_output=True, text=True, timeout=60)
    assert told.stderr == "" and told.stdout == f"no space left for other in {state}\n"


def test_the_file_is_as_documented(tmp_path: Path) -> None:
    """docs/SNAPSHOT.md, written down a second time: a change here needs a new version of the format."""
    page = b"contents" * 512
    save(tmp_path / "base", {9: b"basement" * 512})
    base = Snapshot.open(tmp_path / "base")
    save(tmp_path / "guest", {3: page, 4: b"basement" * 512}, state=b"state", definition=b"{}", base=base)
    snapshot = Snapshot.open(tmp_path / "guest")

    def sha256(data: bytes) -> bytes:
        return hashlib.sha256(data).digest()

    rest = struct.pack("<HBB", 8, 2, 0) + b"contents" + bytes(48)
    record = struct.pack("<I", zlib.crc32(rest)) + rest
    tail = (sha256(record)
            + struct.pack("<III", 3, 0, 2) + sha256(page)[:16]
            + struct.pack("<III", 4, 1, 2) + sha256(b"basement" * 512)[:16]
            + base.id + b"\4base" + b"state" + b"{}")
    header = (b"\x89HSNAP\r\n" + struct.pack("<II16sQQIIII", 1, 1, snapshot.id, MEMORY, 64, 2, 21, 5, 2)
              + sha256(tail))
    assert (tmp_path / "guest").read_bytes() == header + sha256(header) + record + tail


def test_a_page_costs_its_writer_little(tmp_path: Path) -> None:
    """A host that is suspended has millions of them."""
    pages, chunk = 1 << 15, 64
    words = np.zeros((chunk, PAGE // 8), dtype=np.uint64)
    with SnapshotWriter(tmp_path / "s", pages * PAGE) as writer:
        tracemalloc.start()
        try:
            for first in range(0, pages, chunk):
                numbers = np.arange(first, first + chunk)
                words[:] = numbers[:, None] + 1
                writer.add_frames(numbers, np.arange(chunk), memoryview(words).cast("B"))
            cost = tracemalloc.get_traced_memory()[0] / pages
        finally:
            tracemalloc.stop()
    assert cost < 250, cost
