# SPDX-License-Identifier: GPL-2.0-or-later
"""hostctl against a host in memory: what each command does, prints, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hostd.cli import COMMANDS, main
from hostd.ctl.pull import PulledImage, PullError
from tests.served_host import ServedHost, served_host

Ctl = Callable[..., Result]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedHost]:
    with served_host(tmp_path_factory.mktemp("served")) as served:
        yield served


@pytest.fixture
def ctl(served: ServedHost) -> Ctl:
    """Runs hostctl and checks its exit status."""
    served.host.guests.clear()
    served.host.images.clear()
    kernel = served.socket.parent / "kernel"
    kernel.write_bytes(b"kernel")

    def run(*arguments: str, status: int = 0) -> Result:
        words = [str(kernel) if word == "KERNEL" else word for word in arguments]
        result = CliRunner().invoke(main, ["--socket", str(served.socket), *words])
        assert result.exit_code == status, (result.output, result.exception)
        if status:
            assert result.stderr.startswith("hostctl: ")
            assert result.stderr.count("\n") == 1
        return result

    return run


def state(served: ServedHost, name: str) -> str:
    return str(served.host.guests[name].state)


def test_a_vm_through_its_life(ctl: Ctl, served: ServedHost) -> None:
    ctl("create", "one", "--kernel", "KERNEL", "--memory", "64M", "--weight", "200", "--on-crash", "restart")
    spec = served.host.guests["one"].spec
    assert (spec.memory, spec.weight, spec.on_crash, spec.append) == (64 << 20, 200, "restart", None)
    path = {"start": "running", "pause": "paused", "resume": "running", "reset": "running", "stop": "halted"}
    for verb, after in path.items():
        ctl(verb, "one")
        assert state(served, "one") == after
    ctl("destroy", "one")
    assert not served.host.guests


def test_the_monitor_is_the_daemon_s_choice_unless_told(ctl: Ctl, served: ServedHost) -> None:
    ctl("create", "any", "--kernel", "KERNEL")
    ctl("create", "soft", "--kernel", "KERNEL", "--vmm", "bt")
    assert [served.host.guests[name].spec.vmm for name in ("any", "soft")] == [None, "bt"]
    assert "bt" in ctl("list", "soft").stdout.split()
    assert "vmm" in ctl("show", "soft").stdout.split()


def test_create_can_start_at_once(ctl: Ctl, served: ServedHost) -> None:
    ctl("create", "one", "--kernel", "KERNEL", "--start")
    assert state(served, "one") == "running"


@pytest.mark.parametrize("arguments", [
    ["create", "a"],
    ["create", "a", "--image", "i", "--kernel", "KERNEL"],
    ["create", "a", "--image", "i", "--initrd", "KERNEL"],
    ["create", "a", "--kernel", "/no/such/file"],
    ["create", "a", "--kernel", "KERNEL", "--memory", "-5M"],
    ["create", "a", "--kernel", "KERNEL", "--memory", "lots"],
    ["start"],
    ["clone", "a"],
    ["clone", "a", "b", "c", "--count", "2"],
    ["set", "a"],
    ["set", "memory=96M"],
    ["set", "a", "memory=lots"],
    ["set", "a", "weight=many"],
    ["set", "a", "colour=red"],
    ["set", "a", "weight=1", "weight=2"],
    ["set", "a", "weight=1", "--weight", "1"],
    ["create", "a", "--kernel", "KERNEL", "--reservation", "some"],
    ["create", "a", "--kernel", "KERNEL", "--vmm", "kvm"],
    ["wait", "a", "--state", "odd"],
    ["nonsense"],
])
def test_wrong_usage_is_told_before_the_daemon_is_asked(ctl: Ctl, arguments: list[str]) -> None:
    assert "--help)" in ctl(*arguments, status=2).stderr


def test_no_command_shows_what_there_is(ctl: Ctl) -> None:
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 2
    assert "Usage: " in result.stderr


@pytest.mark.parametrize(("arguments", "status", "sentence"), [
    (["create", "Bad", "--kernel", "KERNEL"], 1, "name: expected 1-63 characters"),
    (["create", "a", "--kernel", "KERNEL", "--memory", "0"], 1, "memory: expected int >= 1048576"),
    (["create", "a", "--image", "none"], 3, "no image none"),
    (["create", "a", "--kernel", "KERNEL", "--append", "a\nb"], 1, "append: "),
    (["show", "none"], 3, "no VM 'none'"),
    (["memory", "none"], 3, "no VM 'none'"),
    (["set", "none", "memory=96M"], 3, "no VM 'none'"),
    (["start", "none"], 3, "no VM 'none'"),
    (["stop", "web-*"], 3, "no VM matches 'web-*'"),
    (["image", "remove", "none"], 3, "no image none"),
    (["operations", "--cancel", "none"], 3, "no operation"),
    (["console", "none"], 3, "no VM 'none'"),
    (["tc", "none"], 3, "no VM 'none'"),
    (["tc", "none", "--address", "start"], 1, "address: expected a linear address: 1-8 hexadecimal digits"),
    (["log", "none"], 3, "no VM 'none'"),
])
def test_a_refusal_is_one_sentence(ctl: Ctl, arguments: list[str], status: int, sentence: str) -> None:
    assert sentence in ctl(*arguments, status=status).stderr


def test_a_vm_is_saved_and_restored(ctl: Ctl, served: ServedHost, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    ctl("create", "one", "--kernel", "KERNEL", "--start")
    monkeypatch.chdir(tmp_path)
    file = str(tmp_path / "one.snap")                       # the daemon gets absolute paths
    assert ctl("snapshot", "one", "--to", "one.snap").stdout == f"{file}\n"
    assert json.loads(ctl("snapshot", "one", "--to", file, "--base", "old", "--format", "json").stdout) == {
        "file": file, "size": 4096, "pause_s": 0.001}
    assert ctl("restore", "one.snap", "--name", "two").stdout == "two\n"
    assert state(served, "two") == "running"
    assert "there is no snapshot" in ctl("restore", "none.snap", status=3).stderr


def test_a_name_that_is_taken(ctl: Ctl) -> None:
    ctl("create", "a", "--kernel", "KERNEL")
    assert "already" in ctl("create", "a", "--kernel", "KERNEL", status=1).stderr


def test_no_daemon(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--socket", str(tmp_path / "none"), "list"])
    assert result.exit_code == 1
    assert result.stderr == (
        f"hostctl: cannot reach hostd at {tmp_path / 'none'}: No such file or directory; is it running?\n"
    )


def test_patterns_name_several_vms(ctl: Ctl, served: ServedHost) -> None:
    for name in ("web-1", "web-2", "db"):
        ctl("create", name, "--kernel", "KERNEL")
    ctl("start", "web-*")
    assert [state(served, name) for name in ("web-1", "web-2", "db")] == ["running", "running", "defined"]
    ctl("destroy", "--force", "*", "db")
    assert not served.host.guests


def test_one_failure_among_several_stops_none(ctl: Ctl, served: ServedHost) -> None:
    ctl("create", "a", "--kernel", "KERNEL")
    ctl("start", "none", "a", status=3)
    assert state(served, "a") == "running"


def test_clones_are_named_or_numbered(ctl: Ctl, served: ServedHost) -> None:
    ctl("create", "a", "--kernel", "KERNEL", "--start")
    assert "pause it first" in ctl("clone", "a", "b", status=1).stderr
    ctl("pause", "a")
    ctl("clone", "a", "b", "c", "--start")
    ctl("clone", "a", "--count", "2")
    ctl("clone", "a", "w", "--count", "2")
    assert sorted(served.host.guests) == ["a", "a-1", "a-2", "b", "c", "w-1", "w-2"]
    assert (state(served, "b"), state(served, "w-1")) == ("running", "paused")


def test_shares_change(ctl: Ctl, served: ServedHost) -> None:
    ctl("create", "a", "--kernel", "KERNEL")
    ctl("set", "a", "--weight", "300", "--cap", "50")
    assert (served.host.guests["a"].spec.weight, served.host.guests["a"].spec.cap) == (300, 50)
    assert "cap: expected int <= 100" in ctl("set", "a", "--cap", "101", status=1).stderr


def test_settings_are_options_or_words(ctl: Ctl, served: ServedHost) -> None:
    for name in "web-1", "web-2", "db":
        ctl("create", name, "--kernel", "KERNEL", "--reservation", "8M", "--limit", "100M", "--shares", "50")
    spec = served.host.guests["db"].spec
    assert (spec.memory, spec.reservation, spec.limit, spec.shares) == (None, 8 << 20, 100 << 20, 50)
    ctl("set", "memory=96M", "web-*", "reservation=0", "limit=64MiB", "shares=7", "weight=300", "cap=50",
        "on_crash=restart", "on-poweroff=destroy", "autostart=yes")
    for name in "web-1", "web-2":
        spec = served.host.guests[name].spec
        assert (spec.memory, spec.reservation, spec.limit, spec.shares) == (96 << 20, 0, 64 << 20, 7)
        assert (spec.weight, spec.cap, spec.on_crash, spec.on_poweroff) == (300, 50, "restart", "destroy")
        assert spec.autostart
    ctl("set", "web-1", "--memory", "48M", "--limit", "32M", "shares=9")
    spec = served.host.guests["web-1"].spec
    assert (spec.memory, spec.limit, spec.shares) == (48 << 20, 32 << 20, 9)
    assert served.host.guests["db"].spec.weight is None
    assert "shares: expected int >= 1" in ctl("set", "db", "shares=0", status=1).stderr
    assert "'colour' cannot be set: memory, reservation" in ctl("set", "db", "colour=red", status=2).stderr


def test_memory_is_a_line_a_guest_and_one_for_the_host(ctl: Ctl) -> None:
    for name in "a", "b":
        ctl("create", name, "--kernel", "KERNEL")
    header, *rows, host = ctl("memory").stdout.splitlines()
    assert header.split() == ["NAME", "ASSIGNED", "RESIDENT", "PRIVATE", "SHARED", "BALLOONED", "SWAPPED",
                              "WORKING", "SET", "TARGET", "GUEST", "FREE"]
    assert [row.split() for row in rows] == [
        [name, "0", "0", "1.0M", "0", "0", "0", "-", "96.0M", "-"] for name in ("a", "b")]
    assert host == ("host: 512.0M of 1.0G free (soft), 256.0M private, 240.0M shared, 8.0M overhead, "
                    "8.0M lent, 2.0G saved by sharing (5000 pages/s scanned), "
                    "64.0M swapped to 16.0M of 4.0G, 2 workers wait for memory")
    assert [row.split()[0] for row in ctl("memory", "b").stdout.splitlines()[1:-1]] == ["b"]
    whole = json.loads(ctl("memory", "a*", "--format", "json").stdout)
    assert [(vm["name"], vm["private"], vm["working_set"]) for vm in whole["vms"]] == [("a", 1 << 20, None)]
    assert (whole["host"]["state"], whole["host"]["wrong"]) == ("soft", None)


def test_guests_that_stand_still_for_memory_are_named(ctl: Ctl, served: ServedHost) -> None:
    for name in "a", "b", "c":
        ctl("create", name, "--kernel", "KERNEL")
    served.host.waiting = {"a", "c"}
    assert ctl("memory").stdout.endswith(", at their limit and standing still: a c\n")
    assert "standing still" not in ctl("memory", "b").stdout
    whole = json.loads(ctl("memory", "--format", "json").stdout)
    assert [vm["waiting"] for vm in whole["vms"]] == [True, False, True]


def test_books_are_checked_when_asked(ctl: Ctl, served: ServedHost, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the books are right" in ctl("memory", "--check").stdout
    assert json.loads(ctl("memory", "--check", "--format", "json").stdout)["host"]["wrong"] == []
    faults = ["frame 7 is both private and shared", "frame 9 is lost"]
    monkeypatch.setattr(served.host.overview, "faults", faults)
    assert "wrong" not in ctl("memory").output
    result = CliRunner().invoke(main, ["--socket", str(served.socket), "memory", "--check"])
    assert result.exit_code == 1
    assert sorted(result.stderr.splitlines()) == [
        "hostctl: the books of machine memory are wrong: frame 7 is both private and shared",
        "hostctl: the books of machine memory are wrong: frame 9 is lost"]


def test_everything_shown_is_also_json(ctl: Ctl) -> None:
    ctl("create", "a", "--kernel", "KERNEL", "--start")
    shown: list[tuple[list[str], Callable[[Any], Any], Any]] = [
        (["list"], lambda value: value[0]["name"], "a"),
        (["show", "a"], lambda value: value["state"], "running"),
        (["exits", "a"], lambda value: value[0]["name"], "HLT"),
        (["tc", "a", "--address", "1000"], lambda value: value["text"], "00001000  nop\n"),
        (["operations"], lambda value: {row["status"] for row in value} <= {"done", "failed"}, True),
        (["memory"], lambda value: value["vms"][0]["name"], "a"),
        (["host"], lambda value: value["memory"], 1 << 30),
        (["image", "list"], len, 0),
        (["version"], lambda value: value["hostd"], "0.1.0"),
    ]
    for command, pick, expected in shown:
        after = ctl(*command, "--format", "json").stdout
        assert pick(json.loads(after)) == expected
        assert json.loads(ctl("--format", "json", *command).stdout) == json.loads(after)
        assert ctl(*command).stdout.strip()


def test_the_table_shows_what_people_ask_for(ctl: Ctl) -> None:
    ctl("create", "a", "--kernel", "KERNEL", "--memory", "96M")
    header, row = ctl("list").stdout.splitlines()
    assert header.split()[:5] == ["NAME", "STATE", "MEMORY", "PRIVATE", "SHARED"]
    assert row.split()[:5] == ["a", "defined", "96.0M", "1.0M", "0"]
    assert row.split()[header.split().index("VMM")] == "hw"
    assert "weight" in ctl("show", "a").stdout
    assert "500.0us" in ctl("exits", "a").stdout


def test_translations_are_shown(ctl: Ctl) -> None:
    ctl("create", "a", "--kernel", "KERNEL", "--vmm", "bt", "--start")
    assert ctl("tc", "a", "--address", "0x101000").output == "00101000  nop\n"
    whole = ctl("tc", "a")
    assert whole.stdout == ""
    assert whole.stderr.splitlines() == ["nothing is translated yet",
                                         "there is more: ask for a part of it with --address"]


def test_what_is_sent_can_be_waited_for_and_read(ctl: Ctl) -> None:
    ctl("create", "a", "--kernel", "KERNEL", "--start")
    ctl("send", "a", "echo hello")
    ctl("wait", "a", "--console", "h.llo", "--timeout", "5")
    ctl("wait", "a")
    assert ctl("log", "a").stdout_bytes == b"echo hello\n"
    assert "did not get there" in ctl("wait", "a", "--state", "halted", "--timeout", "0", status=4).stderr


def test_top_looks_as_often_as_told(ctl: Ctl) -> None:
    ctl("create", "a", "--kernel", "KERNEL", "--start")
    output = ctl("top", "--count", "2", "--interval", "0.1").stdout
    assert "1 running" in output
    assert "EXITS/S" in output


def test_images_are_added_listed_and_removed(ctl: Ctl, served: ServedHost) -> None:
    ctl("image", "add", "tiny", "--kernel", "KERNEL", "--initrd", "KERNEL", "--append", "quiet")
    assert served.host.images["tiny"].append == "quiet"
    assert served.host.images["tiny"].initrd == served.host.images["tiny"].kernel
    assert "tiny" in ctl("image", "list").stdout
    ctl("create", "a", "--image", "tiny")
    ctl("image", "remove", "tiny")
    assert not served.host.images


def test_a_pulled_image_is_registered(ctl: Ctl, served: ServedHost, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = served.socket.parent / "kernel"
    pulled = PulledImage(kernel, kernel, "console=ttyS0", "6.1")
    monkeypatch.setattr("hostd.ctl.images.build_debian", lambda progress, recipe: pulled)
    assert "Debian 6.1" in ctl("image", "pull", "debian").stdout
    assert served.host.images["debian"].append == "console=ttyS0"


def test_a_pull_that_fails_says_why(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(progress: object, recipe: object) -> PulledImage:
        raise PullError("apt knows no package")

    monkeypatch.setattr("hostd.ctl.images.build_debian", fail)
    assert ctl("image", "pull", "debian", status=1).stderr == "hostctl: apt knows no package\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(ctl: Ctl, shell: str) -> None:
    assert "_HOSTCTL_COMPLETE" in ctl("completion", shell).stdout


def test_names_are_completed_from_the_daemon(
    ctl: Ctl, served: ServedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctl("create", "web-1", "--kernel", "KERNEL")
    environment = {"_HOSTCTL_COMPLETE": "bash_complete", "COMP_CWORD": "2", "COMP_WORDS": "hostctl start we",
                   "HOSTD_SOCKET": str(served.socket)}
    result = CliRunner().invoke(main, [], env=environment, prog_name="hostctl")
    assert "web-1" in result.output


def test_every_command_has_help() -> None:
    for name in COMMANDS:
        result = CliRunner().invoke(main, [name, "--help"])
        assert result.exit_code == 0, name
        assert "Usage: " in result.output
    assert set(COMMANDS) <= set(CliRunner().invoke(main, ["--help"]).output.split())
