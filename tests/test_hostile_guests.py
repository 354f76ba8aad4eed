# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that do their worst, under a real daemon: a worker never dies of one, and its neighbours go on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostd.ctl.usage import own_bytes
from tests.private_daemon import PrivateDaemon
from vmm import guests

#: what a guest that lives on is, and what one that does not is said to have died of
_LIVES = ""
#: nothing is there, neither memory nor a device
_NOWHERE = 0xF000_0000

_DEEDS = {
    "deaf": _LIVES,
    "spin": _LIVES,
    "flood": _LIVES,
    "timers": _LIVES,
    "execute": "the guest cannot go on: ",
    f"execute at={_NOWHERE}": "the guest cannot go on: ",
    "stack": "triple fault: ",
    f"stack at={_NOWHERE}": "triple fault: ",
    "idt": "triple fault: ",
    f"idt at={_NOWHERE}": "triple fault: ",
    "gdt": "triple fault: ",
    "task": "triple fault: ",
    f"task at={_NOWHERE}": "triple fault: ",
    "tables": "triple fault: ",
}


@pytest.fixture(autouse=True)
def neighbours(daemon: PrivateDaemon) -> Iterator[None]:
    """On every worker a guest that wakes again and again, before, during and after the deed."""
    pids = daemon.worker_pids()
    names = [f"neighbour{index}" for index in range(len(pids))]
    for name in names:
        daemon.create(name, guests.read("idle"), append="ms=20", start=True)
        daemon.wait(name, console="tick 1\r")
    yield
    for name in names:
        number = daemon.console(name).count("tick")
        daemon.wait(name, console=f"tick {number + 5}\r")
    assert daemon.worker_pids() == pids
    for vm in daemon.get("/vms"):
        operation = daemon.client.delete(f"/vms/{vm['name']}", params={"force": "true"}).json()
        assert daemon.get(f"/operations/{operation['id']}", wait=30)["status"] == "done"
    frames = daemon.get("/host")["frames"]
    assert (frames["private"], frames["shared"], frames["overhead"]) == (0, 0, 1)


def start(daemon: PrivateDaemon, kernel: str, append: str) -> None:
    daemon.create("hostile", guests.read(kernel), append=append, memory=4 << 20)
    daemon.do("hostile", "start")


@pytest.mark.parametrize("deed", _DEEDS)
def test_a_deed(daemon: PrivateDaemon, deed: str) -> None:
    start(daemon, "rogue", deed)
    daemon.wait("hostile", console=f"rogue: {deed.split()[0]}\r|abcdefgh")
    if _DEEDS[deed] == _LIVES:
        daemon.do("neighbour0", "pause")
        daemon.do("neighbour0", "resume")
        assert daemon.get("/vms/hostile")["state"] in ("running", "migrating")
        daemon.do("hostile", "stop", force=True)
    else:
        view = daemon.wait("hostile", state="crashed")
        assert view["reason"].startswith(_DEEDS[deed]) and "\n" not in view["reason"]


def test_code_that_rewrites_itself_is_never_stale(daemon: PrivateDaemon) -> None:
    start(daemon, "rogue", "rewrite")
    daemon.wait("hostile", state="halted")
    assert "rogue: 0 instructions were stale" in daemon.console("hostile")


def test_a_flooded_console_does_not_fill_the_daemon(daemon: PrivateDaemon) -> None:
    start(daemon, "rogue", "flood")
    before = own_bytes(daemon.process.pid)
    while not daemon.client.get("/vms/hostile/log", params={"since": 1 << 20}).content:
        assert daemon.get("/vms/hostile")["state"] in ("running", "migrating")
    assert len(daemon.console("hostile")) <= 64 << 10
    assert own_bytes(daemon.process.pid) < before + (8 << 20)


@pytest.mark.parametrize("seed", range(1, 7))
def test_control_registers_at_random(daemon: PrivateDaemon, seed: int) -> None:
    start(daemon, "rogue", f"wild seed={seed}")
    daemon.wait("hostile", console="rogue: wild")
    view = daemon.wait("neighbour0", console="tick 20\r")
    assert view["state"] in ("running", "migrating")
    assert not daemon.get("/vms/hostile")["reason"].startswith("the monitor failed")


@pytest.mark.parametrize("seed", range(1, 5))
def test_garbage_everywhere(daemon: PrivateDaemon, seed: int) -> None:
    start(daemon, "fuzz", f"seed={seed} rounds=3000")
    view = daemon.wait("hostile", state="halted")
    assert view["exit_status"] == 1 and "survived" in daemon.console("hostile")


@pytest.mark.parametrize("seed", range(5, 9))
def test_garbage_everywhere_even_where_it_ends_the_guest(daemon: PrivateDaemon, seed: int) -> None:
    start(daemon, "fuzz", f"seed={seed} rounds=3000 all")
    daemon.wait("hostile", console="fuzz: seed")
    daemon.wait("neighbour0", console="tick 20\r")
    assert not daemon.get("/vms/hostile")["reason"].startswith("the monitor failed")
