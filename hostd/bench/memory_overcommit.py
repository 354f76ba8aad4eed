# SPDX-License-Identifier: GPL-2.0-or-later
"""More guests than there is memory for, all of them at work, for minutes: does anybody come to harm?

It judges, as the soak does: one process killed for want of memory, one guest that crashed, one wrong
checksum, books that are wrong, and it has failed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from hostd.bench.memory_guests import boot, names
from hostd.bench.memory_load import Witness, command
from hostd.ctl import demo
from hostd.ctl.client import Client, vm_path
from hostd.ctl.demo import Template
from hostd.ctl.private import PrivateDaemon, private_daemon
from hostd.ctl.usage import CpuMeter, processes
from hostd.lifecycle import State
from hostd.model import MemoryEvents

_LOOK_S = 1.0
_MOST_TOLD = 20
#: the balancer may be moving a guest to another worker just then
_ALIVE = (State.RUNNING, State.MIGRATING)
#: lines of the daemon's log that are told, the last ones
_LOG_LINES = 40
#: the configuration allows as much as is asked for: the policy is measured, not admission
_TABLES = "[memory]\novercommit_ratio = 1000\n"


@dataclass(frozen=True)
class Load:
    """How much is asked of how little memory."""

    guests: int = 50
    pool: int = 1 << 30
    seconds: float = 300.0
    #: boot every guest; else all are clones of one, which is quicker and leaves sharing less to find
    booted: bool = False
    #: files of each guest, and the size of each
    files: int = 24
    kib: int = 1024


class Overcommit(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it.  `failures` is empty when all is well; sizes are bytes, counts of pages pages."""

    guests: int
    pool: int
    seconds: float
    #: what all guests believe to have, and what their files come to when all are written, each to the pool
    assigned_ratio: float
    files_ratio: float
    boot_seconds: float
    #: guests that have written all of their files
    full: int
    rounds: int
    rounds_most: int
    rounds_least: int
    #: processes that kernels of guests killed, guests that ended, files that were not what was written
    killed: int
    crashed: int
    bad: int
    complaints: int
    #: looks at the host, by its state of memory then, and those at which workers waited for frames
    states: dict[str, int]
    stalled: int
    looks: int
    #: the longest time that any guest was without a finished round
    longest_round_s: float
    events: MemoryEvents
    swapped_most: int
    compressed_most: int
    ballooned_most: int
    saved_most: int
    cpus: float
    failures: list[str]
    log: list[str]


@dataclass
class _Watched:
    """What was seen of the host so far."""

    states: Counter[str] = field(default_factory=Counter)
    stalled: int = 0
    swapped: int = 0
    compressed: int = 0
    ballooned: int = 0
    saved: int = 0

    def look(self, client: Client) -> None:
        host = client.memory()
        self.states[host.state] += 1
        self.stalled += host.waiting > 0
        self.swapped = max(self.swapped, host.swap.used)
        self.compressed = max(self.compressed, host.swap.compressed)
        self.saved = max(self.saved, host.saved)
        self.ballooned = max(self.ballooned, sum(vm.memory_usage.ballooned for vm in client.vms()))


class _Fleet:
    """The guests at work, as their consoles tell of them."""

    def __init__(self, client: Client, count: int) -> None:
        self._client = client
        self.witnesses = {name: Witness(number) for number, name in enumerate(names(count), 1)}
        self._read = dict.fromkeys(self.witnesses, 0)
        self._last = dict.fromkeys(self.witnesses, time.monotonic())
        self.longest = 0.0
        self._half: dict[str, int] = {}

    def start(self, load: Load) -> None:
        for name, witness in self.witnesses.items():
            self._client.call("POST", vm_path(name, "input"),
                              content=command(witness.number, load.files, load.kib).encode())
            self._last[name] = time.monotonic()

    def look(self) -> None:
        """Read what their consoles got since the last look."""
        for name, witness in self.witnesses.items():
            with self._client.stream(vm_path(name, "log"), {"since": self._read[name]}) as response:
                data = response.read()
            self._read[name] += len(data)
            before, now = witness.rounds, time.monotonic()
            witness.read(data)
            self.longest = max(self.longest, now - self._last[name])
            if witness.rounds != before:
                self._last[name] = now

    def note_half(self) -> None:
        """Half the time is over: from now on every guest must get on."""
        if not self._half:
            self._half = {name: witness.rounds for name, witness in self.witnesses.items()}

    def failures(self) -> list[str]:
        """What went wrong with them, a sentence each."""
        found = []
        for name, witness in self.witnesses.items():
            found += [f"{name}: {what}: {line}" for what, lines in (
                ("a process was killed for want of memory", witness.killed),
                ("wrong checksum", witness.bad), ("its kernel complained", witness.complaints))
                for line in lines]
            if not witness.rounds:
                found.append(f"{name}: did not finish a single round")
            elif witness.rounds <= self._half.get(name, 0):
                found.append(f"{name}: did not get beyond round {witness.rounds} in the second half")
        return found


