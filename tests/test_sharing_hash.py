# SPDX-License-Identifier: GPL-2.0-or-later
"""The hash of pages, and what is found by it."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hostd.sharing import PageHash
from hostd.sharing.table import Table, Waiting
from vmm.memory.pool import PAGE, Pool

POOL = Pool(1 << 20)
WORDS = np.frombuffer(POOL.q, dtype=np.uint64).reshape(-1, 512)


def test_the_hash_is_the_sum_of_keyed_doublewords() -> None:
    """By the definition, in integers of any size."""
    keys = np.random.default_rng(3).integers(0, 1 << 64, (2, 512), dtype=np.uint64).tolist()
    WORDS[5] = np.random.default_rng(4).integers(0, 1 << 64, 512, dtype=np.uint64)
    expected = 0
    for word, first, second in zip(WORDS[5].tolist(), *keys, strict=True):
        expected += (word & 0xFFFF_FFFF) * first + (word >> 32) * ((first << 32) + second)
    hash = PageHash(POOL, np.random.default_rng(3))
    assert hash(np.array([5])).tolist() == [expected % (1 << 64)]


def test_any_number_of_frames_in_any_order() -> None:
    hash = PageHash(POOL, np.random.default_rng(1))
    WORDS[:] = np.random.default_rng(2).integers(0, 1 << 64, WORDS.shape, dtype=np.uint64)
    frames = np.random.default_rng(5).permutation(POOL.frames)
    one_by_one = [int(hash(frames[i:i + 1])[0]) for i in range(len(frames))]
    assert hash(frames).tolist() == one_by_one
    assert len(set(one_by_one)) == POOL.frames
    assert hash(frames[:0]).tolist() == []


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1 << 32), words=st.sets(st.integers(0, 511), min_size=1, max_size=8),
       bit=st.integers(0, 63))
def test_no_bits_cancel_out(seed: int, words: set[int], bit: int) -> None:
    """Not even the same bit of several words, which a sum of multiples could lose at its upper end."""
    hash = PageHash(POOL, np.random.default_rng(seed))
    WORDS[1:3] = 0
    WORDS[2][list(words)] = np.uint64(1 << bit)
    zero, other = hash(np.array([1, 2])).tolist()
    assert zero == 0 != other


def test_hosts_have_keys_of_their_own() -> None:
    POOL.page(1)[:] = b"page" * (PAGE // 4)
    frame = np.array([1])
    assert len({int(PageHash(POOL, np.random.default_rng(seed))(frame)[0]) for seed in range(8)}) == 8


def test_the_table_drops_what_only_itself_has() -> None:
    table = Table()
    hashes, frames = np.arange(10, 20, dtype=np.uint64), np.arange(100, 110)
    assert table.add(hashes, frames).tolist() == []
    assert table.add(hashes[:2], np.array([7, 8])).tolist() == [7, 8]
    assert table.frames(np.array([12, 9, 19], dtype=np.uint64)).tolist() == [102, 0, 109]
    looked: list[int] = []

    def shares(frames: np.ndarray) -> np.ndarray:
        looked.extend(frames.tolist())
        return np.where(frames % 2, 1, 3)

    assert table.sweep(shares, 4).tolist() == [101, 103]
    assert table.sweep(shares, 6).tolist() == [105, 107, 109]
    assert looked == frames.tolist()
    assert table.sweep(shares, 99).tolist() == [] and len(table) == 5
    assert table.frames(hashes).tolist() == [100, 0, 102, 0, 104, 0, 106, 0, 108, 0]


def test_slots_of_waiting_pages_change_between_passes() -> None:
    waiting = Waiting(np.random.default_rng(1))
    hashes = np.random.default_rng(2).integers(0, 1 << 64, 5000, dtype=np.uint64)
    before = waiting.at(hashes)
    waiting.put(before, np.arange(1, 5001, dtype=np.uint64))
    assert waiting.get(before)[-1] == 5000
    waiting.clear(5000)
    assert not waiting.get(waiting.at(hashes)).any()
    assert len(np.unique(waiting.at(hashes))) > 3000
    assert (waiting.at(hashes) != before).any()
