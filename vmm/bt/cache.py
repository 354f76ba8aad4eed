# SPDX-License-Identifier: GPL-2.0-or-later
"""The translation cache: units by mode and guest address, their chains, and their end.

    unit = cache.get(mode, eip, fetch)
    match cache.exits[cpu.enter(block, unit.address)]:
        case Edge() as edge: unit = cache.follow(edge, fetch)      # chained from now on
        case Callout(eip=eip): ...                                 # the monitor executes what is there

The arena is filled region by region, in a circle; before a region is used again all units in it die.  A
unit that follows the one that leads to it takes the place of its trailing jump, and is fallen into.

Invariants: every jump out of a unit owns an exit stub for as long as the unit lives, so it can be unchained
without one; a unit that falls into another dies with it; nothing is written that the verifier has not
accepted.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple, TypeAlias

from vmm.bt.decode import Truncated
from vmm.bt.mode import Mode
from vmm.bt.native.arena import STUB_BYTES, Arena
from vmm.bt.native.jumptable import JumpTable
from vmm.bt.strings import INTO_WINDOW
from vmm.bt.template import Exit
from vmm.bt.translate import Draft, Translator, callout
from vmm.bt.unit import Successor, Unit
from vmm.bt.verify import Layout, Rejected, Verifier
from vmm.memory.pool import PAGE, PAGE_SHIFT

_PAGES = 1 << 32 - PAGE_SHIFT
_JMP_BYTES = 5
_REGIONS = 8
#: modes whose templates are kept
_TRANSLATORS = 64

_address = attrgetter("unit.address")

#: the bytes of a page of guest code, by page number; whatever it raises goes to the caller
Fetch: TypeAlias = Callable[[int], bytes | memoryview]


@dataclass(slots=True, eq=False)
class Translation:
    """A unit in the cache."""

    mode: Mode
    unit: Unit
    #: pages its guest code is in
    pages: tuple[int, ...]
    edges: list[Edge] = field(default_factory=list)
    #: stubs of its callouts
    callouts: list[int] = field(default_factory=list)
    #: jumps of any unit that lead here
    incoming: set[Edge] = field(default_factory=set)
    #: jump tables with an entry for it
    tables: list[JumpTable] = field(default_factory=list)
    alive: bool = True

    @property
    def address(self) -> int:
        """Where it is entered."""
        return self.unit.address


@dataclass(slots=True, eq=False)
class Edge:
    """A direct jump from a unit to a guest address."""

    source: Translation
    successor: Successor
    #: host address of its displacement
    site: int
    stub: int
    #: it is the jump at the unit's end
    trailing: bool
    target: Translation | None = None


class Callout(NamedTuple):
    """The guest instruction at `eip` is the monitor's to execute."""

    translation: Translation
    eip: int


@dataclass(slots=True)
class Counters:
    """What the cache did since it was made."""

    units: int = 0
    instructions: int = 0
    chained: int = 0
    #: jumps that became a fall-through
    elided: int = 0
    #: units that died to make room
    evicted: int = 0
    #: units that died because their code changed
    invalidated: int = 0
    #: units the verifier rejected, each left to the monitor instead
    rejected: int = 0


