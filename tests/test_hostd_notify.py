# SPDX-License-Identifier: GPL-2.0-or-later
"""What the service manager hears, on a real datagram socket, and the sockets it hands over."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd import notify
from hostd.notify import Notifier, listen_fds, watchdog_interval


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """$NOTIFY_SOCKET, and the manager's end of it."""
    address = str(tmp_path / "notify") if request.param == "path" else f"@hostd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind("\0" + address[1:] if address[0] == "@" else address)
        end.setblocking(False)
        yield address, end


def test_every_word_arrives(manager: tuple[str, socket.socket]) -> None:
    address, end = manager
    notifier = Notifier({"NOTIFY_SOCKET": address})
    notifier.ready("3 guests")
    notifier.watchdog()
    notifier.status("4 guests")
    notifier.stopping("stopping guests")
    assert [end.recv(4096) for _ in range(4)] == [
        b"READY=1\nSTATUS=3 guests", b"WATCHDOG=1", b"STATUS=4 guests", b"STOPPING=1\nSTATUS=stopping guests"]


def test_reloading_tells_the_time(manager: tuple[str, socket.socket]) -> None:
    address, end = manager
    Notifier({"NOTIFY_SOCKET": address}).reloading()
    reloading, monotonic = end.recv(4096).split(b"\n")
    assert reloading == b"RELOADING=1"
    assert monotonic.startswith(b"MONOTONIC_USEC=") and monotonic.removeprefix(b"MONOTONIC_USEC=").isdigit()


def test_what_gets_on_is_given_time_but_the_manager_is_not_told_all_the_while(
        manager: tuple[str, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    address, end = manager
    notifier = Notifier({"NOTIFY_SOCKET": address})
    times = [0.0, 0.1, 4.9, 5.0, 9.9]
    monkeypatch.setattr(notify.time, "monotonic", iter(times).__next__)
    for _ in times:
        notifier.extend()
    assert [end.recv(4096) for _ in range(2)] == [b"EXTEND_TIMEOUT_USEC=120000000"] * 2
    with pytest.raises(BlockingIOError):
        end.recv(4096)


def test_without_a_manager_nothing_is_sent() -> None:
    Notifier({}).ready("ready")


def test_a_manager_that_is_gone_is_no_error(tmp_path: Path) -> None:
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "absent")}).ready("ready")


@pytest.mark.parametrize(("environ", "interval"), [
    ({}, None),
    ({"WATCHDOG_USEC": "30000000"}, 15.0),
    ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
    ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
    ({"WATCHDOG_USEC": "0"}, None),
    ({"WATCHDOG_USEC": "soon"}, None),
])
def test_the_watchdog_is_pinged_in_half_of_its_time(environ: dict[str, str], interval: float | None) -> None:
    assert watchdog_interval(environ) == interval


@pytest.mark.parametrize("environ", [
    {}, {"LISTEN_FDS": "1"}, {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
    {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"}, {"LISTEN_PID": str(os.getpid())},
])
def test_sockets_meant_for_nobody_or_somebody_else(environ: dict[str, str]) -> None:
    assert listen_fds(environ) == []
    assert environ == {}


def test_a_socket_that_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        monkeypatch.setattr(notify, "LISTEN_FDS_START", listener.fileno())
        listener.set_inheritable(True)
        environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "OTHER": "stays"}
        assert listen_fds(environ) == [listener.fileno()]
        assert not listener.get_inheritable()
        assert environ == {"OTHER": "stays"}
