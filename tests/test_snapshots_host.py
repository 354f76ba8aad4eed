# SPDX-License-Identifier: GPL-2.0-or-later
"""A host that is suspended and comes back: with all guests where they were, or with what can be had."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostd.snapshot import Snapshot
from tests.private_daemon import SOON, PrivateDaemon
from tests.test_bad_disk import SmallDisk, with_disk
from tests.test_snapshots import goes_on, operation, paused, rounds
from vmm import guests

Start = Callable[..., PrivateDaemon]

SUSPEND = 'on_shutdown = "suspend"\n'


def count(daemon: PrivateDaemon, name: str, monitor: str = "hw", **fields: Any) -> None:
    """A guest that tells of round after round, and is in the middle of it."""
    daemon.create(name, guests.read("primes"), append="loop limit=5000", vmm=monitor, start=True, **fields)
    daemon.wait(name, console="round 2:")


def settled(daemon: PrivateDaemon) -> dict[str, str]:
    """States of all VMs, once none is about to be resumed."""
    with daemon.client.stream("GET", "/events") as events:
        lines = events.iter_lines()
        while "starting" in (states := {vm["name"]: vm["state"] for vm in daemon.get("/vms")}).values():
            next(lines)
    return states


def balanced(daemon: PrivateDaemon) -> bool:
    return bool(daemon.get("/memory", check="true")["wrong"] == [])


def left(directory: Path) -> set[str]:
    """What is in the state directory of suspended hosts."""
    return {path.name for path in (directory / "state").iterdir() if path.name.startswith("suspend")}


def test_all_guests_come_back_where_they_were(start_daemon: Start, tmp_path: Path) -> None:
    first = start_daemon(config=SUSPEND)
    for monitor in "hw", "bt":
        count(first, monitor, monitor)
        first.do(monitor, "clone", names=[f"{monitor}-{number}" for number in range(3)], start=True)
        for number in range(3):
            first.wait(f"{monitor}-{number}", console=r"round .*\n")
    first.do("bt-0", "pause")
    first.create("off", guests.read("idle"), autostart=True)
    before = {vm["name"]: vm for vm in first.get("/vms")}
    consoles = {name: first.console(name) for name in before}
    assert first.stop() == 0
    assert left(tmp_path) == {"suspended"}

    second = start_daemon(config=SUSPEND)
    second.wait("off", state="running")                         # it is to run when the daemon does
    states = settled(second)
    assert states.pop("off") == "running"
    assert states.pop("bt-0") == "paused" and set(states.values()) == {"running"}
    assert left(tmp_path) == set()
    for name in states:
        printed = rounds(second.console(name))
        assert second.console(name).startswith(consoles[name])
        goes_on(second, name, printed[-1])
    for name, vm in before.items():
        now = second.get(f"/vms/{name}")
        if name != "off":
            assert (now["boots"], now["crashes"]) == (vm["boots"], vm["crashes"])
            assert now["exits"] >= vm["exits"]
            events = now["memory_events"]
            assert all(events[what] >= count for what, count in vm["memory_events"].items())
            assert events["swapped_in"] == 0, "what is read from the host's own file was not swapped"
            assert now["uptime_s"] >= vm["uptime_s"] and now["cpu"]["run"] >= vm["cpu"]["run"]
    second.do("bt-0", "resume")
    goes_on(second, "bt-0", rounds(consoles["bt-0"])[-1])
    assert balanced(second)
    # and once more, what is still in the first set's file with it
    assert second.stop() == 0
    third = start_daemon(config=SUSPEND)
    assert set(settled(third).values()) <= {"running"}
    for name in states:
        goes_on(third, name, rounds(third.console(name))[-1])
    assert balanced(third)


def test_clones_share_their_memory_again(start_daemon: Start) -> None:
    first = start_daemon(config=SUSPEND)
    count(first, "vm")
    first.do("vm", "clone", names=["a", "b"])
    first.do("vm", "pause")
    assert first.stop() == 0
    second = start_daemon(config=SUSPEND)
    assert set(settled(second).values()) == {"paused"}
    usage = second.get("/vms/a")["memory_usage"]
    assert usage == second.get("/vms/b")["memory_usage"]
    assert usage["shared"] > 0 and usage["private"] == 0
    assert second.get("/host")["frames"]["shared"] * 4096 < 3 * usage["shared"]


def test_a_restored_guest_is_suspended_with_what_is_still_in_its_file(start_daemon: Start) -> None:
    first = start_daemon(config=SUSPEND)
    count(first, "vm")
    file = first.do("vm", "snapshot")["file"]
    assert operation(first, "/restore", file=file, name="new")["status"] == "done"
    printed = paused(first, "new")
    Path(file).unlink()
    assert first.stop() == 0
    second = start_daemon()
    settled(second)
    second.do("new", "resume")
    goes_on(second, "new", printed)


def test_a_guest_with_a_page_that_is_lost_is_powered_off_and_the_others_are_suspended(
        start_daemon: Start, tmp_path: Path) -> None:
    first = start_daemon(config=SUSPEND)
    count(first, "vm")
    file = first.do("vm", "snapshot")["file"]
    assert operation(first, "/restore", file=file, name="new")["status"] == "done"
    paused(first, "new")
    Path(file).write_bytes(b"")
    printed = rounds(first.console("vm"))[-1]
    assert first.stop() == 0
    assert 'msg="guest not suspended" vm=new why="a page of its memory is lost' in first.said()
    assert {path.name for path in (tmp_path / "state" / "suspended").iterdir()} == {"_pages.snap", "vm.snap"}
    second = start_daemon()
    assert settled(second) == {"new": "defined", "vm": "running"}
    goes_on(second, "vm", printed)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("name", "harm"), [
    ("_pages.snap", damage), ("vm.snap", damage), ("_pages.snap", Path.unlink),
    ("vm.snap", lambda path: path.write_bytes(path.read_bytes()[:-1]))])
def test_a_torn_set_is_set_aside(start_daemon: Start, tmp_path: Path, name: str,
                                 harm: Callable[[Path], object]) -> None:
    first = start_daemon(config=SUSPEND)
    count(first, "vm")
    assert first.stop() == 0
    harm(tmp_path / "state" / "suspended" / name)
    second = start_daemon(config=SUSPEND)
    assert settled(second) == {"vm": "halted"}
    assert second.get("/vms/vm")["reason"].startswith("not resumed: ")
    assert left(tmp_path) == {"suspended.broken-1"}
    assert 'msg="guest not resumed" vm=vm ' in second.said()
    second.do("vm", "start")
    assert balanced(second)


def test_a_host_that_is_killed_while_it_is_suspended(start_daemon: Start, tmp_path: Path) -> None:
    first = start_daemon(config=SUSPEND)
    count(first, "vm")
    first.do("vm", "clone", names=[f"vm-{number}" for number in range(20)], start=True)
    first.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + SOON
    while not left(tmp_path):
        assert time.monotonic() < deadline
    first.kill()
    # a moment later it would have been whole: either is right, in between there is nothing
    whole = "suspended" in left(tmp_path)
    if whole:
        for file in (tmp_path / "state" / "suspended").iterdir():
            Snapshot.open(file).close()
    second = start_daemon()
    assert set(settled(second).values()) == ({"running"} if whole else {"defined"})
    assert left(tmp_path) == set()
    second.do("vm", "stop" if whole else "start", **({"force": True} if whole else {}))


def test_a_host_that_is_killed_while_it_is_resumed(start_daemon: Start, tmp_path: Path) -> None:
    first = start_daemon(config=SUSPEND)
    count(first, "vm")
    first.do("vm", "clone", names=[f"vm-{number}" for number in range(20)], start=True)
    assert first.stop() == 0
    second = start_daemon(config=SUSPEND)
    deadline = time.monotonic() + SOON
    while "suspended" in left(tmp_path):
        assert time.monotonic() < deadline
    second.kill()
    # they may have run already: no moment is lived twice
    third = start_daemon()
    assert set(settled(third).values()) == {"defined"} and left(tmp_path) == set()
    third.do("vm", "start")


def test_guests_are_powered_off_where_the_disk_is_full(start_daemon: Start, tmp_path: Path) -> None:
    disk = SmallDisk(start_daemon(prefix=with_disk(tmp_path / "state", "size=256k"), config=SUSPEND))
    daemon = disk.daemon
    count(daemon, "vm")
    filling = (disk.path / "filling").open("wb", buffering=0)
    with filling, pytest.raises(OSError, match="No space left"):
        while True:
            filling.write(bytes(4096))
    assert daemon.stop() == 0
    assert "host not suspended" in daemon.said() and "no space left" in daemon.said()
    assert "power cut" in daemon.said()


def test_a_snapshot_for_which_there_is_no_room(start_daemon: Start, tmp_path: Path) -> None:
    disk = SmallDisk(start_daemon(prefix=with_disk(tmp_path / "state", "size=256k")))
    daemon = disk.daemon
    count(daemon, "vm")
    before = disk.files()
    with disk.full():
        ended = operation(daemon, "/vms/vm/snapshot")
        assert ended["status"] == "failed" and "no space left for vm-" in ended["error"]
    assert disk.files() == before
    goes_on(daemon, "vm", rounds(daemon.console("vm"))[-1])
    assert balanced(daemon)
    assert operation(daemon, "/vms/vm/snapshot")["status"] == "done"
