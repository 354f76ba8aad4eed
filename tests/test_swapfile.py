# SPDX-License-Identifier: GPL-2.0-or-later
"""The swap file: slots never overlap, pages come back, and a full disk costs nobody anything."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hostd.errors import Failed
from hostd.slots import NoRoom, Slots
from hostd.swapfile import ZERO, Full, SwapFile
from tests.test_bad_disk import with_disk
from vmm.memory.pool import PAGE
from vmm.memory.records import MAX_UNITS, PageStore, StoreError

MIB = 1 << 20


class SlotsMachine(RuleBasedStateMachine):
    """Random allocation against a model that knows of each slot how large it is and who owns it."""

    LIMIT = 1500

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots(self.LIMIT)
        self.model: dict[int, list[int]] = {}     # size, owners

    def chosen(self, number: int) -> int | None:
        return sorted(self.model)[number % len(self.model)] if self.model else None

    @rule(sizes=st.lists(st.integers(1, MAX_UNITS), max_size=20))
    def alloc(self, sizes: list[int]) -> None:
        before = self.slots.records(), self.slots.used
        try:
            starts = self.slots.alloc(sizes)
        except NoRoom:
            assert (self.slots.records(), self.slots.used) == before
            longest = self.slots.holes.longest()
            room = max(self.LIMIT - self.slots.end, self.slots.holes.size(longest) if longest else 0)
            assert room < sum(sizes)
            return
        assert len(starts) == len(sizes)
        for start, size in zip(starts, sizes, strict=True):
            assert start not in self.model
            self.model[start] = [size, 1]

    @rule(numbers=st.lists(st.integers(0, 1000), max_size=5))
    def retain(self, numbers: list[int]) -> None:
        for start in map(self.chosen, numbers):
            if start is not None:
                self.slots.retain([start])
                self.model[start][1] += 1

    @rule(numbers=st.lists(st.integers(0, 1000), max_size=30))
    def free(self, numbers: list[int]) -> None:
        for start in map(self.chosen, numbers):
            if start is not None:
                size, owners = self.model[start]
                assert self.slots.free([start]) == (size if owners == 1 else 0)
                self.model[start][1] -= 1
                if owners == 1:
                    del self.model[start]

    @rule(start=st.integers(0, 1500))
    def nobody_frees_what_is_not_a_slot(self, start: int) -> None:
        if start not in self.model:
            for refuse in self.slots.free, self.slots.retain:
                with pytest.raises(KeyError):
                    refuse([start])

    @invariant()
    def the_books_are_right(self) -> None:
        slots = self.slots
        assert slots.records() == {start: tuple(kept) for start, kept in self.model.items()}
        assert slots.used == sum(size for size, _ in self.model.values())
        assert slots.owners == sum(owners for _, owners in self.model.values())
        holes = list(slots.holes.longer_than(1))
        assert slots.holes.units == sum(size for _, size in holes) and len(slots.holes) == len(holes)

    @invariant()
    def every_unit_is_of_one_record_or_one_hole(self) -> None:
        holes = [(first, size, True) for first, size in self.slots.holes.longer_than(1)]
        records = [(start, size, False) for start, (size, _) in self.model.items()]
        at, after_hole = Slots.FIRST, False
        for first, size, hole in sorted(holes + records):
            assert first == at and size > 0 and not (hole and after_hole)
            at, after_hole = first + size, hole
        assert at == self.slots.end <= self.LIMIT and not after_hole


SlotsMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_slots = SlotsMachine.TestCase


def test_a_batch_lies_side_by_side_and_holes_are_used_again() -> None:
    slots = Slots(10_000)
    first = slots.alloc([10] * 100)
    assert first == list(range(1, 1001, 10))
    slots.free(first[10:30])
    assert slots.alloc([20, 30, 40]) == [101, 121, 151]
    assert slots.end == 1001
    slots.free(first[30:])
    assert slots.end == 191 and len(slots.holes) == 0


def test_a_file_rather_grows_while_three_quarters_of_it_are_in_use() -> None:
    slots = Slots(10_000)
    first = slots.alloc([10] * 100)
    slots.free(first[0:40:2])
    assert slots.alloc([15] * 4) == [1001, 1016, 1031, 1046]
    slots.free(first[40:70] + first[75:99])
    assert slots.alloc([25] * 18) == [401 + 25 * i for i in range(12)] + [751 + 25 * i for i in range(6)]
    assert slots.end == 1061


def test_what_is_free_can_be_had_to_the_last_unit() -> None:
    slots = Slots(1001)
    first = slots.alloc([10] * 100)
    slots.free(first[::2])
    again = slots.alloc([10] * 50)
    assert sorted(again) == first[::2]
    with pytest.raises(NoRoom):
        slots.alloc([1])


def page(seed: int) -> memoryview:
    """A page that can be compressed to about a half."""
    return memoryview((random.Random(seed).randbytes(2000) + bytes(PAGE))[:PAGE])


@pytest.fixture
def swap(tmp_path: Path) -> Iterator[SwapFile]:
    swap = SwapFile(tmp_path / "swap", 64 * MIB)
    yield swap
    swap.close()
    assert list(tmp_path.iterdir()) == []


def contents(swap: SwapFile, slot: int) -> memoryview:
    out = memoryview(bytearray(PAGE))
    swap.read_into(slot, out)
    return out


def test_pages_come_back_until_the_last_owner_lets_go(swap: SwapFile) -> None:
    slots = swap.write([page(1), memoryview(bytes(PAGE)), page(2), memoryview(b"filling " * 512)])
    assert slots[1] == ZERO and len(set(slots)) == 4
    swap.retain(slots)
    swap.free(slots)
    for slot, expected in zip(slots, (page(1), bytes(PAGE), page(2), b"filling " * 512), strict=True):
        assert contents(swap, slot) == expected
    worker = PageStore(os.dup(swap.fd))
    out = memoryview(bytearray(PAGE))
    worker.read_into(slots[2], out)
    assert out == page(2)
    worker.close()
    stats = swap.stats()
    assert (stats.records, stats.pages) == (3, 3)
    assert stats.stored_bytes == 2 * 2048 + 64 and stats.file_bytes == stats.stored_bytes + 64
    swap.free(slots)
    stats = swap.stats()
    assert (stats.records, stats.pages, stats.stored_bytes, stats.file_bytes, stats.disk_bytes) == (0,) * 5
    with pytest.raises(KeyError):
        swap.free([slots[0]])
    with pytest.raises(StoreError, match=f"^{swap.path} holds no page at 0x40: 0 bytes are left"):
        contents(swap, slots[0])


def test_random_use(swap: SwapFile) -> None:
    rng = random.Random(7)
    kept: dict[int, int] = {}
    for seed in range(150):
        seeds = [1000 * seed + i for i in range(rng.randrange(20))]
        kept.update(zip(swap.write([page(s) for s in seeds]), seeds, strict=True))
        gone = rng.sample(sorted(kept), min(len(kept), rng.randrange(19)))
        swap.free(gone)
        for slot in gone:
            del kept[slot]
    for slot, seed in kept.items():
        assert contents(swap, slot) == page(seed)
    stats = swap.stats()
    assert stats.stored_bytes == 2048 * len(kept)


def test_space_goes_back_to_the_disk(swap: SwapFile) -> None:
    noise = random.Random(1)
    slots = swap.write([memoryview(noise.randbytes(PAGE)) for _ in range(2048)])
    full = swap.stats()
    assert full.disk_bytes >= 8 * MIB
    swap.free(slots[100:1900])
    punched = swap.stats()
    assert punched.file_bytes == full.file_bytes and punched.disk_bytes < 2 * MIB
    swap.free(slots[1900:])
    assert swap.stats().file_bytes < 2 * MIB
    assert contents(swap, slots[99])


def test_the_limit(tmp_path: Path) -> None:
    swap = SwapFile(tmp_path / "swap", 100 << 10)
    slots = swap.write([page(i) for i in range(40)])
    before = swap.stats()
    with pytest.raises(Full, match=f"^no room for 30 pages in {swap.path}: its limit is 102400 bytes$"):
        swap.write([page(i) for i in range(30)])
    assert swap.stats() == before
    swap.free(slots[::2])
    assert len(swap.write([page(i) for i in range(25)])) == 25
    assert swap.stats().file_bytes <= 100 << 10
    swap.close()
    none = SwapFile(tmp_path / "swap", 0)
    assert none.write([memoryview(bytes(PAGE))]) == [ZERO]
    with pytest.raises(Full):
        none.write([page(1)])
    none.close()


def test_what_an_earlier_run_left_is_dropped_but_can_still_be_read_by_who_has_it(tmp_path: Path) -> None:
    old = SwapFile(tmp_path / "swap", MIB)
    slot, = old.write([page(1)])
    new = SwapFile(tmp_path / "swap", MIB)
    assert new.stats().file_bytes == 0 and os.stat(tmp_path / "swap").st_mode & 0o777 == 0o600
    assert new.write([page(2)]) == [slot]
    assert contents(old, slot) == page(1) and contents(new, slot) == page(2)


def test_a_swap_file_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(Failed, match=f"^cannot write {tmp_path}/none/swap: No such file or directory$"):
        SwapFile(tmp_path / "none" / "swap", MIB)
    (tmp_path / "swap").mkdir()
    with pytest.raises(Failed, match=f"^cannot write {tmp_path}/swap: Is a directory$"):
        SwapFile(tmp_path / "swap", MIB)


def test_threads_may_share_it(swap: SwapFile) -> None:
    wrong: list[int] = []

    def use(seed: int) -> None:
        rng = random.Random(seed)
        kept: dict[int, int] = {}
        for turn in range(40):
            seeds = [seed * 10_000 + turn * 10 + i for i in range(8)]
            kept.update(zip(swap.write([page(s) for s in seeds]), seeds, strict=True))
            gone = rng.sample(sorted(kept), 6)
            wrong.extend(slot for slot in gone if contents(swap, slot) != page(kept.pop(slot)))
            swap.free(gone)
        swap.free(kept)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and swap.stats().records == 0


_ON_A_FULL_DISK = """
import random, sys
from pathlib import Path
from hostd.swapfile import Full, SwapFile

noise = random.Random(1)
def pages(n): return [memoryview(noise.randbytes(4096)) for _ in range(n)]
swap = SwapFile(Path(sys.argv[1]) / "swap", 1 << 30)
kept = pages(100)
slots = swap.write(kept)
before = swap.stats()
try:
    swap.write(pages(100))
except Full as error:
    print(error)
assert swap.stats() == before, (swap.stats(), before)
out = memoryview(bytearray(4096))
for slot, page in zip(slots, kept):
    swap.read_into(slot, out)
    assert out == page
swap.free(slots[50:])
assert len(swap.write(pages(40))) == 40
swap.close()
"""


def test_a_full_disk(tmp_path: Path) -> None:
    state = tmp_path / "state"
    told = subprocess.run([*with_disk(state, "size=512k"), sys.executable, "-c", _ON_A_FULL_DISK, str(state)],
                          capture_output=True, text=True, timeout=60)
    assert told.stderr == "" and told.stdout == f"no space left for swap in {state}\n"
