# SPDX-License-Identifier: GPL-2.0-or-later
"""How little machine memory guests come to when all they have in common is shared; and KSM beside it.

A fleet is looked at once a second from the moment when its last guest is up, until nothing changes any more;
then each of its guests is to do with half of its memory, and it is looked at again.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from hostd.bench import qemu
from hostd.bench.memory_guests import boot, names
from hostd.ctl import demo
from hostd.ctl.client import Client, vm_path
from hostd.ctl.demo import Template
from hostd.ctl.errors import CtlError
from hostd.ctl.private import private_daemon
from hostd.ctl.usage import cpu_seconds, proportional_bytes
from hostd.model import VmPatch

_LOOK_S = 1.0
#: so near to its end is steady, and so long it must have been
NEAR = 0.05
_STEADY_S = 15.0
_BOOT_TIMEOUT = 600.0
#: the configuration allows more guests than the pool has room for if they shared nothing
_TABLES = "[memory]\novercommit_ratio = 1000\n"
_KSM = Path("/sys/kernel/mm/ksm")
#: pages that KSM looks at each time it wakes, and how long it sleeps then
_KSM_SETTINGS = {"pages_to_scan": 1000, "sleep_millisecs": 20, "run": 1}
#: it merges a page that was the same when it came by before, so nothing happens in the first
_KSM_SCANS = 2

Say = Callable[[str], None]


class Look(NamedTuple):
    """Bytes of all guests together, `seconds` after the first look."""

    seconds: float
    private: int
    shared: int
    saved: int


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A fleet that has come to rest; bytes."""

    fleet: str
    guests: int
    #: the guests are to do with half of their memory
    balloon: bool
    #: a guest's own at the first look, and at the end
    private_first: float
    private: float
    #: frames that guests share, and what they would take beyond that if they did not; of the whole fleet
    shared: int
    saved: int
    #: until what the guests have for themselves stayed within `NEAR` of the end
    steady_s: float
    #: CPUs that the daemon (QEMU: the kernel's KSM thread) used until then
    cpu: float
    #: it was still on its way when time was up
    restless: bool


def until_steady(look: Callable[[], Look], most: float,
                 begun: Callable[[], bool] = lambda: True) -> tuple[list[Look], bool]:
    """Look until it has `begun` and nothing has changed for a while, or `most` seconds; and whether time was
    up."""
    looks = [look()]
    while True:
        if looks[-1].seconds >= most:
            return looks, True
        recent = [one.private for one in looks if one.seconds >= looks[-1].seconds - _STEADY_S]
        if begun() and looks[-1].seconds >= _STEADY_S and max(recent) <= min(recent) * (1 + NEAR / 2):
            return looks, False
        time.sleep(_LOOK_S)
        looks.append(look())


def steady_after(looks: list[Look]) -> float:
    """Seconds until what guests have for themselves stayed within `NEAR` of its end."""
    end = looks[-1].private
    for before, after in zip(looks[-2::-1], looks[:0:-1], strict=True):
        if abs(before.private - end) > end * NEAR:
            return after.seconds
    return looks[0].seconds


def _row(fleet: str, guests: int, balloon: bool, looks: list[Look], restless: bool, cpu: float) -> Row:
    end = looks[-1]
    return Row(fleet=fleet, guests=guests, balloon=balloon, private_first=looks[0].private / guests,
               private=end.private / guests, shared=end.shared, saved=end.saved,
               steady_s=round(steady_after(looks), 1), cpu=round(cpu, 3), restless=restless)


def _looker(client: Client) -> Callable[[], Look]:
    began = time.monotonic()

    def look() -> Look:
        host = client.memory()
        private = sum(vm.memory_usage.private for vm in client.vms() if vm.name != demo.TEMPLATE)
        return Look(time.monotonic() - began, private, host.shared, host.saved)
    return look


