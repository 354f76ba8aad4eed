# SPDX-License-Identifier: GPL-2.0-or-later
"""A host with guests on it, page by page, driven by the real memory policy.

Time is in ticks of a second; each has one decision.  Sizes are pages.  A guest's kernel gives pages out for
data (which only its programs free) and for cache (which it drops when asked), and balloons the rest; programs
touch a working set that wanders over both.  The host's frames are counted, and a touch for which there is
none stalls its guest.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import numpy as np
from numpy.typing import NDArray

from hostd.policy import HostMemory, Plan, Policy, Tuning, VmMemory, WorkingSet, settle
from hostd.policy.victims import aged, coldest

#: what a guest's kernel uses a page for
FREE, DATA, CACHE, BALLOON = range(4)
#: where the host has a page
ABSENT, RESIDENT, SWAPPED = range(3)
#: small guests, with small floors
TUNING = Tuning(floor=128)
#: ticks in a sampling period
PERIOD = 5

#: a guest's part of memory that the disk brings back in a tick
DISK = 16

Pages = NDArray[np.int64]


def chunks(pages: Pages) -> Iterator[Pages]:
    return (pages[start:start + 16] for start in range(0, len(pages), 16))


class Guest:
    """A guest whose programs hold `data` pages, `active` of which they touch every tick.

    `driver` is what its balloon driver does, "none", "prompt", "late" (it looks at its orders every third
    tick only), or "deaf"; `statistics`, whether it says what is available: without, it takes pages back from
    its balloon before it runs out of memory; `cache`, pages of files it would like to keep; `growth`, by how
    much data and cache may grow in a tick; `wander`, how far the working set moves.
    """

    def __init__(self, name: str, memory: int = 2048, *, data: int = 512, active: int = 256, cache: int = 0,
                 driver: str = "prompt", statistics: bool = True, reservation: int | None = None,
                 limit: int | None = None, shares: int | None = None, growth: int = 16, wander: int = 3,
                 seed: int = 0) -> None:
        self.name, self.memory = name, memory
        self.settings = settle(memory, reservation, limit, shares)
        self.data, self.active, self.cache = data, active, cache
        self.driver, self.statistics = driver, statistics
        self.growth, self.wander = growth, wander
        self.use = np.full(memory, FREE, dtype=np.uint8)
        self.place = np.full(memory, ABSENT, dtype=np.uint8)
        self.history = np.zeros(memory, dtype=np.uint8)
        self.touched = np.zeros(memory, dtype=bool)             # in this tick
        self.in_period = np.zeros(memory, dtype=bool)
        self.working_set = WorkingSet(Random(seed))
        self.watched = self.working_set.choose(memory)
        self.position = 0
        self.oom = 0
        self.stalls = 0

    def __repr__(self) -> str:
        return (f"{self.name}(data={self.data}, active={self.active}, cache={self.cache}, {self.driver}, "
                f"statistics={self.statistics}, {self.settings}, growth={self.growth}, wander={self.wander})")

    def having(self, use: int) -> Pages:
        return np.flatnonzero(self.use == use)

    def at(self, place: int) -> int:
        return int(np.count_nonzero(self.place == place))

    def account(self) -> VmMemory:
        """As the daemon would see it."""
        ballooned = len(self.having(BALLOON))
        available = len(self.having(FREE)) + len(self.having(CACHE))
        return VmMemory(self.name, self.memory, *self.settings, resident=self.at(RESIDENT),
                        private=self.at(RESIDENT), ballooned=ballooned, swapped=self.at(SWAPPED),
                        working_set=self.working_set.estimate, balloon_able=self.driver != "none",
                        guest_free=available if self.statistics and self.driver != "none" else None)

    # --- the guest's kernel

    def release(self, pages: Pages, use: int) -> None:
        """Free pages, or ballooned ones: the driver reports both, and the host takes the frames."""
        self.use[pages] = use
        self.place[pages] = ABSENT

    def take(self, count: int, use: int) -> int:
        """Up to `count` pages for `use`: free ones, and for all but the cache, the cache's."""
        pages = self.having(FREE)[:count]
        if use != CACHE and len(pages) < count:
            pages = np.concatenate([pages, self.having(CACHE)[:count - len(pages)]])
        if use == DATA and len(pages) < count and not self.statistics:
            pages = np.concatenate([pages, self.having(BALLOON)[:count - len(pages)]])
        self.use[pages] = use
        if use == BALLOON:
            self.release(pages, BALLOON)
        return len(pages)

    def inflate(self, order: int, tick: int) -> None:
        if self.driver in ("none", "deaf") or (self.driver == "late" and tick % 3):
            return
        balloon = self.having(BALLOON)
        if order < len(balloon):
            self.use[balloon[order:]] = FREE
        else:
            self.take(order - len(balloon), BALLOON)

    # --- its programs

    def run(self) -> Iterator[Pages]:
        """One tick, as the pages that the programs touch, a few at a time."""
        data = len(self.having(DATA))
        if self.data > data:
            wanted = min(self.growth, self.data - data)
            if self.take(wanted, DATA) < wanted:
                self.oom += 1
        elif self.data < data:
            self.release(self.having(DATA)[self.data:], FREE)
        if (lacking := self.cache - len(self.having(CACHE))) > 0:
            # a kernel that reads files leaves a little memory free
            self.take(min(lacking, self.growth, max(0, len(self.having(FREE)) - self.memory // 32)), CACHE)
        held = np.concatenate([self.having(DATA), self.having(CACHE)])
        self.touched[:] = False
        yield from chunks(held[self.place[held] == ABSENT])         # what is new is written once
        if len(held) and self.active:
            self.position = (self.position + self.wander) % len(held)
            active = self.position + np.arange(min(self.active, len(held)))
            yield from chunks(np.take(held, active, mode="wrap"))

    def touch(self, pages: Pages, free: int) -> tuple[int, int]:
        """Touch pages of which up to `free` that are missing come in: so many did, and so many did not."""
        missing = pages[self.place[pages] != RESIDENT]
        come = missing[:free]
        self.place[come] = RESIDENT
        self.touched[pages[self.place[pages] == RESIDENT]] = True
        return len(come), len(missing) - len(come)

    def scan(self, tick: int) -> None:
        """What the host notices at the end of a tick."""
        self.history = aged(self.history, self.touched)
        self.in_period |= self.touched
        touched = int(np.count_nonzero(self.in_period[self.watched]))
        if (tick + 1) % PERIOD:
            self.working_set.progress(touched, len(self.watched))
        else:
            self.working_set.feed(touched, len(self.watched))
            self.watched = self.working_set.choose(self.memory)
            self.in_period[:] = False

    def evict(self, count: int) -> None:
        resident = np.flatnonzero(self.place == RESIDENT)
        self.place[coldest(resident, self.history[resident], count)] = SWAPPED


class SimulatedHost:
    """Guests on one pool of `pool` frames."""

    def __init__(self, pool: int, guests: list[Guest], tuning: Tuning = TUNING, overhead: int = 0) -> None:
        self.pool, self.overhead = pool, overhead
        self.guests = {guest.name: guest for guest in guests}
        self.policy = Policy(tuning)
        self.demanded = 0
        self.ticks = 0
        self.plans: list[Plan] = []
        self.evicted = 0

    def __getitem__(self, name: str) -> Guest:
        return self.guests[name]

    @property
    def free(self) -> int:
        return self.pool - self.overhead - sum(guest.at(RESIDENT) for guest in self.guests.values())

    def accounts(self) -> list[VmMemory]:
        return [guest.account() for guest in self.guests.values()]

    def decide(self) -> Plan:
        host = HostMemory(self.pool, self.free, self.overhead, self.demanded, self.ticks)
        return self.policy.decide(host, self.accounts())

    def tick(self) -> Plan:
        plan = self.decide()
        self.plans.append(plan)
        for name, guest in self.guests.items():
            guest.evict(plan.vms[name].evict)
            self.evicted += plan.vms[name].evict
            guest.inflate(plan.vms[name].balloon, self.ticks)
        self.run_guests({name for name, vm in plan.vms.items() if vm.blocked})
        for guest in self.guests.values():
            guest.scan(self.ticks)
        self.ticks += 1
        return plan

    def run_guests(self, blocked: set[str]) -> None:
        """Guests take turns; one that finds no frame, or whose pages the disk is slow to bring, has to wait
        for the next tick."""
        self.demanded = 0
        free = self.free
        programs = {name: (guest.run(), guest.memory // DISK) for name, guest in self.guests.items()}
        while programs:
            for name, (program, disk) in list(programs.items()):
                pages, guest = next(program, None), self.guests[name]
                if pages is None:
                    del programs[name]
                    continue
                swapped = int(np.count_nonzero(guest.place[pages] == SWAPPED))
                came, missing = guest.touch(pages, 0 if name in blocked else free)
                free -= came
                programs[name] = (program, disk - swapped)
                if missing:
                    guest.stalls += 1
                    self.demanded += 1
                if missing or disk < swapped:
                    del programs[name]

    def run(self, ticks: int) -> Plan:
        assert ticks > 0
        for _ in range(ticks):
            plan = self.tick()
        return plan

    def resident(self, *names: str) -> list[int]:
        return [self.guests[name].at(RESIDENT) for name in names]
