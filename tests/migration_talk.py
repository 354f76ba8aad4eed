# SPDX-License-Identifier: GPL-2.0-or-later
"""Examples of all that two hosts say to each other, whole conversations, and two ends that hold them."""

from __future__ import annotations

import numpy as np

from hostd.migration import messages as said
from hostd.migration.capabilities import shown
from hostd.migration.incoming import Incoming
from hostd.migration.messages import BlobPiece, Digests, Pages, Purpose, Said
from hostd.migration.outgoing import Outgoing
from hostd.migration.pages import BatchEncoder, encode_digests, pack_bitmap
from hostd.migration.session import Session
from vmm.memory.pool import PAGE

TOKEN = "0123456789abcdef" * 2
BLOB = "ab" * 32
MEMORY = 1 << 20
CAPABILITIES = ["zstd", "delta", "dedup", "postcopy", "connections", "hw", "bt"]

OFFER = said.Offer(TOKEN, "web", b"{}", MEMORY, "hw", 1, shown("hw"), 2_600_000, 9, [(BLOB, 10)], b"{}", 2, 3)
HELLO = said.Hello("migrate", "hostd 0", CAPABILITIES)
WELCOME = said.Welcome("hostd 0", CAPABILITIES)
_CONTENTS = np.arange(9 * PAGE, dtype=np.uint64).astype(np.uint8).reshape(9, PAGE)
PAGES = Pages(BatchEncoder(256).encode(np.arange(9), _CONTENTS).payload)
DIGESTS = encode_digests(np.arange(9), _CONTENTS)
LEFT = pack_bitmap(np.arange(9), 256)

#: who says it, and what; "source" talks first
Turn = tuple[str, Said]
S, T = "source", "target"

_OPENING: list[Turn] = [(S, OFFER), (T, said.Accept(TOKEN, [BLOB], True, 2))]
_ROUNDS: list[Turn] = [
    (S, Digests(0, DIGESTS)), (S, BlobPiece(BLOB, 0, b"abcd")), (S, Digests(1, DIGESTS)),
    (T, said.Missing(0, b"\xff\x01")), (S, BlobPiece(BLOB, 4, b"efghij")), (T, said.Missing(1, b"\1\0")),
    (S, PAGES), (S, said.RoundEnd(1)), (T, said.RoundDone(1)), (S, PAGES), (S, said.RoundEnd(2))]
_HANDING_OVER: list[Turn] = [(T, said.Ready(TOKEN)), (S, said.Commit(TOKEN, 5)), (T, said.Committed(TOKEN))]
_FETCHING: list[Turn] = [(T, said.Want([3, 5])), (S, PAGES), (T, said.Complete(TOKEN)),
                         (S, said.Forget(TOKEN))]

#: whole conversations after Welcome, by what they are for
CONVERSATIONS: dict[str, tuple[Purpose, list[Turn]]] = {
    "precopy": ("migrate", [*_OPENING, *_ROUNDS, (T, said.RoundDone(2)),
                            (S, said.Final(b"state", b"{}", False, ballooned=LEFT)), *_HANDING_OVER,
                            (S, said.Forget(TOKEN))]),
    "postcopy": ("migrate", [*_OPENING, *_ROUNDS, (S, said.Final(b"state", b"{}", True, 9, LEFT)),
                             (T, said.RoundDone(2)), *_HANDING_OVER, *_FETCHING]),
    "refused": ("migrate", [(S, OFFER), (T, said.Refuse("there is a VM web"))]),
    "cancelled": ("migrate", [*_OPENING, *_ROUNDS, (S, said.Cancel("a user asked for it"))]),
    "aborted": ("migrate", [*_OPENING, *_ROUNDS, (T, said.Aborted(TOKEN, "no memory"))]),
    "join": ("join", [(S, said.Join(TOKEN, 1)), (T, said.Joined(TOKEN)), (S, PAGES), (S, said.RoundEnd(1)),
                      (T, said.RoundDone(1)), (S, Digests(0, DIGESTS)), (T, said.Missing(0, b"\0\0")),
                      (S, said.RoundEnd(2))]),
    "resume": ("resume", [(S, said.Resume(TOKEN)), (T, said.Resumed(TOKEN, LEFT)), *_FETCHING]),
    "resolve": ("resolve", [(S, said.Resolve(TOKEN)), (T, said.Resolved(TOKEN, "running")),
                            (S, said.Resolve(TOKEN)), (T, said.Resolved(TOKEN, "committed")),
                            (S, said.Forget(TOKEN))]),
    "console": ("console", [(S, said.Attach("web", 7)), (T, said.ConsoleData(7, b"login: ")),
                            (S, said.ConsoleInput(b"root\r")), (T, said.ConsoleData(14, b"root\r\n")),
                            (T, said.Bye("it is moving", True))]),
}

#: one of each
ALL: list[Said] = list({type(message): message for message in [
    HELLO, WELCOME, *(message for _, turns in CONVERSATIONS.values() for _, message in turns)]}.values())


def pair(purpose: Purpose) -> dict[str, Session]:
    """Two ends that have greeted and welcomed each other."""
    source, target = Outgoing(purpose), Incoming()
    assert target.receive(source.preamble()) == source.receive(target.preamble()) == []
    target.receive(source.hello())
    source.receive(target.welcome())
    return {S: source, T: target}


def hold(ends: dict[str, Session], turns: list[Turn]) -> dict[str, bytes]:
    """Let two ends say it all; what each of them sent."""
    sent = {S: b"", T: b""}
    for who, message in turns:
        data = ends[who].send(message)
        sent[who] += data
        assert ends[T if who == S else S].receive(data) == [message]
    return sent
