# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest-physical map: faults, copy-on-write, the dirty log, device pages, physical access."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.memory.block import VmBlock, check_memory_size, clone_block, new_block
from vmm.memory.errors import BadAddress, OutOfFrames
from vmm.memory.frames import FrameAllocator, LocalFrames, Magazine
from vmm.memory.p2m import P2M, Outcome
from vmm.memory.p2mbits import (
    DIRTY,
    FRAME_MASK,
    LOGGED,
    PRESENT,
    PRIVATE_BITS,
    STORED,
    TABLE_BITS,
    WRITABLE,
)
from vmm.memory.physical import GuestMemory
from vmm.memory.pool import PAGE, PAGE_SHIFT, Pool
from vmm.memory.reclaim import install

MEMORY = 4 << 20
PAGES = MEMORY // PAGE
WINDOW = 1 << 39


class Ram:
    """A block, its frames, its memory."""

    def __init__(self) -> None:
        self.allocator = FrameAllocator(Pool(24 << 20))
        self.frames = LocalFrames(self.allocator)
        self.block = new_block(self.allocator, MEMORY)
        self.p2m = self.block.p2m
        self.p2m.build()
        self.memory = GuestMemory(self.p2m, self.frames)

    def clone(self) -> tuple[VmBlock, GuestMemory]:
        block = clone_block(self.allocator, self.block)
        block.p2m.build()
        return block, GuestMemory(block.p2m, self.frames)


@pytest.fixture
def ram() -> Iterator[Ram]:
    yield Ram()


