# SPDX-License-Identifier: GPL-2.0-or-later
"""What a message must agree with beside its turn: with what was said before on the same connection.

Both ends keep the same `Facts` and apply the same rules, to what they receive and to what they send.

Invariant: a rule changes facts only when it does not raise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hostd.migration.messages import (
    DIGEST_ROW,
    MAX_PAGES,
    WINDOW,
    About,
    Accept,
    BlobPiece,
    ConsoleData,
    Digests,
    Final,
    Hello,
    Join,
    Missing,
    Offer,
    Pages,
    Purpose,
    Resume,
    RoundDone,
    RoundEnd,
    Said,
    Want,
    Welcome,
)
from hostd.migration.wire import ProtocolError
from vmm.memory.pool import PAGE


@dataclass
class Facts:
    """What was said so far on one connection."""

    #: pages of the guest, where an Offer told them; else no guest has more
    pages: int = MAX_PAGES
    purpose: Purpose = "migrate"
    #: capabilities the source named, and from Welcome on those in force
    capabilities: frozenset[str] = frozenset()
    token: str | None = None
    dry_run: bool = False
    dedup: bool = True
    connections: int = 1
    #: size of each offered blob, and how much of each missing one has come
    blobs: dict[str, int] = field(default_factory=dict)
    arrived: dict[str, int] = field(default_factory=dict)
    #: the last round that was ended, and the last one that was done
    round: int = 0
    done: int = 0
    #: (number, pages) of digests without an answer, oldest first
    unanswered: deque[tuple[int, int]] = field(default_factory=deque)
    next_seq: int = 0
    pages_left: int = 0
    #: where the console data that came ends
    position: int = 0


def check(facts: Facts, message: Said) -> None:
    """Hold `message` against what was said before, and remember what it says.  Raises ProtocolError."""
    kind = type(message)
    needed = _NEEDS.get(kind)
    if needed is not None and needed not in facts.capabilities:
        raise ProtocolError(f"{kind.__name__} came, and {needed} was not agreed on")
    if isinstance(message, About) and facts.token not in (None, message.token):
        raise ProtocolError(f"{kind.__name__} came with the token of another migration")
    rule = _RULES.get(kind)
    if rule is not None:
        rule(facts, message)
    if isinstance(message, About):
        facts.token = message.token


def _hello(facts: Facts, hello: Hello) -> None:
    facts.purpose, facts.capabilities = hello.purpose, frozenset(hello.capabilities)


def _welcome(facts: Facts, welcome: Welcome) -> None:
    facts.capabilities &= frozenset(welcome.capabilities)


def _offer(facts: Facts, offer: Offer) -> None:
    blobs = dict(offer.blobs)
    pages = offer.memory_bytes // PAGE
    if len(blobs) != len(offer.blobs):
        raise ProtocolError("an offer names a blob twice")
    if offer.resident_pages > pages:
        raise ProtocolError(f"an offer of {pages} pages says that {offer.resident_pages} of them are in use")
    if offer.connections > 1 and "connections" not in facts.capabilities:
        raise ProtocolError("an offer asks for more than one connection, which was not agreed on")
    facts.pages, facts.blobs, facts.dry_run = pages, blobs, offer.dry_run
    facts.connections = offer.connections


def _accept(facts: Facts, accept: Accept) -> None:
    missing = dict.fromkeys(accept.missing_blobs, 0)
    if len(missing) != len(accept.missing_blobs) or not missing.keys() <= facts.blobs.keys():
        raise ProtocolError("an answer asks for blobs that were not offered, or twice for one")
    if accept.connections > facts.connections:
        raise ProtocolError(f"an answer asks for {accept.connections} connections, "
                            f"where {facts.connections} were offered")
    if accept.dedup and "dedup" not in facts.capabilities:
        raise ProtocolError("an answer asks for digests, which were not agreed on")
    facts.arrived, facts.dedup, facts.connections = missing, accept.dedup, accept.connections


def _join(facts: Facts, join: Join) -> None:
    if facts.connections > 1 and join.index >= facts.connections:
        raise ProtocolError(f"connection {join.index} joins, where {facts.connections} were agreed on")


def _pages(facts: Facts, pages: Pages) -> None:
    if not pages.payload:
        raise ProtocolError("a batch without pages came")


def _digests(facts: Facts, digests: Digests) -> None:
    if not facts.dedup:
        raise ProtocolError("digests came that nobody asked for")
    if digests.seq != facts.next_seq:
        raise ProtocolError(f"digests number {digests.seq} came, where {facts.next_seq} was due")
    if len(facts.unanswered) >= WINDOW:
        raise ProtocolError(f"digests came while {WINDOW} batches of them were without an answer")
    facts.unanswered.append((digests.seq, len(digests.payload) // DIGEST_ROW))
    facts.next_seq = digests.seq + 1 & 0xFFFFFFFF


def _missing(facts: Facts, missing: Missing) -> None:
    seq, pages = facts.unanswered[0] if facts.unanswered else (None, 0)
    if missing.seq != seq:
        raise ProtocolError(f"an answer to digests number {missing.seq} came, where {seq} was due")
    spare = -pages % 8
    if len(missing.bitmap) != (pages + spare) // 8 or (spare and missing.bitmap[-1] >> 8 - spare):
        raise ProtocolError(f"an answer to the digests of {pages} pages is not as long as that")
    facts.unanswered.popleft()


def _blob_piece(facts: Facts, piece: BlobPiece) -> None:
    at = facts.arrived.get(piece.sha256)
    if at is None:
        raise ProtocolError("a piece of a blob came that was not asked for")
    end = piece.offset + len(piece.data)
    if piece.offset != at or end > facts.blobs[piece.sha256]:
        raise ProtocolError(f"a piece of a blob came for bytes {piece.offset} to {end}, where {at} to "
                            f"{facts.blobs[piece.sha256]} are missing")
    facts.arrived[piece.sha256] = end


def _round_end(facts: Facts, end: RoundEnd) -> None:
    if end.round != facts.round + 1:
        raise ProtocolError(f"round {end.round} ended, where it was round {facts.round + 1}")
    if facts.unanswered:
        raise ProtocolError("a round ended with digests that were not answered")
    facts.round = end.round


def _round_done(facts: Facts, done: RoundDone) -> None:
    if done.round != facts.round or done.round == facts.done:
        raise ProtocolError(f"round {done.round} is said to be done, where it was round {facts.done + 1}")
    facts.done = done.round


def _final(facts: Facts, final: Final) -> None:
    late = [sha256 for sha256, at in facts.arrived.items() if at < facts.blobs[sha256]]
    if late:
        raise ProtocolError(f"the guest came without all of blob {late[0]}")
    if final.pages_left > facts.pages or bool(final.pages_left) != bool(final.left):
        raise ProtocolError(f"the guest came with {final.pages_left} pages left out of {facts.pages}, and a "
                            f"bitmap of {len(final.left)} bytes")
    if final.pages_left and "postcopy" not in facts.capabilities:
        raise ProtocolError("the guest came without all its pages, and post-copy was not agreed on")
    facts.pages_left = final.pages_left


def _want(facts: Facts, want: Want) -> None:
    if want.pages[-1] >= facts.pages or any(a >= b for a, b in zip(want.pages, want.pages[1:])):
        raise ProtocolError("pages are wanted that do not ascend, or are not in the memory")


def _console_data(facts: Facts, data: ConsoleData) -> None:
    if data.position < facts.position:
        raise ProtocolError(f"console data came for position {data.position}, after {facts.position}")
    facts.position = data.position + len(data.data)


#: the capability without which a message has no place
_NEEDS: Mapping[type, str] = {Join: "connections", Digests: "dedup", Want: "postcopy", Resume: "postcopy"}
_RULES: Mapping[type, Callable[[Facts, Any], None]] = {
    Hello: _hello, Welcome: _welcome, Offer: _offer, Accept: _accept, Join: _join, Pages: _pages,
    Digests: _digests, Missing: _missing, BlobPiece: _blob_piece, RoundEnd: _round_end,
    RoundDone: _round_done, Final: _final, Want: _want, ConsoleData: _console_data}
