# SPDX-License-Identifier: GPL-2.0-or-later
"""The run queue of one physical CPU: proportional share by virtual time, caps, and accounting.

The algorithm is start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) with a bounded credit for
sleepers.  Every guest has a *tag*, the virtual time at which its next turn starts.  A turn of `t` nanoseconds
moves the tag by `t / weight`; the guest with the earliest tag runs next; the queue's own virtual time is the
tag of the latest turn.  Over any interval two guests that stay runnable therefore receive time in the ratio
of their weights, with an error of at most one slice each, however unequal the weights are.

The worker calls, for ever: `pick`, run the guest, `charge`, and `sleep` if the guest halted; `wake` when a
timer or an input makes a guest runnable.  All of it is in the hot loop, so the queue is a binary heap of
plain tuples and the guest whose turn it is stays outside it: a turn that is merely interrupted never touches
the heap.
"""

from __future__ import annotations

from bisect import bisect_left
from heapq import heapify, heappop, heappush
from typing import NamedTuple

MS = 1_000_000

MAX_WEIGHT = 10_000

#: a turn is at most this long when few guests compete...
SLICE_NS = 6 * MS
#: ...and at least this part of it when many do: the world switches must not start to cost...
SHORTEST_PART = 3
#: ...and between the two such that all runnable guests together have a turn within this many full slices
ROUND_SLICES = 4
#: a guest that nobody competes with runs on for this long; who wakes meanwhile ends its turn, and every stop
#: that is not needed is saved (the emulated silicon takes milliseconds to get back to its full speed)
LONE_TURN_NS = 100 * MS
#: a turn or an allowance shorter than this is not worth a world switch
GRAIN_NS = MS // 10

#: caps are kept over windows of this length
CAP_WINDOW_NS = 100 * MS

#: virtual nanoseconds are scaled so that the division by the largest weight loses nothing that matters
SCALE = 1 << 16

#: upper bounds of the buckets of the wake-up latency histogram; one more bucket takes what is longer
LATENCY_BOUNDS_NS = tuple(us * 1000 for us in (
    20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000))


class Pick(NamedTuple):
    """The guest to run now, and for how long at most."""

    id: str
    slice_ns: int


class Usage(NamedTuple):
    """Where a guest's lifetime on this CPU went; the three always add up to it.

    `wait_ns` is steal time: the guest could have run and did not, because of others, of its cap, or of the
    monitor's own work on its behalf.
    """

    run_ns: int
    wait_ns: int
    sleep_ns: int


class Latency:
    """Histogram of the time from a wake-up to the turn that it leads to."""

    __slots__ = ("counts", "sum_ns")

    def __init__(self) -> None:
        self.counts = [0] * (len(LATENCY_BOUNDS_NS) + 1)
        self.sum_ns = 0

    def observe(self, ns: int) -> None:
        self.counts[bisect_left(LATENCY_BOUNDS_NS, ns)] += 1
        self.sum_ns += ns


class _Guest:
    __slots__ = ("asleep", "budget", "credit", "entry", "id", "queue", "run_ns", "since", "sleep_ns",
                 "slice_left", "spent", "tag", "turn", "wait_ns", "weight", "window", "woken")

    def __init__(self, id: str, now: int, tag: int) -> None:
        self.id = id
        self.asleep = False
        self.since = now                            # up to here its time is accounted for
        self.run_ns = self.wait_ns = self.sleep_ns = 0
        self.weight = 1
        self.tag = tag
        self.turn = tag                             # its tag when its current turn began
        self.slice_left = 0
        self.credit = 0                             # a slice in its own virtual time
        self.budget = 0                             # nanoseconds per cap window; 0: no cap
        self.spent = 0                              # of the budget since `window`, earlier debts included
        self.window = now
        self.woken: int | None = None               # when it woke, until its turn comes
        self.queue: list[_Entry] | None = None      # the heap that it is in
        self.entry: _Entry | None = None

    def allowance(self, now: int) -> int:
        """What its cap lets it run now; a turn that overran its allowance is paid back in later windows."""
        passed = (now - self.window) // CAP_WINDOW_NS
        if passed > 0:
            self.window += passed * CAP_WINDOW_NS
            self.spent = max(0, self.spent - passed * self.budget)
        return self.budget - self.spent

    def released(self) -> int:
        """When an exhausted guest may run again: the first window that its debts leave something of."""
        return self.window + self.spent // self.budget * CAP_WINDOW_NS