def run(template: Template, load: Load, say: Callable[[str], None]) -> Overcommit:
    """Boot the guests under a daemon of our own with so little memory, set them to work, and judge."""
    with private_daemon(pool=load.pool, tables=_TABLES) as daemon:
        return overcommit(daemon, template, load, say)


def overcommit(daemon: PrivateDaemon, template: Template, load: Load,
               say: Callable[[str], None]) -> Overcommit:
    """The same under a daemon that is there already, with no guests yet."""
    client = daemon.client
    began = time.monotonic()
    if load.booted:
        boot(client, dict.fromkeys(names(load.guests), template), say)
    else:
        demo.boot(client, template)
        demo.clone(client, load.guests)
        _destroy(client, demo.TEMPLATE)
    booted = time.monotonic() - began
    fleet, watched = _Fleet(client, load.guests), _Watched()
    fleet.start(load)
    say(f"{load.guests} guests at work for {load.seconds:.0f} s")
    before = client.host()
    meter = CpuMeter(processes(before))
    began = told = time.monotonic()
    while (elapsed := time.monotonic() - began) < load.seconds:
        time.sleep(min(_LOOK_S, load.seconds - elapsed))
        watched.look(client)
        fleet.look()
        if elapsed > load.seconds / 2:
            fleet.note_half()
        if time.monotonic() > told + 30:
            told = time.monotonic()
            say(f"{elapsed:.0f} s: {sum(one.rounds for one in fleet.witnesses.values())} rounds, "
                f"{len(fleet.failures())} failures")
    workers = client.host().workers
    restarts = sum(worker.restarts for worker in workers)
    cpus = meter.share() if not restarts else float("nan")
    vms = client.vms()
    ended = [f"{vm.name}: is {vm.state} after {vm.boots} boots: {vm.reason or 'no reason'}"
             for vm in vms if vm.state not in _ALIVE or vm.boots != 1 or vm.crashes]
    failures = [*ended, *fleet.failures()]
    if restarts:
        failures.append(f"{restarts} worker processes died")
    failures += [f"the books are wrong: {sentence}" for sentence in client.memory(check=True).wrong or []]
    witnesses = list(fleet.witnesses.values())
    rounds = [witness.rounds for witness in witnesses]
    return Overcommit(
        guests=load.guests, pool=load.pool, seconds=load.seconds,
        assigned_ratio=round(load.guests * template.memory / load.pool, 2),
        files_ratio=round(load.guests * load.files * (load.kib << 10) / load.pool, 2),
        boot_seconds=round(booted, 1), full=sum(witness.full for witness in witnesses), rounds=sum(rounds),
        rounds_most=max(rounds), rounds_least=min(rounds),
        killed=sum(len(witness.killed) for witness in witnesses), crashed=len(ended),
        bad=sum(len(witness.bad) for witness in witnesses),
        complaints=sum(len(witness.complaints) for witness in witnesses), states=dict(watched.states),
        stalled=watched.stalled, looks=watched.states.total(), longest_round_s=round(fleet.longest, 1),
        events=_events([vm.memory_events for vm in vms]), swapped_most=watched.swapped,
        compressed_most=watched.compressed, ballooned_most=watched.ballooned, saved_most=watched.saved,
        cpus=round(cpus, 2),
        failures=failures[:_MOST_TOLD] + ([f"and {len(failures) - _MOST_TOLD} more"]
                                          if len(failures) > _MOST_TOLD else []),
        log=_serious(daemon))


def _destroy(client: Client, name: str) -> None:
    client.finish(client.begin("DELETE", vm_path(name), query={"force": "true"}))


def _events(events: list[MemoryEvents]) -> MemoryEvents:
    """The sums."""
    return MemoryEvents(**{what: sum(getattr(one, what) for one in events)
                           for what in MemoryEvents.__struct_fields__})


def _serious(daemon: PrivateDaemon) -> list[str]:
    """What the daemon itself complained of: all but the lines of every day."""
    lines = daemon.log.read_text(errors="replace").splitlines()
    return [line for line in lines if "level=info" not in line][-_LOG_LINES:]
