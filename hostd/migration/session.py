# SPDX-License-Identifier: GPL-2.0-or-later
"""One end of a migration connection, without the connection: bytes in, messages out, and the other way.

Whoever owns one moves the bytes (hostd/migration/links.py) and acts on the messages.  A session knows the
order of messages (order.py) and what they must agree with (rules.py); it has no clock and waits for nothing.
"""

from __future__ import annotations

from hostd.migration import capabilities, wire
from hostd.migration.messages import Said, decode, encode, limits_of
from hostd.migration.order import ORDER, SAYS, End, State
from hostd.migration.rules import Facts, check
from hostd.migration.wire import Kind, ProtocolError, Splitter, Spoken


class Session:
    """What the two ends have in common.  First send `preamble()`; `version` is known when theirs has come.

    Invariant: after `receive` raised, nothing is received or sent any more, and nothing is kept.
    """

    _end: End
    _other: End

    def __init__(self, spoken: Spoken = capabilities.SPOKEN) -> None:
        self.state: State = "preamble"
        #: what was agreed; for others to read
        self.facts = Facts()
        self.version: int | None = None
        self._spoken = spoken
        self._splitter = Splitter()
        self._failure: str | None = None
        #: the other end said the last word
        self._hung_up = False

    def preamble(self) -> bytes:
        """What this end sends first, before anything else and without waiting."""
        return wire.preamble(self._spoken)

    def receive(self, data: bytes) -> list[Said]:
        """The messages that `data` completes; b"" means that the other end closed the connection.

        Pages, digests and blobs come as they are, to be decoded where that may take its time.  What comes
        after the last message of a connection is dropped.  Raises ProtocolError for what must not come, also
        if messages before it in `data` were good: then they are lost with the connection.
        """
        if self._failure is not None:
            raise ProtocolError(f"this connection is over: {self._failure}")
        try:
            return self._receive(data)
        except ProtocolError as error:
            self._failure = str(error)
            self._splitter = Splitter()
            raise

    def _receive(self, data: bytes) -> list[Said]:
        if not data and self.state != "over":
            raise ProtocolError(f"the other host closed the connection ({self.state})")
        messages: list[Said] = []
        self._splitter.feed(data)
        if self.state == "preamble":
            self._greet()
        while self.state not in ("preamble", "over"):
            frame = self._splitter.take(_LIMITS[self._other, self.state])
            if frame is None:
                return messages
            message = decode(frame)
            self._step(message, self._other)
            messages.append(message)
        if self.state == "over":
            self._splitter = Splitter()
            self._hung_up |= bool(messages)
        return messages

    def _greet(self) -> None:
        theirs = self._splitter.preamble()
        if theirs is not None:
            self.version = capabilities.common_version(self._spoken, theirs)
            self.state = "hello"

    def send(self, message: Said) -> bytes:
        """The bytes to send for a message: none after the other end's last word, since it listens no more.

        Raises ProtocolError for one that may not be sent now, and then all is as before.
        """
        if self._failure is not None:
            raise ProtocolError(f"this connection is over: {self._failure}")
        if self._hung_up:
            return b""
        data = encode(message)
        self._step(message, self._end)
        return data

    def _step(self, message: Said, by: End) -> None:
        kind = type(message)
        if kind not in SAYS[by] or kind not in ORDER[self.state]:
            raise ProtocolError(f"{kind.__name__} is not for the {by} to send now ({self.state})")
        check(self.facts, message)
        following = ORDER[self.state][kind]
        self.state = following(self.facts) if callable(following) else following


#: how long the frames may be that an end can send in a state
_LIMITS: dict[tuple[End, State], dict[Kind, int]] = {
    (end, state): limits_of(SAYS[end] & row.keys()) for end in SAYS for state, row in ORDER.items()}
