# SPDX-License-Identifier: GPL-2.0-or-later
"""Running and paused guests that change their monitor on a host."""

from __future__ import annotations

import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
from click.testing import CliRunner

from hostd.cli import main
from hostd.config import parse
from hostd.definition import Definition
from hostd.errors import Conflict, Failed
from hostd.host import Host
from hostd.migration.views import SwitchedView, SwitchRequest
from hostd.model import Monitor
from hostd.workers import WORKER_COMMAND
from tests.private_daemon import PrivateDaemon
from tests.test_boot_guests import debian
from tests.told_host import SOON, ToldHost
from vmm import guests
from vmm.state import decode

OTHER: dict[str, Monitor] = {"hw": "bt", "bt": "hw"}
#: a worker that has no engine for the software monitor
WITHOUT_BT = (sys.executable, "-c", """
import sys
from hostd import translator, worker

def none(self):
    raise translator.NoTranslator("there is no room for translated code")

translator.Translator.engine = none
worker.main(sys.argv[1:])
""")


@asynccontextmanager
async def hosting(directory: Path, command: tuple[str, ...] = WORKER_COMMAND) -> AsyncIterator[ToldHost]:
    """A host in this process with real workers."""
    config = parse(f'[host]\nstate_dir = "{directory}/state"\nmemory = "64M"\nworkers = 2\n'
                   'shutdown_timeout = 0\n[scheduler]\nbalance_interval = 60')
    async with trio.open_nursery() as nursery:
        host = Host(config, nursery, command)
        nursery.start_soon(host.run)
        told = ToldHost(host)
        await told.ready_workers()
        yield told
        await host.shut_down()
        nursery.cancel_scope.cancel()
    assert host.overview.check_memory() == []


class Counting:
    """The guest `vm`, which counts rounds on its console."""

    def __init__(self, host: ToldHost) -> None:
        self.host, self.rounds = host, 0

    async def start(self, monitor: str) -> None:
        host = self.host
        await host.create("vm", kernel=await host.blob(guests.read("primes")), append="loop limit=8000",
                          vmm=monitor, memory=8 << 20)
        await host.host.start("vm").outcome()
        await self.goes_on()

    async def goes_on(self) -> None:
        """Two rounds more, and none was left out or told of twice."""
        console, vm = self.host.host.console("vm"), self.host.host._guests.vms["vm"]
        before = self.rounds
        with trio.fail_after(SOON):
            while self.rounds < before + 2:
                await vm.activity.wait()
                told = re.findall(rb"round (\d+): 1007 below 8000", console.scrollback())
                self.rounds = len(told)
        assert [int(number) for number in told] == list(range(1, self.rounds + 1))

    async def switch(self, monitor: Monitor) -> SwitchedView:
        result = await self.host.host.switch("vm", SwitchRequest(vmm=monitor)).outcome()
        assert isinstance(result, SwitchedView)
        return result

    def runs_under(self, monitor: str) -> bool:
        """Whether the view and the definition on disk say so."""
        path = self.host.host.config.state_dir / "vms" / "vm.json"
        stored = msgspec.json.decode(path.read_bytes(), type=Definition)
        return self.host.host.get("vm").vmm == stored.vmm == monitor


@pytest.mark.parametrize("first", ["hw", "bt"])
async def test_a_running_guest_goes_on_under_the_other(tmp_path: Path, first: str) -> None:
    async with hosting(tmp_path) as host:
        guest = Counting(host)
        await guest.start(first)
        monitor = OTHER[first]
        for _ in range(5):
            view = await guest.switch(monitor)
            assert view.vmm == monitor and 0 < view.pause_s < SOON
            assert guest.runs_under(monitor)
            await guest.goes_on()
            monitor = OTHER[monitor]
        same = await guest.switch(OTHER[monitor])
        assert same.pause_s == 0
        assert host.host.get("vm").boots == 1


