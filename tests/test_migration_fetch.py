# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that run while pages of them are at another host: they wait for these, and notice nothing."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import numpy as np
import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from hostd.errors import Conflict, HostError
from hostd.guests import Guests
from hostd.host import Host
from hostd.memory import MachineMemory
from hostd.model import CloneRequest, SnapshotRequest, StopRequest
from hostd.reclaiming import Reclaimer
from hostd.stores import slots_at
from hostd.vm import Vm
from tests import hw_modes as m
from tests.hw_rig import Machine, Rig
from tests.test_migration_worker import counting, prints_more
from tests.test_monitor_kernels import GOOD, MIX, PRIMES, boot, last_line
from tests.test_monitor_paging import HLT, load
from tests.test_reclaiming import Host as Simulated
from tests.test_reclaiming import Life
from tests.test_virtio_machine import DATA, HALTED, keep, request, result, start
from tests.told_host import SOON, ToldHost, real_host
from vmm.devices.virtio import bank
from vmm.memory.errors import OutOfFrames
from vmm.memory.p2mbits import FRAME_MASK, KIND_MASK, KIND_SHIFT, STORED, Kind
from vmm.memory.pool import PAGE
from vmm.memory.reclaim import carry_out
from vmm.monitor import StopReason

MONITORS = ("hw", "bt")
STORE = 5
NONE = np.zeros(0, dtype=np.int64)
PRIVATE = np.uint64(Kind.PRIVATE << KIND_SHIFT)


def private(leaf: np.ndarray) -> np.ndarray:
    """Pages with a frame for themselves."""
    return np.flatnonzero(leaf & np.uint64(KIND_MASK) == PRIVATE)


# --- under either monitor ----------------------------------------------------------------------------------


class Away:
    """The other host of one machine: it has pages, and gives those that are waited for."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.pages: dict[int, bytes] = {}
        self.wanted: list[int] = []
        self.given = 0
        machine.block.p2m.fetch = self.fetch

    def fetch(self, slot: int, into: memoryview) -> None:
        assert slot >> 32 == STORE
        self.wanted.append(slot & 0xFFFF_FFFF)
        raise OutOfFrames("elsewhere")

    def take(self, pages: np.ndarray) -> None:
        """These pages are here from now on, as far as nothing is in the way of that."""
        machine, p2m = self.machine, self.machine.block.p2m
        machine.leave_cpu()
        pages, frames = carry_out("freeze", p2m, pages, NONE, NONE)
        carry_out("watch", p2m, pages, NONE, NONE)
        contents = {page: p2m.contents(page) for page in pages.tolist()}
        stored, _ = carry_out("store", p2m, pages, frames, slots_at(STORE, pages).astype(np.int64))
        self.pages |= {page: contents[page] for page in stored.tolist()}

    def give(self) -> None:
        """Those that the machine waits for."""
        wanted, self.wanted = np.unique(np.array(self.wanted, dtype=np.int64)), []
        machine, p2m = self.machine, self.machine.block.p2m
        contents = [self.pages.pop(page) for page in wanted.tolist()]
        frames = np.array([machine.frames.take() if any(page) else 0 for page in contents], dtype=np.int64)
        for frame, page in zip(frames.tolist(), contents):
            if frame:
                p2m.pool.page(frame)[:] = page
                machine.processor.cpu.invalidate(frame, 1)
        done, unused = carry_out("install", p2m, wanted, frames, slots_at(STORE, wanted).astype(np.int64))
        assert (done.tolist(), len(unused)) == (wanted.tolist(), 0)
        self.given += len(wanted)


@pytest.fixture
def bookless(rig: Rig) -> Iterator[Rig]:
    """No books are kept of machines of this rig: frames they let go of come back with its own stock."""
    yield rig
    for block in rig.blocks:
        block.leaf()[:] = 0


@pytest.mark.parametrize(("name", "append"), [MIX, PRIMES])
def test_a_guest_whose_pages_come_when_it_touches_them(bookless: Rig, name: str, append: str) -> None:
    undisturbed = boot(bookless, name, append)
    assert undisturbed.go() == GOOD
    machine = boot(bookless, name, append)
    away, random = Away(machine), Random(3)
    away.take(private(machine.block.leaf()))
    assert away.pages
    for turn in itertools.count():
        stop = machine.run(time.monotonic_ns() + 300_000)
        if stop.reason.final:
            break
        if stop.reason is StopReason.NO_FRAMES:
            assert away.wanted
            away.give()
        elif turn % 3 == 0 and away.given < 150:
            pages = private(machine.block.leaf())
            away.take(pages[[random.random() < 0.5 for _ in pages]])
    assert (stop, last_line(machine)) == (GOOD, last_line(undisturbed))
    assert away.given > 3


def test_a_device_waits_for_pages(bookless: Rig) -> None:
    """Its ring, the descriptors' page and the buffer, one after the other."""
    setup = m.protected(start(bank.RNG, 0) + HLT
                        + request(bank.RNG, 0, 1, DATA, 6) + load(DATA) + keep(0) + HLT)
    setup.put(DATA, b"before, after")
    machine = bookless.machine(setup.state, setup.writes)
    machine.board.rng.entropy = lambda count: b"random"
    assert machine.go() == HALTED
    away = Away(machine)
    away.take(private(machine.block.leaf()))
    machine.processor.halted = False
    waited = []
    while (stop := machine.go()).reason is StopReason.NO_FRAMES:
        waited += away.wanted
        away.give()
    assert stop == HALTED and DATA >> 12 in waited
    assert result(machine, 0) == int.from_bytes(b"rand", "little")
    assert machine.memory.read(DATA, 13) == b"random, after"


