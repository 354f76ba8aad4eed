# SPDX-License-Identifier: GPL-2.0-or-later
"""Two real daemons that guests go to and fro between."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.private_daemon import SOON, PrivateDaemon

LOOPBACK = "127.0.0.1"


class MigratingDaemon(PrivateDaemon):
    """A daemon that guests of others may come to, at `address`."""

    def __init__(self, directory: Path, *, migration: str = "", extra: str = "", ip: str = LOOPBACK,
                 **options: Any) -> None:
        """`migration` is more text for that section of its configuration, `extra` other sections."""
        directory.mkdir(exist_ok=True)
        self.address = f"{ip}:{free_port(ip)}"
        super().__init__(directory, config=f'[migration]\naddress = "{self.address}"\n{migration}\n{extra}',
                         **options)

    def begin(self, name: str, to: str, **wish: Any) -> dict[str, Any]:
        """A migration, as the operation that it is."""
        return self.post(f"/vms/{name}/migrate", to=to, **wish)

    def ended(self, operation: dict[str, Any]) -> dict[str, Any]:
        """The operation, when it is over."""
        ended = self.get(f"/operations/{operation['id']}", wait=SOON)
        assert ended["status"] != "running", ended
        return ended

    def migrate(self, name: str, to: str, **wish: Any) -> dict[str, Any]:
        """The view of a migration that is done."""
        ended = self.ended(self.begin(name, to, **wish))
        assert ended["status"] == "done", ended
        return ended["result"]

    def refused(self, name: str, to: str, **wish: Any) -> str:
        """Why a guest does not go there."""
        ended = self.ended(self.begin(name, to, **wish))
        assert ended["status"] == "failed", ended
        return ended["error"]

    def records(self) -> list[Path]:
        """Of hand-overs that are not over, and what else is left of any."""
        directory = self.directory / "state" / "migrations"
        return sorted(directory.iterdir()) if directory.exists() else []

    def names(self) -> list[str]:
        return sorted(vm["name"] for vm in self.get("/vms"))

    def is_balanced(self) -> bool:
        """Whether the books of its memory are right."""
        return self.get("/memory", check="true")["wrong"] == []


class TwoHosts:
    """`a` and `b`; guests are started at `a`."""

    def __init__(self, a: MigratingDaemon, b: MigratingDaemon) -> None:
        self.a = a
        self.b = b

    def other(self, daemon: MigratingDaemon) -> MigratingDaemon:
        return self.b if daemon is self.a else self.a

    def where(self, name: str) -> MigratingDaemon:
        """The one host that has the guest."""
        having = [daemon for daemon in (self.a, self.b) if name in daemon.names()]
        assert len(having) == 1, name
        return having[0]

    def there(self, name: str, **wish: Any) -> dict[str, Any]:
        """Have a guest go to the other host; the view of its migration."""
        source = self.where(name)
        return source.migrate(name, self.other(source).address, **wish)

    def clear(self) -> None:
        """Destroy all VMs.  Nothing must be left of them, nor of their migrations."""
        for daemon in self.a, self.b:
            daemon.clear()
            assert daemon.records() == []
            assert daemon.is_balanced()
            assert [one["phase"] for one in daemon.get("/migrations")
                    if one["phase"] not in ("done", "failed", "cancelled")] == []


def free_port(ip: str = LOOPBACK) -> int:
    """A port nobody listens at."""
    with socket.socket() as probe:
        probe.bind((ip, 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def two_hosts(directory: Path, **options: Any) -> Iterator[TwoHosts]:
    """Both, started at the same time, with the same options."""
    with ThreadPoolExecutor() as pool, ExitStack() as stack:
        starts = [pool.submit(MigratingDaemon, directory / name, **options) for name in "ab"]
        for start in starts:
            stack.callback(_end, start)
        yield TwoHosts(*(start.result() for start in starts))


def _end(start: Future[MigratingDaemon]) -> None:
    if start.exception() is None:
        start.result().__exit__()
