# SPDX-License-Identifier: GPL-2.0-or-later
"""What other hosts ask of this one, connection by connection: to take a guest, or about one that it took."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from functools import partial

import msgspec
import trio

from hostd.definition import Definition
from hostd.errors import Conflict, HostError, NotFound
from hostd.migration import belongings, capabilities
from hostd.migration.arriving import Arrival
from hostd.migration.belongings import IncomingBlobs
from hostd.migration.conversation import Conversation, answer
from hostd.migration.here import Here
from hostd.migration.index import Indexes
from hostd.migration.links import Link
from hostd.migration.messages import (
    Accept,
    BlobPiece,
    Cancel,
    Commit,
    Committed,
    Digests,
    Final,
    Forget,
    Join,
    Joined,
    Offer,
    Outcome,
    Pages,
    Purpose,
    Ready,
    Resolve,
    Resolved,
    Resume,
    RoundDone,
    RoundEnd,
    reason_of,
)
from hostd.migration.peers import offered
from hostd.migration.progress import Progress
from hostd.migration.totals import Totals
from hostd.migration.wire import ProtocolError

log = logging.getLogger(__name__)


class Target:
    """All guests on their way to this host."""

    def __init__(self, here: Here, note: Callable[[Progress], None], totals: Totals,
                 console: Callable[[Conversation], Awaitable[None]]) -> None:
        """`note` is told of each migration that begins; `console` serves a console to another host."""
        self._here = here
        self._note = note
        self._totals = totals
        self._indexes = Indexes(here.guests, here.memory)
        #: guests that come in at a time; others wait for their Accept
        self._turns = trio.Semaphore(here.config().migration.max_incoming)
        #: guests that arrive, and those of which pages are still missing, by token
        self._arrivals: dict[str, Arrival] = {}
        self._by_purpose: dict[Purpose, Callable[[Conversation], Awaitable[None]]] = {
            "migrate": self._migrate, "join": self._join, "resume": self._resume, "resolve": self._resolve,
            "console": console}

    async def attend(self, link: Link, admit: Callable[[], None]) -> None:
        """One connection, from its first byte to its last (hostd.migration.links.Handler)."""
        talk, purpose = await answer(link, offered(self._here.config().migration))
        try:
            admit()
            await self._by_purpose[purpose](talk)
        except HostError as error:
            with trio.move_on_after(1, shield=True), suppress(HostError):
                await talk.give_up(str(error))
            raise

    async def go_down(self) -> None:
        """No guest comes any more: one that is not this host's yet stays where it is."""
        for arrival in list(self._arrivals.values()):
            arrival.break_off("the host is shutting down")
            if arrival.stage in ("committing", "committed"):
                await arrival.settled.wait()

    # --- migrate

    async def _migrate(self, talk: Conversation) -> None:
        offer = await talk.expect(Offer)
        definition = self._examine(offer)
        # a guest that is stopped for it must not wait for one
        await self._here.guests.workers.wait_ready()
        admission = self._here.admission
        with (self._here.handovers.expected(offer.token), admission.reserve([definition.name]),
              admission.promise([definition])):
            if offer.dry_run:
                await talk.send(Accept(offer.token))
                return
            progress = Progress(offer.token, offer.name, "in", talk.link.peer, phase="copying")
            self._note(progress)
            try:
                committed = await self._take(talk, offer, definition, progress)
                progress.end("done" if committed else "cancelled")
            except BaseException as error:
                progress.end("failed" if isinstance(error, HostError) else "cancelled", reason_of(error))
                raise
            finally:
                self._totals.finished(progress.view())
        if committed:
            await talk.expect(Forget)
            await self._forget(offer.token)

    def _examine(self, offer: Offer) -> Definition:
        """The definition as this host would keep it.  Raises Conflict, Invalid where it cannot come here."""
        here = self._here
        try:
            definition = msgspec.json.decode(offer.definition, type=Definition)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"an offer with a definition that is none: {error}") from None
        if (definition.name, definition.memory, definition.vmm) != (offer.name, offer.memory_bytes,
                                                                    offer.monitor):
            raise ProtocolError("an offer whose definition is of another guest")
        if definition.image is not None or {sha256 for sha256, _ in offer.blobs} != set(
                belongings.blobs_of(definition)):
            raise ProtocolError("an offer with other blobs than its definition names")
        why = capabilities.unfit(offer, capabilities.HostProfile(frozenset(("hw", "bt")), here.tsc_khz()))
        if why is not None:
            raise Conflict(why)
        here.admission.check_memory(definition)
        image = None if offer.image is None else offer.image.decode(errors="replace")
        return belongings.unpack(belongings.Portable(definition, image), here.images)

    async def _take(self, talk: Conversation, offer: Offer, definition: Definition,
                    progress: Progress) -> bool:
        """Whether the guest is here now, with all its pages."""
        token, images = offer.token, self._here.images
        missing = [sha256 for sha256, _ in offer.blobs if not images.has_blob(sha256)]
        async with self._turns, self._indexes.of(definition) as index:
            self._here.admission.check_open()
            share = bool(offer.siblings or self._indexes.members(definition))
            arrival = Arrival(self._here, token, definition, index, share, offer.connections, progress)
            self._arrivals[token] = arrival
            try:
                dedup = bool(index) and talk.agreed("dedup")
                self._here.guests.warm_up(definition.vmm)
                await talk.send(Accept(token, missing, dedup, offer.connections))
                await arrival.prepare(talk.link.peer)
                committed = await self._receive(talk, offer, arrival)
                if committed and arrival.fetching is not None:
                    await arrival.fetching.run(talk)
            finally:
                arrival.break_off("its connection ended")
                with trio.CancelScope(shield=True):
                    await arrival.drop()
                del self._arrivals[token]
        return committed

    async def _receive(self, talk: Conversation, offer: Offer, arrival: Arrival) -> bool:
        """What the source sends, in the order in which the session lets it; whether that ended with
        Commit."""
        with arrival.scope, ExitStack() as uploads:
            blobs = IncomingBlobs(self._here.images, dict(offer.blobs), uploads)
            while True:
                match await talk.receive():
                    case Pages(payload):
                        await arrival.pages(payload)
                    case Digests(seq, payload):
                        await talk.send(await arrival.digests(seq, payload))
                    case BlobPiece() as piece:
                        await blobs.take(piece)
                    case RoundEnd(number):
                        await arrival.end_round(number)
                        await talk.send(RoundDone(number))
                    case Final() as final:
                        await arrival.finish(final)
                        await talk.send(Ready(offer.token))
                    case Commit() as commit:
                        with trio.CancelScope(shield=True):
                            await arrival.commit(commit, talk.link.peer,
                                                 partial(talk.send, Committed(offer.token)))
                        return True
                    case Cancel() as cancel:
                        log.info("guest does not come", extra={"vm": offer.name, "why": cancel.reason})
                        return False
        raise Conflict(arrival.broken)

    # --- about guests that arrive, or did

    async def _join(self, talk: Conversation) -> None:
        join = await talk.expect(Join)
        arrival = self._arrivals.get(join.token)
        if arrival is None:
            raise NotFound("no guest arrives by this token")
        try:
            await talk.send(Joined(join.token))
            while True:
                match await talk.receive():
                    case Pages(payload):
                        await arrival.pages(payload)
                    case RoundEnd(number):
                        await arrival.end_round(number)
                        await talk.send(RoundDone(number))
        except HostError as error:
            if arrival.stage != "copying":
                return                              # all rounds were over
            arrival.break_off(reason_of(error))
            raise
        finally:
            if arrival.stage == "copying":          # cancelled, or a mistake of ours
                arrival.break_off("a connection of its ended")

    async def _resume(self, talk: Conversation) -> None:
        resume = await talk.expect(Resume)
        arrival = self._arrivals.get(resume.token)
        if arrival is None or arrival.fetching is None:
            raise NotFound("no guest waits for pages by this token")
        await arrival.fetching.resume(talk)

    async def _resolve(self, talk: Conversation) -> None:
        resolve = await talk.expect(Resolve)
        token = resolve.token
        await talk.send(Resolved(token, self._outcome(token)))
        await talk.expect(Forget)
        arrival = self._arrivals.get(token)
        if arrival is not None and arrival.fetching is not None:
            await arrival.fetching.give_up("the host it came from ended before all of its memory was here")
        await self._forget(token)

    async def _forget(self, token: str) -> None:
        """The source knows whose the guest is, and asks no more.  Raises Failed, and the record stays."""
        here, arrival = self._here, self._arrivals.get(token)
        if arrival is not None and arrival.stage == "committed":
            await arrival.settled.wait()
        # Invariant: a record goes only when the definition is in the inventory: else it is all there is of it
        for record in here.handovers.unkept():
            if (record.token == token and record.definition is not None and record.vm in here.guests.vms
                    and not here.inventory.has(record.vm)):
                await trio.to_thread.run_sync(here.inventory.save, [record.definition])
        await trio.to_thread.run_sync(here.handovers.forget, token)

    def _outcome(self, token: str) -> Outcome:
        """Whose the guest is.  "aborted" is for ever: what arrives by this token is broken off."""
        outcome = self._here.handovers.answer(token)
        arrival = self._arrivals.get(token)
        if outcome == "aborted" and arrival is not None:
            arrival.break_off("the source has taken it back")
        return outcome