class TranslationCache:
    """The units in one arena, of any number of guests."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self.verifier = Verifier(
            Layout(arena.units, arena.units_bytes, arena.stubs, STUB_BYTES, arena.stub_count))
        #: what each exit stub stands for
        self.exits: list[Edge | Callout | None] = [None] * arena.stub_count
        self.counters = Counters()
        self._free = list(range(arena.stub_count - 1, -1, -1))
        self._translators: dict[Mode, Translator] = {}
        self._known: dict[tuple[Mode, int], Translation] = {}
        self._by_page: dict[tuple[int, int], set[Translation]] = {}
        self._placed: list[Translation] = []           # by address
        self._region_bytes = arena.units_bytes // _REGIONS
        self._region = 0
        self._next = arena.units
        self._limit = arena.units + self._region_bytes

    def __len__(self) -> int:
        return len(self._placed)

    def find(self, mode: Mode, eip: int) -> Translation | None:
        """The unit that begins at `eip`, if there is one."""
        return self._known.get((mode, eip))

    def get(self, mode: Mode, eip: int, fetch: Fetch) -> Translation:
        """The unit that begins at `eip`; translated now if need be."""
        return self._known.get((mode, eip)) or self._translate(mode, eip, fetch, None)

    def follow(self, edge: Edge, fetch: Fetch) -> Translation:
        """The unit a jump leads to, which from now on it reaches by itself."""
        mode, eip = edge.source.mode, edge.successor.eip
        target = self._known.get((mode, eip)) or self._translate(mode, eip, fetch, edge)
        if edge.target is None and edge.source.alive:
            self._arena.write(edge.site, self.verifier.patch(edge.site, target.address))
            self._join(edge, target)
        return target

    def publish(self, translation: Translation, table: JumpTable) -> None:
        """Let indirect jumps through `table` reach a unit."""
        table.set(translation.unit.eip, translation.address)
        if table not in translation.tables:
            translation.tables.append(table)

    def at(self, address: int) -> Translation | None:
        """The unit that has host code at `address`."""
        index = bisect_right(self._placed, address, key=_address) - 1
        if index < 0:
            return None
        found = self._placed[index]
        return found if address < found.address + len(found.unit.host) else None

    def eip_at(self, address: int) -> int | None:
        """The guest instruction whose host code is at `address`."""
        found = self.at(address)
        return None if found is None else found.unit.eip_at(address - found.address)

    def resume_at(self, address: int) -> int:
        """Where a guest that stands at `address` must be entered: a string instruction from its start."""
        before = address - len(INTO_WINDOW)
        found = self.at(address)
        if found is None or before < found.address or self._arena.read(
                before, len(INTO_WINDOW)) != INTO_WINDOW:
            return address
        starts = any(piece.host_at == before - found.address for piece in found.unit.pieces)
        return before if starts else address

    def units(self) -> Iterator[Unit]:
        """All units as they are now, by address."""
        for translation in self._placed:
            unit = translation.unit
            unit.host = self._arena.read(unit.address, len(unit.host))
            yield unit

    def invalidate(self, space: int, page: int) -> int:
        """The code in a page of linear memory changed: its units die.  How many that were."""
        dead = self._kill(self._by_page.get((space, page), ()))
        self.counters.invalidated += dead
        return dead

    def forget(self, space: int) -> int:
        """A linear memory is gone, with all that is known of it."""
        dead = self._kill([one for one in self._placed if one.mode.space == space])
        for mode in [mode for mode in self._translators if mode.space == space]:
            del self._translators[mode]
        self.counters.invalidated += dead
        return dead

    def _translate(self, mode: Mode, eip: int, fetch: Fetch, edge: Edge | None) -> Translation:
        draft, guest = self._draft(mode, eip, fetch)
        address = self._place(draft, edge)
        try:
            return self._install(mode, draft, guest, address, edge)
        except Rejected:
            self.counters.rejected += 1
            first = draft.pieces[1].guest_at if len(draft.pieces) > 1 else draft.guest_bytes
            alone = callout(eip, first)
            return self._install(mode, alone, guest[:first], self._place(alone, None), None)

    def _draft(self, mode: Mode, eip: int, fetch: Fetch) -> tuple[Draft, bytes]:
        translator = self._translators.get(mode)
        if translator is None:
            if len(self._translators) >= _TRANSLATORS:
                self._translators.clear()
            translator = self._translators[mode] = Translator(mode)
        page, at = eip >> PAGE_SHIFT, eip & PAGE - 1
        code = bytes(fetch(page))       # slices of bytes are cheaper than those of a view
        try:
            draft = translator.translate(code, at, eip)
        except Truncated:
            code = code[at:] + bytes(fetch((page + 1) % _PAGES)[:16])
            at = 0
            draft = translator.translate(code, 0, eip)
        return draft, code[at:at + draft.guest_bytes]

    def _place(self, draft: Draft, edge: Edge | None) -> int:
        """Where the unit is to be: over the trailing jump that leads to it, if that is the last in use."""
        length = len(draft.host)
        while len(self._free) < len(draft.exits):
            self._next_region()
        if self._elides(edge) and self._next - _JMP_BYTES + length <= self._limit:
            return self._next - _JMP_BYTES
        if self._next + length > self._limit:
            self._next_region()
        return self._next

    def _elides(self, edge: Edge | None) -> bool:
        begin = self._arena.units + self._region * self._region_bytes
        return (edge is not None and edge.source.alive and edge.trailing and edge.successor.at > 0
                and edge.site + 4 == self._next != begin)

    def _next_region(self) -> None:
        """Go on in the region used longest ago, whose units die."""
        self._region = (self._region + 1) % _REGIONS
        self._next = self._arena.units + self._region * self._region_bytes
        self._limit = self._next + self._region_bytes
        first, last = (bisect_right(self._placed, bound - 1, key=_address)
                       for bound in (self._next, self._limit))
        self.counters.evicted += self._kill(self._placed[first:last])

    def _install(self, mode: Mode, draft: Draft, guest: bytes, address: int,
                 edge: Edge | None) -> Translation:
        """Give the jumps their targets; have the unit verified; make it known."""
        host, exits = draft.host, draft.exits
        stubs = self._free[len(self._free) - len(exits):]
        known: list[Translation | None] = []
        for number, leads in zip(stubs, exits):
            found = None if leads.callout else self._known.get((mode, leads.eip))
            known.append(found)
            if found is not None:
                to = found.unit.address
            elif leads.eip == draft.eip and not leads.callout:
                to = address
            else:
                to = self._arena.stub(number)
            site = leads.site
            host[site:site + 4] = (to - address - site - 4).to_bytes(4, "little", signed=True)
        code = bytes(host)
        self.verifier.accept(code, address)
        self._arena.write(address, code)
        if stubs:
            del self._free[len(self._free) - len(stubs):]
        first, last = draft.eip >> PAGE_SHIFT, (draft.eip + draft.guest_bytes - 1) >> PAGE_SHIFT
        successors = tuple(
            Successor(leads.eip, leads.at, leads.taken) for leads in exits if not leads.callout)
        unit = Unit(draft.eip, mode.code32, guest, address, code, draft.pieces, successors)
        made = Translation(mode, unit, tuple({first, last % _PAGES}))
        if edge is not None and address == edge.site - 1:
            self._elide(edge, made)
        self._register(made, exits, stubs, known)
        self._next = address + len(code)
        return made

    def _register(self, made: Translation, exits: tuple[Exit, ...], stubs: list[int],
                  known: list[Translation | None]) -> None:
        """The unit is found from now on; its jumps get edges, joined to where they lead already."""
        unit = made.unit
        self._known[made.mode, unit.eip] = made
        for page in made.pages:
            units = self._by_page.get((made.mode.space, page))
            if units is None:
                units = self._by_page[made.mode.space, page] = set()
            units.add(made)
        if self._placed and self._placed[-1].address > unit.address:
            insort(self._placed, made, key=_address)
        else:
            self._placed.append(made)
        following = iter(unit.successors)
        for number, leads, target in zip(stubs, exits, known):
            if leads.callout:
                made.callouts.append(number)
                self.exits[number] = Callout(made, leads.eip)
                continue
            trailing = leads.site + 4 == len(unit.host)
            one = Edge(made, next(following), unit.address + leads.site, number, trailing)
            made.edges.append(one)
            self.exits[number] = one
            if leads.eip == unit.eip:
                self._join(one, made)
            elif target is not None:
                self._join(one, target)
        self.counters.units += 1
        self.counters.instructions += len(unit.pieces)

    def _join(self, edge: Edge, target: Translation) -> None:
        edge.target = target
        edge.successor.chained = True
        target.incoming.add(edge)
        self.counters.chained += 1

    def _elide(self, edge: Edge, target: Translation) -> None:
        """`target` is where the trailing jump to it was."""
        unit = edge.source.unit
        unit.host = unit.host[:-_JMP_BYTES]
        edge.successor.at = len(unit.host)
        self._join(edge, target)
        self.counters.elided += 1

    def _kill(self, doomed: Iterable[Translation]) -> int:
        """Units die, and those that fall into them; jumps to them go to their stubs again."""
        waiting, dead = list(doomed), set[Translation]()
        while waiting:
            one = waiting.pop()
            if one in dead:
                continue
            dead.add(one)
            waiting.extend(edge.source for edge in one.incoming
                           if edge.successor.at == len(edge.source.unit.host))
        for one in dead:
            for edge in one.incoming:
                edge.target, edge.successor.chained = None, False
                if edge.source not in dead:
                    stub = self._arena.stub(edge.stub)
                    self._arena.write(edge.site, self.verifier.patch(edge.site, stub))
            one.incoming.clear()
        for one in dead:
            self._remove(one)
        if dead:
            self._placed = [one for one in self._placed if one.alive]
        return len(dead)

    def _remove(self, dead: Translation) -> None:
        dead.alive = False
        unit = dead.unit
        self.verifier.retract(unit.address, len(unit.host))
        del self._known[dead.mode, unit.eip]
        for page in dead.pages:
            key = (dead.mode.space, page)
            self._by_page[key].discard(dead)
            if not self._by_page[key]:
                del self._by_page[key]
        for table in dead.tables:
            table.drop(unit.eip)
        for edge in dead.edges:
            if edge.target is not None:
                edge.target.incoming.discard(edge)
        stubs = [*dead.callouts, *(edge.stub for edge in dead.edges)]
        for number in stubs:
            self.exits[number] = None
        self._free.extend(stubs)
