# SPDX-License-Identifier: GPL-2.0-or-later
"""The whole host restarted with its guests on disk meanwhile: how long that takes, and does any guest notice?

Each guest counts on its console, once a second.  None may lose a number, or say one twice.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from hostd.bench.memory_guests import await_console, names
from hostd.ctl import demo
from hostd.ctl.client import Client, vm_path
from hostd.ctl.demo import Template
from hostd.ctl.private import private_daemon
from hostd.inventory import SUSPENDED
from hostd.lifecycle import State
from hostd.model import CloneRequest, MonitorName

#: typed at a shell; what is typed shows on the console, too, but not at the beginning of a line
_COUNT = b"i=0; while :; do i=$((i+1)); echo; echo N$i; sleep 1; done\n"
_NUMBER = re.compile(rb"^N(\d+)\r?$", re.MULTILINE)
_LOOK_S = 0.02
_TIMEOUT_S = 120.0

Say = Callable[[str], None]


class Suspended(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, and bytes.  `failures` is empty when all is well."""

    vmm: MonitorName
    guests: int
    memory: int
    #: from the word to go down until the daemon was gone, and from its start until every guest ran
    suspend_s: float
    resume_s: float
    #: from that start until every guest had counted on
    counting_s: float
    #: on disk, of all of them
    file_bytes: int
    failures: list[str]


def measure(template: Template, guests: int, say: Say) -> Suspended:
    """Clones of a guest of the template's, on a host that suspends."""
    fleet = names(guests)
    with tempfile.TemporaryDirectory(prefix="hostctl-bench-") as directory:
        with private_daemon(directory=Path(directory), suspend=True) as daemon:
            client = daemon.client
            demo.boot(client, template)
            client.finish(client.begin("POST", vm_path(demo.TEMPLATE, "clone"),
                                       CloneRequest(names=list(fleet), start=True)))
            for name in fleet:
                client.call("POST", vm_path(name, "input"), content=_COUNT)
            for name in fleet:
                await_console(client, name, r"\nN2\b")
            say(f"{guests} guests under {template.vmm} count; the host is restarted")
            before = [_numbers(client, name) for name in fleet]
            began = time.monotonic()
        suspend_s = time.monotonic() - began
        file_bytes = sum(path.stat().st_size for path in Path(directory, "state", SUSPENDED).iterdir())
        began = time.monotonic()
        with private_daemon(directory=Path(directory), suspend=True) as daemon:
            _until_all_run(daemon.client, fleet)
            resume_s = time.monotonic() - began
            for name, numbers in zip(fleet, before):
                await_console(daemon.client, name, rf"\nN{len(numbers) + 2}\b")
            counting_s = time.monotonic() - began
            after = [_numbers(daemon.client, name) for name in fleet]
    failures = [f"{name}: {what}" for name, one, other in zip(fleet, before, after)
                for what in judge(one, other)]
    return Suspended(
        vmm=template.vmm, guests=guests, memory=template.memory, suspend_s=round(suspend_s, 2),
        resume_s=round(resume_s, 2), counting_s=round(counting_s, 2), file_bytes=file_bytes,
        failures=failures)


def judge(before: Sequence[int], after: Sequence[int]) -> list[str]:
    """What is wrong with what a guest had said before the host went down, and when it was back."""
    if not before:
        return ["it had not begun to count"]
    if list(after) != list(range(1, len(after) + 1)):
        return [f"it lost count: {', '.join(map(str, after))}"]
    return []


def _numbers(client: Client, name: str) -> list[int]:
    with client.stream(vm_path(name, "log")) as response:
        return [int(number) for number in _NUMBER.findall(response.read())]


def _until_all_run(client: Client, fleet: Sequence[str]) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline:
        states = {vm.name: vm.state for vm in client.vms()}
        if all(states.get(name) == State.RUNNING for name in fleet):
            return
        time.sleep(_LOOK_S)
