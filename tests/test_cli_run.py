# SPDX-License-Identifier: GPL-2.0-or-later
"""`hostctl run`: one guest in the foreground, how it is driven, and the status it ends with."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hostd.cli import main
from hostd.ctl.errors import CtlError
from hostd.ctl.run import Keys, drive, exit_status
from vmm import guests
from vmm.monitor import Stop, StopReason


class Scripted:
    """A machine that stops as told, and remembers what was typed."""

    def __init__(self, *stops: Stop, wake: int | None = None) -> None:
        self._stops = iter(stops)
        self._wake = wake
        self.typed = b""

    def run(self, deadline_ns: int) -> Stop:
        assert deadline_ns > time.monotonic_ns() - 1_000_000_000
        return next(self._stops)

    def next_wake(self) -> int | None:
        return self._wake

    def feed(self, data: bytes) -> None:
        self.typed += data


POWEROFF = Stop(StopReason.POWEROFF)
SLICE = Stop(StopReason.SLICE)
HALTED = Stop(StopReason.HALTED)


class Typist:
    """A keyboard made of a pipe."""

    def __init__(self) -> None:
        self._near, self._far = os.pipe()
        self.keys = Keys(self._near)

    def type(self, data: bytes) -> None:
        """Type, and wait until it has arrived."""
        os.write(self._far, data)
        self.keys.wait(5.0)

    def close(self) -> None:
        os.close(self._far)


@pytest.fixture
def typist() -> Iterator[Typist]:
    typist = Typist()
    yield typist
    typist.close()


def test_what_is_typed_reaches_the_guest(typist: Typist) -> None:
    typist.type(b"hello")
    guest = Scripted(SLICE, HALTED, POWEROFF, wake=0)
    assert drive(guest, typist.keys, None, threading.Event()) == POWEROFF
    assert guest.typed == b"hello"


def test_a_halted_guest_is_woken_by_a_key(typist: Typist) -> None:
    typist.type(b"x")
    guest = Scripted(HALTED, POWEROFF, wake=None)
    drive(guest, typist.keys, None, threading.Event())
    assert guest.typed == b"x"


def test_the_leaving_key_ends_the_run(typist: Typist) -> None:
    typist.type(b"ab\x1d")
    with pytest.raises(CtlError, match="left before"):
        drive(Scripted(SLICE), typist.keys, None, threading.Event())


def test_an_interrupt_ends_the_run_between_slices(typist: Typist) -> None:
    interrupted = threading.Event()
    interrupted.set()
    with pytest.raises(CtlError, match="left before"):
        drive(Scripted(SLICE), typist.keys, None, interrupted)


def test_the_time_can_be_up(typist: Typist) -> None:
    with pytest.raises(CtlError) as caught:
        drive(Scripted(), typist.keys, 0.0, threading.Event())
    assert caught.value.exit_code == 4


def test_a_closed_input_does_not_end_the_guest(typist: Typist) -> None:
    typist.close()
    typist.close = lambda: None  # type: ignore[method-assign]
    assert drive(Scripted(SLICE, HALTED, POWEROFF, wake=0), typist.keys, None, threading.Event()) == POWEROFF


@pytest.mark.parametrize(("stop", "status"), [
    (POWEROFF, 0),
    (Stop(StopReason.EXIT, "", 1), 1),
    (Stop(StopReason.EXIT, "", 0x55), 0x55),
])
def test_the_status_is_the_guests(stop: Stop, status: int) -> None:
    assert exit_status(stop) == status


@pytest.mark.parametrize(("stop", "sentence"), [
    (Stop(StopReason.RESET), "the guest reset its machine"),
    (Stop(StopReason.CRASHED, "triple fault"), "the guest crashed: triple fault"),
])
def test_an_untimely_end_is_told(stop: Stop, sentence: str) -> None:
    with pytest.raises(CtlError) as caught:
        exit_status(stop)
    assert (str(caught.value), caught.value.exit_code) == (sentence, 1)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["run", *arguments])


def run_for_real(guest: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As a process, since it takes the terminal and signals."""
    program = "from hostd.cli import main; main(prog_name='hostctl')"
    words = [sys.executable, "-c", program, "run", str(guests.path(guest)), "--memory", "8M", *arguments]
    return subprocess.run(words, input="", capture_output=True, text=True, timeout=60)


def test_a_real_guest_prints_and_ends() -> None:
    result = run_for_real("primes", "--append", "limit=100")
    assert "primes: 25 below 100" in result.stdout
    assert result.returncode == 1  # it writes 0 to the debug-exit port


def test_a_guest_that_crashes_at_once() -> None:
    result = run_for_real("triple")
    assert result.returncode == 1
    assert result.stderr.startswith("hostctl: the guest crashed: triple fault")


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--memory", "0"], "a guest needs at least 1 MiB"),
    (["--memory", "4G"], "at most 3 GiB"),
    (["--append", "a\nb"], "control character"),
    (["--append", "x" * 3000], "at most 2047"),
])
def test_bad_values_are_refused_in_a_sentence(arguments: list[str], sentence: str) -> None:
    result = run(str(guests.path("triple")), *arguments)
    assert result.exit_code == 1
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_file_that_is_no_kernel(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("not a kernel")
    result = run(str(text))
    assert result.exit_code == 1
    assert "kernel" in result.stderr


def test_an_initrd_larger_than_memory(tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(bytes(9 << 20))
    result = run(str(guests.path("primes")), "--initrd", str(initrd), "--memory", "8M")
    assert result.exit_code == 1
    assert "initrd" in result.stderr or "module" in result.stderr
