# SPDX-License-Identifier: GPL-2.0-or-later
"""A line to a guest's console: what it writes from a position on, and what is typed at it.

Who is at this end of it (a terminal over a WebSocket, another host) and where the guest is (here, or at
another host: hostd/migration/relay.py) need not know of each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from hostd.console import Reader
from hostd.errors import NotFound
from hostd.host import Host
from hostd.lifecycle import State


class Farewell(NamedTuple):
    """Why a line ended."""

    reason: str
    #: the guest is on the move: whoever asks again, from the position where this line ended, goes on
    come_back: bool


class Line(Protocol):
    """One task may receive while another types."""

    #: of the next byte that `receive` gives, counted since the VM was defined
    position: int

    async def receive(self) -> bytes:
        """What the guest wrote; b"" when this line has come to its end."""
        ...

    async def type(self, data: bytes) -> None:
        """Type at the guest.  Raises HostError if nothing reads its console."""
        ...

    def farewell(self) -> Farewell:
        """Why `receive` gave b""."""
        ...


@contextmanager
def local_line(host: Host, name: str, since: int | None) -> Iterator[Line]:
    """A line to a guest of this host, from `since` on, or from its present boot on.  Raises NotFound."""
    console = host.console(name)
    with console.listen() as reader:
        past = console.scrollback(console.boot if since is None else since)
        yield _LocalLine(host, name, reader, past, console.written - len(past))


class _LocalLine:
    def __init__(self, host: Host, name: str, reader: Reader, past: bytes, position: int) -> None:
        self.position = position
        self._host = host
        self._name = name
        self._reader = reader
        self._past = past

    async def receive(self) -> bytes:
        data, self._past = self._past or await self._reader.receive(), b""
        self.position += len(data)
        return data

    async def type(self, data: bytes) -> None:
        await self._host.send_input(self._name, data)

    def farewell(self) -> Farewell:
        try:
            moving = self._host.get(self._name).state is State.MIGRATING
        except NotFound:
            moving = self._host.migrations.departed(self._name) is not None
        return Farewell("the VM is migrating", True) if moving else Farewell("the VM is gone", False)