# --- the books ---------------------------------------------------------------------------------------------


class Fetching(Simulated):
    """Guests some pages of which are at another host, beside all that is done to them here."""

    def __init__(self) -> None:
        super().__init__()
        self.done = 0
        self.store = self.books.stores.open_remote(self._close)

    def _close(self) -> None:
        """No page is there any more: the next ones are at another."""
        self.done += 1

    def away(self, life: Life) -> np.ndarray:
        """Pages of a guest that are at the other host."""
        leaf = life.block.leaf()
        slots = (leaf & np.uint64(FRAME_MASK)) >> np.uint64(12)
        return np.flatnonzero(((leaf & np.uint64(STORED)) != 0) & (slots >> np.uint64(32) == self.store))

    @precondition(lambda self: len(self.lives) < 5)
    @rule(worker=st.integers(0, 1))
    def arrive(self, worker: int) -> None:
        """A guest comes, and 16 pages of it are to follow."""
        if self.done:
            self.done, self.store = 0, self.books.stores.open_remote(self._close)
        block = self.books.new(1 << 20)
        pages = np.arange(16)
        slots = slots_at(self.store, pages)
        self.books.stores.retain(slots)
        self.books.refer(block, pages, slots)
        life = Life(block, worker, {page: b"page %3d" % page for page in range(0, 16, 2)})
        block.p2m.fetch = lambda slot, into: self.fetch(life, slot, into)
        self.lives.append(life)

    def fetch(self, life: Life, slot: int, into: memoryview) -> None:
        """What the tests that guests notice nothing need: they see what is still to come."""
        if slot >> 32 != self.store:
            self.books.stores.fetch(slot, into)
            return
        into[:] = life.expected.get(slot & 0xFFFF_FFFF, bytes(8)).ljust(PAGE, b"\0")

    @precondition(lambda self: 0 < len(self.lives) < 5)
    @rule(number=st.integers(0, 7), worker=st.integers(0, 1))
    def clone(self, number: int, worker: int) -> None:
        """Guests that are whole may be cloned."""
        if not len(self.away(self.life(number))):
            super().clone(number=number, worker=worker)

    @precondition(lambda self: self.lives and len(self.copies) < 3)
    @rule(number=st.integers(0, 7))
    def snapshot(self, number: int) -> None:
        """The same goes for snapshots."""
        if not len(self.away(self.life(number))):
            super().snapshot(number=number)

    @precondition(lambda self: self.lives)
    @rule(number=st.integers(0, 7), pages=st.sets(st.integers(0, 15), min_size=1), ends=st.sampled_from(
        ("not", "before", "dies before", "dies after", "after", "gives back")), unreported=st.booleans())
    def install(self, number: int, pages: set[int], ends: str, unreported: bool) -> None:
        """Pages come, wanted or not; meanwhile guest or worker may end, or the guest give them back."""
        life = self.life(number)
        if not unreported:
            self.report(life)
        asked = np.array(sorted(pages), dtype=np.int64)
        magazine = self.books.frames_for_loading(len(asked))
        frames = np.array([magazine.take() if page in life.expected else 0 for page in asked.tolist()],
                          dtype=np.int64)
        filled = frames[frames != 0]
        for page, frame in zip(asked.tolist(), frames.tolist()):
            if frame:
                life.block.pool.page(frame)[:] = life.expected[page].ljust(PAGE, b"\0")
        filled = np.append(filled, [magazine.take() for _ in range(len(magazine))]).astype(np.int64)
        passage = self.books.send(filled)
        if ends == "before":
            self.report(life)
            self.lives.remove(life)
            self.books.free(life.block)
            self.books.returned(passage, filled)
            return
        if ends == "dies before":
            self.die(life.worker)
            self.books.returned(passage, filled)
            return
        done, unused = carry_out("install", life.block.p2m, asked, frames,
                                 slots_at(self.store, asked).astype(np.int64))
        unused = np.append(unused, filled[~np.isin(filled, frames)])
        if ends == "dies after":
            self.die(life.worker)
            self.books.returned(passage, filled)
            return
        if ends == "gives back":
            for page in asked.tolist():
                life.block.p2m.discard(page, True)
                life.expected.pop(page, None)
        self.books.arrived(life.block, life.worker, passage, done, filled, unused)
        if ends == "after":
            self.report(life)
            self.lives.remove(life)
            self.books.free(life.block)

    @invariant()
    def what_is_away_is_owned(self) -> None:
        """Until it is reported that a page has no use for its slot any more."""
        owned = 0
        for life in self.lives:
            slots = self.books._charges[life.block.first].slots
            unsaid = [page for page in life.block.p2m.fetched if int(slots[page]) >> 32 == self.store]
            owned += len({*self.away(life).tolist(), *unsaid})
        assert self.done or self.books.stores._owned[self.store] == owned


