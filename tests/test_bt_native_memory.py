# SPDX-License-Identifier: GPL-2.0-or-later
"""Windows and jump tables: what is mapped where, how many mappings that takes, what it costs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bt_native_rig import host_mappings
from vmm.bt.native import memory
from vmm.bt.native.jumptable import PER_PAGE, JumpTable
from vmm.bt.native.windows import GUARD_BYTES, PAGES, WINDOW_BYTES, MappingBudget, Window, runs
from vmm.memory.pool import Pool


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool(4 << 20)


@pytest.fixture
def window(pool: Pool) -> Iterator[Window]:
    window = Window(pool, MappingBudget())
    yield window
    window.close()


def test_a_window_shows_the_frames_mapped_into_it(pool: Pool, window: Window) -> None:
    assert window.base % WINDOW_BYTES == 0
    pool.page(7)[5] = 0xA5
    window.map(PAGES - 1, 7, writable=True)
    seen = memory.view(window.base + (PAGES - 1) * 4096, 4096)
    assert seen[5] == 0xA5
    seen[6] = 0x5A
    assert pool.page(7)[6] == 0x5A


def test_guards_are_reserved_on_both_sides(window: Window) -> None:
    assert window._reserved <= window.base - GUARD_BYTES
    assert window.base + WINDOW_BYTES + GUARD_BYTES <= window._reserved + window._reserved_bytes


def test_consecutive_frames_are_one_mapping(window: Window) -> None:
    window.map_pages(16, [*range(10, 90), 200, 201])
    assert window.mappings == 4 == host_mappings(window)
    window.protect(20, 4, True)
    assert window.mappings == 6 == host_mappings(window)
    window.protect(20, 4, False)
    assert window.mappings == 4 == host_mappings(window)


PAGE_NUMBERS = st.integers(0, 30) | st.integers(PAGES - 31, PAGES - 12)
CHANGES = st.lists(st.one_of(
    st.tuples(st.just("map"), PAGE_NUMBERS, st.integers(1, 11), st.integers(0, 60), st.booleans()),
    st.tuples(st.just("unmap"), PAGE_NUMBERS, st.integers(1, 11), st.just(0), st.just(False)),
    st.tuples(st.just("protect"), PAGE_NUMBERS, st.integers(1, 11), st.just(0), st.booleans()),
    st.tuples(st.just("clear"), st.just(0), st.just(1), st.just(0), st.just(False))), max_size=12)


@settings(max_examples=100, deadline=None)
@given(CHANGES)
def test_mappings_are_counted_as_the_kernel_does(changes: list[tuple[str, int, int, int, bool]]) -> None:
    budget = MappingBudget()
    window = Window(Pool(1 << 20), budget)
    model: dict[int, tuple[int, bool]] = {}
    for what, page, count, frame, writable in changes:
        span = range(page, page + count)
        if what == "map":
            window.map(page, frame, count, writable)
            model.update({p: (frame + p - page, writable) for p in span})
        elif what == "protect":
            window.protect(page, count, writable)
            model.update({p: (model[p][0], writable) for p in span if p in model})
        elif what == "unmap":
            window.unmap(page, count)
            for p in span:
                model.pop(p, None)
        else:
            window.clear()
            model.clear()
    assert {p: (entry >> 1, bool(entry & 1)) for p, entry in window.pages.items()} == model
    assert window.mappings == host_mappings(window) == budget.used
    window.close()
    assert budget.used == 0


def test_the_fullest_window_pays_when_mappings_run_out(pool: Pool) -> None:
    gone: list[int] = []
    budget = MappingBudget(limit=64)
    small, large = Window(pool, budget), Window(pool, budget, gone.extend)
    small.map(3, 3)
    for page in range(200):
        large.map(2 * page, page)
        assert budget.used <= 64
    assert 3 in small.pages
    assert large.evictions == len(gone) and set(gone).isdisjoint(large.pages)
    assert gone[:3] == [0, 2, 4]       # mapped longest
    assert large.mappings == host_mappings(large)
    small.close()
    large.close()


def test_a_budget_too_small_for_its_windows_is_an_error(pool: Pool) -> None:
    window = Window(pool, MappingBudget(limit=2))
    with pytest.raises(OSError, match="2 mappings are not enough"):
        window.map(0, 0)
    window.close()


@pytest.mark.parametrize(("page", "count"), [(-1, 1), (PAGES, 1), (PAGES - 1, 2), (0, 0)])
def test_nothing_is_mapped_outside_a_window(window: Window, page: int, count: int) -> None:
    with pytest.raises(ValueError, match="4 GiB"):
        window.map(page, 1, count)
    with pytest.raises(ValueError, match="4 GiB"):
        window.protect(page, count, True)
    with pytest.raises(ValueError, match="4 GiB"):
        window.unmap(page, count)


def test_runs_of_numbers() -> None:
    assert list(runs([])) == []
    assert list(runs([5, 6, 7, 9, 1, 2])) == [(5, 3), (9, 1), (1, 2)]


def test_a_jump_table_costs_what_is_entered() -> None:
    table = JumpTable(limit=4)
    assert table.get(0xFFFF_FFFF) == 0 and table.resident_bytes == 0
    table.set(0xFFFF_FFFF, 99)
    table.set(0xFFFF_FFFE, 98)
    assert (table.get(0xFFFF_FFFF), table.get(0xFFFF_FFFE), table.resident_bytes) == (99, 98, 4096)
    table.drop(0xFFFF_FFFF)
    table.drop(0x1000)
    assert table.get(0xFFFF_FFFF) == 0 and table.get(0xFFFF_FFFE) == 98
    for page in range(4):
        table.set(page * PER_PAGE, page + 1)
    assert (table.flushes, table.get(0xFFFF_FFFE), table.resident_bytes) == (1, 0, 4096)
    table.clear()
    assert table.get(3 * PER_PAGE) == 0
    table.close()


def test_a_jump_table_has_at_least_a_page() -> None:
    with pytest.raises(ValueError, match="at least one page"):
        JumpTable(limit=0)


def test_refused_address_space_is_an_error_with_a_reason() -> None:
    with pytest.raises(OSError, match="cannot reserve"):
        memory.reserve(1 << 60)
    for change in (lambda: memory.protect(1, 1, 0), lambda: memory.unmap(1, 1),
                   lambda: memory.advise(1, 1, 4), lambda: memory.map_shared(0, 4096, 1, -1, 0)):
        with pytest.raises(OSError, match="cannot"):
            change()
