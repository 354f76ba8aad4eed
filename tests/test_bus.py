# SPDX-License-Identifier: GPL-2.0-or-later
"""The buses: who answers, how accesses are split, what nobody answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.devices.bus import Bus, BusOverlap, PortBus


class Memory:
    """A device that remembers the accesses it got, and stores bytes."""

    def __init__(self, length: int, sizes: set[int]) -> None:
        self.sizes = frozenset(sizes)
        self.data = bytearray(length)
        self.accesses: list[tuple[str, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.accesses.append(("read", offset, size))
        return int.from_bytes(self.data[offset:offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.accesses.append(("write", offset, size))
        self.data[offset:offset + size] = value.to_bytes(size, "little")


@pytest.fixture(params=[Bus, PortBus])
def bus(request: pytest.FixtureRequest) -> Bus:
    return request.param()


def test_a_device_sees_offsets(bus: Bus) -> None:
    device = Memory(8, {1})
    bus.attach(0x3F8, 8, device, "com1")
    bus.write(0x3FD, 1, 0x60)
    assert bus.read(0x3FD, 1) == 0x60
    assert device.accesses == [("write", 5, 1), ("read", 5, 1)]
    assert bus.unclaimed == 0


def test_nobody_reads_as_ones_and_is_counted(bus: Bus) -> None:
    assert [bus.read(0x80, size) for size in (1, 2, 4, 8)] == [0xFF, 0xFFFF, 0xFFFF_FFFF, 2**64 - 1]
    bus.write(0x80, 4, 1)
    assert bus.unclaimed == 5


def test_the_end_of_the_space_is_nobodys(bus: Bus) -> None:
    device = Memory(1, {1})
    bus.attach(0xFFFF, 1, device, "last")
    assert bus.read(0xFFFF, 4) == 0xFFFF_FF00


def test_a_size_the_device_does_not_take_is_split(bus: Bus) -> None:
    device = Memory(4, {1})
    bus.attach(0x40, 4, device, "bytes")
    bus.write(0x40, 4, 0x0403_0201)
    assert device.accesses == [("write", offset, 1) for offset in range(4)]
    assert bus.read(0x40, 4) == 0x0403_0201


def test_an_access_across_devices_is_split(bus: Bus) -> None:
    low, high = Memory(2, {1, 2, 4}), Memory(1, {1, 2, 4})
    bus.attach(0x10, 2, low, "low")
    bus.attach(0x12, 1, high, "high")
    bus.write(0x11, 4, 0x4433_2211)
    assert (bytes(low.data), bytes(high.data)) == (b"\0\x11", b"\x22")
    assert bus.read(0x11, 4) == 0xFFFF_2211
    assert bus.unclaimed == 2


@pytest.mark.parametrize(("base", "length"), [(0x0F, 2), (0x10, 1), (0x13, 4), (0x00, 0x100), (0x11, 1)])
def test_overlap_is_refused(bus: Bus, base: int, length: int) -> None:
    bus.attach(0x10, 4, Memory(4, {1}), "first")
    with pytest.raises(BusOverlap, match=r"second at .* overlaps first"):
        bus.attach(base, length, Memory(4, {1}), "second")


def test_detach_frees_the_range(bus: Bus) -> None:
    bus.attach(0x10, 4, Memory(4, {1}), "first")
    kept = Memory(4, {1, 4})
    bus.attach(0x14, 4, kept, "kept")
    bus.detach("first")
    assert bus.read(0x10, 1) == 0xFF
    bus.write(0x14, 4, 7)
    assert kept.accesses == [("write", 0, 4)]
    bus.attach(0x12, 2, Memory(2, {1}), "second")
    assert bus.read(0x12, 2) == 0


ACCESSES = st.lists(st.tuples(st.booleans(), st.integers(0x0C, 0x24), st.sampled_from([1, 2, 4, 8]),
                              st.integers(0, 2**64 - 1)), max_size=40)


@given(ACCESSES)
def test_the_port_bus_is_a_fast_bus(accesses: list[tuple[bool, int, int, int]]) -> None:
    """The dict of whole accesses changes nothing but the speed."""
    pairs: list[tuple[Bus, list[Memory]]] = []
    for bus in (Bus(), PortBus()):
        devices = [Memory(4, {1}), Memory(6, {1, 2}), Memory(4, {1, 2, 4})]
        for base, device in zip((0x10, 0x14, 0x1C), devices, strict=True):
            bus.attach(base, len(device.data), device, hex(base))
        pairs.append((bus, devices))
    for is_read, address, size, value in accesses:
        if is_read:
            assert pairs[0][0].read(address, size) == pairs[1][0].read(address, size)
        else:
            for bus, _ in pairs:
                bus.write(address, size, value & (1 << 8 * size) - 1)
    for one, other in zip(pairs[0][1], pairs[1][1], strict=True):
        assert one.accesses == other.accesses
    assert pairs[0][0].unclaimed == pairs[1][0].unclaimed
