# SPDX-License-Identifier: GPL-2.0-or-later
"""The translation cache: units by the page of guest code they belong to, their chains, and their end.

    page = cache.page(mode, number, code)
    unit = cache.get(page, eip, beyond)
    match cache.exits[cpu.enter(block, unit.address)]:
        case Edge() as edge: unit = cache.follow(edge, beyond)     # chained from now on
        case Callout(eip=eip): ...                                 # the monitor executes what is there

The arena is filled region by region, in a circle; before a region is used again all units in it die.  A
unit that follows the one that leads to it takes the place of its trailing jump, and is fallen into.

Invariants: every jump out of a unit owns an exit stub for as long as the unit lives, so it can be unchained
without one; direct jumps lead to units of the same page (vmm/bt/codepage.py says why); a unit that falls into
another dies with it; nothing is written that the verifier has not accepted.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple, TypeAlias

from vmm.bt.codepage import TAIL_BYTES, CodePage
from vmm.bt.cpu import Arena, JumpTable
from vmm.bt.decode import Instruction, Truncated, decode
from vmm.bt.mode import Mode
from vmm.bt.native.arena import STUB_BYTES
from vmm.bt.strings import INTO_WINDOW
from vmm.bt.template import Exit
from vmm.bt.translate import Draft, Translator, bridge, callout
from vmm.bt.unit import Piece, Successor, Unit
from vmm.bt.verify import Layout, Rejected, Verifier
from vmm.memory.pool import PAGE

_JMP_BYTES = 5
_REGIONS = 8
#: modes whose templates are kept
_TRANSLATORS = 64
#: pages known without a unit before they are looked through
_MOST_PAGES = 16384

_address = attrgetter("address")

#: how the page behind the one in question begins; whatever it raises goes to the caller
Beyond: TypeAlias = Callable[[], bytes]


@dataclass(slots=True, eq=False)
class Translation:
    """A unit in the cache."""

    page: CodePage
    #: where its guest code begins in the page, and how long it is
    offset: int
    guest_bytes: int
    #: how the next page has to begin; empty for all but units over a page's end
    tail: bytes
    #: where its host code is
    address: int
    length: int
    pieces: tuple[Piece, ...]
    edges: tuple[Edge, ...] = ()
    callout: Callout | None = None
    #: jumps of any unit that lead here
    incoming: list[Edge] = field(default_factory=list)
    #: how often the monitor entered it, or found it on the CPU
    hits: int = 0
    alive: bool = True

    @property
    def eip(self) -> int:
        """Its guest address."""
        return self.page.base + self.offset

    def eip_at(self, offset: int) -> int:
        """The guest instruction to which the host code at `offset` belongs."""
        at = 0
        for piece in self.pieces:
            if piece.host_at > offset:
                break
            at = piece.guest_at
        return self.eip + at & 0xFFFF_FFFF


@dataclass(slots=True, eq=False)
class Edge:
    """A direct jump from a unit to a guest address in the same page."""

    source: Translation
    eip: int
    #: offset of the jump in the source's host code; its length if the jump is elided
    at: int
    #: the branch of a conditional jump, else what follows it
    taken: bool
    #: host address of its displacement
    site: int
    stub: int
    #: it is the jump at the unit's end
    trailing: bool
    target: Translation | None = None


class Callout(NamedTuple):
    """The guest instruction at `eip` is the monitor's to execute."""

    eip: int
    form: Instruction
    #: its bytes
    code: bytes
    stub: int
    simulated: bool = False


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
    #: units found ready by somebody who had not translated them
    shared: int = 0
    pages: int = 0


