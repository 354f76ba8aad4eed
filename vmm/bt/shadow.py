# SPDX-License-Identifier: GPL-2.0-or-later
"""Shadow paging: the views of a guest, and how they follow its page tables (the paper, 2.2 and 3.2).

A supervisor view and a user view are current.  The supervisor view keeps its global pages over changes of
CR3, as a TLB does.  User views, and supervisor views of a guest without global pages, are kept one for each
CR3, so that coming back costs nothing; for that the page tables they were filled from are traced
(`vmm.bt.tables`).

Pages with code that is executed are traced, too (`vmm.bt.traces`); when such a trace goes off the code there
is looked at anew before it is entered again.  Everybody's writes go through the P2M, so there are none that
it misses: those of translated code, of the emulated silicon, and of the monitor and its devices.

Invariants: a page in `p2m.traced` is writable in no view; a view without its CR3 being current shows nothing
but what its tables, as far as they are in sync, say.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from vmm.bt.cache import TranslationCache
from vmm.bt.codepage import TAIL_BYTES, CodePage
from vmm.bt.mode import Mode
from vmm.bt.tables import TracedTables
from vmm.bt.traces import CodeTraces
from vmm.bt.views import View
from vmm.bt.walk import Place, Table, Walker
from vmm.memory.frames import FrameSource
from vmm.memory.p2m import P2M
from vmm.memory.p2mbits import FRAME_MASK, KIND_MASK, KIND_SHIFT, LOGGED, PRESENT, STORED, WRITABLE, Kind
from vmm.memory.pool import PAGE, PAGE_SHIFT
from vmm.silicon import layout as at
from vmm.x86.flags import CR0_PG, CR4_PGE
from vmm.x86.paging import Access

#: views a guest may have, beside the current ones
_MOST_VIEWS = 16
#: pages mapped at once at most, and the frames in stock from which on some are used for that
_MOST_AHEAD, _PLENTY = 16, 256
_FETCH = {False: Access(fetch=True), True: Access(fetch=True, user=True)}


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
        self.tables = TracedTables(self.page_bytes, self._trace)
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
        self.tables.disown(view)

    def views(self) -> list[View]:
        """All there are."""
        return list(self._views.values())

    def view(self, user: bool) -> View:
        """The current view for a privilege."""
        return self.user if user else self.supervisor

    # -- what the guest does to its translations ----------------------------------------------------

    def set_cr3(self) -> None:
        """CR3 was written, perhaps with the value it had."""
        self.tables.sync()
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
        self.tables.clear()
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
                if not writable or following & STORED or len(frames) < _PLENTY:
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
        self.tables.depends(view, tables)

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
        """The bytes of a guest-physical page."""
        return self._p2m.contents(source)

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
        self.tables.went_off(source)
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
        before = self.page_bytes(source) if source in self.tables else b""
        place = (entry & FRAME_MASK) + offset
        self._p2m.pool.view[place:place + len(data)] = data
        if before:
            self.tables.compare(source, before)
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
        if entry & KIND_MASK != Kind.PRIVATE << KIND_SHIFT or source in self.tables:
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
