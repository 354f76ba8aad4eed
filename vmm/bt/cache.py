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
without asking for one; direct jumps lead to units of the same page (vmm/bt/codepage.py says why), so those
that lead to a dead unit are found there; a unit that falls into another dies with it; nothing is written that
the verifier has not accepted.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

from vmm.bt import shape
from vmm.bt.codepage import TAIL_BYTES, CodePage
from vmm.bt.cpu import Arena, JumpTable
from vmm.bt.decode import Truncated
from vmm.bt.exits import BITS, PAGE_MASK, SITE, WHERE
from vmm.bt.mode import Mode
from vmm.bt.native.arena import STUB_BYTES
from vmm.bt.regions import Regions
from vmm.bt.strings import INTO_WINDOW
from vmm.bt.translate import Draft, Translator, bridge, callout
from vmm.bt.translation import Callout, Edge, Stubs, Translation
from vmm.bt.unit import Successor, Unit
from vmm.bt.verify import Layout, Rejected, Verifier
from vmm.memory.pool import PAGE, PAGE_SHIFT

__all__ = ["Callout", "Counters", "Edge", "Translation", "TranslationCache"]

_JMP_BYTES = 5
_CACHE_LINE = 64
_rel32 = struct.Struct("<i").pack
#: modes whose templates are kept
_TRANSLATORS = 64
#: pages known at once: each keeps 4 KiB of guest code, and a guest that rewrites its code makes new ones
_MOST_PAGES = 8192

