# SPDX-License-Identifier: GPL-2.0-or-later
"""virtio-balloon (virtio 1.2, 5.5): the guest gives memory back when it is asked to, and says what is free.

The host sets `target_pages`; the driver takes that many pages from its guest and tells their numbers.  Pages
are 4 KiB.  Nobody waits for anybody: a page that was given back comes back when the guest touches it, so a
driver that lies harms its guest alone.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Any, ClassVar, Protocol

from vmm.devices.saved import DWORD, FLAG, QWORD, TIME, Kind, Kinds
from vmm.devices.virtio.mmio import INDIRECT_DESC, MmioDevice, transport_kinds
from vmm.devices.virtio.ring import Chain, GuestRam, Malformed, Ring, Segment, total
from vmm.memory.pool import PAGE, PAGE_SHIFT

STATS_VQ, DEFLATE_ON_OOM, REPORTING = 1 << 1, 1 << 2, 1 << 5

#: configuration space (5.5.4): pages wanted, pages given
NUM_PAGES, ACTUAL = 0, 4
_CONFIG = struct.Struct("<II")

#: pages in one step: to let go of one takes microseconds, and more where translated code has it mapped
MOST_PAGES = 32

#: what a driver can say of its guest's memory (5.5.6.4), in bytes but for faults and huge pages
STATISTICS = ("swap_in", "swap_out", "major_faults", "minor_faults", "free", "total", "available", "caches",
              "huge_pages_allocated", "huge_pages_failed")
_STATISTIC = struct.Struct("<HQ")
#: more than there are tags; a driver may say something of which nothing is known here
_MOST_STATISTICS = 64


class PageSink(Protocol):
    """Who takes the pages a guest gives back.  Those with a page raise BadAddress where there is no such."""

    def discard(self, page: int, ballooned: bool) -> None:
        """The contents of guest-physical page `page` are lost; it reads as zero afterwards."""

    def deflate(self, page: int) -> None:
        """The guest takes a page out of its balloon; nothing that it has written there meanwhile is lost."""

    def empty(self) -> None:
        """No page is in the balloon any more."""


class Role(Enum):
    """What a queue is for."""

    INFLATE = 0
    DEFLATE = 1
    STATISTICS = 2
    REPORT = 3


def _load_statistics(value: Any) -> dict[str, int]:
    if type(value) is not dict or not value.keys() <= set(STATISTICS):
        raise ValueError("not statistics of a guest's memory")
    return {name: QWORD.load(number) for name, number in value.items()}


class Balloon(MmioDevice):
    """The balloon of a guest of `pages` pages; `now` is guest time in ns."""

    IDENTITY = 5
    OFFERED = INDIRECT_DESC | STATS_VQ | DEFLATE_ON_OOM | REPORTING
    QUEUES = 5
    #: the number of the reporting queue as the standard counts (5.5.2)
    REPORTING_QUEUE = 4

    __slots__ = ("_emptied", "_now", "_sink", "actual", "asked_ns", "deflated", "holds", "inflated", "pages",
                 "received_ns", "reported", "statistics", "target", "wanted")

    SAVED: ClassVar[Kinds] = transport_kinds(QUEUES) | {
        "target": DWORD, "actual": DWORD, "inflated": QWORD, "deflated": QWORD, "reported": QWORD,
        "wanted": FLAG, "holds": FLAG, "asked_ns": TIME, "received_ns": TIME,
        "statistics": Kind(dict, _load_statistics),
    }

    def __init__(self, memory: GuestRam, sink: PageSink, pages: int, now: Callable[[], int],
                 line: Callable[[bool], None], attention: Callable[[], None]) -> None:
        super().__init__(memory, line, attention)
        self._sink = sink
        self._now = now
        #: of the guest
        self.pages = pages
        #: the pages it is asked to give; `target_pages` is how to set it
        self.target = 0
        #: what the driver says it has given
        self.actual = 0
        #: pages ever: told as given, as taken back, and reported as free
        self.inflated = self.deflated = self.reported = 0
        #: `inflated` when the balloon was last known to be empty
        self._emptied = -1
        #: what the driver said last of its guest's memory, by the names in STATISTICS
        self.statistics: dict[str, int] = {}
        #: guest time at which statistics were asked for and received last; 0: never
        self.asked_ns = self.received_ns = 0
        #: statistics are asked for, and the driver's buffer, with which that is done, is still here
        self.wanted = False
        #: the buffer that is here has been read
        self.holds = False

    # -- the host's side ---------------------------------------------------------------------------

    @property
    def driver_ok(self) -> bool:
        """Whether there is a driver that hears of the target."""
        return self.live

    @property
    def target_pages(self) -> int:
        """How many pages the guest is asked to give back."""
        return self.target

    @target_pages.setter
    def target_pages(self, pages: int) -> None:
        """Raises ValueError for more than the guest has."""
        if not 0 <= pages <= self.pages:
            raise ValueError(f"a balloon of {pages} pages: the guest has {self.pages}")
        if pages != self.target:
            self.target = pages
            self.config_changed()

    @property
    def actual_pages(self) -> int:
        """How many pages the guest says it has given back and does not use."""
        return min(self.actual, self.pages)

    @property
    def counters(self) -> dict[str, int]:
        """Pages since power-on: given back, taken back, reported as free."""
        return {"inflated": self.inflated, "deflated": self.deflated, "reported": self.reported}

    def request_statistics(self) -> bool:
        """Ask the driver for `statistics`, which come while the guest runs; False if it has none to give."""
        if not self.live or not self.negotiated(STATS_VQ):
            return False
        self.wanted, self.asked_ns = True, self._now()
        self.call(Role.STATISTICS.value)
        return True

    # -- the driver's side -------------------------------------------------------------------------

    def config(self) -> bytes:
        """Pages wanted and pages given."""
        return _CONFIG.pack(self.target, self.actual)

    def write_config(self, offset: int, data: bytes) -> None:
        """Only what is given is the driver's to write."""
        if offset >= ACTUAL and offset + len(data) <= _CONFIG.size:
            value = bytearray(self.actual.to_bytes(4, "little"))
            value[offset - ACTUAL:offset - ACTUAL + len(data)] = data
            self.actual = int.from_bytes(value, "little")

    def forget(self) -> None:
        """A driver that comes or goes has given nothing yet, and said nothing: what one had that left without
        taking it back (kexec) is the guest's again."""
        self.actual = 0
        if self._emptied != self.inflated:          # looking at all pages is not to be had for each reset
            self._sink.empty()
            self._emptied = self.inflated
        self.wanted = self.holds = False
        self.statistics = {}

    def restored(self) -> None:
        """As for all devices; and nothing is asked for that the guest does not have."""
        super().restored()
        self.target = min(self.target, self.pages)

    def role(self, queue: int) -> Role | None:
        """What a queue is for: Linux leaves no gaps between those that are there, the standard does."""
        if queue == self.REPORTING_QUEUE:
            return Role.REPORT if self.negotiated(REPORTING) else None
        there = [Role.INFLATE, Role.DEFLATE]
        there += [Role.STATISTICS] * self.negotiated(STATS_VQ) + [Role.REPORT] * self.negotiated(REPORTING)
        return there[queue] if queue < len(there) else None

    def step(self, queue: int, ring: Ring) -> bool:
        """Serve a part of a request."""
        role = self.role(queue)
        chain = ring.next(self.memory) if role is not None else None
        if chain is None:
            return False
        if role is Role.STATISTICS:
            return self._statistics(ring, chain)
        if role is Role.REPORT:
            return self._report(ring, chain)
        return self._move(ring, chain, role is Role.INFLATE)

    def _move(self, ring: Ring, chain: Chain, inflate: bool) -> bool:
        """Pages by their numbers, 32 bits each (5.5.6.2)."""
        count = total(chain.readable) // 4
        if count > self.pages:
            raise Malformed(f"{count} pages in one request: the guest has {self.pages}")
        now = max(0, min(count - ring.done, MOST_PAGES))
        numbers = struct.unpack(f"<{now}I", chain.read(self.memory, 4 * ring.done, 4 * now))
        if max(numbers, default=0) >= self.pages:
            raise Malformed(f"page {max(numbers)}: the guest has {self.pages}")
        if inflate:
            for page in numbers:
                self._sink.discard(page, True)
            self.inflated += now
        else:
            for page in numbers:
                self._sink.deflate(page)
            self.deflated += now
        return self._advance(ring, chain, now, count)

    def _report(self, ring: Ring, chain: Chain) -> bool:
        """Free memory as buffers: whole pages of it lose their contents (5.5.6.8)."""
        runs = [_whole_pages(piece) for piece in (*chain.readable, *chain.writable)]
        count = sum(len(run) for run in runs)
        if count > self.pages or any(run.stop > self.pages for run in runs):
            raise Malformed(f"{count} free pages are reported of {self.pages}, or others")
        now = max(0, min(count - ring.done, MOST_PAGES))
        for page in _part(runs, ring.done, now):
            self._sink.discard(page, False)
        self.reported += now
        return self._advance(ring, chain, now, count)

    def _advance(self, ring: Ring, chain: Chain, now: int, count: int) -> bool:
        """Some more of the `count` pages of a request are done; it goes back when all are."""
        ring.done += now
        if ring.done >= count:
            self.finish(ring, chain)
        return True

    def _statistics(self, ring: Ring, chain: Chain) -> bool:
        """The driver's buffer stays here until statistics are wanted, and then goes back to be filled."""
        if self.wanted and self.holds:
            self.finish(ring, chain)
            self.holds = False
            return True
        if not self.holds:
            size = _STATISTIC.size * _MOST_STATISTICS
            data = chain.read(self.memory, 0, size)
            data = data[:len(data) // _STATISTIC.size * _STATISTIC.size]
            self.statistics = {STATISTICS[tag]: value for tag, value in _STATISTIC.iter_unpack(data)
                               if tag < len(STATISTICS)}
            self.received_ns = self._now()
            self.wanted, self.holds = False, True
        return False


def _whole_pages(piece: Segment) -> range:
    """The pages of which every byte is in a segment."""
    first = -(-piece.address // PAGE)
    return range(first, max(first, piece.address + piece.length >> PAGE_SHIFT))


def _part(runs: Iterable[range], skip: int, count: int) -> Iterator[int]:
    """`count` pages of runs, behind the first `skip`."""
    for run in runs:
        part = run[skip:skip + count]
        skip -= min(skip, len(run))
        count -= len(part)
        yield from part
