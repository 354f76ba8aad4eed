# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that pages of guests are in: each is open once, for as long as somebody has a page in it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from hostd.errors import Failed
from hostd.stores import Stores
from vmm.memory.pool import PAGE
from vmm.memory.records import UNIT, PageStore, StoreError, encode
from vmm.memory.stamp import Stamp


def opened(stores: Stores, path: Path) -> int:
    """The number of a file that is open for a moment, as a snapshot is that is restored."""
    if not path.exists():
        path.write_bytes(bytes(UNIT) + encode(b"contents" * 512))
    fd = os.open(path, os.O_RDONLY)
    file = PageStore(fd, str(path), Stamp.of(fd))
    try:
        return stores.open(file)
    finally:
        file.close()


def slots(number: int, *offsets: int) -> np.ndarray:
    return np.array([number << 32 | offset for offset in offsets], dtype=np.uint64)


def test_guests_of_one_file_share_its_number(tmp_path: Path) -> None:
    stores, closed = Stores(), list[int]()
    stores.on_close = closed.append
    for _ in range(300):
        number = opened(stores, tmp_path / "file")
        assert number == 1
        stores.retain(slots(number, 1))
        stores.let_go(number)
    out = memoryview(bytearray(PAGE))
    for _ in range(300):
        assert closed == []
        stores.fetch(int(slots(1, 1)[0]), out)
        stores.release(slots(1, 1))
    assert closed == [1] and bytes(out) == b"contents" * 512
    with pytest.raises(StoreError):
        stores.fetch(int(slots(1, 1)[0]), out)


def test_a_file_that_somebody_holds_stays_open_without_a_page(tmp_path: Path) -> None:
    stores, closed = Stores(), list[int]()
    stores.on_close = closed.append
    for _ in range(2):
        opened(stores, tmp_path / "file")
    stores.retain(slots(1, 1))
    stores.let_go(1)
    stores.release(slots(1, 1))
    assert closed == []
    stores.let_go(1)
    assert closed == [1]


def test_a_file_that_was_changed_is_another_one(tmp_path: Path) -> None:
    stores = Stores()
    assert opened(stores, tmp_path / "file") == 1
    os.utime(tmp_path / "file", ns=(0, 0))
    assert (opened(stores, tmp_path / "file"), opened(stores, tmp_path / "file")) == (2, 2)


def test_more_files_than_there_can_be(tmp_path: Path) -> None:
    stores = Stores()
    for number in range(1, 256):
        assert opened(stores, tmp_path / str(number)) == number
    most = "guests have pages in 255 snapshots and at other hosts, the most there can be: stop one"
    with pytest.raises(Failed, match=most):
        opened(stores, tmp_path / "one more")
    with pytest.raises(Failed, match=most):
        stores.open_remote(lambda: None)
    assert opened(stores, tmp_path / "7") == 7
    for number in range(1, 256):
        stores.let_go(number)
    stores.let_go(7)
