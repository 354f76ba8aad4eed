# SPDX-License-Identifier: GPL-2.0-or-later
"""A connection on which both ends keep to the protocol: messages in, messages out."""

from __future__ import annotations

import time
from collections import deque
from typing import TypeVar

from hostd.errors import Failed
from hostd.migration.incoming import Incoming
from hostd.migration.links import Link, LinkBroken
from hostd.migration.messages import Aborted, Cancel, Hello, Purpose, Refuse, Said, Welcome
from hostd.migration.outgoing import Outgoing
from hostd.migration.session import Session
from hostd.migration.wire import ProtocolError

M = TypeVar("M")


class Declined(Failed):
    """The other host does not go on with it, and says why: nothing has happened there."""


class Conversation:
    """One task may speak while another listens."""

    def __init__(self, link: Link, session: Session) -> None:
        self.link = link
        self.session = session
        #: the time that a word and its answer take to travel, nanoseconds
        self.rtt_ns = 0
        self._heard: deque[Said] = deque()

    async def send(self, message: Said) -> None:
        """Say it.  Raises LinkBroken, and ProtocolError for what must not be said now."""
        await self.link.send(self.session.send(message))

    async def receive(self) -> Said:
        """What the other end says next.  Raises LinkBroken, ProtocolError."""
        while not self._heard:
            await self._hear()
        return self._heard.popleft()

    async def _hear(self) -> None:
        data = await self.link.receive()
        if not data:
            raise LinkBroken(f"{self.link.peer} closed the connection")
        self._heard.extend(self.session.receive(data))

    async def listen(self) -> None:
        """Hear what the other end says, for `receive` to find, until cancelled: that it does not go on must
        not wait until all is sent.  Raises Declined then."""
        while not any(isinstance(message, (Aborted, Refuse)) for message in self._heard):
            await self._hear()
        raise Declined(next(message.reason for message in self._heard
                            if isinstance(message, (Aborted, Refuse))))

    async def expect(self, kind: type[M]) -> M:
        """The answer that is due.  Raises Declined if the other end says no instead, besides what `receive`
        raises."""
        message = await self.receive()
        if isinstance(message, kind):
            return message
        if isinstance(message, (Refuse, Aborted, Cancel)):
            raise Declined(message.reason)
        raise ProtocolError(f"{type(message).__name__} came where {kind.__name__} was due")

    def agreed(self, capability: str) -> bool:
        """Whether both ends have it."""
        return capability in self.session.facts.capabilities

    async def greet(self) -> None:
        """Exchange preambles.  Raises ProtocolError for an end that speaks no version that this one does."""
        await self.link.send(self.session.preamble())
        while self.session.version is None:
            await self._hear()

    async def give_up(self, reason: str) -> None:
        """Say why it ends, where there is a word for that."""
        assert isinstance(self.session, (Incoming, Outgoing))
        farewell = self.session.give_up(reason)
        if farewell:
            await self.link.send(farewell)


async def call(link: Link, purpose: Purpose, capabilities: tuple[str, ...]) -> Conversation:
    """The source's end of a connection, as far as Welcome.  Raises Declined, LinkBroken, ProtocolError."""
    session = Outgoing(purpose)
    talk = Conversation(link, session)
    await talk.greet()
    began = time.monotonic_ns()
    await link.send(session.hello(capabilities))
    await talk.expect(Welcome)
    talk.rtt_ns = time.monotonic_ns() - began
    return talk


async def answer(link: Link, capabilities: tuple[str, ...]) -> tuple[Conversation, Purpose]:
    """The target's end, and what the source wants.  Raises LinkBroken, ProtocolError."""
    session = Incoming()
    talk = Conversation(link, session)
    await talk.greet()
    hello = await talk.expect(Hello)
    await link.send(session.welcome(capabilities))
    return talk, hello.purpose
