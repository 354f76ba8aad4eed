# SPDX-License-Identifier: GPL-2.0-or-later
"""Bad input, through the real command line to a real daemon: one sentence, and nothing left behind."""

from __future__ import annotations

import gzip
import hashlib
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hostd.cli import main
from tests.kernels import bzimage, elf32
from tests.private_daemon import PrivateDaemon
from vmm import guests

Ctl = Callable[..., Result]

FAILED, USAGE, NOT_FOUND = 1, 2, 3


@pytest.fixture
def ctl(daemon: PrivateDaemon) -> Ctl:
    """Runs hostctl; checks its exit status, and that a failure is told in one line."""
    def run(*arguments: object, status: int = 0) -> Result:
        words = list(map(str, arguments))
        result = CliRunner().invoke(main, ["--socket", str(daemon.socket), *words])
        assert result.exit_code == status, (result.output, result.exception)
        if status:
            assert result.stderr.startswith("hostctl: ") and result.stderr.count("\n") == 1
            assert result.stdout == ""
        return result

    return run


def files(daemon: PrivateDaemon) -> set[str]:
    """What there is in the state directory, but for uploads, which wait an hour for somebody to use them."""
    state = daemon.directory / "state"
    found = {str(path.relative_to(state)) for path in state.rglob("*")}
    return {path for path in found if not _is_upload(state / path)}


def _is_upload(path: Path) -> bool:
    if path.parent.name == "unpacked":
        return (path.parent.parent / "blobs" / path.name).exists()
    return path.parent.name == "blobs" and hashlib.sha256(path.read_bytes()).hexdigest() == path.name


@pytest.fixture(autouse=True)
def untouched(daemon: PrivateDaemon) -> Iterator[None]:
    """Whatever a test does, afterwards the daemon is as it was before: its VMs, its frames, its files."""
    before = daemon.get("/vms"), files(daemon), daemon.worker_pids()
    yield
    assert (daemon.get("/vms"), files(daemon), daemon.worker_pids()) == before
    frames = daemon.get("/host")["frames"]
    assert (frames["private"], frames["shared"], frames["overhead"]) == (0, 0, 1)
    assert frames["free"] + frames["granted"] + 1 == frames["total"]


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], Path]:
    """Makes a file."""
    def make(data: bytes) -> Path:
        path = tmp_path / hashlib.sha256(data).hexdigest()[:8]
        path.write_bytes(data)
        return path

    return make


IDLE = guests.path("idle")


# --- kernels and initrds ----------------------------------------------------------------------------------


def test_a_kernel_that_is_not_there(ctl: Ctl) -> None:
    said = ctl("create", "vm", "--kernel", "/nowhere", status=USAGE).stderr
    assert "File '/nowhere' does not exist" in said


@pytest.mark.parametrize(("data", "said"), [
    (b"", "the upload is empty"),
    (b"#!/bin/sh\necho no kernel\n" * 100, "kernel"),
    (guests.read("mix")[:3000], "a truncated ELF file"),
    (bzimage(gzip.compress(bytes(100_000))[:-50] + struct.pack("<I", 100_000)), "payload is corrupt"),
    (elf32(0x100000, [(0x100000, b"\xf4", 1)], machine=40), "machine"),
], ids=["empty", "text", "truncated", "payload", "other machine"])
def test_a_corrupt_kernel(ctl: Ctl, file: Callable[[bytes], Path], data: bytes, said: str) -> None:
    path = file(data)
    for command in (["create", "vm"], ["image", "add", "image"]):
        assert said in ctl(*command, "--kernel", path, status=FAILED).stderr
    if data:
        assert said in ctl("run", path, status=FAILED).stderr


