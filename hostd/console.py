# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's serial console as the daemon keeps it: the last 64 KiB, and whoever is listening.

A console only ever appends.  Positions count bytes since the VM was defined, so a reader that knows where it
stopped can be told what it missed.  Nobody can slow the guest down: a reader that does not keep up loses the
oldest bytes of its own queue, nothing else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import trio

SCROLLBACK = 64 << 10
BACKLOG = 256 << 10


class Reader:
    """One listener of a console: an asynchronous iterator over what is written from now on."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self._closed = False
        self._wake = trio.Event()
        #: bytes this reader was too slow for
        self.lost = 0

    def push(self, data: bytes) -> None:
        self._pending += data
        excess = len(self._pending) - BACKLOG
        if excess > 0:
            del self._pending[:excess]
            self.lost += excess
        self._wake.set()

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    async def receive(self) -> bytes:
        """All that came since the last call; b"" when the console is gone."""
        while not self._pending and not self._closed:
            self._wake = trio.Event()
            await self._wake.wait()
        data = bytes(self._pending)
        self._pending.clear()
        return data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while data := await self.receive():
            yield data


class Console:
    """The scrollback of one VM and its readers."""

    def __init__(self) -> None:
        self._ring = bytearray()
        self._readers: set[Reader] = set()
        #: bytes ever written
        self.written = 0
        #: position at which the present boot began
        self.boot = 0

    def write(self, data: bytes) -> None:
        """Append what the guest wrote."""
        self.written += len(data)
        self._ring += data
        if len(self._ring) > SCROLLBACK:
            del self._ring[:-SCROLLBACK]
        for reader in self._readers:
            reader.push(data)

    def load(self, scrollback: bytes, written: int, boot: int) -> None:
        """Go on from what another daemon had kept of it."""
        self._ring[:] = scrollback[-SCROLLBACK:]
        self.written, self.boot = written, boot

    def mark_boot(self) -> None:
        """The guest is starting anew: what follows belongs to the new boot."""
        self.boot = self.written

    def scrollback(self, since: int = 0) -> bytes:
        """What is kept of the console from position `since` on."""
        first = self.written - len(self._ring)
        return bytes(self._ring[max(0, since - first):])

    @contextmanager
    def listen(self) -> Iterator[Reader]:
        """A reader of all that is written inside the `with`; take `scrollback()` in the same step (without an
        await between) and nothing is lost or doubled."""
        reader = Reader()
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)

    def close(self) -> None:
        """The VM is gone: all readers come to their end."""
        for reader in self._readers:
            reader.close()
