# SPDX-License-Identifier: GPL-2.0-or-later
"""A soak: many Linux guests at mixed work for a long time, and everything that could go wrong watched for.

It judges, unlike the benchmarks: one wrong checksum, one complaint of a kernel, one guest or worker that
ended, one frame that did not come back, or a daemon that grows, and it has failed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import msgspec

from hostd.bench.soak_work import ARRIVED, Witness, command, script
from hostd.ctl.client import Client, vm_path
from hostd.ctl.images import register
from hostd.ctl.private import PrivateDaemon
from hostd.ctl.pull import PulledImage
from hostd.ctl.usage import CpuMeter, own_bytes, processes, proportional_bytes
from hostd.lifecycle import State
from hostd.model import CloneRequest

TEMPLATE = "template"
MEMORY = 128 << 20
#: the daemon may grow so much between the first fifth of the time and its end
GROWTH = 0.05
_BOOT_TIMEOUT = 300.0
_LOOK_S = 5.0
_MOST_TOLD = 20

Say = Callable[[str], None]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it.  `failures` is empty when all is well."""

    guests: int
    seconds: float
    rounds: int
    #: of the guest that got furthest, and of the one that got least far
    rounds_most: int
    rounds_least: int
    #: bytes of the daemon, and of its workers, without machine memory: after a fifth of the time, at the end
    daemon_bytes: tuple[int, int]
    workers_bytes: tuple[int, int]
    #: proportional share of everything, machine memory too, divided by the guests
    bytes_per_guest: int
    #: CPUs in use on average
    cpus: float
    failures: list[str]

    @property
    def daemon_growth(self) -> float:
        first, last = self.daemon_bytes
        return last / first - 1


def soak(daemon: PrivateDaemon, image: PulledImage, guests: int, seconds: float, say: Say) -> Verdict:
    """Boot a template, clone it, have the clones work for `seconds`, and judge."""
    client = daemon.client
    _prepare(client, image)
    say(f"{TEMPLATE} is up; making {guests} clones")
    fleet = Fleet(client, guests)
    fleet.start()
    say(f"{guests} guests at work for {seconds:.0f} s")
    before = client.host()
    pids = processes(before)
    meter = CpuMeter(pids)
    began = time.monotonic()
    early = list(map(own_bytes, pids))
    while (elapsed := time.monotonic() - began) < seconds:
        time.sleep(min(_LOOK_S, seconds - elapsed))
        if elapsed <= seconds / 5:
            early = list(map(own_bytes, pids))
        fleet.look()
        if elapsed > seconds / 2:
            fleet.note_half()
    cpus = meter.share()
    failures = fleet.failures()
    failures += _workers_died(before.pid, pids, client)
    late = early if failures else list(map(own_bytes, pids))
    per_guest = proportional_bytes(pids) // guests
    failures += fleet.end()
    rounds = [witness.rounds for witness in fleet.witnesses.values()]
    daemon_bytes = (early[0], late[0])
    if daemon_bytes[1] > daemon_bytes[0] * (1 + GROWTH):
        failures.append(f"the daemon grew from {daemon_bytes[0]} to {daemon_bytes[1]} bytes")
    return Verdict(
        guests=guests, seconds=round(seconds, 1), rounds=sum(rounds), rounds_most=max(rounds),
        rounds_least=min(rounds), daemon_bytes=daemon_bytes,
        workers_bytes=(sum(early[1:]), sum(late[1:])), bytes_per_guest=per_guest, cpus=round(cpus, 3),
        failures=failures)


class Fleet:
    """The guests at work."""

    def __init__(self, client: Client, guests: int) -> None:
        self._client = client
        self.witnesses = {f"soak-{number}": Witness(number) for number in range(1, guests + 1)}
        self._read = dict.fromkeys(self.witnesses, 0)
        self._half: dict[str, int] = {}

    def start(self) -> None:
        """Clone them and set each to work."""
        client, names = self._client, list(self.witnesses)
        client.finish(client.begin("POST", vm_path(TEMPLATE, "clone"), CloneRequest(names=names, start=True)))
        for name, witness in self.witnesses.items():
            client.call("POST", vm_path(name, "input"), content=command(witness.number).encode())

    def look(self) -> None:
        """Read what their consoles got since the last look."""
        for name, witness in self.witnesses.items():
            with self._client.stream(vm_path(name, "log"), {"since": self._read[name]}) as response:
                data = response.read()
            self._read[name] += len(data)
            witness.read(data)

    def note_half(self) -> None:
        """Half the time is over: from now on every guest must get on."""
        if not self._half:
            self._half = {name: witness.rounds for name, witness in self.witnesses.items()}

    def failures(self) -> list[str]:
        """What is wrong with them, a sentence each."""
        found = []
        for vm in self._client.vms():
            witness = self.witnesses.get(vm.name)
            if witness is None:
                continue
            found += [f"{vm.name}: wrong result: {line}" for line in witness.wrong]
            found += [f"{vm.name}: its kernel complained: {line}" for line in witness.complaints]
            if vm.state != State.RUNNING or vm.boots != 1 or vm.crashes:
                found.append(f"{vm.name}: is {vm.state} after {vm.boots} boots: {vm.reason or 'no reason'}")
            elif witness.rounds <= self._half.get(vm.name, 0):
                found.append(f"{vm.name}: did not get beyond round {witness.rounds} in the second half")
        excess = len(found) - _MOST_TOLD
        return [*found[:_MOST_TOLD], f"and {excess} findings more"] if excess > 0 else found

    def end(self) -> list[str]:
        """Destroy them and the template; what they did not give back, as sentences."""
        client = self._client
        for operation in [client.begin("DELETE", vm_path(name), query={"force": True})
                          for name in (*self.witnesses, TEMPLATE)]:
            client.finish(operation)
        frames = client.host().frames
        if frames.private or frames.shared:
            return [f"{frames.private} private and {frames.shared} shared frames did not come back"]
        return []


def _prepare(client: Client, image: PulledImage) -> None:
    """Boot the template, leave the script in it, and pause it."""
    register(client, TEMPLATE, image.kernel, image.initrd, image.append)
    client.call("POST", "/vms", body={"name": TEMPLATE, "image": TEMPLATE, "memory": MEMORY})
    client.finish(client.begin("POST", vm_path(TEMPLATE, "start")))
    _await_console(client, "/ # ")
    client.call("POST", vm_path(TEMPLATE, "input"), content=script().encode())
    _await_console(client, ARRIVED)
    client.finish(client.begin("POST", vm_path(TEMPLATE, "pause")))


def _await_console(client: Client, pattern: str) -> None:
    client.call("GET", vm_path(TEMPLATE, "wait"), patience=None,
                query={"console": pattern, "timeout": _BOOT_TIMEOUT})


def _workers_died(daemon: int, pids: Iterable[int], client: Client) -> list[str]:
    workers = client.host().workers
    gone = set(pids) - {daemon} - {worker.pid for worker in workers}
    return [f"worker process {pid} died" for pid in sorted(gone)]
