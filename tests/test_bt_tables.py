# SPDX-License-Identifier: GPL-2.0-or-later
"""Traced page tables: what views derived from them, and when it is dropped."""

from __future__ import annotations

from typing import cast

import pytest

from vmm.bt.tables import TracedTables
from vmm.bt.views import View
from vmm.bt.walk import Table
from vmm.memory.errors import OutOfFrames
from vmm.memory.pool import PAGE


class Shown:
    """A view that remembers what it is to drop."""

    def __init__(self) -> None:
        self.dropped: list[tuple[int, int]] = []

    def drop(self, first: int, count: int = 1) -> None:
        self.dropped.append((first, count))


def test_tables_that_cannot_be_read_yet_stay_out_of_sync_with_all_that_follow() -> None:
    elsewhere = {5}
    contents = {page: bytearray(b"\1\0\0\0" * (PAGE // 4)) for page in (5, 6)}

    def page_bytes(page: int) -> bytes:
        if page in elsewhere:
            raise OutOfFrames("elsewhere")
        return bytes(contents[page])

    traced: list[int] = []
    tables, view = TracedTables(page_bytes, traced.append), Shown()
    elsewhere.clear()
    for page in 5, 6:
        tables.depends(cast(View, view), (Table(page, page << 10, 1, 4),))
        tables.went_off(page)
        contents[page][8:12] = b"\0\0\0\0"
    elsewhere.add(5)
    traced.clear()
    with pytest.raises(OutOfFrames):
        tables.sync()
    assert (view.dropped, traced) == ([], [])
    elsewhere.clear()
    tables.sync()
    assert (view.dropped, traced) == ([((5 << 10) + 2, 1), ((6 << 10) + 2, 1)], [5, 6])