async def test_a_paused_guest_and_its_clock(tmp_path: Path) -> None:
    async with hosting(tmp_path) as host:
        guest = Counting(host)
        await guest.start("hw")
        vm = host.host._guests.vms["vm"]
        await host.host.pause("vm").outcome()
        before = decode(vm.parked)
        assert (await guest.switch("bt")).pause_s == 0
        after = decode(vm.parked)
        assert (after.monitor, after.time_ns, after.cpu) == ("bt", before.time_ns, before.cpu)
        assert guest.runs_under("bt") and vm.state == "paused"
        await host.host.resume("vm").outcome()
        await guest.goes_on()
        await guest.switch("hw")
        await host.host.pause("vm").outcome()
        # it has not stood still for longer than it was paused
        assert decode(vm.parked).time_ns > after.time_ns


async def test_who_is_refused_goes_on_as_before(tmp_path: Path) -> None:
    async with hosting(tmp_path, WITHOUT_BT) as host:
        guest = Counting(host)
        await guest.start("hw")
        with pytest.raises(Failed, match="VM vm goes on as before: there is no room for translated code"):
            await guest.switch("bt")
        assert guest.runs_under("hw")
        assert (host.host.get("vm").state, host.host.get("vm").crashes) == ("running", 0)
        await guest.goes_on()


async def test_a_guest_that_is_off_has_nothing_to_change(told: ToldHost) -> None:
    await told.create("vm")
    with pytest.raises(Conflict, match="VM vm is defined: it must be running or paused to change"):
        told.host.switch("vm", SwitchRequest(vmm="bt"))


async def test_a_state_that_cannot_be_read(told: ToldHost) -> None:
    await told.running("vm")
    with pytest.raises(Failed, match="VM vm goes on as before: its state cannot be read"):
        await told.host.switch("vm", SwitchRequest(vmm="bt")).outcome()
    assert (told.host.get("vm").vmm, told.host.get("vm").state) == ("hw", "running")
    await told.tell("vm", "still here\n")
    await told.prints("vm", "still here")


def test_the_command(daemon: PrivateDaemon) -> None:
    daemon.create("vm", guests.read("idle"), vmm="hw")
    daemon.do("vm", "start")
    daemon.wait("vm", console="idle: tick")
    done = CliRunner().invoke(main, ["--socket", str(daemon.socket), "switch", "vm", "bt"])
    assert done.exit_code == 0, done.output
    assert re.fullmatch(r"vm: under bt, stood still for \d+\.\d ms\n", done.stdout)
    assert daemon.get("/vms/vm")["vmm"] == "bt"
    done = CliRunner().invoke(main, ["--socket", str(daemon.socket), "switch", "vm", "hw",
                                     "--format", "json"])
    assert msgspec.json.decode(done.stdout)["vmm"] == "hw"
    assert daemon.client.post("/vms/vm/switch", json={"vmm": "kvm"}).status_code == 400


@pytest.mark.slow
def test_a_debian_guest_counts_on(tmp_path: Path) -> None:
    """Its shell counts on the console while it goes from one monitor to the other and back."""
    image = debian("debian")
    with PrivateDaemon(tmp_path, memory="300M") as daemon:
        daemon.create("vm", image.kernel.read_bytes(), initrd=daemon.upload(image.initrd.read_bytes()),
                      append=image.append, memory=96 << 20, vmm="hw")
        daemon.do("vm", "start")
        daemon.wait("vm", console="/ # ", timeout=120)
        daemon.send("vm", "i=0; while true; do i=$((i+1)); echo number $i; usleep 20000; done\n")
        for turn in range(6):
            daemon.wait("vm", console=f"number {10 * turn + 10}\\s")
            daemon.do("vm", "switch", vmm=("bt", "hw")[turn % 2])
        daemon.wait("vm", console="number 80\\s")
        numbers = [int(number) for number in re.findall(r"^number (\d+)\r?$", daemon.console("vm"), re.M)]
    assert numbers == list(range(1, len(numbers) + 1))
