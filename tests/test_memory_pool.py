# SPDX-License-Identifier: GPL-2.0-or-later
"""Machine memory: one mapping in many processes, and frames that cost nothing until they are touched."""

from __future__ import annotations

import os

import pytest

from vmm.memory.pool import PAGE, Pool


def test_size_is_whole_frames() -> None:
    pool = Pool(3 * PAGE + 1)
    assert (pool.size, pool.frames, len(pool.view), len(pool.q)) == (4 * PAGE, 4, 4 * PAGE, 2048)
    for size in (0, -1):
        with pytest.raises(ValueError, match="must be larger than 0"):
            Pool(size)


def test_another_mapping_sees_the_same_bytes() -> None:
    pool = Pool(4 * PAGE)
    other = Pool(pool.size, os.dup(pool.fd))
    pool.page(2)[:4] = b"here"
    assert bytes(other.page(2)[:4]) == b"here"
    other.q[2 * 512] = 7
    assert pool.view[2 * PAGE] == 7


def test_released_frames_cost_nothing_and_are_zero() -> None:
    pool = Pool(1 << 30)
    assert pool.resident_bytes() == 0
    for frame in (5, 6, 7):
        pool.page(frame)[:] = b"\xaa" * PAGE
    assert pool.resident_bytes() == 3 * PAGE
    pool.release(5, 2)
    assert pool.resident_bytes() == PAGE
    assert bytes(pool.page(6)) == bytes(PAGE)
    assert bytes(pool.page(7)) == b"\xaa" * PAGE
