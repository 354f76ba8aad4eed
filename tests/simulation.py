# SPDX-License-Identifier: GPL-2.0-or-later
"""CPUs with guests on them, in simulated time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hostd.scheduler import Balancer, Load, RunQueue

MS = 1_000_000
SECOND = 1_000_000_000


class Simulation:
    """Guests that always want to run, on some CPUs, with the balancer called every second."""

    def __init__(self, cpus: int, shares: dict[str, tuple[int, int]],
                 placement: Callable[[int], int] = lambda i: 0, percent: Sequence[int] = ()) -> None:
        self.now = 0
        self.percent = percent or [100] * cpus          # of each CPU, what its worker gets of it
        self.shares = shares
        self.queues = [RunQueue() for _ in range(cpus)]
        self.balancer = Balancer()
        self.moves = 0
        self.place = {id: placement(i) for i, id in enumerate(shares)}
        self.before = dict.fromkeys(shares, (0, 0))     # run and wait on the CPUs a guest has left
        for id, cpu in self.place.items():
            self.queues[cpu].add(id, *shares[id], 0)

    def run(self, seconds: int) -> dict[str, float]:
        """Part of a CPU that each guest got in this time."""
        start = self.totals()
        for _ in range(seconds):
            for queue, percent in zip(self.queues, self.percent, strict=True):
                run_cpu(queue, self.now, self.now + SECOND, percent)
            self.now += SECOND
            self.balance()
        return {id: (run - start[id][0]) / (seconds * SECOND) for id, (run, _) in self.totals().items()}

    def totals(self) -> dict[str, tuple[int, int]]:
        totals = {}
        for id, cpu in self.place.items():
            usage, before = self.queues[cpu].usage(id, self.now), self.before[id]
            totals[id] = (before[0] + usage.run_ns, before[1] + usage.wait_ns)
        return totals

    def balance(self) -> None:
        totals = self.totals()
        loads = {id: Load(cpu, *self.shares[id], *totals[id]) for id, cpu in self.place.items()}
        for id, source, target in self.balancer.update(self.now, range(len(self.queues)), loads):
            assert self.place[id] == source != target
            usage, before = self.queues[source].remove(id, self.now), self.before[id]
            self.before[id] = (before[0] + usage.run_ns, before[1] + usage.wait_ns)
            self.queues[target].add(id, *self.shares[id], self.now)
            self.place[id] = target
            self.moves += 1


def run_cpu(queue: RunQueue, now: int, end: int, percent: int = 100) -> int:
    """One worker with CPU-bound guests; the answer is how long it was busy.

    Of that time guests run `percent`; the rest goes to other processes of the machine.
    """
    busy = 0
    while now < end:
        pick = queue.pick(now)
        if pick is None:
            event = queue.next_event(now)
            now = end if event is None else min(event, end)
            continue
        ran = min(pick.slice_ns, end - now)
        now += ran
        busy += ran
        queue.charge(pick.id, ran * percent // 100, now)
    return busy


def weighted(*weights: int, cap: int = 0) -> dict[str, tuple[int, int]]:
    return {f"guest{i}": (weight, cap) for i, weight in enumerate(weights)}
