# SPDX-License-Identifier: GPL-2.0-or-later
"""The stream of what happens on the host, to any number of readers, none of which can hold the host up."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import trio

from hostd.model import Event

QUEUE = 1024


class EventReader:
    """One subscription: an asynchronous iterator over events."""

    def __init__(self) -> None:
        self._queue: deque[Event] = deque()
        self._lost = 0
        self._closed = False
        self._wake = trio.Event()

    def push(self, event: Event) -> None:
        if len(self._queue) >= QUEUE:
            self._queue.popleft()
            self._lost += 1
        self._queue.append(event)
        self._wake.set()

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    async def receive(self) -> Event:
        """The next event.  Raises StopAsyncIteration when the host is going down."""
        while not self._queue and not self._closed:
            self._wake = trio.Event()
            await self._wake.wait()
        if self._lost:
            lost, self._lost = self._lost, 0
            return Event(type="lost", time=time.time(), data={"count": lost})
        if not self._queue:
            raise StopAsyncIteration
        return self._queue.popleft()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    __anext__ = receive


class Events:
    """The publisher."""

    def __init__(self) -> None:
        self._readers: set[EventReader] = set()

    def publish(self, type: str, /, vm: str | None = None, **data: Any) -> None:
        event = Event(type=type, time=time.time(), vm=vm, data=data)
        for reader in self._readers:
            reader.push(event)

    @contextmanager
    def subscribe(self) -> Iterator[EventReader]:
        """A reader of all events published inside the `with`."""
        reader = EventReader()
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)

    def close(self) -> None:
        """No more events: all readers come to their end."""
        for reader in self._readers:
            reader.close()
