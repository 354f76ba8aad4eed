# SPDX-License-Identifier: GPL-2.0-or-later
"""Which part of the swap file holds what: pure accounting, in units of 64 bytes, without the file.

A *slot* is the first unit of a record.  Unit 0 is never given out, so that slot 0 can mean a page of zeroes.

Invariant: every unit from 1 to `end` is of exactly one record or of exactly one hole; no two holes touch one
another, none touches `end`.  A record is there as long as it has owners.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

#: holes up to this size have a list for each size; longer ones, one for each power of two
_EXACT = 127
#: holes of a list that are looked at for one that is long enough
_LOOK = 16


class NoRoom(Exception):
    """The file would have to grow beyond its limit."""


def _bin(size: int) -> int:
    return size if size <= _EXACT else _EXACT - 7 + size.bit_length()


class Holes:
    """What is free below the end of the file."""

    def __init__(self) -> None:
        self.units = 0
        self._size: dict[int, int] = {}      # by first unit
        self._first: dict[int, int] = {}     # by the unit after the last
        #: first units of the holes of each list (a dict, for its order), and a bit for each list not empty
        self._bins: dict[int, dict[int, None]] = {}
        self._filled = 0

    def add(self, first: int, size: int) -> None:
        """Make a hole, one with those it touches."""
        before = self._first.get(first)
        if before is not None:
            size += self.remove(before)
            first = before
        if first + size in self._size:
            size += self.remove(first + size)
        self._size[first] = size
        self._first[first + size] = first
        self._bins.setdefault(_bin(size), {})[first] = None
        self._filled |= 1 << _bin(size)
        self.units += size

    def remove(self, first: int) -> int:
        """The hole that begins at `first` is none any more; returns its size."""
        size = self._size.pop(first)
        del self._first[first + size]
        list_ = self._bins[_bin(size)]
        del list_[first]
        if not list_:
            self._filled &= ~(1 << _bin(size))
        self.units -= size
        return size

    def ending_at(self, unit: int) -> int | None:
        """The hole before `unit`."""
        return self._first.get(unit)

    def fitting(self, size: int) -> int | None:
        """A hole of `size` units or little more."""
        number = _bin(size)
        if number > _EXACT:
            # some of its own list may be too short; all of the next list are long enough
            for first in islice(self._bins.get(number, ()), _LOOK):
                if self._size[first] >= size:
                    return first
            number += 1
        longer = self._filled >> number
        if not longer:
            return None
        return next(iter(self._bins[number + (longer & -longer).bit_length() - 1]))

    def longest(self) -> int | None:
        """The longest hole; of holes longer than all records, one of the longest."""
        return next(iter(self._bins[self._filled.bit_length() - 1])) if self._filled else None

    def size(self, first: int) -> int:
        """Units of the hole that begins at `first`."""
        return self._size[first]

    def longer_than(self, size: int) -> Iterator[tuple[int, int]]:
        """First unit and size of the holes that have at least `size` units."""
        for number in range(_bin(size), self._filled.bit_length()):
            for first in self._bins.get(number, ()):
                if self._size[first] >= size:
                    yield first, self._size[first]

    def __len__(self) -> int:
        return len(self._size)


class Slots:
    """The records of a file that may be `limit` units long."""

    FIRST = 1

    def __init__(self, limit: int) -> None:
        self.limit = limit
        #: units the file must have
        self.end = self.FIRST
        #: units of all records
        self.used = 0
        #: owners of all records
        self.owners = 0
        self.holes = Holes()
        self._sizes: dict[int, int] = {}
        #: owners beyond the first, of records that have some
        self._more: dict[int, int] = {}

    def __len__(self) -> int:
        """How many records there are."""
        return len(self._sizes)

    def alloc(self, sizes: Sequence[int]) -> list[int]:
        """Slots for records of these sizes, with one owner each, side by side where that is possible.

        Raises NoRoom, with nothing allocated.
        """
        starts: list[int] = []
        hole = self.holes.fitting(sum(sizes)) if sizes else None
        if hole is not None:
            self._fill(hole, sizes, starts)
        elif self.holes.units * 4 <= self.end and self.end + sum(sizes) <= self.limit:
            # many small holes cost many small writes: the file rather grows while three quarters are in use
            self._append(sizes, starts)
        else:
            self._scatter(sizes, starts)
        return starts

    def _scatter(self, sizes: Sequence[int], starts: list[int]) -> None:
        """As many as fit in the longest hole, again and again, and the rest at the end."""
        while len(starts) < len(sizes):
            size = sizes[len(starts)]
            hole = self.holes.longest()
            if hole is not None and self.holes.size(hole) >= size:
                self._fill(hole, sizes, starts)
            elif self.end + size <= self.limit:
                self._append([size], starts)
            else:
                self.free(starts)
                raise NoRoom

    def _append(self, sizes: Sequence[int], starts: list[int]) -> None:
        for size in sizes:
            starts.append(self._place(self.end, size))
            self.end += size

    def _fill(self, hole: int, sizes: Sequence[int], starts: list[int]) -> None:
        """Continue `starts` in a hole that has room for at least the next record."""
        left = self.holes.remove(hole)
        while len(starts) < len(sizes) and (size := sizes[len(starts)]) <= left:
            starts.append(self._place(hole, size))
            hole += size
            left -= size
        if left:
            self.holes.add(hole, left)

    def _place(self, start: int, size: int) -> int:
        self._sizes[start] = size
        self.used += size
        self.owners += 1
        return start

    def retain(self, starts: Iterable[int]) -> None:
        """One more owner for each.  Raises KeyError for what is no slot."""
        for start in starts:
            if start not in self._sizes:
                raise KeyError(f"unit {start} is not the start of a record")
            self._more[start] = self._more.get(start, 0) + 1
            self.owners += 1

    def free(self, starts: Iterable[int]) -> int:
        """One owner less for each; returns how many units are free now that were not.

        Raises KeyError for what is no slot.
        """
        before = self.used
        for start in starts:
            more = self._more.get(start, 0)
            if not more:
                self._remove(start)
            elif more == 1:
                del self._more[start]
            else:
                self._more[start] = more - 1
            self.owners -= 1
        return before - self.used

    def _remove(self, start: int) -> None:
        size = self._sizes.pop(start)
        self.used -= size
        if start + size < self.end:
            self.holes.add(start, size)
            return
        self.end = start
        hole = self.holes.ending_at(start)
        if hole is not None:
            self.holes.remove(hole)
            self.end = hole

    def records(self) -> dict[int, tuple[int, int]]:
        """Size and number of owners of every record, by slot."""
        return {start: (size, 1 + self._more.get(start, 0)) for start, size in self._sizes.items()}
