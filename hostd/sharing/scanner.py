# SPDX-License-Identifier: GPL-2.0-or-later
"""Which pages are to be shared: a walk over the private pages of all guests.

The rules by which a page is offered are in `hostd.sharing`.
"""

from __future__ import annotations

import itertools
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
_PRIVATE = np.uint64(Kind.PRIVATE << KIND_SHIFT)
#: a place is a guest's number, from 1, and a page number
_PAGE_BITS = np.uint64(32)
_PAGE_MASK = np.uint64((1 << 32) - 1)

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
    #: pages that are to become shared frames
    freezes: dict[Hashable, np.ndarray] = field(default_factory=dict)
    #: pages that are equal to a shared frame, or will be to one of `freezes`; and their hashes
    merges: dict[Hashable, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @property
    def pages(self) -> int:
        """Pages that give up their frames if all goes well."""
        return sum(map(len, self.zeros.values())) + sum(len(pages) for pages, _ in self.merges.values())


class _Known:
    """What is remembered of a guest."""

    def __init__(self, guest: ScanGuest, number: int) -> None:
        self.guest = guest
        self.number = np.uint64(number)
        #: where the walk goes on, and whether it has been through in this pass
        self.cursor = 0
        self.done = False
        #: hash of each page when it was last looked at; other than that once it was offered
        self.last = np.zeros(len(guest.leaf), dtype=np.uint64)
        #: has been hashed; has been offered
        self.seen = np.zeros(len(guest.leaf), dtype=bool)
        self.offered = np.zeros(len(guest.leaf), dtype=bool)

    def next_pages(self, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The next few private pages and their frames, at most `most`; none when the walk is through."""
        leaf = self.guest.leaf
        while self.cursor < len(leaf):
            entries = leaf[self.cursor:self.cursor + _WINDOW].copy()
            found = np.flatnonzero((entries & np.uint64(KIND_MASK)) == _PRIVATE)
            pages = found[:most] + self.cursor
            self.cursor = int(pages[-1]) + 1 if len(found) >= most else self.cursor + _WINDOW
            if len(pages):
                return pages, ((entries[found[:most]] & np.uint64(FRAME_MASK)) >> PAGE_SHIFT).astype(np.int64)
        self.done = True
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)

    def offer(self, pages: np.ndarray) -> None:
        """These are on their way to be shared.  If they are seen again, two looks must agree first."""
        self.offered[pages] = True
        self.last[pages] = ~self.last[pages]


class Scanner:
    """Finds pages to share.  No clock, no input and output; one caller at a time.

    `hash` gives 0 for a page of zeros.  Whoever acts on the candidates tells `frozen` what became of the
    freezes, and asks `targets` what to merge with.
    """

    def __init__(self, hash: Hash, key: np.random.Generator) -> None:
        self._hash = hash
        self.table = Table()
        #: passes over all guests that are complete
        self.passes = 0
        self._waiting = Waiting(key)
        self._numbers = itertools.count(1)
        self._known: dict[Hashable, _Known] = {}
        self._by_number: dict[int, _Known] = {}
        #: of each image, who was last seen to have a page there
        self._places: dict[Hashable, np.ndarray] = {}
        self._turn = 0
        #: hashes of this scan's freezes
        self._promised: set[int] = set()

    def scan(self, guests: Sequence[ScanGuest], budget: int) -> Candidates:
        """Look at up to `budget` private pages, of all guests in turn; stops at the end of a pass."""
        found = _Found()
        self._promised.clear()
        self._meet(guests)
        while budget > 0:
            waiting = [known for known in self._known.values() if not known.done]
            if not waiting:
                self._end_pass()
                break
            self._turn += 1
            known = waiting[self._turn % len(waiting)]
            start = known.cursor
            pages, frames = known.next_pages(min(CHUNK, budget))
            # passing over entries costs time too, if not as much
            budget -= len(pages) + (known.cursor - start) // _ENTRIES_A_PAGE
            if len(pages):
                self._look(known, pages, self._hash(frames), found)
        return found.candidates()

    def frozen(self, key: Hashable, pages: np.ndarray, frames: np.ndarray) -> np.ndarray:
        """Pages of a guest became shared frames, pinned once for the table.

        The answer is the frames whose pin is not needed.
        """
        if key in self._known:
            self._known[key].offer(pages)
        return self.table.add(self._hash(frames), frames)

    def targets(self, key: Hashable, pages: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of these pages of a guest can be merged, and with which frames."""
        frames = self.table.frames(hashes)
        pages, frames = pages[frames != 0], frames[frames != 0]
        if key in self._known:
            self._known[key].offer(pages)
        return pages, frames

    # -- guests --------------------------------------------------------------------------------------------

    def _meet(self, guests: Sequence[ScanGuest]) -> None:
        """Get to know new guests, and forget those that are gone."""
        keys = {guest.key for guest in guests}
        for key in self._known.keys() - keys:
            del self._by_number[int(self._known.pop(key).number)]
        for guest in guests:
            if guest.key not in self._known:
                known = _Known(guest, next(self._numbers))
                self._known[guest.key] = self._by_number[int(known.number)] = known
        if len(self._places) > len(self._known):
            images = {known.guest.image for known in self._known.values()}
            self._places = {image: places for image, places in self._places.items() if image in images}

    def _end_pass(self) -> None:
        if not self._known:
            return
        self.passes += 1
        for known in self._known.values():
            known.cursor, known.done = 0, False
        self._waiting.clear(sum(int(np.count_nonzero(known.seen)) for known in self._known.values()))

    # -- pages ---------------------------------------------------------------------------------------------

    def _look(self, known: _Known, pages: np.ndarray, hashes: np.ndarray, found: _Found) -> None:
        """Decide on a few pages of a guest."""
        stable = known.seen[pages] & (known.last[pages] == hashes)
        free = stable | ~known.offered[pages]
        known.last[pages] = hashes
        known.seen[pages] = True
        found.scanned += len(pages)

        zero = hashes == 0
        gone = pages[zero & free]
        if len(gone):
            known.offer(gone)
            found.zeros.append((known.guest.key, gone))

        rest = free & ~zero
        merge = rest & self._is_shared(hashes)
        rest &= ~merge
        own = known.number << _PAGE_BITS | pages.astype(np.uint64)
        there = self._places_of(known)
        mates = there[pages]
        there[pages] = own
        hinted = self._equal(mates, hashes, rest & (mates != own))
        self._pair(mates[hinted], hashes[hinted], found)
        merge |= hinted | self._match(own, hashes, rest & ~hinted & stable, found)
        if merge.any():
            found.merges.append((known.guest.key, pages[merge], hashes[merge]))

    def _is_shared(self, hashes: np.ndarray) -> np.ndarray:
        """For which hashes there is a shared frame, or will be."""
        shared = self.table.frames(hashes) != 0
        if self._promised:
            shared |= np.array([key in self._promised for key in hashes.tolist()], dtype=bool)
        return shared

    def _match(self, own: np.ndarray, hashes: np.ndarray, which: np.ndarray, found: _Found) -> np.ndarray:
        """Which pages are equal to one that waits; the others of `which` wait from now on."""
        slots = self._waiting.at(hashes)
        mates = self._waiting.get(slots)
        matched = self._equal(mates, hashes, which & (mates != own))
        alone = which & ~matched
        self._waiting.put(slots[alone], own[alone])
        # two of these pages may be equal to one another: all but the one in the slot see that now
        beside = self._waiting.get(slots)
        twins = self._equal(beside, hashes, alone & (beside != own))
        self._pair(mates[matched], hashes[matched], found)
        self._pair(beside[twins], hashes[twins], found)
        return matched | twins

    def _places_of(self, known: _Known) -> np.ndarray:
        places = self._places.get(known.guest.image)
        if places is None or len(places) < len(known.last):
            grown = np.zeros(len(known.last), dtype=np.uint64)
            if places is not None:
                grown[:len(places)] = places
            places = self._places[known.guest.image] = grown
        return places

    def _equal(self, places: np.ndarray, hashes: np.ndarray, which: np.ndarray) -> np.ndarray:
        """Which of `which` places had these hashes when they were looked at last."""
        equal = np.zeros(len(places), dtype=bool)
        numbers = places >> _PAGE_BITS
        for number in np.unique(numbers[which]):
            known = self._by_number.get(int(number))
            if known is not None:
                theirs = np.flatnonzero(which & (numbers == number))
                equal[theirs] = known.last[places[theirs] & _PAGE_MASK] == hashes[theirs]
        return equal

    def _pair(self, mates: np.ndarray, hashes: np.ndarray, found: _Found) -> None:
        """Pages that others are equal to are to become shared frames, one for each hash."""
        for mate, key in zip(mates.tolist(), hashes.tolist(), strict=True):
            if key not in self._promised:
                self._promised.add(key)
                known = self._by_number[mate >> 32]
                found.freezes.setdefault(known.guest.key, []).append(mate & (1 << 32) - 1)


class _Found:
    """Candidates in the making."""

    def __init__(self) -> None:
        self.scanned = 0
        self.zeros: list[tuple[Hashable, np.ndarray]] = []
        self.freezes: dict[Hashable, list[int]] = {}
        self.merges: list[tuple[Hashable, np.ndarray, np.ndarray]] = []

    def candidates(self) -> Candidates:
        """By guest."""
        result = Candidates(self.scanned)
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
