# SPDX-License-Identifier: GPL-2.0-or-later
"""A wire between two daemons, in a test's hands: it can be cut, and remembers what went over it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock, Thread

from tests.two_hosts import LOOPBACK


class Wire:
    """TCP from `address` to a daemon."""

    def __init__(self, to: str) -> None:
        host, _, port = to.rpartition(":")
        self._to = host, int(port)
        self._listener = socket.create_server((LOOPBACK, 0))
        self.address = f"{LOOPBACK}:{self._listener.getsockname()[1]}"
        #: of each connection in the order in which they came: what the caller said
        self.said: list[bytearray] = []
        self._cut = False
        self._lock = Lock()
        self._open: list[socket.socket] = []
        Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End all connections, and those that are made until it is mended."""
        with self._lock:
            self._cut = True
            for end in self._open:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            self._open.clear()

    def mend(self) -> None:
        with self._lock:
            self._cut = False

    def close(self) -> None:
        self.cut()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._cut:
                    caller.close()
                    continue
                called = socket.create_connection(self._to)
                self._open += [caller, called]
                self.said.append(bytearray())
                log = self.said[-1]
            Thread(target=self._pump, args=(caller, called, log), daemon=True).start()
            Thread(target=self._pump, args=(called, caller, bytearray()), daemon=True).start()

    def _pump(self, here: socket.socket, there: socket.socket, log: bytearray) -> None:
        with suppress(OSError):
            while data := here.recv(1 << 16):
                log += data
                there.sendall(data)
        with suppress(OSError):
            there.shutdown(socket.SHUT_WR)


@contextmanager
def wire(to: str) -> Iterator[Wire]:
    made = Wire(to)
    try:
        yield made
    finally:
        made.close()
