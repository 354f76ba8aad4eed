# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast links send: under limits that are shared, and of their own."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from hostd.migration.links import BURST_S, PIECE, Bandwidth
from tests.test_migration_links import link_pair, receive_always, send_always


@given(rate=st.integers(1 << 16, 1 << 30), sizes=st.lists(st.integers(1, PIECE), min_size=1, max_size=50),
       pauses=st.lists(st.floats(0, 1), min_size=50, max_size=50))
def test_no_window_has_more_than_the_rate_allows(rate: int, sizes: list[int], pauses: list[float]) -> None:
    limit, now, gone = Bandwidth(rate), 0.0, []
    for size, pause in zip(sizes, pauses):
        now = max(now + pause * size / rate, limit.take(now + pause * size / rate, size))
        gone.append((now, size))
    for first in range(len(gone)):
        total = 0
        for time, size in gone[first:]:
            assert total <= rate * (time - gone[first][0] + BURST_S) * (1 + 1e-9) + 1
            total += size


async def test_links_share_a_limit_and_keep_to_their_own(autojump_clock: trio.testing.MockClock) -> None:
    shared = Bandwidth(10 << 20)
    pairs = [link_pair(shared), link_pair(shared, Bandwidth(1 << 20))]
    with trio.move_on_after(10) as scope:
        async with trio.open_nursery() as nursery:
            for left, right in pairs:
                nursery.start_soon(send_always, left)
                nursery.start_soon(receive_always, right)
    assert scope.cancelled_caught
    first, second = (left.sent / 10 for left, _ in pairs)
    assert second == pytest.approx(1 << 20, rel=0.05)
    assert first + second == pytest.approx(10 << 20, rel=0.05)
    for pair in pairs:
        for link in pair:
            await link.aclose()
