# SPDX-License-Identifier: GPL-2.0-or-later
"""Many Linux guests under one daemon of our own: how soon they run, and what they cost while idle.

QEMU's figures are those of a few machines, scaled to the number of ours: time to start, and CPU, in
proportion; memory each, as it is (of QEMU's own code, each of a few pays a larger part than each of many).
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from hostd.bench import qemu
from hostd.bench.boot import debian
from hostd.bench.measures import Benchmark, Measure, Samples, Settings
from hostd.ctl import demo
from hostd.ctl.client import Client, vm_path
from hostd.ctl.private import PrivateDaemon, private_daemon
from hostd.ctl.usage import CpuMeter, processes, proportional_bytes

#: what the console shows when the guest is up and has nothing more to do
_PROMPT = "/ # "
_BOOT_TIMEOUT = 300.0

_CLONES, _EACH, _MEMORY, _CPU = "fleet-start", "fleet-start-each", "fleet-memory", "fleet-idle-cpu"


def measure_start(settings: Settings, wanted: frozenset[str]) -> Mapping[str, Samples]:
    """Start daemons, one after the other."""
    runs = []
    for _ in range(settings.runs):
        with private_daemon() as daemon:
            runs.append(daemon.start_seconds)
    return {"daemon-start": Samples(runs)}


def measure(settings: Settings, wanted: frozenset[str]) -> Mapping[str, Samples]:
    """Make the fleet as often as there are runs, and watch the last."""
    with tempfile.TemporaryDirectory(prefix="hostctl-bench-") as directory:
        template = debian(Path(directory), _PROMPT, settings.say)
        theirs = qemu_fleet(template, settings) if settings.qemu else {}
        with private_daemon() as daemon:
            ours = fleet(daemon, template, settings)
    return {name: Samples(runs, theirs.get(name, [])) for name, runs in ours.items()}


def fleet(daemon: PrivateDaemon, template: demo.Template, settings: Settings) -> dict[str, list[float]]:
    """Our figures."""
    client = daemon.client
    settings.say(f"booting the template of {settings.guests} guests")
    demo.boot(client, template)
    starts: list[float] = []
    for run in range(settings.runs):
        if run:
            _destroy_clones(client)
        starts.append(demo.clone(client, settings.guests))
    settings.say(f"{settings.guests} guests run; letting them come to rest")
    time.sleep(settings.settle)
    pids = processes(client.host())
    meter = CpuMeter(pids)
    time.sleep(settings.watch)
    return {
        _CLONES: starts,
        _EACH: [seconds / settings.guests for seconds in starts],
        _CPU: [meter.share()],
        _MEMORY: [proportional_bytes(pids) / settings.guests],
    }


def _destroy_clones(client: Client) -> None:
    for vm in client.vms():
        if vm.template is not None:
            client.finish(client.begin("DELETE", vm_path(vm.name), query={"force": "true"}))


def qemu_fleet(template: demo.Template, settings: Settings) -> dict[str, list[float]]:
    """QEMU's, extrapolated."""
    count = settings.qemu_guests
    settings.say(f"booting {count} QEMU machines side by side")
    command = qemu.command(template)
    scale = settings.guests / count
    with ExitStack() as machines:
        began = time.monotonic()
        processes = []
        for _ in range(count):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            machines.callback(process.wait)
            machines.callback(process.kill)
            processes.append(process)
        for process in processes:
            qemu.await_output(process, template.ready, _BOOT_TIMEOUT)
        seconds = time.monotonic() - began
        time.sleep(settings.settle)
        pids = [process.pid for process in processes]
        meter = CpuMeter(pids)
        time.sleep(settings.watch)
        return {
            _CLONES: [seconds * scale],
            _EACH: [seconds / count],
            _CPU: [meter.share() * scale],
            _MEMORY: [proportional_bytes(pids) / count],
        }


START = Benchmark((Measure("daemon-start", "daemon start to the first answer of its API", "s", 0.5),),
                  measure_start)
FLEET = Benchmark(
    (Measure(_CLONES, "all Linux guests running, from a booted template (QEMU: booted, scaled)", "s", 2),
     Measure(_EACH, "the same for each guest", "s"),
     Measure(_MEMORY, "memory of an idle guest, all in: PSS of daemon and workers by guests", "B", 8 << 20),
     Measure(_CPU, "CPU of daemon and workers, all guests idle (QEMU: scaled)", "core", 0.1)),
    measure,
)
