# SPDX-License-Identifier: GPL-2.0-or-later
"""What goes with a guest from one real daemon to another and back: all of it, and nothing twice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import httpx
import pytest

from tests.migration_guests import MEMORY, Evidence, counted, counter, witness
from tests.private_daemon import SOON
from tests.two_hosts import MigratingDaemon, TwoHosts, two_hosts
from vmm import guests

pytestmark = pytest.mark.slow

MONITORS = ("hw", "bt")
#: a guest that halts between its lines
SLEEPER = {"kernel": guests.read("idle"), "append": "ms=20"}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture(autouse=True)
def clean(hosts: TwoHosts) -> Iterator[None]:
    yield
    hosts.clear()


def start(hosts: TwoHosts, name: str, kernel: bytes, **fields: Any) -> None:
    """A guest at `a` that has said something."""
    hosts.a.create(name, kernel, start=True, **fields)
    hosts.a.wait(name, console="\n")


def goes_on(daemon: MigratingDaemon, name: str) -> None:
    """Wait until the guest has said something new."""
    said = len(daemon.console(name))
    deadline = time.monotonic() + SOON
    while len(daemon.console(name)) == said:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- what a user sees of it ---------------------------------------------------------------------------------

#: what only grows
COUNTERS = ("uptime_s", "exits", "interrupts", "world_switches", "cpu", "memory_events")


def grown(before: Any, after: Any) -> bool:
    """Whether no number has become less."""
    if isinstance(before, dict):
        return all(grown(count, after[name]) for name, count in before.items())
    return bool(before <= after)


@pytest.mark.parametrize("monitor", MONITORS)
def test_nothing_of_a_vm_is_lost_on_the_way(hosts: TwoHosts, monitor: str) -> None:
    terms = {"weight": 50, "cap": 60, "limit": MEMORY - 4096, "shares": 77, "reservation": 1 << 20,
             "on_crash": "restart", "on_poweroff": "destroy", "autostart": True, "append": "a b"}
    initrd = hosts.a.upload(b"initrd" * 1000)
    start(hosts, "vm", witness(64, 10), vmm=monitor, initrd=initrd, **terms)
    hosts.a.do("vm", "reset")
    hosts.a.wait("vm", console="t .*\n")
    begun = hosts.a.get("/vms/vm")
    assert begun["boots"] == 2
    for there in hosts.b, hosts.a:
        here = hosts.where("vm")
        said, exits = here.console("vm"), here.get("/vms/vm/exits")
        before = here.get("/vms/vm")
        hosts.there("vm")
        after = there.get("/vms/vm")
        for name, value in before.items():
            if name in COUNTERS:
                assert grown(value, after[name]), (name, value, after[name])
            elif name not in ("worker", "memory_usage"):
                assert after[name] == value, name
        counts = {row["code"]: row["count"] for row in there.get("/vms/vm/exits")}
        assert all(counts[row["code"]] >= row["count"] for row in exits)
        assert there.console("vm").startswith(said)
        goes_on(there, "vm")
        Evidence(there.console("vm").rpartition(" 00000001\n")[2]).check()
    # it can be booted where it has never been before
    hosts.there("vm")
    hosts.b.do("vm", "reset")
    goes_on(hosts.b, "vm")
    again = hosts.b.get("/vms/vm")
    assert (again["boots"], again["kernel"], again["initrd"]) == (3, begun["kernel"], initrd)


@pytest.mark.parametrize("monitor", MONITORS)
def test_a_64_bit_guest_counts_on(hosts: TwoHosts, monitor: str) -> None:
    start(hosts, "vm", counter(), vmm=monitor)
    for _ in range(4):
        hosts.there("vm")
        goes_on(hosts.where("vm"), "vm")
    numbers = counted(hosts.a.console("vm"))
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_a_paused_guest_stays_paused(hosts: TwoHosts) -> None:
    start(hosts, "vm", witness(64))
    hosts.a.do("vm", "pause")
    said = hosts.a.console("vm")
    for daemon in hosts.b, hosts.a, hosts.b:
        view = hosts.there("vm")
        assert daemon.get("/vms/vm")["state"] == "paused"
        assert daemon.console("vm") == said and view["pages"]["delta"] == 0
    hosts.b.do("vm", "resume")
    goes_on(hosts.b, "vm")
    Evidence(hosts.b.console("vm")).check()


@pytest.mark.parametrize("monitor", MONITORS)
def test_a_halted_guest_is_woken_by_its_timer(hosts: TwoHosts, monitor: str) -> None:
    start(hosts, "vm", **SLEEPER, vmm=monitor)
    for _ in range(6):
        hosts.there("vm")
        goes_on(hosts.where("vm"), "vm")
    ticks = [int(line.split()[-1]) for line in hosts.a.console("vm").splitlines()[1:] if "tick " in line]
    assert ticks == list(range(1, len(ticks) + 1))


def test_names_of_images_and_templates(hosts: TwoHosts) -> None:
    kernel, other = witness(), witness(1)
    for daemon, same, differs in (hosts.a, kernel, kernel), (hosts.b, kernel, other):
        for name, data in ("same", same), ("differs", differs):
            daemon.post("/images", name=name, kernel=daemon.upload(data), append="x=1")
    hosts.a.post("/images", name="unknown", kernel=hosts.a.upload(kernel), append="x=1")
    for name in "same", "differs", "unknown":
        hosts.a.post("/vms", name=name, image=name, memory=MEMORY, start=True)
        hosts.a.wait(name, console="\n")
        hosts.there(name)
    views = {name: hosts.b.get(f"/vms/{name}") for name in hosts.b.names()}
    assert (views["same"]["image"], views["same"]["kernel"]) == ("same", None)
    sha256 = hosts.b.upload(kernel)
    for name in "differs", "unknown":
        assert (views[name]["image"], views[name]["kernel"], views[name]["append"]) == (None, sha256, "x=1")
    hosts.b.do("differs", "reset")
    goes_on(hosts.b, "differs")
    hosts.b.do("same", "pause")
    hosts.b.do("same", "clone", names=["clone"], start=True)
    hosts.there("clone")
    assert hosts.a.get("/vms/clone")["template"] == "same"
    for daemon in hosts.a, hosts.b:
        daemon.clear()
        for image in daemon.get("/images"):
            daemon.client.delete(f"/images/{image['name']}")


# --- console, keyboard, clock -------------------------------------------------------------------------------

def move(hosts: TwoHosts, name: str, times: int) -> None:
    for _ in range(times):
        hosts.there(name)


def followed(hosts: TwoHosts, name: str, until: str) -> str:
    """What those see who follow the console, wherever it is, from its first byte on."""
    said = b""
    for daemon in (hosts.a, hosts.b) * 1000:
        transport = httpx.HTTPTransport(uds=str(daemon.socket))
        with (httpx.Client(transport=transport, base_url="http://hostd", timeout=SOON) as client,
              client.stream("GET", f"/vms/{name}/log", params={"follow": "true", "since": len(said)}) as log):
            if log.status_code != 200:
                continue
            for data in log.iter_bytes():
                said += data
                if until.encode() in said:
                    return said.decode()
    raise AssertionError(f"no {until} in {said[-500:]!r}")


def test_followers_of_the_console_miss_nothing(hosts: TwoHosts) -> None:
    start(hosts, "vm", witness(16, 100))
    with ThreadPoolExecutor() as pool:
        seen = pool.submit(followed, hosts, "vm", "<q>")
        move(hosts, "vm", 10)
        hosts.a.send("vm", "q")
        text = seen.result(SOON)
    assert hosts.a.console("vm").startswith(text)
    Evidence(text).check()


def type_at(hosts: TwoHosts, name: str, text: str) -> None:
    """Type it where the guest is: where it is refused it was not typed."""
    deadline = time.monotonic() + SOON
    while True:
        for daemon in hosts.a, hosts.b:
            answer = daemon.client.post(f"/vms/{name}/input", content=text.encode())
            if answer.is_success:
                return
            assert answer.status_code in (404, 409), answer.text
        assert time.monotonic() < deadline


@pytest.mark.parametrize("mode", ["auto", "postcopy"])
def test_keys_arrive_once_and_in_their_order(hosts: TwoHosts, mode: str) -> None:
    start(hosts, "vm", witness(200, 100))
    hosts.b.create("load", guests.read("primes"), append="loop", start=True)
    typed = 0
    for _ in range(6):
        source = hosts.where("vm")
        moving = source.begin("vm", hosts.other(source).address, mode=mode)
        while source.get(f"/operations/{moving['id']}")["status"] == "running":
            type_at(hosts, "vm", text(typed, 7))
            typed += 7
        source.ended(moving)
    type_at(hosts, "vm", "~")
    hosts.a.wait("vm", console="<~>")
    seen = Evidence(hosts.a.console("vm"))
    seen.check()
    wanted = text(0, typed) + "~"
    assert wanted.endswith(seen.keys) and typed > 100, (seen.keys, typed)


def text(begin: int, length: int) -> str:
    """A part of a text in which every position tells where it is."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return "".join(letters[n % 52] if n % 3 else str(n // 3 % 10) for n in range(begin, begin + length))


