# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose a guest is, when the answer to Commit did not come: the other host is asked until it says so.

Nobody else may decide it but a user, who knows that the other host is gone for good.
"""

from __future__ import annotations

import logging

import trio

from hostd.errors import HostError
from hostd.migration.conversation import Conversation
from hostd.migration.messages import Forget, Resolve, Resolved
from hostd.migration.peers import Peer

log = logging.getLogger(__name__)

#: how long an answer is waited for, before the question is asked again on another connection
ANSWER_S = 5.0
#: seconds until the next question: twice as long each time, from the first to the last of these
FIRST_S, LAST_S = 0.25, 30.0


class Doubt:
    """About one hand-over."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._word = trio.Event()

    @property
    def recovered(self) -> bool:
        """Whether a user has said so."""
        return self._word.is_set()

    def recover(self) -> None:
        """A user says that the guest is this host's."""
        self._word.set()

    async def resolve(self, peer: Peer) -> bool:
        """Whether the other host has the guest.  Not before it says so, or a user says that it has not."""
        committed: bool | None = None
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                nonlocal committed
                wait = FIRST_S
                while (committed := await self._ask(peer)) is None:
                    await trio.sleep(wait)
                    wait = min(2 * wait, LAST_S)
                nursery.cancel_scope.cancel()

            async def listen() -> None:
                nonlocal committed
                await self._word.wait()
                committed = False
                nursery.cancel_scope.cancel()

            nursery.start_soon(ask)
            nursery.start_soon(listen)
        assert committed is not None
        return committed

    async def _ask(self, peer: Peer) -> bool | None:
        """One question; None: there is no answer yet."""
        try:
            with trio.fail_after(ANSWER_S):
                async with peer.open("resolve") as talk:
                    await talk.send(Resolve(self._token))
                    outcome = (await talk.expect(Resolved)).outcome
        except (HostError, trio.TooSlowError) as error:
            why = str(error) or "no answer"
            log.info("hand-over not resolved yet", extra={"peer": peer.name, "why": why})
            return None
        return None if outcome == "running" else outcome == "committed"


async def let_go(talk: Conversation, token: str) -> bool:
    """Tell the other host that its record is not needed any more; whether it hung up then, as one does that
    has heard it.  (So does one that is killed just then: a record that nobody needs stays there.)"""
    try:
        with trio.fail_after(ANSWER_S):
            await talk.send(Forget(token))
            while await talk.link.receive():
                pass
    except (HostError, trio.TooSlowError) as error:
        why = str(error) or "no answer"
        log.info("record not taken back yet", extra={"peer": talk.link.peer, "why": why})
        return False
    return True


async def forget(peer: Peer, token: str) -> bool:
    """The same on a connection of its own."""
    try:
        with trio.fail_after(ANSWER_S):
            async with peer.open("resolve") as talk:
                await talk.send(Resolve(token))
                await talk.expect(Resolved)
                return await let_go(talk, token)
    except (HostError, trio.TooSlowError) as error:
        log.info("record not taken back yet", extra={"peer": peer.name, "why": str(error) or "no answer"})
        return False
