# SPDX-License-Identifier: GPL-2.0-or-later
"""Consoles of guests that went to another host: this host relays them, so that a terminal which was attached
stays attached.

Positions count bytes since the VM was defined and go with it, so nothing is lost or doubled on the way.  When
the guest moves on, the line ends, and whoever asks again finds it wherever it is by then: a host that it went
to relays, too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import trio

from hostd.errors import Conflict, HostError, NotFound
from hostd.host import Host
from hostd.lifecycle import State
from hostd.line import Farewell, Line, local_line
from hostd.migration.conversation import Conversation
from hostd.migration.departures import Departed
from hostd.migration.links import LinkBroken
from hostd.migration.messages import CHUNK, Attach, Bye, ConsoleData, ConsoleInput, reason_of
from hostd.migration.peers import Peer
from hostd.migration.wire import ProtocolError

#: seconds for the other host to find the console, and to hear this one's farewell
ANSWER_S = 10.0
LEAVE_S = 1.0


@asynccontextmanager
async def line_to(host: Host, name: str, since: int | None) -> AsyncIterator[Line]:
    """A line to a guest's console, from `since` on, or from its present boot on: here, or where it went.

    Raises NotFound if it is nowhere, other HostErrors if it cannot be had at the moment.
    """
    async with AsyncExitStack() as stack:
        gone = _departed(host, name)
        if gone is None:
            yield stack.enter_context(local_line(host, name, since))
        else:
            peer = Peer(gone.peer, host.config.migration)
            yield await stack.enter_async_context(_remote_line(peer, name, since))


def _departed(host: Host, name: str) -> Departed | None:
    """Where the guest went; None if it is here, or unknown.  One that has left may still have memory here."""
    with suppress(NotFound):
        if host.get(name).state is not State.MIGRATING:
            return None
    return host.migrations.departed(name)


@asynccontextmanager
async def _remote_line(peer: Peer, name: str, since: int | None) -> AsyncIterator[Line]:
    async with peer.open("console") as talk:
        await talk.send(Attach(name, since))
        answer: object = None
        with trio.move_on_after(ANSWER_S):
            answer = await talk.receive()
        match answer:
            case ConsoleData():
                pass
            case Bye():
                kind = Conflict if answer.come_back else NotFound
                raise kind(f"VM {name} went to {peer.name}, which says: {answer.reason}")
            case None:
                raise LinkBroken(f"{peer.name} does not answer")
            case _:
                raise ProtocolError(f"{type(answer).__name__} came where ConsoleData was due")
        line = _RemoteLine(talk, answer)
        try:
            yield line
        finally:
            await line.leave()


class _RemoteLine:
    """The other host says first where its data begins."""

    def __init__(self, talk: Conversation, first: ConsoleData) -> None:
        self.position = first.position
        self._talk = talk
        self._heard = first.data
        self._farewell: Farewell | None = None

    async def receive(self) -> bytes:
        try:
            data = self._heard or await self._next()
        except LinkBroken as error:
            self._farewell = Farewell(str(error), True)
            return b""
        except HostError as error:
            self._farewell = Farewell(str(error), False)
            return b""
        self._heard = b""
        self.position += len(data)
        return data

    async def _next(self) -> bytes:
        while True:
            message = await self._talk.receive()
            if isinstance(message, Bye):
                self._farewell = Farewell(message.reason, message.come_back)
                return b""
            if not isinstance(message, ConsoleData):
                raise ProtocolError(f"{type(message).__name__} came where ConsoleData was due")
            # it never goes back (rules.py); it jumps where this end was too slow for the guest
            self.position = message.position
            if message.data:
                return message.data

    async def type(self, data: bytes) -> None:
        for start in range(0, len(data), CHUNK):
            await self._talk.send(ConsoleInput(data[start:start + CHUNK]))

    def farewell(self) -> Farewell:
        assert self._farewell is not None
        return self._farewell

    async def leave(self) -> None:
        """Tell the other host that nobody is at this end any more, if it does not know."""
        with trio.move_on_after(LEAVE_S, shield=True), suppress(HostError):
            if self._farewell is None:
                await self._talk.send(Bye("left"))


async def serve_console(talk: Conversation, host: Host) -> None:
    """The other end: a console for another host, from the welcome to the end of the connection.

    Raises LinkBroken and ProtocolError for what becomes of that.
    """
    attach = await talk.receive()
    if not isinstance(attach, Attach):
        return
    async with AsyncExitStack() as stack:
        try:
            line = await stack.enter_async_context(line_to(host, attach.name, attach.since))
        except HostError as error:
            await talk.send(Bye(reason_of(error), not isinstance(error, NotFound)))
            return
        await talk.send(ConsoleData(line.position, b""))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_type, talk, line, nursery.cancel_scope)
            await _write(talk, line)
            nursery.cancel_scope.cancel()


async def _write(talk: Conversation, line: Line) -> None:
    """Guest to visitor, until the line ends."""
    position = line.position
    while data := await line.receive():
        position = line.position - len(data)
        for start in range(0, len(data), CHUNK):
            await talk.send(ConsoleData(position + start, data[start:start + CHUNK]))
    reason, come_back = line.farewell()
    await talk.send(Bye(reason_of(reason), come_back))


async def _type(talk: Conversation, line: Line, scope: trio.CancelScope) -> None:
    """Visitor to guest, until the visitor leaves."""
    while isinstance(message := await talk.receive(), ConsoleInput):
        # nobody may listen at the other end, as with a machine that is off: the line stays
        with suppress(HostError):
            await line.type(message.data)
    scope.cancel()
