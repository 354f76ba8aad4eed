# SPDX-License-Identifier: GPL-2.0-or-later
"""Live scheduling: do busy guests get what their weights promise, and no more than their caps allow?

The figures are of a real daemon with two workers.  Guests are charged the CPU time that they really had, so
on a machine with other work than ours they get less than two CPUs together.  Guests that want more than there
is are compared with their part of what all of them got; guests whose caps leave CPUs idle, with their caps,
and a machine too busy to give them as much shows as one that misses them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

from hostd.bench.measures import Benchmark, Measure, Samples, Settings
from hostd.ctl.client import Client
from hostd.ctl.private import private_daemon
from hostd.model import VmCreate
from hostd.scheduler.entitlement import CPU, Claim, fill, limit_of
from vmm import guests

WORKERS = 2
_MEMORY = 16 << 20
#: how far off is told as the ratio of the larger to the smaller
_REACH = 1.05


class Share(NamedTuple):
    """What a busy guest is told it may have: its weight, and its cap in percent (0: none)."""

    weight: int
    cap: int = 0


class Scenario(NamedTuple):
    """Busy guests, and what each of them is to get."""

    about: str
    shares: tuple[Share, ...]

    def worst(self, got: list[float], elapsed: float) -> float:
        """From the CPU seconds that each got in `elapsed` seconds: how far off the one furthest off is."""
        claims = [Claim(share.weight, limit_of(share.cap)) for share in self.shares]
        capacity = WORKERS * CPU
        if sum(claim.limit for claim in claims) >= capacity:
            capacity = int(sum(got) / elapsed * CPU)
        return max(_off(seconds, due * elapsed / CPU)
                   for seconds, due in zip(got, fill(claims, capacity), strict=True))


def _off(got: float, due: float) -> float:
    return max(got / due, due / got) if got else float("inf")


_CAPPED = tuple(Share(400, cap) for cap in (10, 25, 50))

SCENARIOS = {
    "shares": Scenario(
        "eight busy guests, weights 1:1:2:2:4:4:8:8: CPU time to its due, the worst",
        tuple(Share(weight) for weight in (100, 100, 200, 200, 400, 400, 800, 800))),
    "caps": Scenario("three busy guests, caps of 10, 25 and 50%: CPU time to its due, the worst", _CAPPED),
    "caps-crowded": Scenario(
        "the same beside two busy guests without a cap", (*_CAPPED, Share(100), Share(100))),
}


def measure(settings: Settings, wanted: frozenset[str]) -> Mapping[str, Samples]:
    """Once each, over `settings.watch` seconds after as many to settle as the balancer needs."""
    samples = {}
    for name, scenario in SCENARIOS.items():
        if name in wanted:
            settings.say(scenario.about)
            got, elapsed = _cpu_seconds(scenario.shares, settings.settle / 2, settings.watch)
            samples[name] = Samples([scenario.worst(got, elapsed)])
    return samples


def _cpu_seconds(shares: tuple[Share, ...], settle: float, watch: float) -> tuple[list[float], float]:
    """What guests with these shares get between `settle` and `watch` seconds later, and the time exactly."""
    names = [f"busy-{number}" for number in range(len(shares))]
    with private_daemon(workers=WORKERS) as daemon:
        start_busy(daemon.client, dict(zip(names, shares, strict=True)))
        time.sleep(settle)
        began, before = time.monotonic(), _run_seconds(daemon.client)
        time.sleep(watch)
        elapsed, after = time.monotonic() - began, _run_seconds(daemon.client)
    return [after[name] - before[name] for name in names], elapsed


def _run_seconds(client: Client) -> dict[str, float]:
    return {vm.name: vm.cpu.run for vm in client.vms()}


def start_busy(client: Client, shares: Mapping[str, Share]) -> None:
    """Guests that compute for ever, by name."""
    kernel = client.upload(guests.path("primes"))
    for name, share in shares.items():
        client.call("POST", "/vms", body=VmCreate(
            name=name, kernel=kernel, append="loop", memory=_MEMORY, weight=share.weight, cap=share.cap,
            start=True))


BENCHMARK = Benchmark(
    tuple(Measure(name, scenario.about, "x", _REACH) for name, scenario in SCENARIOS.items()), measure)
