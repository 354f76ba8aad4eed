# SPDX-License-Identifier: GPL-2.0-or-later
"""Another host, as this one calls it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from hostd.config import MigrationSection
from hostd.errors import ConfigError, Failed
from hostd.migration import security
from hostd.migration.capabilities import CAPABILITIES
from hostd.migration.conversation import Conversation, call
from hostd.migration.links import Bandwidth, LinkBroken, dial, parse_peer, peer_name
from hostd.migration.messages import Purpose

#: seconds that the other host may take to say that it is one
HELLO_S = 10.0


def offered(config: MigrationSection) -> tuple[str, ...]:
    """The capabilities this host names."""
    return tuple(name for name in CAPABILITIES if name != "postcopy" or config.post_copy)


def certificate(config: MigrationSection) -> security.Tls | None:
    """This host's certificate, as it is on the disk now: it may have been renewed.  Raises Failed."""
    try:
        return security.load(config.tls)
    except ConfigError as error:
        raise Failed(f"the certificate of this host cannot be used: {error}") from None


class Peer:
    """`address` is "HOST[:PORT]"; raises Invalid for anything else.  All connections share `limits`."""

    def __init__(self, address: str, config: MigrationSection, limits: Sequence[Bandwidth] = ()) -> None:
        self._host, self._port = parse_peer(address)
        self._config = config
        self._limits = limits
        self.name = peer_name(self._host, self._port)

    @asynccontextmanager
    async def open(self, purpose: Purpose) -> AsyncIterator[Conversation]:
        """A connection for this purpose.  Raises Invalid (nothing may go there in plain), LinkBroken,
        Untrusted, ProtocolError, Declined."""
        tls = certificate(self._config)
        link = await dial(self._host, self._port, tls, self._config.allow_plain, self._limits)
        async with link:
            try:
                with trio.fail_after(HELLO_S):
                    talk = await call(link, purpose, offered(self._config))
            except trio.TooSlowError:
                raise LinkBroken(f"{self.name} does not answer") from None
            yield talk