def _watch(client: Client, fleet: str, guests: int, balloon: bool, most: float) -> Row:
    pids = [client.host().pid]
    before, began = cpu_seconds(pids), time.monotonic()
    looks, restless = until_steady(_looker(client), most)
    cpu = (cpu_seconds(pids) - before) / (time.monotonic() - began)
    return _row(fleet, guests, balloon, looks, restless, cpu)


def fleet(name: str, guests: Mapping[str, Template] | Template, count: int, pool: int, most: float,
          say: Say) -> list[Row]:
    """Rows of one fleet, without and with balloon: of clones of one template, or of guests booted."""
    with private_daemon(pool=pool, tables=_TABLES) as daemon:
        client = daemon.client
        say(f"{name}: {count} guests")
        if isinstance(guests, Template):
            demo.boot(client, guests)
            demo.clone(client, count)
        else:
            boot(client, guests, say)
        rows = [_watch(client, name, count, False, most)]
        for vm in client.vms():
            if vm.name != demo.TEMPLATE:
                client.call("PATCH", vm_path(vm.name), body=VmPatch(memory=vm.memory // 2 >> 12 << 12))
        return [*rows, _watch(client, name, count, True, most)]


def measure(amd64: Template, i386: Template | None, count: int, pool: int, most: float,
            say: Say) -> list[Row]:
    """The table: clones, guests booted from one image, and from two."""
    rows = fleet("clones", amd64, count, pool, most, say)
    rows += fleet("booted", dict.fromkeys(names(count), amd64), count, pool, most, say)
    if i386 is not None:
        both = {name: (amd64, i386)[number % 2] for number, name in enumerate(names(count))}
        rows += fleet("mixed images", both, count, pool, most, say)
    return rows


# -- KSM ---------------------------------------------------------------------------------------------------

@contextmanager
def ksm() -> Iterator[int]:
    """Have the kernel merge pages at full tilt; its settings come back.  The value is its thread's pid.

    Raises CtlError where that is not allowed.
    """
    try:
        before = {name: (_KSM / name).read_text().strip() for name in _KSM_SETTINGS}
        (_KSM / "run").write_text(before["run"])
    except OSError as error:
        raise CtlError(f"KSM can be measured by root on a kernel that has it only: {error}") from None
    try:
        for name, value in _KSM_SETTINGS.items():
            (_KSM / name).write_text(str(value))
        yield _ksm_thread()
    finally:
        if before["run"] == "0":
            (_KSM / "run").write_text("2")       # what is merged is taken apart again
        for name, text in before.items():
            (_KSM / name).write_text(text)


def _ksm_thread() -> int:
    for path in Path("/proc").glob("[0-9]*/comm"):
        if path.read_text().strip() == "ksmd":
            return int(path.parent.name)
    return 0


def peer(template: Template, count: int, most: float, say: Say) -> Row:
    """As many QEMU machines with the same files, booted side by side a few at a time, and KSM."""
    command = qemu.command(template)
    with ExitStack() as machines:
        processes: list[subprocess.Popen[bytes]] = []
        for start in range(0, count, 4):
            wave = []
            for _ in range(min(4, count - start)):
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                machines.callback(process.wait)
                machines.callback(process.kill)
                wave.append(process)
            for process in wave:
                qemu.await_output(process, template.ready, _BOOT_TIMEOUT)
            processes += wave
            say(f"{len(processes)} of {count} QEMU machines are up")
        pids = [process.pid for process in processes]
        with ksm() as thread:
            began = time.monotonic()

            def look() -> Look:
                shared, sharing = (int((_KSM / name).read_text()) << 12
                                   for name in ("pages_shared", "pages_sharing"))
                return Look(time.monotonic() - began, proportional_bytes(pids), shared, sharing)

            def begun() -> bool:
                return int((_KSM / "full_scans").read_text()) - scans >= _KSM_SCANS

            threads = [thread] if thread else []
            before, scans = cpu_seconds(threads), int((_KSM / "full_scans").read_text())
            looks, restless = until_steady(look, most, begun)
            cpu = (cpu_seconds(threads) - before) / (time.monotonic() - began)
        return _row("QEMU with KSM (PSS)", count, False, looks, restless, cpu)