TestFetching = Fetching.TestCase
TestFetching.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# --- on a host ---------------------------------------------------------------------------------------------


class OtherHost:
    """The host that a guest came from, as the daemon sees it: it has the pages, and sends those that are
    wanted."""

    def __init__(self, host: Host, vm: Vm) -> None:
        self.guests: Guests = host._guests
        self.memory: MachineMemory = host._memory
        self.reclaimer = Reclaimer(self.guests, self.memory)
        self.vm = vm
        self.pages: dict[int, bytes] = {}
        self.wanted: list[int] = []
        self.told = trio.Event()
        self.closed = trio.Event()
        self.asked: list[int] = []

    async def keep(self) -> None:
        """All private pages of the guest are here, and it goes on without them."""
        vm, books = self.vm, self.memory.books
        async with self.guests.changing(vm):
            await self.guests.park(vm)
            block = vm.block
            assert block is not None
            pages = private(block.leaf())
            self.pages = {page: block.p2m.contents(page) for page in pages.tolist()}
            frames = (block.leaf()[pages] & np.uint64(FRAME_MASK)) >> np.uint64(12)
            block.leaf()[pages] = 0
            books.reported(block, [], frames.astype(np.int64).tolist(), [])
            self.store = books.stores.open_remote(self.closed.set)
            slots = slots_at(self.store, pages)
            books.stores.retain(slots)
            books.refer(block, pages, slots)
            vm.fetching = self.want
            await self.guests.unpark(vm)

    def want(self, pages: list[int]) -> None:
        self.wanted += pages
        self.asked += pages
        self.told.set()

    async def send(self, pages: list[int]) -> None:
        contents = [self.pages[page] for page in pages]
        filled = sum(map(any, contents))
        magazine = self.memory.books.frames_for_loading(filled)
        frames = np.array([magazine.take() if any(data) else 0 for data in contents], dtype=np.int64)
        for frame, data in zip(frames.tolist(), contents):
            if frame:
                self.memory.pool.page(frame)[:] = data
        await self.reclaimer.install(self.vm, self.store, np.array(pages, dtype=np.int64), frames)

    async def serve(self) -> None:
        """Send what is wanted, one page after the other, for ever."""
        while True:
            await self.told.wait()
            self.told = trio.Event()
            wanted, self.wanted = self.wanted, []
            for page in wanted:
                await self.send([page])


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[ToldHost]:
    """A host in this process with real workers."""
    async with real_host(tmp_path) as told:
        yield told