def test_an_initrd_larger_than_memory(ctl: Ctl, file: Callable[[bytes], Path]) -> None:
    initrd = file(bytes(5 << 20))
    said = ctl("create", "vm", "--kernel", IDLE, "--initrd", initrd, "--memory", "4M", status=FAILED).stderr
    assert "does not fit" in said


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("memory", "status", "said"), [
    ("0", FAILED, "memory: "), ("-1", USAGE, "-1"), ("64K", FAILED, "memory: "), ("much", USAGE, "much"),
    ("1025K", FAILED, "whole number of 4 KiB pages"), ("4G", FAILED, "memory: "),
    ("512M", FAILED, "more than the host's pool of 512 MiB holds"), ("9" * 30, USAGE, "no size"),
])
def test_memory(ctl: Ctl, memory: str, status: int, said: str) -> None:
    result = ctl("create", "vm", "--kernel", IDLE, f"--memory={memory}", status=status)
    assert said in result.stderr


@pytest.mark.parametrize("name", ["", "UPPER", "-dash", "a" * 64, "../escape", "a b", "ä", "a\n", "*"])
def test_a_bad_name(ctl: Ctl, name: str) -> None:
    said = ctl("create", "--kernel", IDLE, "--", name, status=FAILED).stderr
    assert "name: expected 1-63 characters of a-z 0-9 . -, starting with a letter or digit" in said


@pytest.mark.parametrize("append", ["x" * 2048, "a\nb", "a\0b", "\x1b[2J", "\x7f"])
def test_a_bad_command_line(ctl: Ctl, append: str) -> None:
    said = ctl("create", "vm", "--kernel", IDLE, "--append", append, status=FAILED).stderr
    assert "append: expected at most 2047 characters, none of them a control character" in said


def test_an_unknown_image(ctl: Ctl) -> None:
    said = ctl("create", "vm", "--image", "nonesuch", status=NOT_FOUND).stderr
    assert said == "hostctl: no image nonesuch (there is: none)\n"


@pytest.mark.parametrize(("what", "value"), [("weight", 0), ("weight", 10001), ("cap", -1), ("cap", 101)])
def test_shares_out_of_range(ctl: Ctl, what: str, value: int) -> None:
    said = ctl("create", "vm", "--kernel", IDLE, f"--{what}", value, status=FAILED).stderr
    assert f"{what}: expected" in said


def test_a_name_that_is_taken(ctl: Ctl) -> None:
    ctl("create", "vm", "--kernel", IDLE, "--memory", "4M", "--start")
    for command in (["create", "vm", "--kernel", IDLE], ["clone", "vm", "vm"]):
        assert ctl(*command, status=FAILED).stderr == "hostctl: VM vm exists already\n"
    assert "given twice" in ctl("clone", "vm", "new", "new", status=FAILED).stderr
    assert ctl("list").stdout.count("\n") == 2
    ctl("destroy", "--force", "vm")


def test_a_vm_that_is_not_there(ctl: Ctl) -> None:
    for verb in "start", "pause", "stop", "destroy", "show", "log", "exits":
        assert ctl(verb, "nonesuch", status=NOT_FOUND).stderr == "hostctl: no VM nonesuch\n"


def test_more_memory_than_there_is_left(ctl: Ctl) -> None:
    """The pool is promised more than once, but never given twice."""
    ctl("create", "vm", "--kernel", guests.path("primes"), "--append", "loop", "--memory", "4M", "--start")
    names = [f"vm-{number}" for number in range(200)]
    ctl("clone", "vm", *names)
    ctl("destroy", "--force", "vm", *names)


# --- guests that end at once ------------------------------------------------------------------------------


def test_a_kernel_that_triple_faults_at_once(ctl: Ctl) -> None:
    ctl("create", "vm", "--kernel", guests.path("triple"), "--memory", "4M", "--start")
    ctl("wait", "vm", "--state", "crashed")
    assert "triple fault: " in ctl("show", "vm").stdout
    ctl("destroy", "vm")



def test_a_triple_fault_in_the_foreground() -> None:
    done = subprocess.run([sys.executable, "-c", "from hostd.cli import main; main()", "run",
                           guests.path("triple")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (FAILED, "", 1)
    assert done.stderr.startswith("hostctl: the guest crashed: triple fault: ")
