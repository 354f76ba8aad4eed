# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest-physical to machine (P2M), kept as the nested page table itself.

The nested table's leaf level is one contiguous array of 8-byte entries indexed by guest-physical page, so
there is one truth about a page, read by the silicon's walker, the monitor and the daemon alike.  An
entry is a long-mode PTE (AMD64 APM vol. 2, 5.3.3 and 15.25) whose three available bits say what the page is:

    absent    no frame yet; reads as zero, a frame comes with the first touch
    private   a frame of this guest alone
    shared    a frame that other entries name too; never writable, a write breaks it (copy-on-write)
    ballooned given back by the guest; as absent, if it touches it nevertheless
    stored    not present, its contents in a file: instead of a frame the entry holds a slot

A private or shared entry without the present bit is *watched*: its frame is there, and its next access is
noticed, which is how idle pages are told from others.

Invariant: a shared entry is never writable; a private entry lacks write permission only while the dirty
log waits for its first write, or a trace (vmm/bt/shadow.py) for its next.
NX is never set (the silicon dereferences NULL on it, and guest page-table walks fetch through these entries).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import numpy as np

from vmm.memory.errors import BadAddress, OutOfFrames
from vmm.memory.frames import FrameSource
from vmm.memory.p2mbits import (
    DIRTY,
    FRAME_MASK,
    KIND_MASK,
    KIND_SHIFT,
    LOGGED,
    PRESENT,
    PRIVATE_BITS,
    STORED,
    TABLE_BITS,
    WRITABLE,
    Kind,
)
from vmm.memory.pool import PAGE, PAGE_SHIFT, Pool

#: the most memory a guest can have: the rest of the low 4 GiB belongs to devices
MAX_MEMORY = 3 << 30
_MASK64 = (1 << 64) - 1
_ZERO_TABLE = memoryview(bytes(PAGE)).cast("Q")
_FRAMED = (Kind.PRIVATE << KIND_SHIFT, Kind.SHARED << KIND_SHIFT)


class Outcome(IntEnum):
    """What a nested page fault came to."""

    MAPPED = 0        # present entry installed or write permission given: retry, no flush needed
    REMAPPED = 1      # the page has another frame now: flush the TLB, then retry
    NOT_RAM = 2       # no memory there: a device's address


def _private(entries: np.ndarray) -> np.ndarray:
    return (entries & np.uint64(KIND_MASK)) == np.uint64(Kind.PRIVATE << KIND_SHIFT)


def _no_store(slot: int, into: memoryview) -> None:
    raise OutOfFrames(f"slot {slot:#x} is of no store that is open here")


