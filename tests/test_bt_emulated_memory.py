# SPDX-License-Identifier: GPL-2.0-or-later
"""Windows and jump tables of the emulated CPU, as translated code sees them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bt_cpu_rig import Rig
from vmm.bt.cpu import Window
from vmm.bt.native.block import Block
from vmm.bt.native.jumptable import PER_PAGE
from vmm.bt.native.trampolines import FAULT, MISS
from vmm.bt.native.windows import PAGES, WINDOW_BYTES, MappingBudget
from vmm.memory.pool import Pool

# mov eax, gs:[ebx]   /   mov gs:[ebx + 4], eax
LOAD, STORE = "65678B03", "6567894304"
AT_STORE = 64


class Prober(Rig):
    """Reads and writes guest addresses with code of its own; each frame begins with its number."""

    def probe(self, page: int, block: Block | None = None) -> tuple[int, bool] | None:
        """The frame a page shows, and whether it may be written; None when nothing is there."""
        block, units = block or self.block, self.cpu.arena.units
        block.set("rbx", page << 12)
        if self.cpu.enter(block, units) == FAULT:
            assert block.fault()[:3] == (14, 4, block.get("window") + (page << 12))
            return None
        writable = self.cpu.enter(block, units + AT_STORE) != FAULT
        if not writable:
            assert block.fault()[:3] == (14, 7, block.get("window") + (page << 12) + 4)
        return block.get("rax"), writable

    def new_window(self, budget: MappingBudget | None = None) -> tuple[Window, Block]:
        window = self.cpu.new_window(self.pool, budget or self.budget)
        return window, self.new_block(window)


@pytest.fixture(scope="module")
def shared() -> Iterator[Prober]:
    rig = Prober.of("emulated")
    assert isinstance(rig, Prober)
    yield rig
    rig.close()


@pytest.fixture
def rig(shared: Prober) -> Prober:
    shared.reset()
    shared.put(LOAD)
    shared.put(STORE, AT_STORE)
    for frame in range(shared.pool.frames):
        shared.pool.q[frame * 512] = frame
    return shared


SPAN = (*range(44), *range(PAGES - 32, PAGES))
PAGE_NUMBERS = st.integers(0, 30) | st.integers(PAGES - 31, PAGES - 12)
CHANGES = st.lists(st.one_of(
    st.tuples(st.just("map"), PAGE_NUMBERS, st.integers(1, 11), st.integers(0, 60), st.booleans()),
    st.tuples(st.just("unmap"), PAGE_NUMBERS, st.integers(1, 11), st.just(0), st.just(False)),
    st.tuples(st.just("protect"), PAGE_NUMBERS, st.integers(1, 11), st.just(0), st.booleans()),
    st.tuples(st.just("clear"), st.just(0), st.just(1), st.just(0), st.just(False))), max_size=8)


def test_translated_code_sees_what_is_mapped_after_every_change(rig: Prober) -> None:
    @settings(max_examples=25, deadline=None)
    @given(CHANGES)
    def check(changes: list[tuple[str, int, int, int, bool]]) -> None:
        window, block = rig.new_window()
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
            assert {page: rig.probe(page, block) for page in SPAN} == {page: model.get(page) for page in SPAN}
            assert {p: (entry >> 1, bool(entry & 1)) for p, entry in window.pages.items()} == model
            assert rig.budget.used == window.mappings + rig.window.mappings
        window.close()
        block.close()
        assert rig.budget.used == rig.window.mappings
    check()


def test_whole_windows_and_scattered_frames(rig: Prober) -> None:
    rig.window.map(510, 3, 600, writable=True)
    assert [rig.probe(page) for page in (509, 510, 511, 512, 1023, 1024, 1109, 1110)] == [
        None, (3, True), (4, True), (5, True), (516, True), (517, True), (602, True), None]
    # the root, one middle table, three leaves
    assert rig.window.mappings == 5
    rig.window.map_pages(0x80000, [9, 7, 8])
    assert [rig.probe(0x80000 + index) for index in range(3)] == [(9, False), (7, False), (8, False)]
    assert rig.window.mappings == 7
    rig.window.unmap(0, PAGES)
    assert rig.probe(510) is rig.probe(0x80000) is None and not rig.window.pages


def test_the_fullest_window_pays_when_tables_run_out(rig: Prober) -> None:
    gone: list[int] = []
    budget = MappingBudget(limit=40)
    small = rig.cpu.new_window(rig.pool, budget)
    large = rig.cpu.new_window(rig.pool, budget, gone.extend)
    small.map(3, 3)
    for page in range(200):
        large.map(512 * page, page)
        assert budget.used <= 40
    assert 3 in small.pages
    assert large.evictions == len(gone) and set(gone).isdisjoint(large.pages)
    assert gone[:3] == [0, 512, 1024]      # mapped longest
    small.close()
    large.close()
    assert budget.used == 0
    tiny = rig.cpu.new_window(rig.pool, MappingBudget(limit=2))
    with pytest.raises(OSError, match="2 mappings are not enough"):
        tiny.map(0, 0)
    tiny.close()


@pytest.mark.parametrize(("page", "count"), [(-1, 1), (PAGES, 1), (PAGES - 1, 2), (0, 0)])
def test_nothing_is_mapped_outside_a_window(rig: Prober, page: int, count: int) -> None:
    for change in (lambda: rig.window.map(page, 1, count), lambda: rig.window.unmap(page, count),
                   lambda: rig.window.protect(page, count, True)):
        with pytest.raises(ValueError, match="4 GiB"):
            change()


def test_a_closed_window_is_gone_and_its_place_is_the_next_ones(rig: Prober) -> None:
    window, block = rig.new_window()
    window.map(1, 21)
    assert rig.probe(1, block) == (21, False)
    place = window.base
    window.close()
    assert rig.probe(1, block) is None
    block.close()
    window, block = rig.new_window()
    assert window.base == place and rig.probe(1, block) is None
    window.map(1, 22, writable=True)
    assert rig.probe(1, block) == (22, True)
    window.close()
    block.close()


def test_windows_show_one_pool(rig: Prober) -> None:
    with pytest.raises(ValueError, match="one pool"):
        rig.cpu.new_window(Pool(1 << 20), rig.budget)


def test_windows_are_aligned_and_far_apart(rig: Prober) -> None:
    windows = [rig.cpu.new_window(rig.pool, rig.budget) for _ in range(130)]
    bases = sorted(window.base for window in windows)
    assert all(base % WINDOW_BYTES == 0 for base in bases)
    assert all(after - before >= 2 * WINDOW_BYTES for before, after in pairwise(bases))
    for window in windows:
        window.map(PAGES - 1, 5)
        window.close()


def test_a_jump_table_leads_where_it_says(rig: Prober) -> None:
    jump = rig.cpu.arena.units + 256
    rig.cpu.arena.write(jump, bytes.fromhex("43FF24C7"))
    stub = rig.cpu.arena.stub
    table = rig.cpu.new_table(limit=4)
    block = rig.new_block(rig.window)
    block.set("jump_table", table.base)

    def leads(guest: int) -> int:
        block.set("r8", guest)
        return rig.cpu.enter(block, jump)

    assert leads(0) == leads(0xFFFF_FFFF) == MISS and table.resident_bytes == 0
    table.set(0xFFFF_FFFF, stub(9))
    table.set(0xFFFF_FFFE, stub(8))
    assert (leads(0xFFFF_FFFF), leads(0xFFFF_FFFE), leads(0xFFFF_FFFD)) == (9, 8, MISS)
    table.drop(0xFFFF_FFFF)
    table.drop(0x1000)
    assert (table.get(0xFFFF_FFFF), leads(0xFFFF_FFFF), leads(0xFFFF_FFFE)) == (0, MISS, 8)
    for page in range(4):
        table.set(page * PER_PAGE, stub(page + 1))
    assert (table.flushes, table.get(0xFFFF_FFFE), leads(0xFFFF_FFFE)) == (1, 0, MISS)
    assert table.resident_bytes == 4096
    assert leads(3 * PER_PAGE) == 4
    table.set(0x1FF8, stub(1))
    table.set(0x2FFF, stub(2))
    table.set(0x3000, stub(3))
    table.drop_page(2)
    assert [leads(guest) for guest in (0x1FF8, 0x2FFF, 0x3000)] == [MISS, MISS, 3]
    table.clear()
    assert leads(0x3000) == MISS
    table.close()
    assert leads(0x3000) == MISS
    block.close()


def test_a_jump_table_has_at_least_a_page(rig: Prober) -> None:
    with pytest.raises(ValueError, match="at least one page"):
        rig.cpu.new_table(limit=0)
