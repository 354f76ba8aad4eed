# SPDX-License-Identifier: GPL-2.0-or-later
"""The peer: QEMU's live migration of the same guest, from process to process, told by QMP what to do."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from hostd.bench import qemu
from hostd.bench.migrate_network import Network, Site
from hostd.bench.migrate_sides import Limits, Moved, NotMoved
from hostd.bench.migrate_watch import Watch
from hostd.ctl.demo import Template
from hostd.ctl.errors import CtlError

#: seconds in which QEMU answers what it answers at once
_PATIENCE = 30.0
#: what QEMU 7.2 does unless told otherwise (migration/migration.c): milliseconds, and bytes a second
DEFAULT_DOWNTIME_MS = 300.0
DEFAULT_BANDWIDTH = 128 << 20
#: so much is no limit
UNLIMITED = 10**11


class Qmp:
    """QEMU's machine protocol (docs/interop/qmp-spec): commands with answers, and events in between."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._data = bytearray()
        self._events: list[dict[str, Any]] = []
        self._receive(_PATIENCE)
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """What it returns.  Raises CtlError with QEMU's words if it refuses."""
        request = {"execute": command, "arguments": {name.replace("_", "-"): value
                                                     for name, value in arguments.items()}}
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        while "return" not in (message := self._receive(_PATIENCE)):
            if "error" in message:
                raise CtlError(f"QEMU refused {command}: {message['error']['desc']}")
            self._events.append(message)
        return message["return"]

    def await_event(self, name: str, timeout: float, *status: str) -> str:
        """Wait for an event of this name, and of one of these states if some are given; its state.

        Raises TimeoutError.
        """
        deadline = time.monotonic() + timeout
        while True:
            message = self._events.pop(0) if self._events else self._receive(deadline - time.monotonic())
            found = str(message.get("data", {}).get("status", ""))
            if message["event"] == name and (not status or found in status):
                return found

    def _receive(self, timeout: float) -> dict[str, Any]:
        """The next message, each of which is a line."""
        while (end := self._data.find(b"\n")) < 0:
            self._connection.settimeout(max(timeout, 0.001))
            data = self._connection.recv(65536)
            if not data:
                raise CtlError("QEMU ended")
            self._data += data
        message: dict[str, Any] = json.loads(self._data[:end])
        del self._data[:end + 1]
        return message


class Machine:
    """One QEMU process.  `incoming`: it waits at this address for a guest to come."""

    def __init__(self, guest: Template, site: Site, incoming: str | None = None) -> None:
        self._end = ExitStack()
        with site.inside():
            ours, theirs = socket.socketpair()
            self._end.callback(ours.close)
            with theirs:
                command = [*qemu.command(guest), "-chardev", f"socket,id=qmp,fd={theirs.fileno()}",
                           "-mon", "chardev=qmp,mode=control",
                           *(["-incoming", incoming] if incoming is not None else [])]
                self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                                pass_fds=[theirs.fileno()])
        self._end.callback(self.process.wait)
        self._end.callback(self.process.kill)
        try:
            self.qmp = Qmp(ours)
        except BaseException:
            self._end.close()
            raise

    def end(self) -> None:
        """Switch it off.  Its output is whoever's reads it."""
        self._end.close()


class QemuSide:
    """A guest that QEMU runs, at one site or the other."""

    def __init__(self, guest: Template, network: Network) -> None:
        self.watch = Watch()
        self._guest = guest
        self._here, self._there = network.sites
        self._machine = Machine(guest, self._here)
        self.watch.follow(self._machine.process)

    def hop(self, limits: Limits) -> Moved:
        """Send the guest to a new process at the other site.  Raises NotMoved if it stays."""
        address = f"tcp:{self._there.address}:{self._there.free_port()}"
        target = Machine(self._guest, self._there, address)
        try:
            # QEMU listens before it answers its monitor, which Machine has waited for
            moved = _migrate(self._machine.qmp, address, limits)
            target.qmp.await_event("RESUME", _PATIENCE)
        except BaseException:
            target.end()
            raise
        self.watch.follow(target.process)
        self._machine.end()
        self._machine = target
        self._here, self._there = self._there, self._here
        return moved

    def close(self) -> None:
        self._machine.end()
        self.watch.close()


def _migrate(source: Qmp, address: str, limits: Limits) -> Moved:
    """One migration, to its end."""
    source.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    source.execute("migrate-set-parameters",
                   downtime_limit=round(limits.downtime_ms or DEFAULT_DOWNTIME_MS),
                   max_bandwidth=limits.bandwidth or DEFAULT_BANDWIDTH)
    source.execute("migrate", uri=address)
    try:
        status = source.await_event("MIGRATION", limits.timeout, "completed", "failed")
    except TimeoutError:
        source.execute("migrate_cancel")
        status = source.await_event("MIGRATION", _PATIENCE, "completed", "cancelled")
    found = source.execute("query-migrate")
    if status != "completed":
        raise NotMoved(found.get("error-desc", f"not done after {limits.timeout:.0f} s"))
    while not found["total-time"]:
        # QEMU says that it is done, and then works out its figures: within a few instructions
        found = source.execute("query-migrate")
    return Moved(found["downtime"] / 1e3, found["total-time"] / 1e3, found["ram"]["transferred"])


@contextmanager
def side(guest: Template, network: Network) -> Iterator[QemuSide]:
    """A guest under QEMU, that boots."""
    made = QemuSide(guest, network)
    try:
        yield made
    finally:
        made.close()