class P2M:
    """The nested table of one guest, in `tables` frames from `first`, for `pages` pages of RAM."""

    #: PML4, PDPT, four page directories, and spare tables for device pages
    FIXED = 6
    SPARE = 8

    def __init__(self, pool: Pool, first: int, pages: int) -> None:
        self.pool = pool
        self.first = first
        self.pages = pages
        self.leaf_first = first + self.FIXED + self.SPARE
        start = self.leaf_first * 512
        self.leaf = pool.q[start:start + pages]
        #: to be reported to whoever keeps the books: pages that let go of a shared frame and the frame,
        #: private frames that were given back, and pages that need their slot no more
        self.dropped: list[tuple[int, int]] = []
        self.freed: list[int] = []
        self.fetched: list[int] = []
        #: reads what is in a slot into a frame; raises OutOfFrames where that has to be waited for
        self.fetch: Callable[[int, memoryview], None] = _no_store
        self.cow_breaks = 0
        #: changes whenever a page that was mapped is mapped elsewhere, or less permissively
        self.version = 0
        self.logging = False
        #: pages whose next write somebody wants to know of beforehand; they lack write permission
        self.traced: set[int] = set()
        #: told when a traced page is about to be written (it is traced no longer), and when a page has got
        #: another frame
        self.on_trace: Callable[[int], None] | None = None
        self.on_remap: Callable[[int], None] | None = None
        self._spare_used = 0

    @classmethod
    def table_frames(cls, pages: int) -> int:
        """How many frames the tables for `pages` guest pages take."""
        return cls.FIXED + cls.SPARE + -(-pages // 512)

    @property
    def root(self) -> int:
        """Machine-physical address for nCR3."""
        return self.first << PAGE_SHIFT

    def build(self) -> None:
        """(Re)make the upper levels: they lead to the leaf array, and to no device page yet.

        The leaf array itself is left alone; whoever takes a guest over calls this.
        """
        q, first = self.pool.q, self.first
        self._spare_used = 0
        for frame in range(first, first + self.FIXED + self.SPARE):
            q[frame * 512:(frame + 1) * 512] = _ZERO_TABLE
        q[first * 512] = (first + 1) << PAGE_SHIFT | TABLE_BITS
        for gib in range(4):
            q[(first + 1) * 512 + gib] = (first + 2 + gib) << PAGE_SHIFT | TABLE_BITS
        for index in range(-(-self.pages // 512)):
            q[(first + 2) * 512 + index] = (self.leaf_first + index) << PAGE_SHIFT | TABLE_BITS

    # -- RAM ---------------------------------------------------------------------------------------

    def fault(self, gpa: int, write: bool, frames: FrameSource) -> Outcome:
        """Serve a nested page fault: first touch, copy-on-write and the dirty log are one path.

        Raises OutOfFrames, with nothing changed, when a frame is needed and none is there.
        """
        page = gpa >> PAGE_SHIFT
        if page >= self.pages:
            return Outcome.NOT_RAM
        entry = self.leaf[page]
        if not entry & PRESENT:
            if entry & KIND_MASK in _FRAMED:
                self.leaf[page] = entry | PRESENT
            else:
                self._bring(page, entry, frames)
                if not write or page not in self.traced:
                    return Outcome.MAPPED
            entry = self.leaf[page]
        if entry & WRITABLE or not write:
            return Outcome.MAPPED
        if page in self.traced:
            self.traced.discard(page)
            if self.on_trace is not None:
                self.on_trace(page)
        if entry & KIND_MASK == Kind.PRIVATE << KIND_SHIFT:
            self.leaf[page] = entry | WRITABLE | LOGGED
            return Outcome.MAPPED
        self._break_share(page, entry, frames)
        return Outcome.REMAPPED

    def _bring(self, page: int, entry: int, frames: FrameSource) -> None:
        """A frame for a page that has none, with what is in its slot, if it has one of these."""
        frame = frames.take()
        if entry & STORED:
            try:
                self.fetch((entry & FRAME_MASK) >> PAGE_SHIFT, self.pool.page(frame))
            except BaseException:
                self.freed.append(frame)
                raise
            self.fetched.append(page)
        # it may have been traced while it was in its slot
        right = PRIVATE_BITS if page not in self.traced else PRIVATE_BITS & ~WRITABLE
        self.leaf[page] = frame << PAGE_SHIFT | right | (LOGGED if self.logging else 0)

    def _break_share(self, page: int, entry: int, frames: FrameSource) -> None:
        fresh = frames.exchange()
        old = (entry & FRAME_MASK) >> PAGE_SHIFT
        view = self.pool.view
        view[fresh << PAGE_SHIFT:(fresh + 1) << PAGE_SHIFT] = view[old << PAGE_SHIFT:(old + 1) << PAGE_SHIFT]
        self.leaf[page] = fresh << PAGE_SHIFT | PRIVATE_BITS | (LOGGED if self.logging else 0)
        self.dropped.append((page, old))
        self.cow_breaks += 1
        self.changed(page)

    def changed(self, page: int) -> None:
        """The entry of a page that was mapped says something else now."""
        self.version += 1
        if self.on_remap is not None:
            self.on_remap(page)

    def discard(self, page: int, ballooned: bool) -> None:
        """The guest gives a page back: what is in it is lost, and it reads as zero from now on.

        The guest must be off the CPU, or its TLB be flushed before it goes on.  Raises BadAddress.
        """
        if not 0 <= page < self.pages:
            raise BadAddress(page << PAGE_SHIFT)
        entry = self.leaf[page]
        if page in self.traced:
            self.traced.discard(page)
            if self.on_trace is not None:
                self.on_trace(page)
        kind = entry & KIND_MASK
        if kind == Kind.PRIVATE << KIND_SHIFT:
            self.freed.append((entry & FRAME_MASK) >> PAGE_SHIFT)
        elif kind == Kind.SHARED << KIND_SHIFT:
            self.dropped.append((page, (entry & FRAME_MASK) >> PAGE_SHIFT))
        elif entry & STORED:
            self.fetched.append(page)
        logged = LOGGED if self.logging else 0
        self.leaf[page] = (Kind.BALLOONED << KIND_SHIFT if ballooned else 0) | logged
        if entry:
            self.changed(page)

    def empty_balloon(self) -> None:
        """The guest has no balloon any more: pages that it had given back are as those it never touched."""
        entries = self._entries()
        ballooned = (entries & np.uint64(KIND_MASK)) == np.uint64(Kind.BALLOONED << KIND_SHIFT)
        entries[ballooned] &= np.uint64(LOGGED)

    def trace(self, page: int) -> None:
        """Tell `on_trace` before the page is written next.  Who has it mapped writable must see to that."""
        self.traced.add(page)
        self.leaf[page] &= ~WRITABLE & _MASK64

    def for_read(self, gpa: int, frames: FrameSource) -> int:
        """Machine address behind `gpa`, or -1 where the page reads as zero and has no frame for that."""
        page = gpa >> PAGE_SHIFT
        if page >= self.pages:
            raise BadAddress(gpa)
        entry = self.leaf[page]
        if not entry & PRESENT:
            if not entry & STORED and entry & KIND_MASK not in _FRAMED:
                return -1
            self.fault(gpa, False, frames)
            entry = self.leaf[page]
        return entry & FRAME_MASK | gpa & 0xFFF

    def contents(self, page: int) -> bytes:
        """What is in a page, wherever it is; nothing changes."""
        entry = self.leaf[page]
        if entry & KIND_MASK in _FRAMED:
            return bytes(self.pool.page((entry & FRAME_MASK) >> PAGE_SHIFT))
        data = bytearray(PAGE)
        if entry & STORED:
            self.fetch((entry & FRAME_MASK) >> PAGE_SHIFT, memoryview(data))
        return bytes(data)

    def for_write(self, gpa: int, frames: FrameSource) -> int:
        """Machine address behind `gpa`, made writable for the monitor (frames come, shares break)."""
        page = gpa >> PAGE_SHIFT
        if page >= self.pages:
            raise BadAddress(gpa)
        entry = self.leaf[page]
        if not entry & WRITABLE or not entry & PRESENT:
            self.fault(gpa, True, frames)
            entry = self.leaf[page]
        return entry & FRAME_MASK | gpa & 0xFFF

    # -- dirty log ---------------------------------------------------------------------------------
    #
    # Each call changes write permissions: the guest must be off the CPU (vmrun flushes its TLB).

    def start_log(self) -> None:
        """From now on, note which pages are written, by the guest or for it."""
        entries = self._entries()
        entries &= ~np.uint64(LOGGED)
        entries[_private(entries)] &= ~np.uint64(WRITABLE)
        self.logging = True
        self.version += 1

    def collect_log(self) -> np.ndarray:
        """Numbers of the pages written since the log was started or last collected, ascending."""
        entries = self._entries()
        written = np.flatnonzero(entries & np.uint64(LOGGED))
        entries[written] &= ~np.uint64(LOGGED | WRITABLE)
        self.version += 1
        return written

    def stop_log(self) -> None:
        """Note nothing any more; what was not collected is forgotten."""
        entries = self._entries()
        entries &= ~np.uint64(LOGGED)
        entries[_private(entries)] |= np.uint64(WRITABLE)
        entries[list(self.traced)] &= ~np.uint64(WRITABLE)
        self.logging = False

    def log(self, what: str) -> np.ndarray:
        """One of the above by its name: start, collect, stop.  Pages are what `collect_log` answers, else
        none."""
        if what == "collect":
            return self.collect_log()
        {"start": self.start_log, "stop": self.stop_log}[what]()
        return np.zeros(0, dtype=np.int64)

    def _entries(self) -> np.ndarray:
        return np.frombuffer(self.leaf, dtype=np.uint64)

    # -- device pages ------------------------------------------------------------------------------

    def map_device(self, gpa: int, machine: int) -> bool:
        """Point the page of `gpa`, which has no RAM, at machine address `machine` (a device window).

        Spare tables are few; when they run out all device pages are forgotten first.  Returns whether the
        TLB must be flushed for it.
        """
        flush = False
        if self._spare_used + 3 > self.SPARE and self._device_table(gpa) is None:
            self.build()
            flush = True
        table = self._device_table(gpa)
        if table is None:
            table = self._make_device_table(gpa)
        self.pool.q[table * 512 + (gpa >> 12 & 511)] = machine & FRAME_MASK | TABLE_BITS | DIRTY
        return flush

    def _device_table(self, gpa: int) -> int | None:
        """Frame of the leaf table that serves `gpa`, if there is one."""
        frame = self.first
        for shift in (39, 30, 21):
            entry = self.pool.q[frame * 512 + (gpa >> shift & 511)]
            if not entry & PRESENT:
                return None
            frame = (entry & FRAME_MASK) >> PAGE_SHIFT
        return frame

    def _make_device_table(self, gpa: int) -> int:
        q = self.pool.q
        frame = self.first
        for shift in (39, 30, 21):
            slot = frame * 512 + (gpa >> shift & 511)
            if not q[slot] & PRESENT:
                spare = self.first + self.FIXED + self._spare_used
                self._spare_used += 1
                q[spare * 512:(spare + 1) * 512] = _ZERO_TABLE
                q[slot] = spare << PAGE_SHIFT | TABLE_BITS
            frame = (q[slot] & FRAME_MASK) >> PAGE_SHIFT
        return frame
