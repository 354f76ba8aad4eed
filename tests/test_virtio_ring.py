# SPDX-License-Identifier: GPL-2.0-or-later
"""The split virtqueue: what a driver may put there, and everything it may not."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.virtio_rig import Ram
from vmm.devices.virtio.ring import (
    INDIRECT,
    MOST_DESCRIPTORS,
    NEXT,
    NO_INTERRUPT,
    WRITE,
    Chain,
    Malformed,
    Ring,
    Segment,
)
from vmm.memory.errors import BadAddress, OutOfFrames
from vmm.state import StateError

SIZE = 8
TABLE, AVAILABLE, USED, SECOND_TABLE, BUFFER = 0x1000, 0x1400, 0x1800, 0x2000, 0x3000
MEMORY = 0x4000

Descriptor = tuple[int, int, int, int]


def ring_of(*descriptors: Descriptor, indirect: bool = True, second: tuple[Descriptor, ...] = (),
            size: int = SIZE) -> tuple[Ring, Ram]:
    """A queue with these descriptors, the first of which is available."""
    ram = Ram(MEMORY)
    for place, table in ((TABLE, descriptors), (SECOND_TABLE, second)):
        for index, descriptor in enumerate(table):
            struct.pack_into("<QIHH", ram.data, place + 16 * index, *descriptor)
    struct.pack_into("<HHH", ram.data, AVAILABLE, 0, 1, 0)
    ring = Ring()
    ring.descriptors, ring.driver, ring.device = TABLE, AVAILABLE, USED
    ring.resize(size)
    ring.enable(indirect)
    return ring, ram


def make_available(ram: Ram, position: int, head: int, size: int = SIZE) -> None:
    struct.pack_into("<H", ram.data, AVAILABLE + 4 + 2 * (position % size), head)
    struct.pack_into("<H", ram.data, AVAILABLE + 2, position + 1 & 0xFFFF)


def test_nothing_is_available() -> None:
    ring, ram = ring_of()
    struct.pack_into("<H", ram.data, AVAILABLE + 2, 0)
    assert ring.next(ram) is None


def test_a_chain_and_its_end() -> None:
    ring, ram = ring_of((BUFFER, 4, NEXT, 2), (0, 0, 0, 0), (BUFFER + 4, 4, NEXT, 5), (0,) * 4, (0,) * 4,
                        (BUFFER + 16, 10, WRITE, 0))
    ram.data[BUFFER:BUFFER + 8] = b"abcdefgh"
    chain = ring.next(ram)
    assert chain == Chain(0, (Segment(BUFFER, 4), Segment(BUFFER + 4, 4)), (Segment(BUFFER + 16, 10),))
    assert chain.read(ram, 2, 4) == b"cdef"
    assert chain.read(ram, 6, 100) == b"gh"
    chain.write(ram, b"12345")
    assert ram.data[BUFFER + 16:BUFFER + 22] == b"12345\0"
    assert ring.next(ram) == chain              # it is not taken before it is finished
    assert ring.finish(ram, chain, 5)
    assert struct.unpack_from("<HHII", ram.data, USED) == (0, 1, 0, 5)
    assert ring.next(ram) is None


def test_an_indirect_table_behind_a_direct_descriptor() -> None:
    ring, ram = ring_of((BUFFER, 4, NEXT, 1), (SECOND_TABLE, 32, INDIRECT, 0),
                        second=((BUFFER + 8, 8, NEXT, 1), (BUFFER + 32, 1, WRITE, 0)))
    pieces = Segment(BUFFER, 4), Segment(BUFFER + 8, 8)
    assert ring.next(ram) == Chain(0, pieces, (Segment(BUFFER + 32, 1),))


def test_indices_wrap() -> None:
    ring, ram = ring_of((BUFFER, 1, 0, 0))
    ring.position = 0xFFFF
    make_available(ram, 0xFFFF, 0)
    chain = ring.next(ram)
    assert chain is not None
    ring.finish(ram, chain, 0)
    assert ring.position == 0
    assert struct.unpack_from("<H", ram.data, USED + 2) == (0,)
    make_available(ram, 0, 0)
    assert ring.next(ram) == chain


def test_an_interrupt_is_suppressed() -> None:
    ring, ram = ring_of((BUFFER, 1, 0, 0))
    struct.pack_into("<H", ram.data, AVAILABLE, NO_INTERRUPT)
    chain = ring.next(ram)
    assert chain is not None
    assert not ring.finish(ram, chain, 0)


@pytest.mark.parametrize(("descriptors", "second"), [
    ([(BUFFER, 1, NEXT, 0)], ()),                                                   # leads to itself
    ([(BUFFER, 1, NEXT, 1), (BUFFER, 1, NEXT, 0)], ()),
    ([(BUFFER, 1, NEXT, SIZE)], ()),                                                # beyond the table
    ([(BUFFER, 1, WRITE | NEXT, 1), (BUFFER, 1, 0, 0)], ()),                        # read behind written
    ([(BUFFER, 1 << 31, NEXT, 1), (0, 1 << 31, NEXT, 2), (0, 1, 0, 0)], ()),        # more than 4 GiB
    ([(SECOND_TABLE, 0, INDIRECT, 0)], ()),
    ([(SECOND_TABLE, 17, INDIRECT, 0)], ((BUFFER, 1, 0, 0),)),
    ([(SECOND_TABLE, 16, INDIRECT | NEXT, 0)], ((BUFFER, 1, 0, 0),)),
    ([(SECOND_TABLE, 16 * (SIZE + 1), INDIRECT, 0)], ((BUFFER, 1, 0, 0),)),
    ([(SECOND_TABLE, 0xFFFF_FFF0, INDIRECT, 0)], ()),
    ([(SECOND_TABLE, 16, INDIRECT, 0)], ((SECOND_TABLE, 16, INDIRECT, 0),)),        # a table in a table
    ([(SECOND_TABLE, 16, INDIRECT, 0)], ((BUFFER, 1, NEXT, 1),)),
    ([(SECOND_TABLE, 16, INDIRECT, 0)], ((BUFFER, 1, NEXT, 0),)),
], ids=str)
def test_a_malformed_chain(descriptors: list[Descriptor], second: tuple[Descriptor, ...]) -> None:
    ring, ram = ring_of(*descriptors, second=second)
    with pytest.raises(Malformed):
        ring.next(ram)
    assert ram.accesses < 8


def test_an_indirect_table_that_was_not_negotiated() -> None:
    ring, ram = ring_of((SECOND_TABLE, 16, INDIRECT, 0), second=((BUFFER, 1, 0, 0),), indirect=False)
    with pytest.raises(Malformed, match="indirect"):
        ring.next(ram)


@pytest.mark.parametrize("index", [SIZE + 1, 0x8000, 0xFFFF])
def test_an_index_too_far_ahead_or_running_backwards(index: int) -> None:
    ring, ram = ring_of((BUFFER, 1, 0, 0))
    struct.pack_into("<H", ram.data, AVAILABLE + 2, index)
    with pytest.raises(Malformed, match="requests"):
        ring.next(ram)


def test_a_head_beyond_the_table() -> None:
    ring, ram = ring_of((BUFFER, 1, 0, 0))
    make_available(ram, 0, SIZE)
    with pytest.raises(Malformed, match="descriptor 8"):
        ring.next(ram)


@pytest.mark.parametrize("part", ["descriptors", "driver", "device"])
@pytest.mark.parametrize("address", [MEMORY, MEMORY - 2, (1 << 64) - 16])
def test_a_part_outside_memory(part: str, address: int) -> None:
    ring, ram = ring_of((BUFFER, 1, 0, 0))
    chain = ring.next(ram)
    assert chain is not None
    setattr(ring, part, address)
    with pytest.raises(BadAddress):
        ring.next(ram)
        ring.position += 7
        ring.finish(ram, chain, 0)


@pytest.mark.parametrize("size", [0, 3, 6, 33, 64, 0xFFFF_FFFF])
def test_a_size_that_cannot_be(size: int) -> None:
    ring = Ring()
    ring.resize(size)
    with pytest.raises(Malformed, match="1, 2, 4"):
        ring.enable(True)
    assert not ring.ready


@pytest.mark.parametrize("part", ["descriptors", "driver", "device"])
def test_a_part_that_is_not_aligned(part: str) -> None:
    ring, _ = ring_of()
    setattr(ring, part, 0x1001)
    with pytest.raises(Malformed, match="aligned"):
        ring.enable(True)


def test_without_a_frame_nothing_has_happened() -> None:
    ring, ram = ring_of((BUFFER, 4, 0, 0))
    before = ring.save()
    for ram.refuse in (1, 2, 3):            # the index, the slot, the table
        with pytest.raises(OutOfFrames):
            ring.next(ram)
        assert ring.save() == before
    chain = ring.next(ram)
    assert chain is not None
    for ram.refuse in (1, 2, 3):            # the flags, the element, the index
        with pytest.raises(OutOfFrames):
            ring.finish(ram, chain, 4)
        assert ring.save() == before
        assert struct.unpack_from("<H", ram.data, USED + 2) == (0,)
    assert ring.finish(ram, chain, 4)
    assert struct.unpack_from("<HHII", ram.data, USED) == (0, 1, 0, 4)


def test_a_queue_is_saved_and_loaded() -> None:
    ring, _ = ring_of((BUFFER, 4, 0, 0))
    ring.position, ring.done = 12, 34
    other = Ring()
    other.load(ring.save())
    assert other.save() == ring.save()
    for name, value in (("size", 3), ("size", 64), ("position", 1 << 16), ("descriptors", 1 << 64),
                        ("ready", 1)):
        with pytest.raises(StateError, match=name):
            other.load(ring.save() | {name: value})
    other.load(ring.save() | {"size": 0})
    assert not other.ready


ADDRESS = st.one_of(st.sampled_from([0, TABLE, AVAILABLE, USED, SECOND_TABLE, BUFFER, MEMORY - 1, MEMORY]),
                    st.integers(0, MEMORY), st.integers(0, 2**64 - 1))
LENGTH = st.one_of(st.integers(0, 64), st.sampled_from([16, 32, 128, 0xFFFF_FFFF]), st.integers(0, 2**32 - 1))
FLAGS = st.one_of(st.integers(0, 7), st.integers(0, 0xFFFF))
INDEX = st.one_of(st.integers(0, SIZE), st.integers(0, 0xFFFF))
TABLE_OF = st.lists(st.tuples(ADDRESS, LENGTH, FLAGS, INDEX), max_size=SIZE)


@given(TABLE_OF, TABLE_OF, st.lists(INDEX, min_size=SIZE, max_size=SIZE), INDEX, INDEX, st.integers(0, 8),
       st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=400, deadline=None)
def test_whatever_a_driver_writes(descriptors: list[Descriptor], second: list[Descriptor], heads: list[int],
                                  index: int, position: int, refused: int, size: int) -> None:
    """A queue answers, refuses, or asks to be asked again, after few accesses; it does not move by itself."""
    ring, ram = ring_of(*descriptors, second=tuple(second), size=size)
    struct.pack_into(f"<HH{SIZE}H", ram.data, AVAILABLE, 0, index, *heads)
    ring.position = position
    for turn in range(4):
        before = ring.save()
        ram.accesses, ram.refuse = 0, int(turn == 0 and refused == 0)
        try:
            chain = ring.next(ram)
        except OutOfFrames:
            assert turn == 0
            continue
        except (Malformed, BadAddress):
            break
        finally:
            assert ram.accesses <= 4
            assert ring.save() == before
        if chain is None:
            break
        assert len(chain.readable) + len(chain.writable) <= min(size, MOST_DESCRIPTORS)
        with suppress(BadAddress):
            assert len(chain.read(ram, refused, 100)) <= 100
        with suppress(BadAddress):
            ring.finish(ram, chain, 0)
            assert ring.position == before["position"] + 1 & 0xFFFF
