# SPDX-License-Identifier: GPL-2.0-or-later
"""How guests go from one real daemon to another: by which mode and terms, and to which monitor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_client_stream

from tests.migration_guests import PAGES, Evidence, counted, counter, witness
from tests.migration_wire import wire
from tests.private_daemon import SOON
from tests.two_hosts import MigratingDaemon, TwoHosts, two_hosts

pytestmark = pytest.mark.slow

MIB = 1 << 20
#: it writes so many pages faster than so many bytes a second are sent
DIRTIER_PAGES, SLOW = 96, MIB
DIRTIER = witness(DIRTIER_PAGES, 1022)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture(autouse=True)
def clean(hosts: TwoHosts) -> Iterator[None]:
    yield
    hosts.clear()


def start(hosts: TwoHosts, kernel: bytes, lines: int = 1, **fields: Any) -> None:
    """A guest at `a` that has said some lines."""
    hosts.a.create("vm", kernel, start=True, **fields)
    hosts.a.wait("vm", console="\n" * lines if lines == 1 else rf"(.*\n){{{lines}}}")


def goes_on(daemon: MigratingDaemon) -> None:
    """The guest runs there, wrote all its pages once more, and found none that is wrong."""
    before = len(daemon.console("vm"))
    until(lambda: daemon.console("vm")[before:].count("\n") > 20)
    Evidence(daemon.console("vm")).check()


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- modes --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["precopy", "postcopy", "auto"])
@pytest.mark.parametrize("connections", [1, 3])
def test_a_guest_goes_to_and_fro(hosts: TwoHosts, mode: str, connections: int) -> None:
    start(hosts, witness(64, 100))
    for _ in range(2):
        view = hosts.there("vm", mode=mode, connections=connections)
        assert view["mode"] == mode and view["downtime"] > 0 and view["remaining_pages"] == 0
        goes_on(hosts.where("vm"))
    assert hosts.where("vm") is hosts.a


def test_bandwidth_is_kept_to(hosts: TwoHosts) -> None:
    start(hosts, witness(256, 1022), 20)
    hosts.a.do("vm", "pause")
    view = hosts.there("vm", bandwidth=MIB, mode="precopy")
    sent = sum(view["bytes"].values())
    assert sent > MIB * 0.9 and view["elapsed"] > 0.8 * (sent - 0.1 * MIB) / MIB
    hosts.b.do("vm", "resume")
    goes_on(hosts.b)


def test_a_guest_that_takes_too_long_runs_on(hosts: TwoHosts) -> None:
    start(hosts, DIRTIER, 20)
    assert hosts.a.refused("vm", hosts.b.address, timeout=0.5, bandwidth=64 << 10) == (
        "VM vm was not handed over within 0.5 seconds: it runs on here")
    assert hosts.b.names() == []
    goes_on(hosts.a)


def test_a_guest_that_writes_too_fast_stays(hosts: TwoHosts) -> None:
    start(hosts, DIRTIER, 20)
    moving = hosts.a.begin("vm", hosts.b.address, mode="precopy", bandwidth=SLOW)
    held = []
    until(lambda: held.append(told(hosts.a, moving)["throttle"]) or held[-1] == 5)
    assert hosts.a.get("/migrations")[-1]["dirty_rate"] > 0
    ended = hosts.a.ended(moving)
    assert ended["error"].startswith("VM vm stays here: it writes to memory faster than the connection "
                                     "carries it, even at 5 % of a CPU: ")
    assert ended["detail"]["throttle"] is None and ended["detail"]["phase"] == "failed"
    # nobody holds it any more
    before = hosts.a.get("/vms/vm")["cpu"]
    until(lambda: hosts.a.get("/vms/vm")["cpu"]["run"] > before["run"] + 0.3)
    after = hosts.a.get("/vms/vm")["cpu"]
    assert after["sleep"] - before["sleep"] < 3 * (after["run"] - before["run"])
    goes_on(hosts.a)


def told(daemon: MigratingDaemon, moving: dict[str, Any]) -> dict[str, Any]:
    """What a running operation says of the migration."""
    operation = daemon.get(f"/operations/{moving['id']}")
    assert operation["status"] == "running", operation
    detail: dict[str, Any] = operation["detail"]
    return detail


def test_what_is_left_is_fetched_when_it_writes_too_fast(hosts: TwoHosts) -> None:
    start(hosts, DIRTIER, 20)
    view = hosts.there("vm", mode="auto", bandwidth=SLOW)
    assert view["phase"] == "done" and view["throttle"] is None and view["round"] > 3
    # it stood still for less than sending all its pages takes
    assert view["downtime"] < DIRTIER_PAGES * 4096 / SLOW
    goes_on(hosts.b)


# --- post-copy ----------------------------------------------------------------------------------------------

def phases(hosts: TwoHosts) -> list[str]:
    """Of the migration that began last, from `a` to `b`, as either end has it."""
    def last(daemon: MigratingDaemon, direction: str) -> str:
        views = [view for view in daemon.get("/migrations") if view["direction"] == direction]
        return views[-1]["phase"] if views else ""

    return [last(hosts.a, "out"), last(hosts.b, "in")]


def test_an_interrupted_post_copy_goes_on(hosts: TwoHosts) -> None:
    start(hosts, witness(PAGES // 4, 1022), 60)
    with wire(hosts.b.address) as line:
        moving = hosts.a.begin("vm", line.address, mode="postcopy", bandwidth=2 * MIB)
        until(lambda: phases(hosts) == ["fetching"] * 2)
        for _ in range(2):
            line.cut()
            until(lambda: phases(hosts) == ["recovering"] * 2)
            # the guest is there, and waits
            assert hosts.b.get("/vms/vm")["state"] == "running"
            assert hosts.a.get("/vms/vm")["state"] == "migrating"
            for refused in hosts.b.refused("vm", hosts.a.address), hosts.b.ended(
                    hosts.b.post("/vms/vm/snapshot"))["error"]:
                assert refused.startswith("VM vm still fetches memory from the host it came from")
            line.mend()
            until(lambda: phases(hosts)[0] == "fetching")
        assert hosts.a.ended(moving)["status"] == "done"
        until(lambda: hosts.b.records() == [])
    assert hosts.a.names() == [] and phases(hosts) == ["done"] * 2
    goes_on(hosts.b)


async def test_the_console_is_where_a_guest_is_that_fetches_its_memory(hosts: TwoHosts) -> None:
    """A terminal at the old host is told to come back, and is relayed then."""
    start(hosts, witness(PAGES // 4, 1022), 60)
    async with trio.open_nursery() as nursery:
        terminal = await console(nursery, hosts.a)
        moving = hosts.a.begin("vm", hosts.b.address, mode="postcopy", bandwidth=2 * MIB)
        with pytest.raises(ConnectionClosed) as closed, trio.fail_after(SOON):
            while True:
                await terminal.get_message()
        assert (closed.value.reason.code, closed.value.reason.reason) == (1012, "the VM is migrating")
        assert phases(hosts)[0] == "fetching"
        answer = hosts.a.client.post("/vms/vm/input", content=b"?")
        assert answer.status_code == 409 and "VM vm is being migrated to" in answer.text
        terminal = await console(nursery, hosts.a)
        await terminal.send_message(b"!")
        said = b""
        with trio.fail_after(SOON):
            while b"<!>" not in said:
                said += await terminal.get_message()
        nursery.cancel_scope.cancel()
    assert phases(hosts)[0] == "fetching"
    assert hosts.a.ended(moving)["status"] == "done"
    assert "<?>" not in hosts.b.console("vm")


async def console(nursery: trio.Nursery, daemon: MigratingDaemon) -> WebSocketConnection:
    stream = await trio.open_unix_socket(daemon.socket)
    return await wrap_client_stream(nursery, stream, "hostd", "/vms/vm/console")


# --- monitors -----------------------------------------------------------------------------------------------

def test_a_guest_changes_its_monitor_on_the_way(hosts: TwoHosts) -> None:
    start(hosts, witness(64, 100))
    for monitor in "bt", "hw", "bt", "hw":
        hosts.there("vm", vmm=monitor)
        there = hosts.where("vm")
        assert there.get("/vms/vm")["vmm"] == monitor
        goes_on(there)


def test_a_paused_guest_changes_its_monitor_on_the_way(hosts: TwoHosts) -> None:
    start(hosts, witness(64, 100))
    hosts.a.do("vm", "pause")
    hosts.there("vm", vmm="bt")
    hosts.b.do("vm", "resume")
    goes_on(hosts.b)


def test_a_64_bit_guest_goes_to_binary_translation_and_back(hosts: TwoHosts) -> None:
    start(hosts, counter())
    for monitor in "bt", "hw":
        hosts.there("vm", vmm=monitor)
        there = hosts.where("vm")
        said = len(there.console("vm"))
        until(lambda said=said, there=there: len(there.console("vm")) > said + 100)
    numbers = counted(hosts.a.console("vm"))
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
