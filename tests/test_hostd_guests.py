# SPDX-License-Identifier: GPL-2.0-or-later
"""Real guests on real workers under a real daemon, which lead the same lives under either monitor."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator

import pytest

from tests.private_daemon import PrivateDaemon
from vmm import guests

MONITORS = ("hw", "bt")


@pytest.fixture(autouse=True)
def clean(daemon: PrivateDaemon) -> Iterator[None]:
    """Every test leaves the daemon as it found it: without VMs, and with all frames free again."""
    yield
    daemon.clear()


def run(daemon: PrivateDaemon, kernel: str, append: str = "", name: str = "vm", **fields: object) -> None:
    daemon.create(name, guests.read(kernel), append=append, **fields)
    daemon.do(name, "start")


def rounds(console: str) -> list[int]:
    """The rounds that `primes loop limit=5000` has told of, all of them with the right count."""
    told = re.findall(r"round (\d+): (\d+) below 5000", console)
    assert {count for _, count in told} == {"669"}
    return [int(number) for number, _ in told]


def test_a_guest_computes_prints_and_ends(daemon: PrivateDaemon) -> None:
    run(daemon, "primes", "limit=5000")
    view = daemon.wait("vm", state="halted")
    assert view["exit_status"] == 1
    assert "primes: 669 below 5000" in daemon.console("vm")
    assert view["exits"] > 50 and view["world_switches"] >= 1 and view["cpu"]["run"] > 0
    expected = {"hw": {"ioio", "npf"}, "bt": {"ioio"}}[view["vmm"]]
    assert {row["name"] for row in daemon.get("/vms/vm/exits")} >= expected


def test_a_guest_with_paging_tasks_and_timer_interrupts(daemon: PrivateDaemon) -> None:
    run(daemon, "mix")
    assert daemon.wait("vm", state="halted")["exit_status"] == 1


def test_a_kernel_that_triple_faults_at_once_is_crashed_with_a_sentence(daemon: PrivateDaemon) -> None:
    run(daemon, "triple")
    view = daemon.wait("vm", state="crashed")
    assert "triple fault" in view["reason"] and view["crashes"] == 1
    assert all(worker["restarts"] == 0 for worker in daemon.get("/host")["workers"])


def test_a_halted_guest_wakes_by_its_timer_and_sleeps_between(daemon: PrivateDaemon) -> None:
    run(daemon, "idle", "ticks=2")
    view = daemon.wait("vm", state="halted")
    assert view["interrupts"] > 0
    assert view["cpu"]["sleep"] > view["cpu"]["run"]


def test_a_guest_goes_on_where_it_was_paused(daemon: PrivateDaemon) -> None:
    run(daemon, "primes", "loop limit=5000")
    daemon.wait("vm", console="round 2:")
    daemon.do("vm", "pause")
    printed = daemon.console("vm")
    assert daemon.get("/vms/vm")["memory_usage"]["private"] > 0
    daemon.do("vm", "resume")
    last = rounds(printed)[-1]
    daemon.wait("vm", console=f"round {last + 3}:.*\n")
    whole = daemon.console("vm")
    assert whole.startswith(printed) and rounds(whole)[:last + 3] == list(range(1, last + 4))


def test_clones_go_on_from_the_template_s_moment(daemon: PrivateDaemon) -> None:
    run(daemon, "primes", "loop limit=5000", name="template")
    daemon.wait("template", console="round 2:")
    daemon.do("template", "pause")
    last = rounds(daemon.console("template"))[-1]
    names = [f"clone{number}" for number in range(6)]
    daemon.do("template", "clone", names=names, start=True)
    shared = daemon.get("/host")["frames"]["shared"]
    assert shared > 0
    for name in names:
        daemon.wait(name, console=f"round {last + 3}:.*\n")
        assert set(rounds(daemon.console(name))) >= {last + 2, last + 3}
        assert daemon.get(f"/vms/{name}")["template"] == "template"
    daemon.do("template", "resume")
    daemon.wait("template", console=f"round {last + 3}:.*\n")


def test_a_killed_worker_takes_down_its_own_guests_only(daemon: PrivateDaemon) -> None:
    pids = daemon.worker_pids()
    for number in range(4):
        run(daemon, "idle", name=f"vm{number}", on_crash="restart" if number < 2 else "stop")
    homes = {vm["name"]: vm["worker"] for vm in daemon.get("/vms")}
    victim = homes["vm3"]
    os.kill(pids[victim], signal.SIGKILL)
    daemon.wait("vm3", state="crashed")
    assert daemon.get("/vms/vm3")["reason"] == f"worker {victim} died: killed by SIGKILL"
    for name, worker in homes.items():
        view = daemon.wait(name, state="crashed" if (worker, name[-1] > "1") == (victim, True) else "running")
        assert view["boots"] == (2 if worker == victim and view["on_crash"] == "restart" else 1)
    assert daemon.worker_pids()[1 - victim] == pids[1 - victim]
    assert daemon.worker_pids()[victim] != pids[victim]
    daemon.do("vm3", "start")


def test_a_crash_of_a_worker_s_own_code_is_in_the_log(daemon: PrivateDaemon) -> None:
    run(daemon, "primes", "loop", name="vm")
    daemon.wait("vm", console="primes: ")
    victim = daemon.get("/vms/vm")["worker"]
    os.kill(daemon.worker_pids()[victim], signal.SIGSEGV)
    assert daemon.wait("vm", state="crashed")["reason"] == f"worker {victim} died: killed by SIGSEGV"
    said = daemon.said()
    assert "Fatal Python error: Segmentation fault" in said and "worker.py\"" in said
    daemon.worker_pids()


def test_resetting_a_guest_boots_it_again(daemon: PrivateDaemon) -> None:
    run(daemon, "idle")
    daemon.wait("vm", console="idle")
    daemon.do("vm", "reset")
    daemon.wait("vm", console="idle")
    assert daemon.get("/vms/vm")["boots"] == 2


def test_more_guests_than_memory_wait_for_it_and_go_on(daemon: PrivateDaemon) -> None:
    # 512 MiB of pool, of which guests touch little: definitions may promise more than there is
    for number in range(8):
        run(daemon, "idle", name=f"vm{number}", memory=128 << 20)
    assert sum(vm["memory"] for vm in daemon.get("/vms")) > daemon.get("/host")["memory"]
    for number in range(8):
        daemon.wait(f"vm{number}", console="idle: tick")
