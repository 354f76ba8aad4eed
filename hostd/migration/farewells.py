# SPDX-License-Identifier: GPL-2.0-or-later
"""Words Forget that other hosts have not heard: said again until they have, for as long as the daemon runs.

A host keeps the record of a guest that came to it until it hears that nobody will ask whose it is.
"""

from __future__ import annotations

import logging
import math

import trio

from hostd.migration.doubt import FIRST_S, LAST_S, forget
from hostd.migration.peers import Peer

log = logging.getLogger(__name__)

#: so many at a time: hosts that are gone for good never hear theirs
_MOST = 1024


class Farewells:
    """Of one host."""

    def __init__(self) -> None:
        self._owed, self._next = trio.open_memory_channel[tuple[Peer, str]](math.inf)
        self._count = 0

    def owe(self, peer: Peer, token: str) -> None:
        """This host has let go of the guest by this token, and `peer` is to hear it."""
        if self._count == _MOST:
            log.warning("record not taken back: too many others are not", extra={"peer": peer.name})
            return
        self._count += 1
        self._owed.send_nowait((peer, token))

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            async for peer, token in self._next:
                nursery.start_soon(self._say, peer, token)

    async def _say(self, peer: Peer, token: str) -> None:
        wait = FIRST_S
        while not await forget(peer, token):
            await trio.sleep(wait)
            wait = min(2 * wait, LAST_S)
        self._count -= 1