class TranslationCache:
    """The units in one arena, of any number of guests."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self.verifier = Verifier(
            Layout(arena.units, arena.units_bytes, arena.stubs, STUB_BYTES, arena.stub_count))
        #: what each exit stub stands for
        self.exits: list[Edge | Callout | None] = [None] * arena.stub_count
        self.counters = Counters()
        #: jump tables that may have entries for units here
        self.tables: list[JumpTable] = []
        self._free = list(range(arena.stub_count - 1, -1, -1))
        self._translators: dict[Mode, Translator] = {}
        self._pages: dict[tuple[Mode, int, bytes], CodePage] = {}
        self._placed: list[Translation] = []           # by address
        self._region_bytes = arena.units_bytes // _REGIONS
        self._region = 0
        self._next = arena.units
        self._limit = arena.units + self._region_bytes

    def __len__(self) -> int:
        return len(self._placed)

    @property
    def used_bytes(self) -> int:
        """Host code of units alive."""
        return sum(one.length for one in self._placed)

    # -- pages and units ---------------------------------------------------------------------------

    def page(self, mode: Mode, number: int, code: bytes) -> CodePage:
        """The page with these bytes at this place, known already or new."""
        key = mode, number, code
        found = self._pages.get(key)
        if found is None:
            if len(self._pages) >= _MOST_PAGES:
                self._pages = {key: page for key, page in self._pages.items() if page.units}
            found = self._pages[key] = CodePage(mode, number, code)
            self.counters.pages += 1
        return found

    def find(self, page: CodePage, eip: int, beyond: Beyond) -> Translation | None:
        """The unit that begins at `eip`, if there is one."""
        offset = eip & PAGE - 1
        found = page.units.get(offset)
        if found is None and page.straddlers:
            found = page.unit_at(offset, beyond())
        return found

    def get(self, page: CodePage, eip: int, beyond: Beyond) -> Translation:
        """The unit that begins at `eip`; translated now if need be."""
        return self.find(page, eip, beyond) or self._translate(page, eip & PAGE - 1, beyond, None)

    def follow(self, edge: Edge, beyond: Beyond) -> Translation:
        """The unit a jump leads to, which from now on it reaches by itself."""
        page = edge.source.page
        target = self.find(page, edge.eip, beyond) or self._translate(page, edge.eip & PAGE - 1, beyond, edge)
        if edge.target is None and edge.source.alive:
            reached = self._bridge(page, edge.eip) if target.tail else target
            if edge.source.alive and target.alive:
                self._arena.write(edge.site, self.verifier.patch(edge.site, reached.address))
                self._join(edge, reached)
        return target if target.alive else self.follow(edge, beyond)

    def _bridge(self, page: CodePage, eip: int) -> Translation:
        """A jump through the table to a unit over the page's end, since only the table knows which one."""
        found = page.bridges.get(eip & PAGE - 1)
        if found is None:
            draft = bridge(eip)
            found = self._install(page, draft, b"", self._place(draft, None), None)
        return found

    def at(self, address: int) -> Translation | None:
        """The unit that has host code at `address`."""
        index = bisect_right(self._placed, address, key=_address) - 1
        if index < 0:
            return None
        found = self._placed[index]
        return found if address < found.address + found.length else None

    def eip_at(self, address: int) -> int | None:
        """The guest instruction whose host code is at `address`."""
        found = self.at(address)
        return None if found is None else found.eip_at(address - found.address)

    def boundary(self, address: int) -> int | None:
        """The guest instruction that begins at host `address`, if one does.

        A string instruction stands at its beginning whenever it stands in its repetition.
        """
        found = self.at(self.resume_at(address))
        if found is None:
            return None
        offset = self.resume_at(address) - found.address
        for piece in found.pieces:
            if piece.host_at == offset:
                return found.eip + piece.guest_at & 0xFFFF_FFFF
        return None

    def resume_at(self, address: int) -> int:
        """Where a guest that stands at `address` must be entered: a string instruction from its start."""
        before = address - len(INTO_WINDOW)
        found = self.at(address)
        if found is None or before < found.address or self._arena.read(
                before, len(INTO_WINDOW)) != INTO_WINDOW:
            return address
        starts = any(piece.host_at == before - found.address for piece in found.pieces)
        return before if starts else address

    def unit(self, one: Translation) -> Unit:
        """A unit as it is now."""
        page = one.page
        guest = page.code[one.offset:one.offset + one.guest_bytes] + one.tail
        successors = tuple(Successor(edge.eip, edge.at, edge.taken, edge.target is not None)
                           for edge in one.edges)
        return Unit(one.eip, page.mode.code32, guest, one.address,
                    self._arena.read(one.address, one.length), one.pieces, successors, one.hits)

    def units(self) -> Iterator[Unit]:
        """All units as they are now, by address."""
        return map(self.unit, self._placed)

    # -- the end of units --------------------------------------------------------------------------

    def kill(self, doomed: Iterable[Translation]) -> int:
        """The code of these units changed.  How many died."""
        dead = self._kill(doomed)
        self.counters.invalidated += dead
        return dead

    def simulate(self, page: CodePage, offset: int, wanted: bool) -> None:
        """From now on the monitor executes the instruction at `offset`, or does so no longer."""
        (page.simulated.add if wanted else page.simulated.discard)(offset)
        self.kill(page.covering(offset))

    def forget(self, page: CodePage) -> None:
        """A page nobody executes any more."""
        self.kill(list(page.all_units()))
        self._pages.pop((page.mode, page.number, page.code), None)

    # -- making units ------------------------------------------------------------------------------

    def _translate(self, page: CodePage, offset: int, beyond: Beyond, edge: Edge | None) -> Translation:
        draft, tail = self._draft(page, offset, beyond)
        if tail:
            edge = None
        address = self._place(draft, edge)
        try:
            return self._install(page, draft, tail, address, edge)
        except Rejected:
            self.counters.rejected += 1
            first = draft.pieces[1].guest_at if len(draft.pieces) > 1 else draft.guest_bytes
            alone = callout(draft.eip, first)
            return self._install(page, alone, tail, self._place(alone, None), None)

    def _draft(self, page: CodePage, offset: int, beyond: Beyond) -> tuple[Draft, bytes]:
        translator = self._translators.get(page.mode)
        if translator is None:
            if len(self._translators) >= _TRANSLATORS:
                self._translators.clear()
            translator = self._translators[page.mode] = Translator(page.mode)
        eip = page.base + offset
        try:
            return translator.translate(page.code, offset, eip, page.simulated), b""
        except Truncated:
            rest = PAGE - offset
            simulated: Collection[int] = (0,) if offset in page.simulated else ()
            code = page.code[offset:] + beyond()[:TAIL_BYTES]
            draft = translator.translate(code, 0, eip, simulated, longest=1)
            return draft, code[rest:draft.guest_bytes]

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
        return (edge is not None and edge.source.alive and edge.trailing and edge.at > 0
                and edge.site + 4 == self._next != begin)

    def _next_region(self) -> None:
        """Go on in the region used longest ago, whose units die."""
        self._region = (self._region + 1) % _REGIONS
        self._next = self._arena.units + self._region * self._region_bytes
        self._limit = self._next + self._region_bytes
        first, last = (bisect_right(self._placed, bound - 1, key=_address)
                       for bound in (self._next, self._limit))
        self.counters.evicted += self._kill(self._placed[first:last])

    def _install(self, page: CodePage, draft: Draft, tail: bytes, address: int,
                 edge: Edge | None) -> Translation:
        """Give the jumps their targets; have the unit verified; make it known."""
        host, exits = draft.host, draft.exits
        stubs = self._free[len(self._free) - len(exits):]
        known: list[Translation | None] = []
        units = page.units
        for number, leads in zip(stubs, exits):
            found = None
            if not leads.callout:
                offset = leads.eip & PAGE - 1
                found = units.get(offset) or page.bridges.get(offset)
            known.append(found)
            if found is not None:
                to = found.address
            elif leads.eip == draft.eip and not leads.callout and not tail:
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
        offset = draft.eip & PAGE - 1
        made = Translation(page, offset, min(draft.guest_bytes, PAGE - offset), tail, address, len(code),
                           draft.pieces)
        if edge is not None and address == edge.site - 1:
            self._elide(edge, made)
        self._register(made, draft, stubs, known)
        self._next = address + len(code)
        return made

    def _register(self, made: Translation, draft: Draft, stubs: list[int],
                  known: list[Translation | None]) -> None:
        """The unit is found from now on; its jumps get edges, joined to where they lead already."""
        page = made.page
        if made.tail:
            page.straddlers[made.offset, made.tail] = made
        elif not made.guest_bytes:
            page.bridges[made.offset] = made
        else:
            page.units[made.offset] = made
        if self._placed and self._placed[-1].address > made.address:
            insort(self._placed, made, key=_address)
        else:
            self._placed.append(made)
        edges = []
        for number, leads, target in zip(stubs, draft.exits, known):
            if leads.callout:
                made.callout = self.exits[number] = self._callout(made, leads, number)
                continue
            one = Edge(made, leads.eip, leads.at, leads.taken, made.address + leads.site, number,
                       leads.site + 4 == made.length)
            edges.append(one)
            self.exits[number] = one
            if target is not None:
                self._join(one, target)
            elif leads.eip == draft.eip and not made.tail:
                self._join(one, made)
        if edges:
            made.edges = tuple(edges)
        self.counters.units += 1
        self.counters.instructions += len(draft.pieces)

    def _callout(self, made: Translation, leads: Exit, stub: int) -> Callout:
        page = made.page
        at = leads.eip - made.eip & 0xFFFF_FFFF
        code = (page.code[made.offset + at:made.offset + made.guest_bytes] + made.tail).ljust(15, b"\0")
        form = decode(code, 0, page.mode.code32)
        return Callout(leads.eip, form, code[:form.length], stub, made.offset + at in page.simulated)

    def _join(self, edge: Edge, target: Translation) -> None:
        edge.target = target
        target.incoming.append(edge)
        self.counters.chained += 1

    def _elide(self, edge: Edge, target: Translation) -> None:
        """`target` is where the trailing jump to it was."""
        source = edge.source
        source.length -= _JMP_BYTES
        edge.at = source.length
        self._join(edge, target)
        self.counters.elided += 1

    def _kill(self, doomed: Iterable[Translation]) -> int:
        """Units die, and those that fall into them; jumps to them go to their stubs again."""
        waiting, dead = list(doomed), set[Translation]()
        while waiting:
            one = waiting.pop()
            if one in dead or not one.alive:
                continue
            dead.add(one)
            waiting.extend(edge.source for edge in one.incoming if edge.at == edge.source.length)
        for one in dead:
            for edge in one.incoming:
                edge.target = None
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
        self.verifier.retract(dead.address, dead.length)
        if dead.tail:
            del dead.page.straddlers[dead.offset, dead.tail]
        elif not dead.guest_bytes:
            del dead.page.bridges[dead.offset]
        else:
            del dead.page.units[dead.offset]
        eip, address = dead.eip, dead.address
        for table in self.tables:
            if table.get(eip) == address:
                table.drop(eip)
        for edge in dead.edges:
            if edge.target is not None:
                edge.target.incoming.remove(edge)
        stubs = [edge.stub for edge in dead.edges]
        if dead.callout is not None:
            stubs.append(dead.callout.stub)
        for number in stubs:
            self.exits[number] = None
        self._free.extend(stubs)
