# SPDX-License-Identifier: GPL-2.0-or-later
"""Laying out a guest's memory for a boot: the memory map, and writes that never overlap."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.boot import e820
from vmm.boot.errors import BootError
from vmm.boot.layout import Layout

MIB = 1 << 20


def test_memory_map_has_the_hole_of_a_pc() -> None:
    assert e820.regions(16 * MIB) == [
        (0, 0x9FC00, e820.RAM),
        (0x9FC00, 0x400, e820.RESERVED),
        (0xE0000, 0x20000, e820.RESERVED),
        (0x100000, 15 * MIB, e820.RAM),
    ]


@pytest.mark.parametrize("memory", [-4096, 0, MIB - 4096, 16 * MIB + 1, (3 << 30) + 4096, 1 << 40])
def test_impossible_memory_is_refused(memory: int) -> None:
    with pytest.raises(BootError, match="cannot have"):
        Layout(memory)


def test_overlap_is_refused_and_names_both() -> None:
    layout = Layout(16 * MIB)
    layout.put(0x100000, b"x" * 100, "the kernel", size=0x2000)
    with pytest.raises(BootError, match=r"the initrd at .* overlaps the kernel"):
        layout.put(0x101FFF, b"x", "the initrd")


def test_kernels_get_no_place_in_the_hole() -> None:
    layout = Layout(16 * MIB)
    for start, size in ((0x9FBFF, 2), (0xA0000, 1), (0xFFFFF, 1), (0x1000, 1 * MIB)):
        with pytest.raises(BootError, match="hole"):
            layout.put_usable(start, b"", "the kernel", size)
    layout.put_usable(0x100000, b"x", "the kernel")


def test_place_high_goes_below_limit_and_claims() -> None:
    layout = Layout(16 * MIB)
    assert layout.place_high(b"x" * 5000, "a", limit=1 << 32) == 16 * MIB - 8192
    assert layout.place_high(b"x", "b", limit=1 << 32) == 16 * MIB - 8192 - 4096
    assert layout.place_high(b"x", "c", limit=8 * MIB) == 8 * MIB - 4096
    with pytest.raises(BootError, match="does not fit"):
        layout.place_high(bytes(15 * MIB), "d", limit=1 << 32)


_actions = st.lists(st.tuples(
    st.sampled_from(("put", "low", "after", "high")),
    st.integers(-5000, 3 * MIB),
    st.integers(0, 200_000),
    st.sampled_from((1, 16, 4096)),
), max_size=12)


@given(_actions)
def test_writes_are_disjoint_and_inside_memory(actions: list[tuple[str, int, int, int]]) -> None:
    layout = Layout(2 * MIB)
    for action, start, size, align in actions:
        data = bytes(size)
        try:
            if action == "put":
                layout.put(start, data, "p")
            elif action == "low":
                assert layout.place_low(data, "l", align) % align == 0
            elif action == "after":
                assert layout.place_after(data, "a", align) % align == 0
            else:
                assert layout.place_high(data, "h", limit=start + size, align=align) % align == 0
        except BootError:
            continue
    spans = sorted((start, start + len(data)) for start, data in layout.writes if len(data))
    assert all(0 <= start < end <= 2 * MIB for start, end in spans)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
