# SPDX-License-Identifier: GPL-2.0-or-later
"""The task that carries out the memory policy: looks how the guests stand, decides, and has it done.

Once a second, and at once when a worker runs out of frames, `Policy.decide` (hostd/policy) is asked; while
there is plenty of memory, only when guests come, go or claim something else, and once a minute.  What it says
is carried out in its order: balloons get their targets, sharing runs at full rate, and pages that were not
used lately go to the swap file.  A guest that ends or is being changed is left out until the next time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import trio

from hostd.definition import Definition
from hostd.errors import Conflict, HostError
from hostd.events import Events
from hostd.guests import Guests
from hostd.lifecycle import State
from hostd.memory import MachineMemory
from hostd.memory_state import HostMemoryState
from hostd.policy import HostMemory, Policy, VmMemory, VmPlan, WorkingSet, pressure, settle
from hostd.policy.victims import NEW, aged, coldest
from hostd.protocol import Most, SetBalloon
from hostd.rationing import Rationing
from hostd.reclaiming import Reclaimer
from hostd.swapfile import NotStored
from hostd.vm import Vm
from vmm.memory.frames import FrameAllocator
from vmm.memory.p2mbits import PRESENT

if TYPE_CHECKING:
    from vmm.memory.block import VmBlock

log = logging.getLogger(__name__)

DECIDE_S = 1.0
#: the same while somebody waits for memory
HUNGRY_S = 0.1
#: and while there is plenty of memory, which is seen without looking at every guest
PLENTY_S = 60.0
#: the part of the pool that is free then
PLENTY = 0.1
#: between two looks at the working sets: while memory is short, and while there is plenty
SAMPLE_S, LAZY_SAMPLE_S = 20.0, 60.0
#: how old a guest's statistics may be that somebody looks at while there is plenty: asking wakes the guest
STATISTICS_S = 30.0
#: between questions whether there is a balloon driver, which wake nobody
DRIVER_S = 5.0
#: how long nothing is swapped out once the swap file took no page
REST_S = 10.0
#: pages frozen, written and let go of at once
BATCH = 1024


class _Watch:
    """What is known of how one life of a guest uses its memory."""

    def __init__(self, life: int, pages: int, random: Random) -> None:
        self.life = life
        self.history = np.full(pages, NEW, dtype=np.uint8)
        self.working_set = WorkingSet(random)
        #: the pages of the period under way
        self.sample = np.zeros(0, dtype=np.int64)
        self.sampled = False
        self.asked = -STATISTICS_S
        self.target = -1

    def touched(self, block: VmBlock) -> int:
        """How many pages of the sample were used since they are watched."""
        return int(np.count_nonzero(block.leaf()[self.sample] & np.uint64(PRESENT)))


class MemoryKeeper:
    """`urgent` is called with whether pages should be shared at full rate; `state` is kept for the views."""

    def __init__(self, guests: Guests, memory: MachineMemory, reclaimer: Reclaimer, events: Events,
                 state: HostMemoryState, urgent: Callable[[bool], None],
                 random: Random | None = None) -> None:
        self._guests = guests
        self._memory = memory
        self._reclaimer = reclaimer
        self._events = events
        self._state = state
        self._urgent = urgent
        self._random = random or Random()
        self._policy = Policy()
        self._watches: dict[str, _Watch] = {}
        #: the last decision asked for nothing
        self._settled = False
        #: until when nothing is swapped out, since that failed the last time
        self._rests: float | None = None
        self._hunger = trio.Event()
        self._rationing = Rationing(guests.leases, self._evict)
        guests.leases.on_hunger = memory.on_want = self._hungry

    def _hungry(self) -> None:
        self._guests.leases.collect_stock()
        self._hunger.set()

    async def run(self) -> None:
        """Keep memory until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sample)
            nursery.start_soon(self._rationing.run)
            decided, about = -PLENTY_S, None
            while True:
                with trio.move_on_after(DECIDE_S):
                    await self._hunger.wait()
                claims = self._claims()
                if (not self._hunger.is_set() and claims == about and self._plenty()
                        and trio.current_time() < decided + PLENTY_S and not self._looked_at()):
                    continue
                self._hunger = trio.Event()
                decided, about = trio.current_time(), claims
                await self.decide()
                # no busy loop, but whoever is still hungry does not wait for a whole period
                await trio.sleep(HUNGRY_S)
                if self._guests.leases.waiting() or self._memory.wanted:
                    self._hungry()

    def _claims(self) -> list[tuple[str, int, Definition, bool]]:
        """What a decision is about: who is there, what they claim, and who can be told."""
        return [(vm.name, vm.boots, vm.definition, vm.worker is not None) for vm in self._guests.vms.values()]

    def _plenty(self) -> bool:
        return (self._policy.state is pressure.State.HIGH and self._settled
                and not any(vm.strict and vm.worker is not None for vm in self._guests.vms.values())
                and self._memory.books.free_frames() > PLENTY * self._memory.pool.frames)

    def _looked_at(self) -> bool:
        """Somebody looks at what a guest said long ago."""
        long_ago = trio.current_time() - STATISTICS_S
        return any(vm.memory_state.looked and vm.worker is not None and watch.asked < long_ago
                   for vm in self._guests.vms.values()
                   if (watch := self._watches.get(vm.name)) is not None)

    # --- deciding

    async def decide(self) -> None:
        """One decision, carried out."""
        vms = [vm for vm in self._guests.vms.values() if vm.block is not None and vm.state in _KEPT]
        self._watches = {vm.name: self._watch(vm) for vm in vms}
        before = self._policy.state
        stands = [self._stands(vm) for vm in vms]
        plan = self._policy.decide(self._host_memory(), stands)
        if plan.state is not before:
            log.log(logging.WARNING if plan.state > before else logging.INFO, "memory pressure",
                    extra={"state": plan.state.label, "before": before.label})
            self._events.publish("memory", state=plan.state.label, before=before.label)
        self._state.pressure = plan.state
        self._state.waiting = self._guests.leases.waiting()
        # a balloon on its way moves a step a decision
        self._settled = not any(one.balloon or one.evict for one in plan.vms.values())
        self._urgent(plan.share)
        for vm, stand in zip(vms, stands, strict=True):
            self._ration(vm, plan.vms[vm.name], stand)
            self._ask(vm, plan.vms[vm.name])
        for vm in vms:
            if plan.vms[vm.name].evict:
                await self._evict(vm, plan.vms[vm.name].evict)

    def _watch(self, vm: Vm) -> _Watch:
        watch = self._watches.get(vm.name)
        if watch is None or watch.life != vm.boots:
            assert vm.block is not None
            watch = _Watch(vm.boots, vm.block.pages, self._random)
        return watch

    def _host_memory(self) -> HostMemory:
        counts = self._memory.books.counts()
        return HostMemory(pool=counts.total, free=self._memory.books.free_frames(), overhead=counts.overhead,
                          demanded=self._guests.leases.demanded() + self._memory.wanted,
                          now=trio.current_time())

    def _stands(self, vm: Vm) -> VmMemory:
        assert vm.block is not None
        definition, state, counts = vm.definition, vm.memory_state, vm.block.memory_counts()
        settings = settle(counts["assigned"], definition.reservation >> 12, definition.limit_bytes >> 12,
                          definition.shares)
        balloon = vm.balloon
        statistics: dict[str, int] = balloon.statistics if balloon is not None else {}
        part, sole = self._shared(vm.block)
        watch = self._watches[vm.name]
        watch.working_set.progress(watch.touched(vm.block), len(watch.sample))
        if watch.sampled:
            state.working_set = watch.working_set.estimate
        return VmMemory(
            name=vm.name, memory=counts["assigned"], reservation=settings.reservation, limit=settings.limit,
            shares=settings.shares, resident=counts["private"] + part, private=counts["private"],
            shared=counts["shared"], sole=sole, ballooned=counts["ballooned"],
            swapped=counts["stored"], working_set=watch.working_set.estimate,
            balloon_able=balloon is not None and balloon.driver and vm.worker is not None,
            guest_free=_pages(statistics.get("available", statistics.get("free")), counts["assigned"]))

    def _shared(self, block: VmBlock) -> tuple[int, int]:
        """The guest's part of the frames it shares, and how many of them nobody else has."""
        _, shared = FrameAllocator.split(block.leaf())
        owners = self._memory.books.shares(shared)
        return int((1 / np.maximum(owners, 1)).sum()), int(np.count_nonzero(owners == 1))

    # --- carrying out

    def _ration(self, vm: Vm, plan: VmPlan, stand: VmMemory) -> None:
        """Its limit is on all pages that have a frame; a guest that is blocked gets no frame of its own above
        its target either, its part of what it shares included."""
        part = stand.resident - stand.private
        self._rationing.set(vm, Most(stand.limit if stand.limit < stand.memory else None,
                                     max(0, plan.target - part) if plan.blocked else None))

    def _ask(self, vm: Vm, plan: VmPlan) -> None:
        """Tell the balloon driver its target, and ask how the guest's memory is doing when that is needed."""
        watch, now = self._watches[vm.name], trio.current_time()
        assert vm.block is not None
        wanted = max(plan.balloon, vm.block.pages - (vm.definition.memory_target_bytes >> 12))
        vm.memory_state.balloon_target = wanted
        if vm.worker is None:
            return                                  # it is told when it goes on (`_claims`)
        if vm.lock.locked():
            self._settled &= wanted == watch.target
            return
        short, state = self._policy.state is not pressure.State.HIGH, vm.memory_state
        patience = (DRIVER_S if vm.balloon is None or not vm.balloon.driver
                    else DECIDE_S if short else STATISTICS_S)
        if wanted == watch.target and now < watch.asked + patience:
            return
        watch.target, watch.asked = wanted, now
        vm.worker.send(SetBalloon(vm.lease, wanted, statistics=short or state.looked))
        state.looked = False

    async def _evict(self, vm: Vm, count: int, shared: bool = False) -> int | None:
        """Swap out the `count` coldest pages: those with frames of their own, or all that are `shared`, too.
        What was used since the last time it was looked at is watched anew, and so spared this time, unless
        nothing else is left.

        The answer is how many were; None if the guest was not to be had.
        """
        if vm.block is None:
            return None
        if self._rests is not None and trio.current_time() < self._rests:
            return 0
        watch = self._watches[vm.name] = self._watch(vm)
        done = 0
        try:
            cold = self._look(vm, watch, shared)
            if len(cold) < count:
                cold = self._framed(vm.block, shared)
                await self._reclaimer.watch(vm, cold)
            for start in range(0, min(count, len(cold)), BATCH):
                chosen = coldest(cold, watch.history[cold], count)[start:start + BATCH]
                done += await self._reclaimer.swap_out(vm, chosen)
                self._rests = None
        except NotStored as error:
            if self._rests is None:
                log.warning("no page can be swapped", extra={"why": str(error)})
            self._rests = trio.current_time() + REST_S
        except Conflict as error:
            log.debug("guest not swapped", extra={"vm": vm.name, "why": str(error)})
            return None
        except HostError as error:
            log.warning("guest not swapped", extra={"vm": vm.name, "why": str(error)})
        return done

    def _look(self, vm: Vm, watch: _Watch, shared: bool) -> np.ndarray:
        """Those of `_framed` that were not used since they are watched."""
        assert vm.block is not None
        used = (vm.block.leaf() & np.uint64(PRESENT)) != 0
        watch.history = aged(watch.history, used)
        framed = self._framed(vm.block, shared)
        return framed[~used[framed]]

    def _framed(self, block: VmBlock, shared: bool) -> np.ndarray:
        """The pages that free a frame when they are swapped out: private ones, and those that are shared with
        nobody any more.  Or all that are `shared`, too."""
        leaf = block.leaf()
        framed = FrameAllocator.is_private(leaf)
        if shared:
            framed |= FrameAllocator.is_shared(leaf)
        else:
            framed[self._memory.books.sole(block)] = True
        return np.flatnonzero(framed)

    # --- working sets

    async def _sample(self) -> None:
        """See which of the pages watched in the last period were used, and watch others."""
        while True:
            await trio.sleep(LAZY_SAMPLE_S if self._plenty() else SAMPLE_S)
            for name, watch in list(self._watches.items()):
                vm = self._guests.vms.get(name)
                if vm is None or vm.block is None or vm.boots != watch.life or vm.worker is None:
                    continue
                if len(watch.sample):
                    watch.working_set.feed(watch.touched(vm.block), len(watch.sample))
                    watch.sampled = True
                sample = np.array(watch.working_set.choose(vm.block.pages), dtype=np.int64)
                watch.sample = sample[:0]           # says nothing until it is watched
                with suppress(HostError):
                    await self._reclaimer.watch(vm, sample)
                    watch.sample = sample


_KEPT = frozenset({State.RUNNING, State.PAUSED})


def _pages(statistic: int | None, most: int) -> int | None:
    """Pages in a statistic, which is in bytes and the guest's word: it has not more than `most`."""
    return None if statistic is None else min(statistic >> 12, most)
