# SPDX-License-Identifier: GPL-2.0-or-later
"""Moves guests between workers so that what they get is what they are entitled to on the whole host.

A run queue is fair among the guests of its own CPU only.  The balancer keeps for every guest its *lag*: the
CPU time that it was entitled to and did not get (negative: that it got beyond).  Once a second it predicts,
for the present placement and for every placement one move or one exchange away, what the lags would be a
second later, and goes where they would be smallest.  If some placement is fair, the lags stop growing there
and the moves end.  If none is (three equal guests on two CPUs), the lags of the disadvantaged grow until an
exchange pays, and guests take turns on the crowded CPU: the long run is fair where no moment can be.

A move must gain more than it costs: `MOVE_GAIN` is the hysteresis, `moves_per_update` the bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from heapq import nlargest
from typing import NamedTuple

from hostd.scheduler.entitlement import CPU, Claim, fill, limit_of

#: guests that want less than this are left where they are: they disturb nobody
IDLE = CPU // 50
#: lags are forgotten beyond this many seconds of entitlement...
LAG_SECONDS = 2
#: ...and fade by this part a second, so that old history does not move guests for ever
LAG_FADE = 32
#: the improvement, in nanoseconds of weighted lag, that a move must promise
MOVE_GAIN = CPU // 100
#: exchanges are tried for so many of each worker's guests, those that lag most: all would take too long
EXCHANGED = 4
#: a shorter interval is not a measurement
MIN_INTERVAL_NS = CPU // 10


class Load(NamedTuple):
    """What the daemon knows of a guest: where it is, what it may use, and its two running totals."""

    worker: int
    weight: int
    cap: int
    run_ns: int
    wait_ns: int


class Move(NamedTuple):
    id: str
    source: int
    target: int


class _Guest:
    """A guest in the balancer's model."""

    __slots__ = ("claim", "entitled", "got", "id", "lag", "moved", "worker")

    def __init__(self, id: str, worker: int, claim: Claim, got: int) -> None:
        self.id = id
        self.worker = worker
        self.moved = False
        self.claim = claim
        self.got = got
        self.entitled = 0
        self.lag = 0

    def relative_lag(self) -> float:
        return self.lag / max(self.entitled, IDLE)


class Balancer:
    """The daemon's side of the scheduler.  `update` is called about once a second."""

    def __init__(self, moves_per_update: int = 4) -> None:
        self._moves_per_update = moves_per_update
        self._last: Mapping[str, Load] = {}
        self._last_time: int | None = None
        self._lags: dict[str, int] = {}

    def place(self, workers: Sequence[int], loads: Iterable[Load]) -> int:
        """The worker for a new guest: the one with the least weight on it, then with the fewest guests."""
        weight = dict.fromkeys(workers, 0)
        count = dict.fromkeys(workers, 0)
        for load in loads:
            if load.worker in weight:
                weight[load.worker] += load.weight
                count[load.worker] += 1
        return min(workers, key=lambda worker: (weight[worker], count[worker]))

    def update(self, now: int, workers: Sequence[int], loads: Mapping[str, Load]) -> list[Move]:
        """Take the measurements up to `now`; the answer is the moves to make."""
        before, since = self._last, self._last_time
        if since is not None and now - since < MIN_INTERVAL_NS:
            return []
        self._last, self._last_time = dict(loads), now
        if since is None:
            return []
        guests = _measure(now - since, before, loads)
        capacities = _capacities(workers, guests)
        self._update_lags(now - since, sum(capacities.values()), guests)
        model = _Model(capacities, guests)
        moves: list[Move] = []
        while (left := self._moves_per_update - len(moves)) > 0 and (step := model.best_step(left)):
            moves += step
        return moves

    def _update_lags(self, interval: int, capacity: int, guests: list[_Guest]) -> None:
        """What every guest was entitled to, less what it got."""
        entitled = fill([guest.claim for guest in guests], capacity)
        lags: dict[str, int] = {}
        for guest, due in zip(guests, entitled, strict=True):
            guest.entitled = due
            lag = self._lags.get(guest.id, 0)
            lag += (due - guest.got) * interval // CPU - lag * interval // (CPU * LAG_FADE)
            bound = due * LAG_SECONDS
            lags[guest.id] = guest.lag = max(-bound, min(bound, lag))
        self._lags = lags


