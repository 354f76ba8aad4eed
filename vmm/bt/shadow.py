# SPDX-License-Identifier: GPL-2.0-or-later
"""Shadow paging: the views of a guest, and how they follow its page tables (the paper, 2.2 and 3.2).

A supervisor view and a user view are current.  The supervisor view keeps its global pages over changes of
CR3, as a TLB does.  User views, and supervisor views of a guest without global pages, are kept one for each
CR3, so that coming back costs nothing; for that the page tables they were filled from are traced:

    traced       write-protected in the P2M; a write sets the trace off, and the page becomes
    out of sync  writable, with a copy of what it was; at the next change of CR3 it is compared, changed
                 entries are dropped from all views, and it is traced again

Pages with code that is executed are traced, too; when such a trace goes off the code there is looked at
anew before it is entered again.  Everybody's writes go through the P2M, so there are none that it misses:
those of translated code, of the emulated silicon, and of the monitor and its devices.

Invariants: a page in `p2m.traced` is writable in no view; a view without its CR3 being current shows nothing
but what its tables, as far as they are in sync, say.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from vmm.bt.cache import TranslationCache
from vmm.bt.codepage import TAIL_BYTES, CodePage
from vmm.bt.mode import Mode
from vmm.bt.native.windows import runs
from vmm.bt.traces import CodeTraces
from vmm.bt.views import View
from vmm.bt.walk import Place, Table, Walker
from vmm.memory.frames import FrameSource
from vmm.memory.p2m import P2M
from vmm.memory.p2mbits import FRAME_MASK, KIND_MASK, KIND_SHIFT, LOGGED, PRESENT, WRITABLE, Kind
from vmm.memory.pool import PAGE, PAGE_SHIFT
from vmm.silicon import layout as at
from vmm.x86.flags import CR0_PG, CR4_PGE
from vmm.x86.paging import ACCESSED, DIRTY, Access

#: views a guest may have, beside the current ones
_MOST_VIEWS = 16
#: pages mapped at once at most, and the frames in stock from which on some are used for that
_MOST_AHEAD, _PLENTY = 16, 256
#: a page of which more entries changed at once is no page table any more
_FLOOD = 256
_FETCH = {False: Access(fetch=True), True: Access(fetch=True, user=True)}


def _changed(before: bytes, now: bytes, size: int) -> list[int]:
    """Which present entries of a page of tables are others now; A and D, which we set, do not count.

    From an absent entry nothing was derived.
    """
    kind = np.dtype(np.uint32 if size == 4 else np.uint64)
    one, marks = kind.type(1), kind.type(ACCESSED | DIRTY)
    old, new = np.frombuffer(before, kind), np.frombuffer(now, kind)
    other = (old ^ new) & ~(new & marks)
    return [int(index) for index in np.flatnonzero((old & one).astype(bool) & (other != 0))]


class Device(Exception):
    """There is no memory at a linear address, but a device's (or nobody's) guest-physical one: `gpa`."""

    def __init__(self, gpa: int) -> None:
        super().__init__(gpa)
        self.gpa = gpa


class Shadow:
    """The views of the guest whose registers are in `q`.

    `new_view` makes an empty one; `code_changed` is told of traced guest-physical pages that are written.
    """

    def __init__(self, q: memoryview, walker: Walker, p2m: P2M, frames: FrameSource, cache: TranslationCache,
                 new_view: Callable[[], View], code_changed: Callable[[int], None]) -> None:
        self._q = q
        self._walker = walker
        self._p2m = p2m
        self._leaf = p2m.leaf
        self._frames = frames
        self._cache = cache
        self._new_view = new_view
        self._code_changed = code_changed
        self._views: OrderedDict[tuple[bool, int], View] = OrderedDict()
        self._spare: list[View] = []
        #: guest-physical page -> where it may be mapped; entries that are not true any more are skipped
        self._shown: dict[int, list[tuple[View, int]]] = {}
        #: traced page tables: page -> what its entries are about, in which views
        self._tables: dict[int, dict[tuple[View, int], Table]] = {}
        #: tables out of sync: page -> what it was
        self._unsynced: dict[int, bytes] = {}
        self.traces = CodeTraces(p2m)
        #: pages of code this guest has come upon
        self._met: set[int] = set()
        #: the supervisor view if it keeps global pages
        self._global: View | None = None
        p2m.traced.clear()
        p2m.on_trace = self._trace_went_off
        p2m.on_remap = self._remapped
        self._version = p2m.version
        self.supervisor = self._current(False)
        self.user = self._current(True)

    # -- which views -------------------------------------------------------------------------------

    def _key(self, user: bool) -> tuple[bool, int]:
        q = self._q
        if not q[at.CR] & CR0_PG:
            return False, -1            # without paging there are no privileges
        if not user and q[at.CR + 4] & CR4_PGE:
            return False, -2
        return user, q[at.CR + 3] & 0xFFFF_FFE0

    def _current(self, user: bool) -> View:
        key = self._key(user)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= _MOST_VIEWS + 2:
                self._recycle()
            view = self._spare.pop() if self._spare else self._blank_view()
            view.user = key[0]
            self._views[key] = view
        self._views.move_to_end(key)
        if not user:
            self._global = view if key == (False, -2) else None
        return view

    def _blank_view(self) -> View:
        """A new one, or where the host has no more address space, one that was used."""
        try:
            return self._new_view()
        except OSError:
            if len(self._views) < 2:
                raise
            self._recycle()
            return self._spare.pop()

    def _recycle(self) -> None:
        """The view used longest ago becomes a blank one."""
        _, view = self._views.popitem(last=False)
        self._disown(view)
        self._spare.append(view)

    def _disown(self, view: View) -> None:
        view.clear()
        for page, users in list(self._tables.items()):
            for key in [key for key in users if key[0] is view]:
                self._release_table(page, key)

    def views(self) -> list[View]:
        """All there are."""
        return list(self._views.values())

    def view(self, user: bool) -> View:
        """The current view for a privilege."""
        return self.user if user else self.supervisor

    # -- what the guest does to its translations ----------------------------------------------------

    def set_cr3(self) -> None:
        """CR3 was written, perhaps with the value it had."""
        self._sync()
        if self._q[at.CR + 4] & CR4_PGE:
            self.supervisor.flush_passing()
        self.supervisor, self.user = self._current(False), self._current(True)

    def invalidate(self, address: int) -> None:
        """INVLPG."""
        page = address >> PAGE_SHIFT
        for view in {self.supervisor, self.user}:
            self._drop_entry(view, page)

    def flush(self) -> None:
        """Everything that was derived from page tables goes: CR0 or CR4 changed what they mean."""
        for view in self._views.values():
            view.clear()
        self._tables.clear()
        self._unsynced.clear()
        self._shown.clear()
        self._version = self._p2m.version
        self.supervisor, self.user = self._current(False), self._current(True)

    def follow_p2m(self) -> None:
        """Before the guest runs: somebody else may have changed what the P2M allows."""
        if self._version != self._p2m.version:
            self.flush()

    # -- faults ------------------------------------------------------------------------------------

    def fill(self, user: bool, address: int, write: bool) -> None:
        """Map the page of a linear address, for an access that the guest's page tables allow.

        Raises GuestFault when they do not, Device, OutOfFrames.
        """
        view, page = self.view(user), address >> PAGE_SHIFT
        place = self._walker.find(address, write, view.user)
        source = place.page
        entry = self.frame_for(source, write, address)
        writable = place.writable and bool(entry & WRITABLE)
        if place.span > 1 and view.window.pages.get(page) is None and place.tables:
            view.large[page & -place.span] = place.span
        count = 1
        if page == view.next and place.span > 1:
            count = self._ahead(view, page, place, entry, writable)
        else:
            view.next, view.run = page + 1, 1
        view.map(page, source, (entry & FRAME_MASK) >> PAGE_SHIFT, writable, count)
        depends = not place.everywhere and place.tables
        for index in range(page, page + count):
            shown = self._shown.get(source)
            if shown is None:
                self._shown[source] = [(view, index)]
            elif (view, index) not in shown:
                shown.append((view, index))
            if depends:
                self._depends(view, index, place.tables)
            source += 1

    def _ahead(self, view: View, page: int, place: Place, entry: int, writable: bool) -> int:
        """How many pages are to be mapped at once: more and more while a guest goes through a large page.

        Those behind the first are in the P2M already, with the next frames and the same right, or come now.
        """
        wanted = min(2 * view.run, _MOST_AHEAD, place.span - page % place.span)
        view.run, count = wanted, 1
        leaf, pages, frames = self._leaf, view.window.pages, self._frames
        while count < wanted:
            source = place.page + count
            if source >= self._p2m.pages or page + count in pages:
                break
            following = leaf[source]
            if not following & PRESENT:
                if not writable or len(frames) < _PLENTY:
                    break
                self._p2m.fault(source << PAGE_SHIFT, True, frames)
                following = leaf[source]
            if following & FRAME_MASK != (entry & FRAME_MASK) + (count << PAGE_SHIFT) or (
                    place.writable and bool(following & WRITABLE)) != writable:
                break
            count += 1
        view.next = page + count
        return count

    def frame_for(self, source: int, write: bool, offset: int = 0) -> int:
        """The P2M entry of a guest-physical page, which may be read, or written, from now on."""
        if source >= self._p2m.pages:
            raise Device(source << PAGE_SHIFT | offset & PAGE - 1)
        entry = self._leaf[source]
        if not entry & PRESENT or (write and not entry & WRITABLE):
            self._p2m.fault(source << PAGE_SHIFT, write, self._frames)
            entry = self._leaf[source]
        return entry

    def _depends(self, view: View, page: int, tables: tuple[Table, ...]) -> None:
        """The page was found through these tables: they are traced, unless the next CR3 drops it anyway."""
        if view is self._global:
            view.passing.add(page)
            return
        for table in tables:
            users = self._tables.get(table.page)
            if users is None:
                users = self._tables[table.page] = {}
                if table.page not in self._unsynced:
                    self._trace(table.page)
            users.setdefault((view, table.first), table)
            before = self._unsynced.get(table.page)
            if before is not None:
                # what is derived from it from now on is derived from what it is now
                now = self.page_bytes(table.page)
                if now != before:
                    self.compare(table.page, before)
                    self._unsynced[table.page] = now

    # -- code --------------------------------------------------------------------------------------

    def code_page(self, mode: Mode, number: int) -> CodePage:
        """The page of code at a linear page of the current view.  Raises GuestFault, Device, OutOfFrames."""
        view = self.view(mode.user)
        found = view.code.get(number)
        if found is not None:
            return found
        source = self._fetch(view, number)
        code = self.page_bytes(source)
        mixed = self.traces.private(view, number, mode, source)
        if mixed is not None:
            self._cache.kill(mixed.change(code))
            found = mixed
        elif self.traces.mixes(source):
            found = self.traces.adopt(view, CodePage(mode, number, code, private=True), source)
        else:
            found = self._cache.page(mode, number, code)
            if id(found) not in self._met:
                self._met.add(id(found))
                self._cache.counters.shared += len(found.units)
        view.code[number] = found
        self._watch_code(view, number, source)
        return found

    def beyond(self, user: bool, number: int) -> bytes:
        """How the page behind linear page `number` begins, for an instruction that ends there."""
        view = self.view(user)
        following = number + 1 & 0xF_FFFF
        source = self._fetch(view, following)
        self._watch_code(view, following, source)
        return self.page_bytes(source)[:TAIL_BYTES]

    def _fetch(self, view: View, number: int) -> int:
        gpa = self._walker.check(number << PAGE_SHIFT, _FETCH[view.user])
        place = self._walker.find(number << PAGE_SHIFT, False, view.user)
        if not place.everywhere and place.tables:
            self._depends(view, number, place.tables)
        self.frame_for(gpa >> PAGE_SHIFT, False)
        return gpa >> PAGE_SHIFT

    def _watch_code(self, view: View, number: int, source: int) -> None:
        self.traces.watch(view, number, source)
        self._trace(source)

    def page_bytes(self, source: int) -> bytes:
        """The bytes of a guest-physical page that has a frame."""
        start = self._leaf[source] & FRAME_MASK
        return bytes(self._p2m.pool.view[start:start + PAGE])

    # -- traces ------------------------------------------------------------------------------------

    def _trace(self, source: int) -> None:
        """Write-protect a guest-physical page everywhere."""
        if source >= self._p2m.pages or source in self._p2m.traced:
            return
        self._p2m.trace(source)
        for view, page in self._shown_at(source):
            if view.window.pages[page] & 1:
                view.window.protect(page, 1, False)

    def _shown_at(self, source: int) -> list[tuple[View, int]]:
        shown = self._shown.get(source)
        if shown is None:
            return []
        shown[:] = [(view, page) for view, page in shown if view.sources.get(page) == source]
        return shown

    def _trace_went_off(self, source: int) -> None:
        """A traced page is about to be written."""
        if source in self._tables:
            self._unsynced[source] = self.page_bytes(source)
        watched = self.traces.went_off(source)
        for view, number in watched:
            view.drop_code(number)
        self._code_changed(source)

    def _remapped(self, source: int) -> None:
        """A guest-physical page has another frame: a share was broken."""
        if self._version == self._p2m.version - 1:
            self._version += 1
        for view, page in self._shown_at(source):
            view.window.unmap(page)
            del view.sources[page]
        self._shown.pop(source, None)

    def locate(self, user: bool, address: int, write: bool) -> int:
        """The guest-physical page of a linear address.  Raises GuestFault, Device, OutOfFrames."""
        source = self._walker.find(address, write, self.view(user).user).page
        if source >= self._p2m.pages:
            raise Device(source << PAGE_SHIFT | address & PAGE - 1)
        return source

    def store_traced(self, source: int, offset: int, data: bytes) -> bool:
        """Store to a traced page with its trace in place; False, and nothing done, where that cannot be.

        What depended on the entries and on the code that change is dropped at once.
        """
        entry = self._leaf[source]
        if source not in self._p2m.traced or entry & KIND_MASK != Kind.PRIVATE << KIND_SHIFT:
            return False
        mixed = self.traces.private_pages(source)
        if self.traces.watched(source) and not mixed:
            return False
        if self._p2m.logging:
            self._leaf[source] = entry | LOGGED
        before = self.page_bytes(source) if source in self._tables else b""
        place = (entry & FRAME_MASK) + offset
        self._p2m.pool.view[place:place + len(data)] = data
        if before:
            self.compare(source, before)
        if mixed:
            self.stored(source)
        return True

    def open(self, view: View, address: int) -> int | None:
        """Make a write-protected page of a view writable for one store; its guest-physical page.

        None where its frame is shared, or where more than code depends on it: then the trace has to go off.
        """
        page = address >> PAGE_SHIFT
        source = view.sources[page]
        entry = self._leaf[source]
        if entry & KIND_MASK != Kind.PRIVATE << KIND_SHIFT or source in self._tables:
            return None
        if self._p2m.logging:
            self._leaf[source] = entry | LOGGED
        view.window.protect(page, 1, True)
        return source

    def shut(self, view: View, address: int) -> None:
        """The store is done: the page is write-protected again."""
        page = address >> PAGE_SHIFT
        if page in view.sources:
            view.window.protect(page, 1, False)

    def stored(self, source: int) -> None:
        """A store to a mixed page was carried out: what it did not change lives on, under a trace again."""
        code = self.page_bytes(source)
        for page in self.traces.private_pages(source):
            self._cache.kill(page.change(code))
        self._code_changed(source)

    def source_of_code(self, address: int, user: bool) -> int | None:
        """The guest-physical page of code the silicon is to execute, traced from now on; None if a device."""
        view = self.view(user)
        try:
            source = self._fetch(view, address >> PAGE_SHIFT)
        except Device:
            return None
        self._watch_code(view, address >> PAGE_SHIFT, source)
        return source

    def frame_number(self, source: int) -> int:
        """The frame of a guest-physical page that has one."""
        return (self._leaf[source] & FRAME_MASK) >> PAGE_SHIFT

    # -- page tables -------------------------------------------------------------------------------

    def _sync(self) -> None:
        """Compare the tables that were written with what they were, and trace them again."""
        if not self._unsynced:
            return
        unsynced, self._unsynced = self._unsynced, {}
        for page, before in unsynced.items():
            if page in self._tables:
                self.compare(page, before)
            if page in self._tables:
                self._trace(page)

    def compare(self, page: int, before: bytes) -> None:
        """Drop from all views what depends on the entries that changed in a page of tables."""
        users = self._tables[page]
        now = self.page_bytes(page)
        if now == before:
            return
        for size in {table.size for table in users.values()}:
            changed = _changed(before, now, size)
            for key, table in [item for item in users.items() if item[1].size == size]:
                if len(changed) > _FLOOD:
                    self._release_table(page, key)
                else:
                    self._drop_entries(key[0], table, changed)

    def _drop_entries(self, view: View, table: Table, changed: list[int]) -> None:
        if not table.span:              # directory pointers: each is about a gigabyte
            for _ in changed:
                view.drop(0, 1 << 20)
            return
        for first, count in runs(changed):
            view.drop(table.first + first * table.span, count * table.span)

    def _release_table(self, page: int, key: tuple[View, int]) -> None:
        """The page is no table of a view any more; what was found through it is forgotten."""
        view, table = key[0], self._tables[page].pop(key)
        if not self._tables[page]:
            del self._tables[page]
        entries = PAGE // table.size
        view.drop(table.first if table.span else 0, entries * table.span if table.span else 1 << 20)

    def _drop_entry(self, view: View, page: int) -> None:
        for span in (512, 1024):
            first = page & -span
            if view.large.get(first) == span:
                view.drop(first, span)
                del view.large[first]
        view.drop(page)

    def close(self) -> None:
        """Give all address space back."""
        if self._p2m.on_trace == self._trace_went_off:
            self._p2m.on_trace = self._p2m.on_remap = None
            self._p2m.traced.clear()
        for view in [*self._views.values(), *self._spare]:
            view.close()
        self._views.clear()
        self._spare.clear()
