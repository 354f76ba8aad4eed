# SPDX-License-Identifier: GPL-2.0-or-later
"""What the service manager is told, and what it hands over: sd_notify(3), sd_listen_fds(3), the watchdog."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import MutableMapping
from contextlib import suppress

#: sd_listen_fds(3): passed descriptors begin here
LISTEN_FDS_START = 3

#: seconds that work which makes progress gets from each sign of it on, and between two signs that are sent
EXTEND_S, EXTEND_EVERY_S = 120, 5


class Notifier:
    """Datagrams to $NOTIFY_SOCKET; silent where there is none."""

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._socket: socket.socket | None = None
        self._extended = -math.inf
        if address.startswith(("/", "@")):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
        # a leading @ means the abstract namespace (unix(7))
        self._address = "\0" + address[1:] if address.startswith("@") else address

    def send(self, *assignments: str) -> None:
        if self._socket is None:
            return
        # The manager may be away or its buffer full: nothing depends on the message reaching it.
        with suppress(OSError):
            self._socket.sendto("\n".join(assignments).encode(), self._address)

    def ready(self, status: str) -> None:
        self.send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        # Type=notify-reload wants the time, to tell this reload's READY from an earlier one's
        self.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str) -> None:
        self.send("STOPPING=1", f"STATUS={status}")

    def extend(self) -> None:
        """The start or the stop under way makes progress: that it takes long is no reason to kill the daemon.
        For any thread, as often as there is progress."""
        now = time.monotonic()
        if now - self._extended >= EXTEND_EVERY_S:
            self._extended = now
            self.send(f"EXTEND_TIMEOUT_USEC={EXTEND_S * 1_000_000}")

    def status(self, status: str) -> None:
        self.send(f"STATUS={status}")

    def watchdog(self) -> None:
        self.send("WATCHDOG=1")


def watchdog_interval(environ: MutableMapping[str, str] = os.environ) -> float | None:
    """Seconds between pings: half of what the manager allows (sd_watchdog_enabled(3)); None: no watchdog."""
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    usec = environ.get("WATCHDOG_USEC", "")
    return int(usec) / 2e6 if usec.isdecimal() and int(usec) else None


def listen_fds(environ: MutableMapping[str, str] = os.environ) -> list[int]:
    """The sockets the manager passed to this process.  The variables are removed, so that no child takes them
    for its own."""
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    fds = list(range(LISTEN_FDS_START, LISTEN_FDS_START + int(count)))
    for fd in fds:
        os.set_inheritable(fd, False)
    return fds