def _measure(interval: int, before: Mapping[str, Load], loads: Mapping[str, Load]) -> list[_Guest]:
    """What every guest wanted and got."""
    guests = []
    for id, load in loads.items():
        last = before.get(id)
        if last is None or load.run_ns < last.run_ns or load.wait_ns < last.wait_ns:
            continue                                # new, or its totals began again: nothing measured yet
        run = (load.run_ns - last.run_ns) * CPU // interval
        wait = (load.wait_ns - last.wait_ns) * CPU // interval
        guests.append(_Guest(id, load.worker, Claim(load.weight, limit_of(load.cap, run + wait)), run))
    return guests


def _capacities(workers: Sequence[int], guests: Iterable[_Guest]) -> dict[int, int]:
    """What each worker has to give: a whole CPU, or if its guests wanted more than that, what they got.

    They get less than a CPU where the machine has other work than ours.  Were it not taken into account,
    every guest would lag, and who lags more than others could not be told.
    """
    wanted = dict.fromkeys(workers, 0)
    got = dict.fromkeys(workers, 0)
    for guest in guests:
        if guest.worker in wanted:
            wanted[guest.worker] += guest.claim.limit
            got[guest.worker] += guest.got
    return {worker: got[worker] if wanted[worker] >= CPU else CPU for worker in workers}


class _Model:
    """A placement, and what it would do to the lags in the next second."""

    def __init__(self, capacities: Mapping[int, int], guests: Iterable[_Guest]) -> None:
        self._capacities = capacities
        self._members: dict[int, list[_Guest]] = {worker: [] for worker in capacities}
        for guest in guests:
            if guest.claim.limit >= IDLE and guest.worker in self._members:
                self._members[guest.worker].append(guest)
        self._cost = {worker: self._predict(worker, members) for worker, members in self._members.items()}

    def _predict(self, worker: int, members: list[_Guest]) -> int:
        """The unfairness on a worker in a second: the squares of the lags, each relative to its entitlement.

        Only those who would lag count: time that one gets beyond its due is what another one lags by, and a
        guest alone on an idle CPU does no harm.
        """
        cost = 0
        given = fill([guest.claim for guest in members], self._capacities[worker])
        for guest, gets in zip(members, given, strict=True):
            lag = guest.lag + guest.entitled - gets
            if lag > 0:
                cost += lag * lag // max(guest.entitled, IDLE)
        return cost

    def best_step(self, moves_left: int) -> list[Move]:
        """The move or the exchange that gains most, done in the model; nothing if none gains enough."""
        exchanged = EXCHANGED if moves_left >= 2 else 0
        best_gain = MOVE_GAIN                       # for each guest moved
        best: tuple[_Guest, _Guest | None, int] | None = None
        for source, members in self._members.items():
            laggards = nlargest(exchanged, members, key=_Guest.relative_lag)
            for guest in members:
                if guest.moved:
                    continue                        # once at a time
                for target, others in self._members.items():
                    if target == source:
                        continue
                    gain = self._gain(guest, None, source, target)
                    if gain > best_gain:
                        best_gain, best = gain, (guest, None, target)
                    if guest.lag <= 0 or guest not in laggards:
                        continue                    # an exchange is for the sake of one that lags
                    for other in others:
                        gain = 0 if other.moved else self._gain(guest, other, source, target) // 2
                        if gain > best_gain:
                            best_gain, best = gain, (guest, other, target)
        return self._do(*best) if best is not None else []

    def _gain(self, guest: _Guest, other: _Guest | None, source: int, target: int) -> int:
        here = [member for member in self._members[source] if member is not guest]
        there = [member for member in self._members[target] if member is not other]
        there.append(guest)
        if other is not None:
            here.append(other)
        cost = self._predict(source, here) + self._predict(target, there)
        return self._cost[source] + self._cost[target] - cost

    def _do(self, guest: _Guest, other: _Guest | None, target: int) -> list[Move]:
        source = guest.worker
        moves = []
        for moved, origin, destination in ((guest, source, target), (other, target, source)):
            if moved is not None:
                self._members[origin].remove(moved)
                self._members[destination].append(moved)
                moved.worker = destination
                moved.moved = True
                moves.append(Move(moved.id, origin, destination))
        for worker in (source, target):
            self._cost[worker] = self._predict(worker, self._members[worker])
        return moves