@pytest.mark.parametrize("monitor", MONITORS)
def test_the_clock_goes_on_through_many_moves(hosts: TwoHosts, monitor: str) -> None:
    moves = 50 if monitor == "hw" else 6
    start(hosts, "vm", witness(period=2_000_000), vmm=monitor)
    khz = hosts.a.get("/host")["workers"][0]["tsc_khz"]
    before, began = behind(hosts.a, "vm", khz), time.monotonic()
    gaps = []
    for _ in range(moves):
        view = hosts.there("vm")
        gaps.append(view["downtime"])
    lost = behind(hosts.a, "vm", khz) - before
    seen = Evidence(hosts.a.console("vm"))
    seen.check()
    # no more than two milliseconds a move, and what the two daemons' ideas of the frequency may differ by
    assert abs(lost) < moves * 2e-3 + 500e-6 * (time.monotonic() - began) + 5e-3, lost
    assert max(after - before for before, after in pairwise(seen.clock)) / khz / 1e3 < sum(gaps) + 1


def behind(daemon: MigratingDaemon, name: str, khz: int) -> float:
    """This machine's clock less the guest's, seconds: the least of some readings."""
    found = []
    for _ in range(40):
        lines = Evidence(daemon.console(name)[-200:]).clock
        found.append(time.monotonic() - lines[-1] / khz / 1e3)
        time.sleep(0.003)
    return min(found)