#: how the page behind the one in question begins; whatever it raises goes to the caller
Beyond: TypeAlias = Callable[[], bytes]


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
        self.exits = Stubs(arena.stub_count)
        self.counters = Counters()
        #: jump tables that may have entries for units here
        self.tables: list[JumpTable] = []
        self._translators: dict[Mode, Translator] = {}
        #: the one used last
        self._translator: Translator | None = None
        self._pages: dict[tuple[Mode, int, bytes], CodePage] = {}
        self._placed = Regions(arena.units, arena.units_bytes)

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
                self._forget_oldest(_MOST_PAGES // 4)
            found = self._pages[key] = CodePage(mode, number, code)
            self.counters.pages += 1
        return found

    def _forget_oldest(self, count: int) -> None:
        """The pages known longest, and their units, make room; whoever executes one goes on with it alone."""
        oldest = list(islice(self._pages, count))
        self.counters.evicted += self._kill(
            [unit for key in oldest for unit in self._pages.pop(key).all_units()])

    def find(self, page: CodePage, eip: int, beyond: Beyond) -> Translation | None:
        """The unit that begins at `eip`, if there is one."""
        return page.units.get(eip & PAGE_MASK) or self._find_straddler(page, eip & PAGE_MASK, beyond)

    def get(self, page: CodePage, eip: int, beyond: Beyond) -> Translation:
        """The unit that begins at `eip`; translated now if need be."""
        return self.find(page, eip, beyond) or self._translate(page, eip & PAGE_MASK, beyond, None)

    @staticmethod
    def _find_straddler(page: CodePage, offset: int, beyond: Beyond) -> Translation | None:
        return page.unit_at(offset, beyond()) if page.straddlers else None

    def follow(self, edge: Edge, beyond: Beyond) -> Translation:
        """The unit a jump leads to, which from now on it reaches by itself."""
        source, offset = edge.source, edge.packed & PAGE_MASK
        page, chain = source.page, 1 << edge.number
        target = page.units.get(offset)
        if target is None and page.straddlers:
            target = self._find_straddler(page, offset, beyond)
        if target is None:
            target = self._translate(page, offset, beyond, edge)
        if not source.chained & chain and source.alive:
            reached = self._bridge(page, offset) if target.tail else target
            if source.alive and target.alive:
                site = edge.site
                self._arena.write(site, self.verifier.patch(site, reached.address))
                source.chained |= chain
                self.counters.chained += 1
        return target if target.alive else self.follow(edge, beyond)

    def _bridge(self, page: CodePage, offset: int) -> Translation:
        """A jump through the table to a unit over the page's end, since only the table knows which one."""
        found = page.bridges.get(offset)
        if found is None:
            found = self._install(page, offset, bridge(page.base + offset), b"", None)
            page.bridges[offset] = found
        return found

    def at(self, address: int) -> Translation | None:
        """The unit that has host code at `address`."""
        return self._placed.at(address)

    def eip_at(self, address: int) -> int | None:
        """The guest instruction whose host code is at `address`."""
        found = self._placed.at(address)
        return None if found is None else found.eip_at(address - found.address)

    def boundary(self, address: int) -> int | None:
        """The guest instruction that begins at host `address`, if one does.

        A string instruction stands at its beginning whenever it stands in its repetition.
        """
        found = self._placed.at(address)
        if found is None:
            return None
        guest_at, host_at = shape.find(found.shape, address - found.address)
        begins = found.address + host_at
        if begins != address and not self._repeats(begins, address):
            return None
        return found.eip + guest_at & 0xFFFF_FFFF

    def resume_at(self, address: int) -> int:
        """Where a guest that stands at `address` must be entered: a string instruction from its start."""
        if self._arena.read(address - len(INTO_WINDOW), len(INTO_WINDOW)) != INTO_WINDOW:
            return address
        found = self._placed.at(address)
        if found is None:
            return address
        begins = found.address + shape.find(found.shape, address - found.address)[1]
        return begins if self._repeats(begins, address) else address

    def _repeats(self, begins: int, address: int) -> bool:
        """Whether a guest at `address` is in the repetition of the string instruction from `begins` on."""
        return (address - begins == len(INTO_WINDOW)
                and self._arena.read(begins, len(INTO_WINDOW)) == INTO_WINDOW)

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
        translator = self._translator
        if translator is None or translator.mode is not page.mode:
            translator = self._translator = self._translator_for(page.mode)
        eip = (page.number << PAGE_SHIFT) + offset
        tail = b""
        try:
            draft = translator.translate(page.code, offset, eip, page.simulated)
        except Truncated:
            rest = PAGE - offset
            simulated: Collection[int] = (0,) if offset in page.simulated else ()
            code = page.code[offset:] + beyond()[:TAIL_BYTES]
            draft = translator.translate(code, 0, eip, simulated, longest=1)
            tail = code[rest:draft.guest_bytes]
            edge = None
        try:
            made = self._install(page, offset, draft, tail, edge)
        except Rejected:
            self.counters.rejected += 1
            alone = callout(eip, shape.guest_bytes(draft.shape[:2]))
            made = self._install(page, offset, alone, tail, None)
        if tail:
            page.straddlers[offset, tail] = made
        else:
            page.units[offset] = made
        return made

    def _translator_for(self, mode: Mode) -> Translator:
        found = self._translators.get(mode)
        if found is None:
            if len(self._translators) >= _TRANSLATORS:
                self._translators.clear()
            found = self._translators[mode] = Translator(mode)
        return found

    def _install(self, page: CodePage, offset: int, draft: Draft, tail: bytes,
                 edge: Edge | None) -> Translation:
        """Find a place for the unit; give its jumps their targets; have it verified; write it there.

        The caller has it found in its page.
        """
        _, parts, pieces, exits = draft
        placed, length = self._placed, len(b"".join(parts))
        stub = packed = chained = 0
        if exits:
            while (stub := self.exits.take(len(exits))) < 0:
                self._next_region()
        if edge is not None and self._elides(edge, length):
            address = placed.next - _JMP_BYTES
        else:
            if placed.next + _CACHE_LINE + length > placed.limit:
                self._next_region()
            address = placed.next
            if edge is not None and edge.offset <= edge.source.offset:
                # a jump back makes a loop: its first unit begins a cache line, for it may be all of it
                address = address + _CACHE_LINE - 1 & -_CACHE_LINE
            edge = None
        if exits:
            packed, chained = self._aim(page, draft, address, length, stub, -1 if tail else offset)
        try:
            code = self.verifier.accept(parts, address)
        except Rejected:
            if exits:
                self.exits.free(stub, len(exits))
            raise
        self._arena.write(address, code)
        made = Translation(page, offset, tail, address, length, pieces, packed, stub, chained)
        if exits:
            self.exits.give(stub, len(exits), made)
        counters = self.counters
        if edge is not None:
            edge.source.length -= _JMP_BYTES
            edge.source.chained |= 1 << edge.number
            counters.chained += 1
            counters.elided += 1
        placed.add(made, address, length)
        counters.units += 1
        counters.instructions += len(pieces) >> 1
        if chained:
            counters.chained += chained.bit_count()
        return made

    def _aim(self, page: CodePage, draft: Draft, address: int, length: int, stub: int,
             offset: int) -> tuple[int, int]:
        """Have the jumps of a unit lead to units there are, the unit itself, at `offset`, among them.

        The others lead to their stubs.  The jumps, and which of them are chained, as in `Translation`.
        """
        packed = chained = shift = 0
        bit = 1
        parts, units, bridges = draft.parts, page.units, page.bridges
        end, site = address + length, length - 4
        out = self._arena.stub(stub) - end
        for leads, behind, part in draft.exits:
            there = leads & WHERE
            found = units.get(there)
            if found is None and bridges:
                found = bridges.get(there)
            if found is not None:
                parts[part] = _rel32(found.address - end + behind)
                chained |= bit
            elif there == offset:
                parts[part] = _rel32(behind - length)
                chained |= bit
            else:
                parts[part] = _rel32(out + behind)
            packed |= (site - behind << SITE | leads) << shift
            bit, shift, out = 2, BITS, out + STUB_BYTES
        return packed, chained

    def _elides(self, edge: Edge, length: int) -> bool:
        """Whether a unit can be put over the trailing jump that leads to it: if that is the last in use."""
        placed, source = self._placed, edge.source
        end = source.length
        return (source.address + end == placed.next and end == (edge.packed >> SITE) + 4 > _JMP_BYTES
                and source.alive and placed.next - _JMP_BYTES + length <= placed.limit
                and placed.next != placed.begin)

    def _next_region(self) -> None:
        """Go on in the region used longest ago, whose units die."""
        self.counters.evicted += self._kill(self._placed.advance())

    # -- and their end, in detail ------------------------------------------------------------------

    def _kill(self, doomed: Iterable[Translation]) -> int:
        """Units die, and those that fall into them; jumps to them go to their stubs again."""
        dead = {one for one in doomed if one.alive}
        by_page: dict[CodePage, list[Translation]] = {}
        for one in dead:
            by_page.setdefault(one.page, []).append(one)
        for page, dying in by_page.items():
            falling = {one.address + one.length: one for one in page.all_units() if one.falls_through}
            for one in dying:       # which grows meanwhile
                before = falling.get(one.address)
                if before is not None and before not in dead:
                    dead.add(before)
                    dying.append(before)
            self._unchain(page, {one.offset for one in dying}, dead)
        for one in sorted(dead, key=lambda one: -one.address):      # removal is cheapest from a region's end
            self._remove(one)
        return len(dead)

    def _unchain(self, page: CodePage, offsets: Collection[int], dead: Collection[Translation]) -> None:
        """The jumps of the living to these places in the page lead to their stubs again."""
        for one in page.all_units():
            if not one.chained or one in dead:
                continue
            for edge in one.edges:
                if edge.chained and edge.offset in offsets:
                    one.chained &= ~(1 << edge.number)
                    self._arena.write(edge.site, self.verifier.patch(edge.site, self._arena.stub(edge.stub)))

    def _remove(self, dead: Translation) -> None:
        dead.alive = False
        dead.chained = 0
        self.verifier.retract(dead.address, dead.length)
        self._placed.remove(dead)
        page, offset = dead.page, dead.offset
        if dead.tail:
            del page.straddlers[offset, dead.tail]
        elif page.units.get(offset) is dead:
            del page.units[offset]
        else:
            del page.bridges[offset]
        eip, address = dead.eip, dead.address
        for table in self.tables:
            if table.get(eip) == address:
                table.drop(eip)
        if dead.exits:
            self.exits.free(dead.stub, 2 if dead.exits >> BITS else 1)