#: (key, sequence number, guest): the number makes equal keys first come first served, and guests never
#: compared
_Entry = tuple[int, int, _Guest]


class RunQueue:
    """The guests of one physical CPU.

    Invariant: a guest is in exactly one of four places: asleep, in `_ready` (keyed by tag), in `_throttled`
    (keyed by the time its cap lets it go), or `_current`.
    Invariant: no guest competes with a tag earlier than the virtual time, at the moment it became ready, less
    its own credit; and the virtual time never goes back.  So nobody can save up time by sleeping.
    """

    def __init__(self, slice_ns: int = SLICE_NS) -> None:
        self.latency = Latency()
        self._longest = slice_ns
        self._shortest = slice_ns // SHORTEST_PART
        self._round = slice_ns * ROUND_SLICES
        self._guests: dict[str, _Guest] = {}
        self._ready: list[_Entry] = []
        self._throttled: list[_Entry] = []
        self._current: _Guest | None = None
        self._virtual = 0
        self._sequence = 0

    def __len__(self) -> int:
        return len(self._guests)

    def __contains__(self, id: str) -> bool:
        return id in self._guests

    # -- membership

    def add(self, id: str, weight: int, cap: int, now: int) -> None:
        """A new guest, runnable at once, with neither credit nor debt.  `cap` is in percent; 0 means none."""
        if id in self._guests:
            raise ValueError(f"guest {id} is in the run queue already")
        guest = _Guest(id, now, self._virtual)
        self._apply_share(guest, weight, cap)
        self._guests[id] = guest
        self._enqueue(self._ready, guest.tag, guest)

    def remove(self, id: str, now: int) -> Usage:
        """Forget the guest; the answer is its final account."""
        usage = self.usage(id, now)
        self._dequeue(self._guests.pop(id))
        return usage

    def set_share(self, id: str, weight: int, cap: int) -> None:
        """Change weight and cap from now on; what the guest is owed or owes, in real time, stays."""
        guest = self._guests[id]
        old = guest.weight
        self._apply_share(guest, weight, cap)
        guest.tag = self._virtual + (guest.tag - self._virtual) * old // weight
        if guest.queue is not None:
            # back among the ready even if throttled: `pick` holds it to its new cap
            self._dequeue(guest)
            self._enqueue(self._ready, guest.tag, guest)

    def _apply_share(self, guest: _Guest, weight: int, cap: int) -> None:
        if not 1 <= weight <= MAX_WEIGHT:
            raise ValueError(f"weight {weight} is not in 1..{MAX_WEIGHT}")
        if cap < 0:
            raise ValueError(f"cap {cap} is negative")
        guest.weight = weight
        # What a guest may be owed when it wakes, of its own time; all else that it did not use is forfeited.
        guest.credit = self._longest * SCALE // weight
        # one virtual CPU cannot use more than one CPU: a larger cap is no cap
        guest.budget = cap * CAP_WINDOW_NS // 100 if cap < 100 else 0

    # -- sleeping and waking

    def sleep(self, id: str, now: int) -> None:
        """The guest has nothing to do until `wake`: it halted, or it was paused."""
        guest = self._guests[id]
        if guest.asleep:
            return
        self._dequeue(guest)
        guest.wait_ns += now - guest.since
        guest.since = now
        guest.asleep = True
        guest.woken = None

    def wake(self, id: str, now: int) -> None:
        """The guest can run since `now`.  It goes before whoever runs if it used less than its share."""
        guest = self._guests[id]
        if not guest.asleep:
            return
        now = max(now, guest.since)                 # its alarm may have gone off while it fell asleep
        guest.sleep_ns += now - guest.since
        guest.since = guest.woken = now
        guest.asleep = False
        self._make_ready(guest)

    # -- the hot loop

    def pick(self, now: int) -> Pick | None:
        """Whose turn it is.  None: nobody can run before `next_event` or a `wake`."""
        throttled = self._throttled
        while throttled and throttled[0][0] <= now:
            self._make_ready(heappop(throttled)[2])
        ready = self._ready
        guest = self._current
        if guest is not None and ready and guest.slice_left > self._longest:
            guest.slice_left = self._longest        # it was alone, and is not any more
        if guest is not None and (guest.slice_left < GRAIN_NS or (ready and ready[0][0] < guest.turn)):
            # Its slice is over, or one woke that would have been picked in its place.
            self._enqueue(ready, guest.tag, guest)
            guest = None
        while True:
            if guest is None:
                if not ready:
                    self._current = None
                    return None
                guest = heappop(ready)[2]
                guest.queue = guest.entry = None
                guest.turn = tag = guest.tag
                if tag > self._virtual:
                    self._virtual = tag
                guest.slice_left = self._turn_length(now)
            slice_ns = guest.slice_left
            if guest.budget:
                allowance = guest.allowance(now)
                if allowance <= 0:
                    guest.woken = None              # what follows is its cap's doing, not the scheduler's
                    self._enqueue(throttled, guest.released(), guest)
                    guest = None
                    continue
                slice_ns = min(slice_ns, max(allowance, GRAIN_NS))
            if guest.woken is not None:
                self.latency.observe(now - guest.woken)
                guest.woken = None
            self._current = guest
            return Pick(guest.id, slice_ns)

    def _turn_length(self, now: int) -> int:
        """For the guest just taken off the ready queue: by how many still compete with it."""
        waiting = len(self._ready)
        if waiting:
            return min(self._longest, max(self._shortest, self._round // (waiting + 1)))
        if self._throttled:
            return min(LONE_TURN_NS, max(self._shortest, self._throttled[0][0] - now))
        return LONE_TURN_NS

    def charge(self, id: str, ran_ns: int, now: int) -> None:
        """The guest picked last ran for `ran_ns`; the rest, up to now, it waited for the monitor."""
        guest = self._current
        if guest is None or guest.id != id:
            raise ValueError(f"guest {id} was not picked")
        passed = now - guest.since
        ran_ns = min(ran_ns, passed)
        guest.run_ns += ran_ns
        guest.wait_ns += passed - ran_ns
        guest.since = now
        guest.tag += ran_ns * SCALE // guest.weight
        guest.slice_left -= ran_ns
        if guest.budget:
            guest.spent += ran_ns
        if not self._ready:
            # alone, its turn might as well begin now: who wakes next must not be owed all of a long one
            guest.turn = guest.tag
            self._virtual = max(self._virtual, guest.tag)

    def next_event(self, now: int) -> int | None:
        """When the first guest held back by its cap may run again."""
        return max(now, self._throttled[0][0]) if self._throttled else None

    # -- accounting

    def usage(self, id: str, now: int) -> Usage:
        """The guest's account up to now."""
        guest = self._guests[id]
        passed = now - guest.since
        if guest.asleep:
            return Usage(guest.run_ns, guest.wait_ns, guest.sleep_ns + passed)
        return Usage(guest.run_ns, guest.wait_ns + passed, guest.sleep_ns)

    # -- the heaps

    def _make_ready(self, guest: _Guest) -> None:
        """Back in the competition, owed no more than its credit however long it was away."""
        guest.tag = max(guest.tag, self._virtual - guest.credit)
        self._enqueue(self._ready, guest.tag, guest)

    def _enqueue(self, queue: list[_Entry], key: int, guest: _Guest) -> None:
        self._sequence += 1
        guest.queue = queue
        guest.entry = entry = (key, self._sequence, guest)
        heappush(queue, entry)

    def _dequeue(self, guest: _Guest) -> None:
        """Take the guest out of wherever it is; only the rare caller finds it inside a heap."""
        if guest is self._current:
            self._current = None
        elif guest.queue is not None and guest.entry is not None:
            guest.queue.remove(guest.entry)
            heapify(guest.queue)
        guest.queue = guest.entry = None
