# SPDX-License-Identifier: GPL-2.0-or-later
"""What guests that have nothing in common lose to page sharing: CPU time that they would have had without it.

Guests keep all CPUs busy with files of their own, which the scanner looks at for nothing; with sharing and
without it, in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import msgspec

from hostd.bench.memory_guests import boot, names
from hostd.bench.memory_load import command
from hostd.ctl.client import Client, vm_path
from hostd.ctl.demo import Template
from hostd.ctl.private import private_daemon

_GUESTS = 4
#: files of each guest, and the size of each
_FILES, _KIB = 32, 1024
#: seconds until their files are written, and for which they are watched
_SETTLE_S, _WATCH_S = 20.0, 20.0
_WITHOUT = "[sharing]\nenabled = false\n"


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """CPUs that the guests had together, medians, and the part that sharing took; pages scanned in a second
    meanwhile."""

    guests: int
    with_sharing: float
    without: float
    lost_ratio: float
    scanned_per_second: float


def measure(template: Template, runs: int, say: Callable[[str], None]) -> Loss:
    """Watch such guests with sharing and without it, in turn."""
    had: dict[bool, list[float]] = {True: [], False: []}
    scanned = []
    for _ in range(runs):
        for sharing in True, False:
            say(f"busy guests {'with' if sharing else 'without'} page sharing")
            with private_daemon(tables="" if sharing else _WITHOUT) as daemon:
                cpus, pages = _watch(daemon.client, template)
            had[sharing].append(cpus)
            if sharing:
                scanned.append(pages)
    with_sharing, without = median(had[True]), median(had[False])
    return Loss(guests=_GUESTS, with_sharing=round(with_sharing, 4), without=round(without, 4),
                lost_ratio=round(1 - with_sharing / without, 4), scanned_per_second=round(median(scanned)))


def _watch(client: Client, template: Template) -> tuple[float, float]:
    """CPUs that busy guests have, and pages of theirs that are scanned in a second."""
    boot(client, dict.fromkeys(names(_GUESTS), template), lambda said: None)
    for number, name in enumerate(names(_GUESTS), 1):
        client.call("POST", vm_path(name, "input"), content=command(number, _FILES, _KIB).encode())
    time.sleep(_SETTLE_S)
    began, run, scanned = time.monotonic(), _run_seconds(client), client.memory().scanned
    time.sleep(_WATCH_S)
    elapsed = time.monotonic() - began
    return (_run_seconds(client) - run) / elapsed, (client.memory().scanned - scanned) / elapsed


def _run_seconds(client: Client) -> float:
    return sum(vm.cpu.run for vm in client.vms())
