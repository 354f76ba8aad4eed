# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests under binary translation on real workers: the same VMs, and what shows of their translation."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import trio
from click.testing import CliRunner, Result

from hostd.cli import main
from hostd.metrics import reason_of
from tests.private_daemon import PrivateDaemon
from tests.told_host import SOON, ToldHost, real_host
from vmm import guests
from vmm.state import decode


@pytest.fixture(autouse=True)
def clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """A shared daemon is left without VMs."""
    yield
    if "daemon" in request.fixturenames:
        request.getfixturevalue("daemon").clear()


def run(daemon: PrivateDaemon, kernel: str, append: str = "", name: str = "vm", **fields: object) -> None:
    daemon.create(name, guests.read(kernel), append=append, vmm="bt", **fields)
    daemon.do(name, "start")


def ctl(daemon: PrivateDaemon, *arguments: str, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["--socket", str(daemon.socket), *arguments])
    assert result.exit_code == status, result.output
    return result


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[ToldHost]:
    """A host in this process with real workers."""
    async with real_host(tmp_path) as told:
        yield told


async def start(host: ToldHost, name: str, kernel: str, append: str = "") -> None:
    await host.create(name, kernel=await host.blob(guests.read(kernel)), append=append, vmm="bt",
                      memory=8 << 20)
    await host.host.start(name).outcome()


# --- what is translated ----------------------------------------------------------------------------------


def test_the_translation_of_a_running_guest_is_shown(daemon: PrivateDaemon) -> None:
    run(daemon, "primes", "loop")
    daemon.wait("vm", console="primes: ")
    listing = ctl(daemon, "tc", "vm").stdout
    heads = re.findall(r"^([0-9a-f]{8}):  \d+ instructions?, \d+ bytes? -> ", listing, re.M)
    assert heads and "IDENT" in listing
    one = daemon.get("/vms/vm/translations", address=f"0x{heads[0]}")
    assert one["complete"] and f"\n{heads[0]}:" in f"\n{one['text']}"


def test_what_is_not_translated_is_told(daemon: PrivateDaemon) -> None:
    run(daemon, "primes", "loop")
    daemon.wait("vm", console="primes: ")
    assert "nothing at 0xdead0000 is translated" in ctl(daemon, "tc", "vm", "--address", "dead0000",
                                                        status=3).stderr
    ctl(daemon, "pause", "vm")
    assert "VM vm is paused: only a running one" in ctl(daemon, "tc", "vm", status=1).stderr


def test_events_of_translation_are_among_the_exits(daemon: PrivateDaemon) -> None:
    run(daemon, "mix")
    daemon.wait("vm", state="halted")
    rows = daemon.get("/vms/vm/exits")
    own = {row["code"]: row["name"] for row in rows if 0x408 <= row["code"] <= 0x40E}
    assert own and "unknown" not in own.values()
    shown = ctl(daemon, "exits", "vm").stdout
    assert all(name in shown for name in own.values())
    metrics = httpx.get(daemon.get("/host")["metrics"]).text
    for code in own:
        assert f'hostd_vm_exits_total{{name="vm",reason="{reason_of(code)}"}}' in metrics
    assert 'hostd_vm_info{image="",name="vm",vmm="bt"} 1.0' in metrics


async def test_translators_count_and_clones_run_their_template_s_units(host: ToldHost) -> None:
    worker, other = host.host._workers.all
    other.kill()                                                # so that all guests share a translator
    await start(host, "template", "primes", "loop limit=500")
    await host.prints("template", "round 3")
    await host.host._workers.hear()
    before = worker.view(0).translator
    assert before.instructions > before.units > 0
    assert before.chained > 0 and before.pages > 0 and before.used_bytes > 0
    names = [f"clone{number}" for number in range(4)]
    await host.clone("template", *names)
    for name in names:
        await host.prints(name, "round")
    await host.host._workers.hear()
    assert worker.view(0).translator.units < 2 * before.units


# --- a guest that moves ----------------------------------------------------------------------------------


async def test_a_guest_moves_and_goes_on(host: ToldHost) -> None:
    await start(host, "vm", "primes", "loop limit=500")
    await host.prints("vm", "round 1:")
    vm = host.host._guests.vms["vm"]
    for _ in range(3):
        target = next(worker for worker in host.host._workers.ready if worker is not vm.worker)
        await host.host._guests.move(vm, target)
        assert host.host.get("vm").worker == target.index
        said = len(host.host.console("vm").scrollback())
        with trio.fail_after(SOON):
            while host.host.console("vm").scrollback()[said:].count(b": 95 below 500") < 2:
                await vm.activity.wait()


async def test_a_parked_guest_keeps_its_monitor(host: ToldHost) -> None:
    await start(host, "vm", "idle")
    await host.prints("vm", "idle: tick")
    await host.host.pause("vm").outcome()
    assert decode(host.host._guests.vms["vm"].parked).monitor == "bt"
    await host.clone("vm", "copy", start=False)
    state = decode(host.host._guests.vms["copy"].parked)
    assert (state.monitor, host.host.get("copy").vmm) == ("bt", "bt")
    await host.host.resume("copy").outcome()
    await host.host.resume("vm").outcome()
    await host.stop("vm", timeout=0)
    await host.becomes("copy", "running")


# --- without a daemon ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cpu", ["native", "unicorn"])
def test_a_guest_in_the_foreground(cpu: str) -> None:
    program = "from hostd.cli import main; main(prog_name='hostctl')"
    done = subprocess.run(
        [sys.executable, "-c", program, "run", str(guests.path("primes")), "--memory", "8M", "--vmm", "bt",
         "--bt-cpu", cpu, "--append", "limit=100"], input="", capture_output=True, text=True, timeout=120)
    assert "primes: 25 below 100" in done.stdout, done.stderr
    assert done.returncode == 1
