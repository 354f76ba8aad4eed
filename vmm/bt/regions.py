# SPDX-License-Identifier: GPL-2.0-or-later
"""The room for units: regions filled one after the other, in a circle, and who is where in them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm.bt.translation import Translation

_REGIONS = 8


class _Region:
    """Invariant: the units are ordered by address, and `addresses` has theirs."""

    __slots__ = ("addresses", "begin", "units")

    def __init__(self, begin: int) -> None:
        self.begin = begin
        self.addresses: list[int] = []
        self.units: list[Translation] = []


class Regions:
    """Who is where among `size` bytes from `begin` on."""

    def __init__(self, begin: int, size: int) -> None:
        self._begin = begin
        self._bytes = size // _REGIONS
        self._regions = [_Region(begin + number * self._bytes) for number in range(_REGIONS)]
        self._number = 0
        self._current = self._regions[0]
        #: of the current region: where it begins, behind its last unit, and where it ends
        self.begin = self.next = begin
        self.limit = begin + self._bytes

    def __len__(self) -> int:
        return sum(len(region.units) for region in self._regions)

    def __iter__(self) -> Iterator[Translation]:
        """All units, by address."""
        for region in self._regions:
            yield from region.units

    def advance(self) -> list[Translation]:
        """Go on in the region used longest ago; the units in it, which are to be removed."""
        self._number = (self._number + 1) % _REGIONS
        self._current = region = self._regions[self._number]
        self.begin = self.next = region.begin
        self.limit = region.begin + self._bytes
        return list(region.units)

    def add(self, unit: Translation, address: int, length: int) -> None:
        """A unit in the current region, behind all others there."""
        region = self._current
        region.addresses.append(address)
        region.units.append(unit)
        self.next = address + length

    def remove(self, unit: Translation) -> None:
        """The unit is gone.  Its place stays free until the region's turn comes again."""
        region = self._regions[(unit.address - self._begin) // self._bytes]
        index = bisect_left(region.addresses, unit.address)
        del region.addresses[index], region.units[index]

    def at(self, address: int) -> Translation | None:
        """The unit that has host code at `address`."""
        number = (address - self._begin) // self._bytes
        if not 0 <= number < _REGIONS:
            return None
        region = self._regions[number]
        index = bisect_right(region.addresses, address) - 1
        if index < 0:
            return None
        found = region.units[index]
        return found if address < found.address + found.length else None
