# SPDX-License-Identifier: GPL-2.0-or-later
"""Which pages are to be shared: a walk over the private pages of all guests.

The rules by which a page is offered are in `hostd.sharing`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from hostd.sharing.table import Table, Waiting
from vmm.memory.p2mbits import FRAME_MASK, KIND_MASK, KIND_SHIFT, Kind
from vmm.memory.pool import PAGE_SHIFT

#: pages of one guest looked at before it is the next one's turn
CHUNK = 512
#: entries of a P2M array read at once in the search for private pages
_WINDOW = 4096
#: entries that are passed over in the time in which a page is hashed
_ENTRIES_A_PAGE = 512
_NOTHING = np.empty(0, dtype=np.int64)
_PRIVATE, _SHARED = np.uint64(Kind.PRIVATE << KIND_SHIFT), np.uint64(Kind.SHARED << KIND_SHIFT)

Hash = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class ScanGuest:
    """A guest as the scanner sees it."""

    #: what tells this life of this guest from all others
    key: Hashable
    #: guests with the same are likely to have the same in the same pages
    image: Hashable
    #: its P2M array, which others change meanwhile
    leaf: np.ndarray


@dataclass
class Candidates:
    """What a scan found, by the guest's key.  Page numbers are int64, hashes uint64."""

    #: pages hashed
    scanned: int = 0
    #: pages full of zeros
    zeros: dict[Hashable, np.ndarray] = field(default_factory=dict)
    #: frames that pages share already, as those of clones do, and that the table does not know
    strangers: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    #: pages that are to become shared frames
    freezes: dict[Hashable, np.ndarray] = field(default_factory=dict)
    #: pages that are equal to a shared frame, or will be to one of `freezes`; and their hashes
    merges: dict[Hashable, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @property
    def pages(self) -> int:
        """Pages that give up their frames if all goes well."""
        return sum(map(len, self.zeros.values())) + sum(len(pages) for pages, _ in self.merges.values())


class _Known:
    """A guest the walk goes through."""

    def __init__(self, guest: ScanGuest, first: int) -> None:
        self.guest = guest
        self.pages = len(guest.leaf)
        #: the place of its page 0
        self.first = first
        #: where the walk goes on, and whether it has been through in this pass
        self.cursor = 0
        self.done = False

    def next_pages(self, met: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The next few pages, at most `most`, their frames, and which of them are private; none when the walk
        is through.

        They are the private ones, and the shared ones whose frames have not been `met`.
        """
        while self.cursor < self.pages:
            start, self.cursor = self.cursor, min(self.cursor + _WINDOW, self.pages)
            entries = self.guest.leaf[start:self.cursor].copy()
            kinds = entries & np.uint64(KIND_MASK)
            found = np.flatnonzero((kinds == _PRIVATE) | (kinds == _SHARED))
            frames = ((entries[found] & np.uint64(FRAME_MASK)) >> PAGE_SHIFT).astype(np.int64)
            private = kinds[found] == _PRIVATE
            # the guest may have ended: what was its P2M array may be something else by now
            new = (frames < len(met)) & (private | ~met.take(frames, mode="clip"))
            found, frames, private = found[new], frames[new], private[new]
            if len(found) > most:
                found, frames, private = found[:most], frames[:most], private[:most]
                self.cursor = start + int(found[-1]) + 1
            if len(found):
                return found + start, frames, private
        self.done = True
        return _NOTHING, _NOTHING, _NOTHING.astype(bool)


class Scanner:
    """Finds pages to share.  No clock, no input and output; one caller at a time.

    `hash` gives 0 for a page of zeros; the pool has `frames` frames.  Whoever acts on the candidates tells
    `frozen` and `adopted` what became of freezes and strangers, and asks `targets` what to merge with.
    """

    def __init__(self, hash: Hash, frames: int, key: np.random.Generator) -> None:
        self._hash = hash
        self.table = Table()
        #: passes over all guests that are complete
        self.passes = 0
        self._waiting = Waiting(key)
        #: by key, in the order of their places
        self._known: dict[Hashable, _Known] = {}
        #: a place is a number for each page of each guest, from 1; by place, the hash of the page when it was
        #: last looked at, or another one if it was offered then, or 0 if there is none
        self._last = np.zeros(1, dtype=np.uint64)
        self._offered = np.zeros(1, dtype=bool)
        #: by frame, the shared ones that were looked at in this pass, or are in the table: clones have them
        #: in common, and one look is enough
        self._met = np.zeros(frames, dtype=bool)
        #: pages looked at in this pass
        self._looked = 0
        #: of each image, the place of the page that was last seen with this number
        self._there: dict[Hashable, np.ndarray] = {}
        self._turn = 0
        #: hashes of this scan's freezes
        self._promised: set[int] = set()

    def scan(self, guests: Sequence[ScanGuest], budget: int) -> Candidates:
        """Look at up to `budget` private pages, of all guests in turn; stops at the end of a pass."""
        found = _Found()
        self._promised.clear()
        if budget > 0:
            self._meet(guests)
        while budget > 0:
            waiting = [known for known in self._known.values() if not known.done]
            if not waiting:
                self._end_pass()
                break
            self._turn += 1
            known = waiting[self._turn % len(waiting)]
            start = known.cursor
            pages, frames, private = known.next_pages(self._met, min(CHUNK, budget))
            # passing over entries costs time too, if not as much
            budget -= len(pages) + (known.cursor - start) // _ENTRIES_A_PAGE
            if len(pages):
                found.scanned += len(pages)
                self._looked += len(pages)
                hashes = self._hash(frames)
                self._look(known, pages[private], hashes[private], found)
                self._look_at_shared(frames[~private], hashes[~private], found)
        return found.candidates()

    def frozen(self, key: Hashable, pages: np.ndarray, frames: np.ndarray) -> np.ndarray:
        """Pages of a guest became shared frames, pinned once for the table.

        The answer is the frames whose pin is not needed.
        """
        if key in self._known:
            self._offer(self._known[key].first + pages)
        return self.adopted(frames)

    def adopted(self, frames: np.ndarray) -> np.ndarray:
        """Shared frames were pinned once for the table.  The answer is those whose pin is not needed."""
        self._met[frames] = True
        return self.table.add(self._hash(frames), frames)

    def targets(self, key: Hashable, pages: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of these pages of a guest can be merged, and with which frames."""
        frames = self.table.frames(hashes)
        pages, frames = pages[frames != 0], frames[frames != 0]
        if key in self._known:
            self._offer(self._known[key].first + pages)
        return pages, frames

    # -- guests --------------------------------------------------------------------------------------------

    def _meet(self, guests: Sequence[ScanGuest]) -> None:
        """Get to know new guests, and forget those that are gone."""
        for key in self._known.keys() - {guest.key for guest in guests}:
            known = self._known.pop(key)
            self._last[known.first:known.first + known.pages] = 0
        for guest in guests:
            if guest.key not in self._known:
                known = self._known[guest.key] = _Known(guest, len(self._last))
                self._last = np.append(self._last, np.zeros(known.pages, dtype=np.uint64))
                self._offered = np.append(self._offered, np.zeros(known.pages, dtype=bool))
        if len(self._last) > 1 + 2 * self._places():
            # a pass may outlast many short lives
            self._waiting.clear(self._looked)
            self._close_ranks()

    def _places(self) -> int:
        """How many places have a guest."""
        return sum(known.pages for known in self._known.values())

    def _end_pass(self) -> None:
        if not self._known:
            return
        self.passes += 1
        for known in self._known.values():
            known.cursor, known.done = 0, False
        self._waiting.clear(self._looked)
        self._looked = 0
        # what is met and not in the table may be used for something else by now
        self._met[np.flatnonzero(self._met)] = False
        self._met[self.table.all_frames()] = True
        if len(self._last) > 1 + self._places():
            self._close_ranks()

    def _close_ranks(self) -> None:
        """Have no places without a guest.  Nobody may remember a place over this."""
        kept = np.concatenate([[0], *(np.arange(known.first, known.first + known.pages)
                                      for known in self._known.values())])
        self._last, self._offered = self._last[kept], self._offered[kept]
        self._there.clear()
        first = 1
        for known in self._known.values():
            known.first = first
            first += known.pages

    # -- pages ---------------------------------------------------------------------------------------------

    def _offer(self, places: np.ndarray) -> None:
        """These are on their way to be shared.  If they are seen again, two looks must agree first."""
        self._offered[places] = True
        self._last[places] = ~self._last[places]

    def _look(self, known: _Known, pages: np.ndarray, hashes: np.ndarray, found: _Found) -> None:
        """Decide on a few pages of a guest."""
        places = known.first + pages
        stable = self._last[places] == hashes
        free = stable | ~self._offered[places]
        self._last[places] = hashes

        zero = free & (hashes == 0)
        if zero.any():
            self._offer(places[zero])
            found.zeros.append((known.guest.key, pages[zero]))
        rest = free & (hashes != 0)
        merge = rest & self._is_shared(hashes)
        rest &= ~merge
        there = self._pages_there(known)
        mates = there[pages]
        there[pages] = places
        hinted = self._equal(mates, places, hashes, rest)
        self._pair(mates[hinted], hashes[hinted], found)
        merge |= hinted | self._match(places, hashes, rest & ~hinted & stable, found)
        if merge.any():
            found.merges.append((known.guest.key, pages[merge], hashes[merge]))

    def _look_at_shared(self, frames: np.ndarray, hashes: np.ndarray, found: _Found) -> None:
        """Shared frames are looked at once: pages may be equal to them."""
        self._met[frames] = True
        strange = ~self._is_shared(hashes)
        self._promised.update(hashes[strange].tolist())
        found.strangers += frames[strange].tolist()

    def _is_shared(self, hashes: np.ndarray) -> np.ndarray:
        """For which hashes there is a shared frame, or will be."""
        shared = self.table.frames(hashes) != 0
        if self._promised:
            shared |= np.array([key in self._promised for key in hashes.tolist()], dtype=bool)
        return shared

    def _match(self, places: np.ndarray, hashes: np.ndarray, which: np.ndarray, found: _Found) -> np.ndarray:
        """Which pages are equal to one that waits; the others of `which` wait from now on."""
        slots = self._waiting.at(hashes)
        mates = self._waiting.get(slots)
        matched = self._equal(mates, places, hashes, which)
        alone = which & ~matched
        self._waiting.put(slots[alone], places[alone])
        # two of these pages may be equal to one another: all but the one in the slot see that now
        beside = self._waiting.get(slots)
        twins = self._equal(beside, places, hashes, alone)
        self._pair(mates[matched], hashes[matched], found)
        self._pair(beside[twins], hashes[twins], found)
        return matched | twins

    def _pages_there(self, known: _Known) -> np.ndarray:
        there = self._there.get(known.guest.image)
        if there is None:
            there = np.zeros(0, dtype=np.int64)
        if len(there) < known.pages:
            there = np.append(there, np.zeros(known.pages - len(there), dtype=np.int64))
            self._there[known.guest.image] = there
        return there

    def _equal(self, mates: np.ndarray, places: np.ndarray, hashes: np.ndarray,
               which: np.ndarray) -> np.ndarray:
        """Which of `which` have a mate, other than themselves, that had the same hash when last looked at."""
        return which & (mates != places) & (self._last[mates] == hashes)

    def _pair(self, mates: np.ndarray, hashes: np.ndarray, found: _Found) -> None:
        """Pages that others are equal to are to become shared frames, one for each hash."""
        if not len(mates):
            return
        guests = list(self._known.values())
        owners = np.searchsorted([known.first for known in guests], mates, side="right") - 1
        for owner, mate, key in zip(owners.tolist(), mates.tolist(), hashes.tolist(), strict=True):
            if key not in self._promised:
                self._promised.add(key)
                known = guests[owner]
                found.freezes.setdefault(known.guest.key, []).append(mate - known.first)


class _Found:
    """Candidates in the making."""

    def __init__(self) -> None:
        self.scanned = 0
        self.zeros: list[tuple[Hashable, np.ndarray]] = []
        self.strangers: list[int] = []
        self.freezes: dict[Hashable, list[int]] = {}
        self.merges: list[tuple[Hashable, np.ndarray, np.ndarray]] = []

    def candidates(self) -> Candidates:
        """By guest."""
        result = Candidates(self.scanned, strangers=np.array(self.strangers, dtype=np.int64))
        for key, pages in self.zeros:
            have = result.zeros.get(key)
            result.zeros[key] = pages if have is None else np.concatenate((have, pages))
        for key, numbers in self.freezes.items():
            result.freezes[key] = np.array(numbers, dtype=np.int64)
        for key, pages, hashes in self.merges:
            mine = result.merges.get(key)
            result.merges[key] = (pages, hashes) if mine is None else (
                np.concatenate((mine[0], pages)), np.concatenate((mine[1], hashes)))
        return result
