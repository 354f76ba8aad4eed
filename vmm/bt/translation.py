# SPDX-License-Identifier: GPL-2.0-or-later
"""Translations as data: a unit in the cache, and what an exit stub stands for.

There are tens of thousands of units, most of them never looked at again.  So a unit keeps packed what is
seldom asked for: its pieces (`vmm.bt.shape`) and its exits (`vmm.bt.exits`).  Edges and callouts are made of
these when somebody wants one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from vmm.bt import exits, shape
from vmm.bt.decode import Instruction, decode
from vmm.bt.exits import BITS, CALLOUT, ONE, PAGE_MASK, SITE, TAKEN, WIDE
from vmm.bt.unit import Piece
from vmm.memory.pool import PAGE, PAGE_SHIFT

if TYPE_CHECKING:
    from vmm.bt.codepage import CodePage


class Translation:
    """A unit in the cache.

    Invariant: `chained` has a bit for each exit whose jump leads into the unit, or the bridge, that its page
    has at the target.
    """

    __slots__ = ("address", "alive", "chained", "exits", "hits", "length", "offset", "page", "shape", "stub",
                 "tail")

    def __init__(self, page: CodePage, offset: int, tail: bytes, address: int, length: int, pieces: bytes,
                 leaving: int, stub: int, chained: int) -> None:
        self.page = page
        #: where its guest code begins in the page
        self.offset = offset
        #: how the next page has to begin; empty for all but units over a page's end
        self.tail = tail
        #: where its host code is
        self.address = address
        self.length = length
        self.shape = pieces
        #: its jumps, and the stub of the first, followed by those of the others
        self.exits = leaving
        self.stub = stub
        self.chained = chained
        #: how often the monitor entered it, or found it on the CPU
        self.hits = 0
        self.alive = True

    @property
    def eip(self) -> int:
        """Its guest address."""
        return self.page.base + self.offset

    @property
    def guest_bytes(self) -> int:
        """Length of its guest code in the page."""
        return min(shape.guest_bytes(self.shape), PAGE - self.offset)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Its guest instructions."""
        return shape.pieces(self.shape)

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Its direct jumps to other units."""
        return tuple(Edge(self, number, one) for number, one in enumerate(exits.each(self.exits))
                     if not one & CALLOUT)

    @property
    def callout(self) -> Callout | None:
        """The instruction it leaves to the monitor."""
        for number, one in enumerate(exits.each(self.exits)):
            if one & CALLOUT:
                return self.callout_at(one & PAGE_MASK, self.stub + number)
        return None

    @property
    def falls_through(self) -> bool:
        """Whether the unit behind it took the place of its trailing jump."""
        last = self.exits >> BITS or self.exits
        return last >> SITE > self.length

    def eip_at(self, offset: int) -> int:
        """The guest instruction to which the host code at `offset` belongs."""
        return self.eip + shape.find(self.shape, offset)[0] & 0xFFFF_FFFF

    def callout_at(self, at: int, stub: int) -> Callout:
        """The instruction at an offset in the page, which it leaves to the monitor by this stub."""
        page = self.page
        code = (page.code[at:self.offset + self.guest_bytes] + self.tail).ljust(15, b"\0")
        form = decode(code, 0, page.mode.code32)
        return Callout(page.base + at, form, code[:form.length], stub, at in page.simulated)


class Edge:
    """A direct jump from a unit to a guest address in the same page: exit `number` of `source`."""

    __slots__ = ("number", "packed", "source")

    def __init__(self, source: Translation, number: int, packed: int) -> None:
        self.source = source
        self.number = number
        self.packed = packed

    @property
    def eip(self) -> int:
        """Where it leads in the guest."""
        return self.source.page.number << PAGE_SHIFT | self.packed & PAGE_MASK

    @property
    def offset(self) -> int:
        """Where it leads in its page."""
        return self.packed & PAGE_MASK

    @property
    def taken(self) -> bool:
        """It is the branch of a conditional jump, else what follows it."""
        return bool(self.packed & TAKEN)

    @property
    def at(self) -> int:
        """Offset of the jump in the source's host code; its length if the jump is elided."""
        return (self.packed >> SITE) - (2 if self.packed & WIDE else 1)

    @property
    def site(self) -> int:
        """Host address of its displacement."""
        return self.source.address + (self.packed >> SITE)

    @property
    def stub(self) -> int:
        """Number of its stub."""
        return self.source.stub + self.number

    @property
    def trailing(self) -> bool:
        """It is the jump at the unit's end."""
        return (self.packed >> SITE) + 4 == self.source.length

    @property
    def chained(self) -> bool:
        """It leads into its target, not to the monitor."""
        return bool(self.source.chained >> self.number & 1)

    @property
    def target(self) -> Translation | None:
        """The unit it leads into; None when it leads to the monitor."""
        page, offset = self.source.page, self.offset
        return page.units.get(offset) or page.bridges.get(offset) if self.chained else None


class Callout(NamedTuple):
    """The guest instruction at `eip` is the monitor's to execute."""

    eip: int
    form: Instruction
    #: its bytes
    code: bytes
    stub: int
    simulated: bool = False


class Stubs:
    """What each of `count` exit stubs stands for: `stubs[number]`, None while it is free.

    A unit has one of them, or two that follow one another.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        #: of the stubs used so far: the unit, or its callout once that was asked for
        self._owners: list[Translation | Callout | None] = []
        #: by how many there are together
        self._free: tuple[list[int], ...] = [], [], []

    def __len__(self) -> int:
        """How many were ever used."""
        return len(self._owners)

    def __getitem__(self, number: int) -> Edge | Callout | None:
        owner = self._owners[number]
        if not isinstance(owner, Translation):
            return owner
        which = number - owner.stub
        one = owner.exits >> BITS * which & ONE
        if not one & CALLOUT:
            return Edge(owner, which, one)
        found = self._owners[number] = owner.callout_at(one & PAGE_MASK, number)
        return found

    def __iter__(self) -> Iterator[Edge | Callout | None]:
        return map(self.__getitem__, range(len(self._owners)))

    def take(self, count: int) -> int:
        """So many free ones together; the number of the first, or -1 when there are none."""
        if free := self._free[count]:
            return free.pop()
        owners = self._owners
        first = len(owners)
        if first + count > self._count:
            return -1
        owners.extend((None,) * count)
        return first

    def give(self, number: int, count: int, owner: Translation) -> None:
        """They are the unit's."""
        self._owners[number] = owner
        if count > 1:
            self._owners[number + 1] = owner

    def free(self, number: int, count: int) -> None:
        """They are nobody's any more."""
        self._owners[number:number + count] = (None,) * count
        self._free[count].append(number)
