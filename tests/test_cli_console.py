# SPDX-License-Identifier: GPL-2.0-or-later
"""`hostctl console` as a process of its own, on a terminal and on pipes."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd.lifecycle import State
from hostd.model import VmCreate
from tests.memory_host import Guest
from tests.served_host import ServedHost, served_host


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedHost]:
    with served_host(tmp_path) as served:
        served.host.guests["a"] = Guest(VmCreate(name="a"), State.RUNNING)
        yield served


def start(served: ServedHost, stdin: int, stdout: int, stderr: int) -> subprocess.Popen[bytes]:
    program = "from hostd.cli import main; main(prog_name='hostctl')"
    words = [sys.executable, "-c", program, "--socket", str(served.socket), "console", "a"]
    return subprocess.Popen(words, stdin=stdin, stdout=stdout, stderr=stderr)


class Terminal:
    """The far end of the terminal a process runs on."""

    def __init__(self, served: ServedHost) -> None:
        self.master, slave = pty.openpty()
        self.process = start(served, slave, slave, slave)
        os.close(slave)
        self.seen = b""

    def expect(self, text: bytes) -> None:
        """Read until `text` appeared."""
        while text not in self.seen:
            self.seen += os.read(self.master, 4096)

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def leave(self) -> int:
        self.type(b"\x1d")
        status = self.process.wait(10)
        os.close(self.master)
        return status


@pytest.fixture
def terminal(served: ServedHost) -> Iterator[Terminal]:
    served.do(served.host.guests["a"].console.write, b"login: ")
    terminal = Terminal(served)
    yield terminal
    terminal.process.kill()
    terminal.process.wait()


def test_keys_go_to_the_guest_and_its_output_comes_back(served: ServedHost, terminal: Terminal) -> None:
    terminal.expect(b"Ctrl-] leaves")
    terminal.expect(b"login: ")
    terminal.type(b"ro\x03ot")
    terminal.expect(b"ro\x03ot")
    assert terminal.leave() == 0
    assert served.host.guests["a"].console.scrollback() == b"login: ro\x03ot"


def test_the_terminal_is_raw_only_while_attached(served: ServedHost, terminal: Terminal) -> None:
    before = termios.tcgetattr(terminal.master)
    terminal.expect(b"login: ")
    assert not termios.tcgetattr(terminal.master)[3] & termios.ECHO
    terminal.type(b"\x1d")
    assert terminal.process.wait(10) == 0
    assert termios.tcgetattr(terminal.master) == before


def test_a_migrating_vm_is_followed_without_losing_a_byte(served: ServedHost, terminal: Terminal) -> None:
    guest = served.host.guests["a"]
    terminal.expect(b"login: ")

    def move() -> None:
        guest.state = State.MIGRATING
        guest.console.write(b"<before>")
        guest.console.close()
        guest.console.write(b"<meanwhile>")
        guest.state = State.MIGRATING

    served.do(move)
    terminal.expect(b"is migrating, reconnecting")
    served.do(guest.console.write, b"<after>")
    terminal.expect(b"<after>")
    assert terminal.seen.count(b"login: ") == 1
    assert terminal.seen.count(b"<before>") == 1
    assert terminal.seen.count(b"<meanwhile>") == 1
    assert terminal.leave() == 0


def test_a_console_ends_with_its_vm(served: ServedHost, terminal: Terminal) -> None:
    terminal.expect(b"login: ")
    served.do(served.host.guests["a"].console.close)
    terminal.expect(b"the VM is gone")
    assert terminal.process.wait(10) == 0


def test_a_daemon_that_goes_is_told_in_a_sentence(served: ServedHost, terminal: Terminal) -> None:
    terminal.expect(b"login: ")
    served.do(served.stop.set)
    terminal.expect(b"hostctl: the daemon broke off")
    assert terminal.process.wait(10) == 1


def test_input_from_a_pipe_ends_the_attachment(served: ServedHost) -> None:
    process = start(served, subprocess.PIPE, subprocess.DEVNULL, subprocess.DEVNULL)
    assert process.stdin is not None
    process.stdin.write(b"echo piped\n")
    process.stdin.close()
    assert process.wait(10) == 0
    assert b"echo piped" in served.host.guests["a"].console.scrollback()