def nested_walk(p2m: P2M, gpa: int) -> int | None:
    """The entry the silicon finds for a guest-physical address."""
    entry = p2m.root | PRESENT
    for shift in (39, 30, 21, 12):
        entry = p2m.pool.q[(entry & FRAME_MASK) // 8 + (gpa >> shift & 511)]
        if not entry & PRESENT:
            return None
    return entry


# -- faults ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [False, True])
def test_first_touch(ram: Ram, write: bool) -> None:
    assert nested_walk(ram.p2m, 0x5123) is None
    assert ram.p2m.for_read(0x5123, ram.frames) == -1
    assert ram.p2m.fault(0x5123, write, ram.frames) is Outcome.MAPPED
    entry = nested_walk(ram.p2m, 0x5123)
    assert entry is not None and entry & ~FRAME_MASK == PRIVATE_BITS
    assert ram.p2m.for_read(0x5123, ram.frames) == entry & FRAME_MASK | 0x123
    assert ram.block.memory_counts() == {
        "assigned": PAGES, "resident": 1, "private": 1, "shared": 0, "ballooned": 0, "stored": 0}


def test_fault_beyond_the_memory(ram: Ram) -> None:
    assert ram.p2m.fault(MEMORY, True, ram.frames) is Outcome.NOT_RAM
    for access in (lambda: ram.p2m.for_read(MEMORY, ram.frames), lambda:
                   ram.p2m.for_write(MEMORY, ram.frames),
                   lambda: ram.memory.read(MEMORY - 4, 8), lambda: ram.memory.write(MEMORY, b"x")):
        with pytest.raises(BadAddress, match="has no memory"):
            access()


def test_fault_without_a_frame_changes_nothing(ram: Ram) -> None:
    none = Magazine()
    ram.memory.write_u32(0x1000, 7)
    clone, _ = ram.clone()
    before = bytes(clone.leaf())
    for gpa in (0x1000, 0x2000):
        with pytest.raises(OutOfFrames):
            clone.p2m.fault(gpa, True, none)
    assert bytes(clone.leaf()) == before
    assert clone.p2m.dropped == []


def test_an_emptied_balloon_leaves_untouched_pages_and_what_the_log_has(ram: Ram) -> None:
    ram.memory.write(0x1000, b"kept")
    ram.p2m.discard(2, ballooned=True)
    ram.p2m.start_log()
    ram.p2m.discard(3, ballooned=True)
    ram.memory.write(0x4000, b"kept")
    before = list(ram.p2m.leaf)
    ram.p2m.empty_balloon()
    assert (ram.p2m.leaf[2], ram.p2m.leaf[3]) == (0, LOGGED)
    assert [page for page in range(PAGES) if ram.p2m.leaf[page] != before[page]] == [2, 3]


# -- copy-on-write ------------------------------------------------------------------------------------------


def test_copy_on_write(ram: Ram) -> None:
    ram.memory.write(0x3000, b"template")
    block, memory = ram.clone()
    for p2m in (ram.p2m, block.p2m):
        assert not (nested_walk(p2m, 0x3000) or 0) & WRITABLE
    assert block.p2m.fault(0x3000, False, ram.frames) is Outcome.MAPPED
    assert block.memory_counts()["shared"] == 1
    old = block.p2m.for_read(0x3000, ram.frames) >> 12
    assert block.p2m.fault(0x3000, True, ram.frames) is Outcome.REMAPPED
    assert memory.read(0x3000, 8) == b"template"
    memory.write(0x3000, b"clone")
    assert ram.memory.read(0x3000, 8) == b"template"
    assert (block.p2m.dropped, block.p2m.cow_breaks) == ([(3, old)], 1)
    assert block.memory_counts()["shared"] == 0


def test_template_that_is_written_again_keeps_its_clones(ram: Ram) -> None:
    ram.memory.write(0x3000, b"one")
    _, memory = ram.clone()
    version = ram.p2m.version
    ram.memory.write(0x3000, b"two")
    assert ram.p2m.version > version
    assert memory.read(0x3000, 3) == b"one"


# -- dirty log ----------------------------------------------------------------------------------------------


def test_dirty_log_is_exact(ram: Ram) -> None:
    for page in (1, 2, 3, 9):
        ram.memory.write_u32(page * PAGE, page)
    ram.p2m.start_log()
    assert ram.p2m.collect_log().tolist() == []
    ram.memory.read(1 * PAGE, 8)
    ram.memory.write_u32(2 * PAGE, 0)
    ram.memory.write(9 * PAGE + 4090, bytes(12))                    # and page 10, new
    assert ram.p2m.collect_log().tolist() == [2, 9, 10]
    assert ram.p2m.collect_log().tolist() == []
    ram.memory.write_u32(2 * PAGE, 0)
    assert ram.p2m.collect_log().tolist() == [2]
    ram.p2m.stop_log()
    entries = [entry for entry in ram.p2m.leaf if entry & PRESENT]
    assert all(entry & WRITABLE and not entry & LOGGED for entry in entries) and len(entries) == 5
    ram.memory.write_u32(3 * PAGE, 0)
    assert ram.p2m.collect_log().tolist() == []


def test_dirty_log_of_a_clone(ram: Ram) -> None:
    ram.memory.write_u32(0x1000, 1)
    ram.memory.write_u32(0x2000, 2)
    block, memory = ram.clone()
    block.p2m.start_log()
    memory.write_u32(0x2000, 3)
    assert block.p2m.collect_log().tolist() == [2]
    block.p2m.stop_log()
    assert not block.p2m.leaf[1] & WRITABLE, "a shared page became writable"
    assert ram.memory.read_u32(0x2000) == 2


@settings(max_examples=40, deadline=None)
@given(rounds=st.lists(st.tuples(st.sets(st.integers(0, 40)), st.booleans()), max_size=6),
       before=st.sets(st.integers(0, 40)))
def test_dirty_log_by_property(rounds: list[tuple[set[int], bool]], before: set[int]) -> None:
    """Pages written since the last collection, whatever they were before; reads do not count."""
    ram = Ram()
    for page in before:
        ram.memory.write_u32(page * PAGE, 1)
    ram.p2m.start_log()
    since: set[int] = set()
    for pages, collect in rounds:
        for page in pages:
            ram.memory.read_u32(page * PAGE + 8)
            ram.memory.write_u32(page * PAGE, 2)
        since |= pages
        if collect:
            assert ram.p2m.collect_log().tolist() == sorted(since)
            since = set()


# -- device pages -------------------------------------------------------------------------------------------


def test_device_page(ram: Ram) -> None:
    assert ram.p2m.map_device(0xFEE0_0123, WINDOW + 0xFEE0_0123) is False
    assert nested_walk(ram.p2m, 0xFEE0_0FFF) == WINDOW + 0xFEE0_0000 | TABLE_BITS | DIRTY
    assert nested_walk(ram.p2m, 0xFEE0_1000) is None
    ram.p2m.build()
    assert nested_walk(ram.p2m, 0xFEE0_0000) is None


def test_device_pages_beside_ram(ram: Ram) -> None:
    """The page directory whose first half is RAM serves device addresses in its second half."""
    ram.memory.write_u32(MEMORY - 8, 5)
    ram.p2m.map_device(MEMORY, WINDOW + MEMORY)
    assert nested_walk(ram.p2m, MEMORY) == WINDOW + MEMORY | TABLE_BITS | DIRTY
    assert (nested_walk(ram.p2m, MEMORY - 8) or 0) & FRAME_MASK == (
        ram.p2m.for_read(MEMORY - 8, ram.frames) & FRAME_MASK)


@given(st.lists(st.integers(MEMORY >> 12, (1 << 27) - 1), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_device_pages_are_bounded(pages: list[int]) -> None:
    """However many addresses are touched: the last one is mapped, RAM stays, no other memory is used."""
    ram = Ram()
    ram.memory.write_u32(0, 0x1234)
    outside = ram.block.first, ram.block.first + 3
    before = [bytes(ram.p2m.pool.page(frame)) for frame in range(*outside)]
    leaf = bytes(ram.p2m.leaf)
    for page in pages:
        gpa = page << 12
        ram.p2m.map_device(gpa, WINDOW + gpa)
        assert nested_walk(ram.p2m, gpa) == WINDOW + gpa | TABLE_BITS | DIRTY
    assert bytes(ram.p2m.leaf) == leaf
    assert [bytes(ram.p2m.pool.page(frame)) for frame in range(*outside)] == before
    assert ram.p2m._spare_used <= P2M.SPARE


# -- blocks and physical memory -----------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "words"), [
    (0, "at least 1 MiB"), (-4096, "at least 1 MiB"), (4096, "too small"),
    ((3 << 30) + 4096, "at most 3 GiB"),
    ((1 << 20) + 1, "whole number")])
def test_memory_sizes_no_guest_can_have(size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_memory_size(size)


def test_memory_that_ends_inside_a_table() -> None:
    allocator = FrameAllocator(Pool(8 << 20))
    block = new_block(allocator, (2 << 20) + 5 * PAGE)
    block.p2m.build()
    frames = LocalFrames(allocator)
    last = (2 << 20) + 4 * PAGE
    assert block.p2m.fault(last, True, frames) is Outcome.MAPPED
    assert nested_walk(block.p2m, last) is not None
    assert block.p2m.fault(last + PAGE, True, frames) is Outcome.NOT_RAM
    assert VmBlock.frames_for(block.memory_bytes) == 3 + P2M.FIXED + P2M.SPARE + 2


def test_physical_access(ram: Ram) -> None:
    memory = ram.memory
    assert memory.read(0x1FF0, 32) == bytes(32)
    assert ram.block.memory_counts()["resident"] == 0, "reading brought frames"
    memory.write(0x1FFC, bytes(range(8)))
    assert memory.read(0x1FFB, 10) == b"\0" + bytes(range(8)) + b"\0"
    memory.write_u64(0x2FFC, 0x1122334455667788)
    assert memory.read_u64(0x2FFC) == 0x1122334455667788
    assert (memory.read_u32(0x2FFC), memory.read_u32(0x3000)) == (0x55667788, 0x11223344)
    memory.write(0, memoryview(b"view"))
    assert memory.read(0, 4) == b"view"


# -- traces ------------------------------------------------------------------------------------------------


def test_a_page_that_was_traced_while_it_was_elsewhere_is_not_writable_when_it_comes(ram: Ram) -> None:
    """Brought in by a fault or installed, it takes a write's own fault, which sets the trace off."""
    p2m, leaf = ram.p2m, ram.block.leaf()
    seen: list[int] = []
    p2m.on_trace = seen.append
    p2m.fetch = lambda slot, into: None
    for page in 1, 2, 3:
        leaf[page] = np.uint64(7 << PAGE_SHIFT | STORED)
        p2m.trace(page)
    assert p2m.fault(1 << PAGE_SHIFT, False, ram.frames) is Outcome.MAPPED
    install(p2m, np.array([2]), np.array([ram.frames.take()]), np.array([7]))
    assert not int(leaf[1]) & WRITABLE and not int(leaf[2]) & WRITABLE and seen == []
    for page in 1, 2, 3:
        ram.memory.write(page << PAGE_SHIFT, b"new")
        assert int(leaf[page]) & WRITABLE and page not in p2m.traced
    assert seen == [1, 2, 3]
