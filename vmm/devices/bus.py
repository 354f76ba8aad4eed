# SPDX-License-Identifier: GPL-2.0-or-later
"""The port and MMIO buses: they find the device behind an address.

A device sees offsets, never addresses.  Accesses nobody claims read all ones and write nowhere, as on an
ISA bus with its pull-up resistors; they are counted.  An access that straddles devices, or has a size
the device does not take, is split into bytes, lowest address first.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable
from operator import attrgetter
from typing import NamedTuple, Protocol

BYTES = frozenset({1})
BYTES_AND_WORDS = frozenset({1, 2})
BYTES_TO_DWORDS = frozenset({1, 2, 4})


class Device(Protocol):
    """What can be attached to a bus.  `sizes` are the access sizes it takes; 1 is always among them."""

    @property
    def sizes(self) -> frozenset[int]:
        """A constant of the class."""

    def read(self, offset: int, size: int) -> int:
        """The value read at `offset`, less than 256**size.  Never raises."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Write `value`, less than 256**size, at `offset`.  Never raises."""


class BusOverlap(ValueError):
    """Two devices claim the same address."""


class Claim(NamedTuple):
    """The addresses base..end-1 belong to a device."""

    base: int
    end: int
    device: Device
    name: str


class Bus:
    """An address space.  Lookup is a bisection: good for the few, rarely used MMIO ranges."""

    def __init__(self) -> None:
        #: sorted by base; claims never overlap
        self.claims: list[Claim] = []
        #: accesses that touched an address nobody claims
        self.unclaimed = 0

    def attach(self, base: int, length: int, device: Device, name: str) -> None:
        """Give base..base+length-1 to `device`.  Raises BusOverlap if another has any of it."""
        claim = Claim(base, base + length, device, name)
        for other in self.claims:
            if other.base < claim.end and claim.base < other.end:
                raise BusOverlap(f"{name} at {base:#x} overlaps {other.name} at {other.base:#x}")
        insort(self.claims, claim, key=attrgetter("base"))

    def detach(self, name: str) -> None:
        """Take the claims of that name off the bus."""
        self.claims = [claim for claim in self.claims if claim.name != name]

    def read(self, address: int, size: int) -> int:
        """The little-endian value of `size` bytes at `address`."""
        claim = self._find(address)
        if claim is not None and address + size <= claim.end and size in claim.device.sizes:
            return claim.device.read(address - claim.base, size)
        value = 0
        missed = False
        for index in range(size):
            claim = self._find(address + index)
            if claim is None:
                missed = True
                byte = 0xFF
            else:
                byte = claim.device.read(address + index - claim.base, 1)
            value |= byte << 8 * index
        self.unclaimed += missed
        return value

    def write(self, address: int, size: int, value: int) -> None:
        """Write the `size` low bytes of `value` at `address`, little endian."""
        claim = self._find(address)
        if claim is not None and address + size <= claim.end and size in claim.device.sizes:
            claim.device.write(address - claim.base, size, value)
            return
        missed = False
        for index in range(size):
            claim = self._find(address + index)
            if claim is None:
                missed = True
            else:
                claim.device.write(address + index - claim.base, 1, value >> 8 * index & 0xFF)
        self.unclaimed += missed

    def _find(self, address: int) -> Claim | None:
        index = bisect_right(self.claims, address, key=attrgetter("base"))
        if index and address < self.claims[index - 1].end:
            return self.claims[index - 1]
        return None


class PortBus(Bus):
    """The port space.  Every exit of a booting kernel's console and timer comes through here, so each
    access one device takes whole is one dict lookup away."""

    def __init__(self) -> None:
        super().__init__()
        #: address | size << 16 -> the device's bound methods and the offset
        self._whole: dict[int, tuple[Callable[[int, int], int], Callable[[int, int, int], None], int]] = {}

    def attach(self, base: int, length: int, device: Device, name: str) -> None:
        """As `Bus.attach`."""
        super().attach(base, length, device, name)
        read, write = device.read, device.write
        for size in device.sizes:
            for offset in range(length - size + 1):
                self._whole[base + offset | size << 16] = (read, write, offset)

    def detach(self, name: str) -> None:
        """As `Bus.detach`."""
        kept = [claim for claim in self.claims if claim.name != name]
        self.claims = []
        self._whole.clear()
        for claim in kept:
            self.attach(claim.base, claim.end - claim.base, claim.device, claim.name)

    def read(self, address: int, size: int) -> int:
        """As `Bus.read`."""
        whole = self._whole.get(address | size << 16)
        if whole is not None:
            return whole[0](whole[2], size)
        return super().read(address, size)

    def write(self, address: int, size: int, value: int) -> None:
        """As `Bus.write`."""
        whole = self._whole.get(address | size << 16)
        if whole is not None:
            whole[1](whole[2], size, value)
        else:
            super().write(address, size, value)
