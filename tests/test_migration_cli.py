# SPDX-License-Identifier: GPL-2.0-or-later
"""hostctl migrate and its companions against a host in memory: what they ask for, print, and end with."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import trio
from click.testing import CliRunner, Result

from hostd.cli import main
from hostd.ctl.progress import migration_of, over, under_way
from hostd.lifecycle import State
from hostd.migration.views import EvacuateRequest, MigrateRequest, MigrationView
from hostd.model import OperationView, VmCreate
from tests.memory_host import Guest
from tests.memory_migrations import NOWHERE, SLOW
from tests.served_host import ServedHost, served_host

Ctl = Callable[..., Result]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedHost]:
    with served_host(tmp_path_factory.mktemp("served")) as served:
        yield served


@pytest.fixture
def ctl(served: ServedHost) -> Ctl:
    """Runs hostctl and checks its exit status; web-1, web-2 and db run."""
    served.host.guests.clear()
    for name in ("web-1", "web-2", "db"):
        served.host.guests[name] = Guest(VmCreate(name=name), State.RUNNING)
    for kept in (served.host.migrations.requests, served.host.migrations.views, served.host.migrations.gone):
        kept.clear()

    def run(*words: str, status: int = 0) -> Result:
        result = CliRunner().invoke(main, ["--socket", str(served.socket), *words])
        assert result.exit_code == status, (result.output, result.exception)
        assert all(line.startswith("hostctl: ") for line in result.stderr.splitlines())
        assert bool(result.stderr) == bool(status)
        return result

    return run


def names(served: ServedHost) -> set[str]:
    return set(served.host.guests)


def test_a_vm_moves_and_one_line_says_what_it_came_to(ctl: Ctl, served: ServedHost) -> None:
    assert ctl("migrate", "db", "b").stdout == "db: downtime 38ms, total 1.42s, 1.0M\n"
    assert served.host.migrations.requests == [MigrateRequest(to="b")]
    assert names(served) == {"web-1", "web-2"}


def test_patterns_name_several_and_the_last_word_is_the_host(ctl: Ctl, served: ServedHost) -> None:
    lines = ctl("migrate", "web-*", "db", "b:9000").stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["web-1", "web-2", "db"]
    assert {request.to for request in served.host.migrations.requests} == {"b:9000"}


@pytest.mark.parametrize(("options", "expected"), [
    (["--auto"], {}),
    (["--precopy"], {"mode": "precopy"}),
    (["--postcopy", "--connections", "4"], {"mode": "postcopy", "connections": 4}),
    (["--downtime", "20", "--bandwidth", "100M"], {"downtime_ms": 20.0, "bandwidth": 100 << 20}),
    (["--timeout", "60", "--vmm", "bt"], {"timeout": 60.0, "vmm": "bt"}),
])
def test_options_are_the_request(
        ctl: Ctl, served: ServedHost, options: list[str], expected: dict[str, object]) -> None:
    ctl("migrate", *options, "db", "b")
    assert served.host.migrations.requests == [MigrateRequest(to="b", **expected)]  # type: ignore[arg-type]


def test_a_dry_run_moves_nothing(ctl: Ctl, served: ServedHost) -> None:
    assert ctl("migrate", "db", "b", "--dry-run").stdout == "db: b would take it\n"
    assert "db" in names(served)


def test_one_failure_among_several_stops_none(ctl: Ctl, served: ServedHost) -> None:
    served.host.guests["web-1"].state = State.HALTED
    assert "web-1 is halted" in ctl("migrate", "web-*", "b", status=1).stderr
    assert names(served) == {"web-1", "db"}
    assert len(ctl("migrate", "none", "nothing", "b", status=3).stderr.splitlines()) == 2


def test_who_does_not_wait_gets_an_operation_to_follow_and_to_cancel(ctl: Ctl, served: ServedHost) -> None:
    id = ctl("migrate", "db", SLOW, "--no-wait").stdout.strip()
    row = next(line for line in ctl("operations").stdout.splitlines() if line.startswith(id))
    assert "copying, round 3, 1200 pages left, 2000 dirtied/s, 100.0M/s, downtime 40ms expected" in row
    ctl("operations", "--cancel", id)
    row = next(line for line in ctl("operations").stdout.splitlines() if line.startswith(id))
    assert "cancelled" in row
    id = json.loads(ctl("evacuate", "b", "--no-wait", "--format", "json").stdout)["id"]
    assert ctl("evacuate", "b", "--no-wait").stdout.strip() != id


@pytest.mark.parametrize(("words", "status", "sentence"), [
    (["migrate", "db", NOWHERE], 1, f"cannot reach {NOWHERE}"),
    (["migrate", "db", "b", "--bandwidth", "1K"], 1, "bandwidth: expected int >= 65536"),
    (["migrate", "none", "b"], 3, "no VM 'none'"),
    (["migrate", "x-*", "b"], 3, "no VM matches 'x-*'"),
    (["migrate", "db"], 2, "name the VMs to move, and then the host"),
    (["migrate"], 2, "Missing argument"),
    (["migrate", "db", "b", "--downtime", "0"], 2, "--downtime"),
    (["migrate", "db", "b", "--vmm", "kvm"], 2, "--vmm"),
    (["evacuate"], 2, "Missing argument"),
    (["evacuate", "b", "--parallel", "0"], 2, "--parallel"),
    (["recover", "none"], 3, "no VM 'none'"),
    (["recover", "db"], 1, "it is this host's"),
])
def test_a_refusal_is_one_sentence(ctl: Ctl, words: list[str], status: int, sentence: str) -> None:
    assert sentence in ctl(*words, status=status).stderr


def test_an_evacuation_names_what_stays(ctl: Ctl, served: ServedHost) -> None:
    result = ctl("evacuate", "b", "--parallel", "8", "--bandwidth", "1M", "--precopy", status=1)
    assert result.stdout == "moved 1 of 3 guests, total 2.5s\n"
    assert sorted(result.stderr.splitlines()) == [
        "hostctl: VM b stays: its memory does not fit", "hostctl: VM c stays: cancelled"]
    assert served.host.migrations.requests == [
        EvacuateRequest(to="b", parallel=8, bandwidth=1 << 20, mode="precopy")]
    assert "b would take 1 of 3 guests" in ctl("evacuate", "b", "--dry-run", status=1).stdout


def test_a_vm_in_doubt_is_recovered(ctl: Ctl, served: ServedHost) -> None:
    served.host.guests["db"].state = State.MIGRATING
    assert ctl("recover", "db").stdout == ""


def test_migrations_are_a_table(ctl: Ctl) -> None:
    ctl("migrate", "db", "b")
    ctl("migrate", "web-1", NOWHERE, status=1)
    header, db, web = ctl("migrations").stdout.splitlines()
    assert header.split()[:4] == ["NAME", "WAY", "PEER", "PHASE"]
    assert db.split() == ["db", "out", "b", "done", "3", "0", "2000", "100.0M", "38ms", "1.4s", "1.0M"]
    assert web.split()[3] == "failed" and f"cannot reach {NOWHERE}" in web


def test_everything_shown_is_also_json(ctl: Ctl) -> None:
    moved = json.loads(ctl("migrate", "db", "b", "--format", "json").stdout)
    assert [(view["vm"], view["phase"], view["downtime"]) for view in moved] == [("db", "done", 0.038)]
    assert json.loads(ctl("migrations", "--format", "json").stdout) == moved
    evacuated = json.loads(ctl("--format", "json", "evacuate", "b", status=1).stdout)
    assert (evacuated["moved"], set(evacuated["failed"])) == (["a"], {"b", "c"})
    operations = json.loads(ctl("operations", "--format", "json").stdout)
    assert [row["detail"]["vm"] for row in operations if row["kind"] == "migrate"][-1] == "db"


def test_names_are_completed(ctl: Ctl, served: ServedHost) -> None:
    environment = {"_HOSTCTL_COMPLETE": "bash_complete", "COMP_CWORD": "2", "COMP_WORDS": "hostctl migrate w",
                   "HOSTD_SOCKET": str(served.socket)}
    assert "web-2" in CliRunner().invoke(main, [], env=environment, prog_name="hostctl").output


def test_a_terminal_shows_it_under_way_and_ctrl_c_cancels(ctl: Ctl, served: ServedHost) -> None:
    master, slave = pty.openpty()
    program = "from hostd.cli import main; main(prog_name='hostctl')"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "--socket", str(served.socket), "migrate", "db", SLOW],
        stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "COLUMNS": "200", "TERM": "xterm"})
    os.close(slave)
    seen = b""
    try:
        while b"db: copying, round 3, 1200 pages left" not in seen:
            seen += os.read(master, 4096)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 1
    finally:
        process.kill()
        process.wait()
        os.close(master)
    last = served.host.operations.list()[-1]
    trio.from_thread.run(last.wait, trio_token=served.token)
    assert (last.kind, last.status) == ("migrate", "cancelled")
    assert "db" in names(served)


def test_figures_that_are_not_known_are_left_out() -> None:
    view = MigrationView(token="t", vm="a", direction="out", peer="b", mode="auto", phase="connecting")
    assert under_way(view) == "connecting"
    assert over(view) == "a: downtime -, total 0.00s, 0"
    held = MigrationView(token="t", vm="a", direction="out", peer="b", mode="auto", phase="copying",
                         throttle=30, elapsed=75.0, bytes={"full": 5 << 20})
    assert under_way(held) == "copying, held to 30% of a CPU"
    assert over(held) == "a: downtime -, total 1m15s, 5.0M"
    other = OperationView(id="1", kind="clone", target="a", status="running", progress=0.0, phase="",
                          error=None, created=0.0, finished=None, result=None)
    assert migration_of(other) is None