@asynccontextmanager
async def fetched(host: ToldHost, vm: Vm) -> AsyncIterator[OtherHost]:
    """The guest fetches its memory from there from now on."""
    other = OtherHost(host.host, vm)
    async with trio.open_nursery() as nursery:
        await other.keep()
        nursery.start_soon(other.serve)
        yield other
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("monitor", MONITORS)
async def test_a_guest_fetches_what_it_needs_and_then_the_rest(host: ToldHost, monitor: str) -> None:
    vm = await counting(host, monitor)
    async with fetched(host, vm) as other:
        await prints_more(host)
        assert 0 < len(other.asked) < len(other.pages) and not other.closed.is_set()
        assert len(set(other.asked)) == len(other.asked)
        for attempt in (host.host.clone("vm", CloneRequest(names=["copy"])),
                        host.host.snapshot("vm", SnapshotRequest())):
            with pytest.raises(Conflict, match="VM vm still fetches memory from the host it came from"):
                await attempt.outcome()
        # from worker to worker, and paused for a while
        target = next(worker for worker in host.host._workers.ready if worker is not vm.worker)
        await host.host._guests.move(vm, target)
        await prints_more(host)
        await host.host.pause("vm").outcome()
        rest = sorted(set(other.pages) - set(other.asked))
        await other.send(rest[:20])
        await host.host.resume("vm").outcome()
        await other.send(rest)
        with trio.fail_after(SOON):
            await other.closed.wait()
        vm.fetching = None
        await prints_more(host)
        assert vm.block is not None and vm.block.memory_counts()["stored"] == 0
        await host.clone("vm", "copy")


@pytest.mark.parametrize("end", ["stop", "die"])
async def test_a_guest_that_ends_before_all_of_it_is_here(host: ToldHost, end: str) -> None:
    vm = await counting(host, "hw")
    async with fetched(host, vm) as other:
        await prints_more(host)
        rest = sorted(set(other.pages) - set(other.asked))
        async with trio.open_nursery() as nursery:
            async def send(pages: list[int]) -> None:
                try:
                    await other.send(pages)
                except HostError:
                    failed.append(pages)

            failed: list[list[int]] = []
            for start in range(0, len(rest), 8):
                nursery.start_soon(send, rest[start:start + 8])
            await trio.lowlevel.checkpoint()
            if end == "die":
                assert vm.worker is not None
                vm.worker.kill()
                await host.becomes("vm", "crashed")
            else:
                await host.host.stop("vm", StopRequest(force=True)).outcome()
        assert vm.fetching is None
        with trio.fail_after(SOON):
            await other.closed.wait()
    await host.ready_workers()
    frames = host.host.overview.frames()
    assert (frames.private, frames.shared) == (0, 0)


async def test_an_answer_and_the_guest_s_end_at_once(told: ToldHost) -> None:
    """The books follow the answer before the memory it is about is gone."""
    await told.running("vm")
    vm = told.host._guests.vms["vm"]
    await told.tell("vm", "last words\n")
    await told.prints("vm", "last words")
    memory = told.host._memory
    magazine = memory.books.frames_for_loading(3)
    frames = np.array([magazine.take() for _ in range(3)], dtype=np.int64)
    reclaimer = Reclaimer(told.host._guests, memory)
    assert await reclaimer.install(vm, 1, np.array([1, 2, 3]), frames) == 0
    await told.becomes("vm", "halted")
    assert told.host.overview.frames().granted == 0


async def test_a_suspended_host_leaves_out_who_is_not_whole(host: ToldHost) -> None:
    vm = await counting(host, "hw")
    async with fetched(host, vm):
        assert await host.host._suspender.suspend(lambda: None) == set()
        assert vm.state == "running"
