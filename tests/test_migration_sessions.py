# SPDX-License-Identifier: GPL-2.0-or-later
"""Both ends of migration connections: whole conversations, and every message at every wrong time."""

from __future__ import annotations

from typing import get_args

import msgspec
import numpy as np
import pytest

from hostd.migration import messages as said
from hostd.migration.incoming import Incoming
from hostd.migration.messages import BlobPiece, Digests, Pages, Purpose, Said, encode
from hostd.migration.order import ORDER, SAYS, State
from hostd.migration.outgoing import Outgoing
from hostd.migration.pages import encode_digests
from hostd.migration.session import Session
from hostd.migration.wire import MAGIC, ProtocolError, Spoken, preamble
from tests.migration_talk import (
    ALL,
    BLOB,
    CAPABILITIES,
    CONVERSATIONS,
    DIGESTS,
    LEFT,
    OFFER,
    PAGES,
    TOKEN,
    S,
    T,
    Turn,
    hold,
    pair,
)

OTHER_TOKEN = "f" * 32
replace = msgspec.structs.replace


def after(name: str, turns: int) -> dict[str, Session]:
    """Two ends in the middle of a conversation."""
    purpose, everything = CONVERSATIONS[name]
    ends = pair(purpose)
    hold(ends, everything[:turns])
    return ends


# --- conversations ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_is_heard_as_it_was_said(name: str) -> None:
    purpose, turns = CONVERSATIONS[name]
    ends = pair(purpose)
    hold(ends, turns)
    assert ends[S].state == ends[T].state == ("stream over" if purpose == "join" else "over")


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_it_does_not_matter_how_the_stream_is_cut(name: str) -> None:
    purpose, turns = CONVERSATIONS[name]
    ends = pair(purpose)
    for who, message in turns:
        data = ends[who].send(message)
        cut = max(1, len(data) // 100)
        heard = [each for start in range(0, len(data), cut)
                 for each in ends[T if who == S else S].receive(data[start:start + cut])]
        assert heard == [message]


def test_the_table_of_states_is_whole() -> None:
    assert set(ORDER) == set(get_args(State))
    said_by_somebody = SAYS["source"] | SAYS["target"]
    assert said_by_somebody == {type(message) for message in ALL}
    for row in ORDER.values():
        assert row.keys() <= said_by_somebody
        assert {state for state in row.values() if isinstance(state, str)} <= set(ORDER)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_message_out_of_turn_is_refused_by_both_ends(name: str) -> None:
    for turns in range(len(CONVERSATIONS[name][1])):
        for message in ALL:
            ends = after(name, turns)
            for speaker, listener in (S, T), (T, S):
                state = ends[speaker].state
                if state == "over" or (type(message) in SAYS[speaker] and type(message) in ORDER[state]):
                    continue
                with pytest.raises(ProtocolError):
                    ends[speaker].send(message)
                assert ends[speaker].state == state
                deaf = after(name, turns)[listener]
                with pytest.raises(ProtocolError):
                    deaf.receive(encode(message))
                refuses_everything(deaf)


def refuses_everything(end: Session) -> None:
    for message in PAGES, said.Bye(""), said.Resolve(TOKEN):
        with pytest.raises(ProtocolError, match="this connection is over"):
            end.receive(encode(message))
        with pytest.raises(ProtocolError, match="this connection is over"):
            end.send(message)


# --- the beginning ------------------------------------------------------------------------------------------

def test_hosts_a_version_apart_speak_the_older_one() -> None:
    source, target = Outgoing("migrate", Spoken(2, 1)), Incoming(Spoken(1, 1))
    target.receive(source.preamble())
    source.receive(target.preamble())
    assert source.version == target.version == 1
    assert target.receive(source.hello())[0].purpose == "migrate"  # type: ignore[union-attr]


def test_hosts_two_versions_apart_part_in_one_sentence() -> None:
    source, target = Outgoing("migrate", Spoken(3, 2)), Incoming(Spoken(1, 1))
    with pytest.raises(ProtocolError, match=r"versions 2 to 3 .* this one version 1: update the older"):
        target.receive(source.preamble())
    with pytest.raises(ProtocolError, match="speaks version 1 of"):
        source.receive(target.preamble())
    refuses_everything(target)


def test_nothing_is_sent_before_the_other_end_has_greeted() -> None:
    with pytest.raises(ProtocolError, match="Hello is not for the source to send now"):
        Outgoing("migrate").hello()


def test_only_what_both_can_do_is_in_force() -> None:
    source, target = Outgoing("migrate"), Incoming()
    target.receive(source.preamble())
    source.receive(target.preamble())
    target.receive(source.hello(("zstd", "dedup", "warp")))
    source.receive(target.welcome(("zstd", "postcopy", "dedup")))
    assert source.facts.capabilities == target.facts.capabilities == {"zstd", "dedup"}


@pytest.mark.parametrize(("purpose", "capability", "turns"), [
    ("resume", "postcopy", [(S, said.Resume(TOKEN))]),
    ("join", "connections", [(S, said.Join(TOKEN, 1))]),
    ("migrate", "connections", [(S, OFFER)]),
    ("migrate", "dedup", [(S, OFFER), (T, said.Accept(TOKEN, dedup=True))]),
    ("migrate", "postcopy", [(S, OFFER), (T, said.Accept(TOKEN)), (S, said.RoundEnd(1)),
                             (S, said.Final(b"s", b"", False, 9, LEFT))]),
])
def test_what_was_not_agreed_on_is_refused(purpose: Purpose, capability: str, turns: list[Turn]) -> None:
    less = [each for each in CAPABILITIES if each != capability]
    source, target = Outgoing(purpose), Incoming()
    target.receive(source.preamble())
    source.receive(target.preamble())
    target.receive(source.hello())
    source.receive(target.welcome(tuple(less)))
    ends: dict[str, Session] = {S: source, T: target}
    hold(ends, turns[:-1])
    refused(ends, *turns[-1], "not agreed on")


# --- what messages must agree with --------------------------------------------------------------------------

def refused(ends: dict[str, Session], who: str, message: Said, why: str) -> None:
    """One end neither sends it, nor does the other one take it; the sender goes on."""
    state = ends[who].state
    with pytest.raises(ProtocolError, match=why):
        ends[who].send(message)
    assert ends[who].state == state
    listener = ends[T if who == S else S]
    with pytest.raises(ProtocolError, match=why):
        listener.receive(encode(message))
    refuses_everything(listener)


def at(name: str, kind: type) -> dict[str, Session]:
    """Before the first message of this kind in a conversation."""
    kinds = [type(message) for _, message in CONVERSATIONS[name][1]]
    return after(name, kinds.index(kind))


@pytest.mark.parametrize(("name", "who", "message", "why"), [
    ("precopy", S, replace(OFFER, blobs=[(BLOB, 1), (BLOB, 2)]), "names a blob twice"),
    ("precopy", S, replace(OFFER, resident_pages=257), "257 of them are in use"),
    ("precopy", T, said.Accept(OTHER_TOKEN), "another migration"),
    ("precopy", T, said.Accept(TOKEN, ["f" * 64]), "not offered"),
    ("precopy", T, said.Accept(TOKEN, [BLOB, BLOB]), "twice for one"),
    ("precopy", T, said.Accept(TOKEN, connections=3), "3 connections"),
    ("precopy", S, Digests(1, DIGESTS), "number 1 came, where 0"),
    ("precopy", S, BlobPiece("f" * 64, 0, b"x"), "not asked for"),
    ("precopy", S, BlobPiece(BLOB, 1, b"x"), "bytes 1 to 2, where 0 to 10"),
    ("precopy", S, BlobPiece(BLOB, 0, b"x" * 11), "bytes 0 to 11, where 0 to 10"),
    ("precopy", T, said.Missing(1, b"\0\0"), "number 1 came, where 0"),
    ("precopy", T, said.Missing(0, b"\0"), "digests of 9 pages"),
    ("precopy", T, said.Missing(0, b"\0\0\0"), "digests of 9 pages"),
    ("precopy", T, said.Missing(0, b"\0\2"), "digests of 9 pages"),
    ("precopy", S, said.RoundEnd(2), "round 2 ended, where it was round 1"),
    ("precopy", T, said.RoundDone(2), "round 2 is said to be done, where it was round 1"),
    ("precopy", S, said.Final(b"s", b"", False, 0, LEFT), "0 pages left"),
    ("precopy", S, said.Final(b"s", b"", False, 9), "9 pages left"),
    ("precopy", S, said.Final(b"s", b"", False, 257, LEFT), "257 pages left out of 256"),
    ("precopy", T, said.Ready(OTHER_TOKEN), "another migration"),
    ("precopy", S, said.Commit(OTHER_TOKEN, 0), "another migration"),
    ("precopy", T, said.Committed(OTHER_TOKEN), "another migration"),
    ("precopy", S, said.Forget(OTHER_TOKEN), "another migration"),
    ("postcopy", T, said.Want([5, 3]), "do not ascend"),
    ("postcopy", T, said.Want([3, 3]), "do not ascend"),
    ("postcopy", T, said.Want([256]), "not in the memory"),
    ("postcopy", T, said.Complete(OTHER_TOKEN), "another migration"),
    ("resolve", T, said.Resolved(OTHER_TOKEN, "aborted"), "another migration"),
    ("join", S, Pages(b""), "without pages"),
])
def test_a_message_must_agree_with_what_was_said(name: str, who: str, message: Said, why: str) -> None:
    refused(at(name, type(message)), who, message, why)


def test_a_token_is_the_same_from_first_to_last() -> None:
    ends = at("resolve", said.Resolved)
    hold(ends, [(T, said.Resolved(TOKEN, "running"))])
    refused(ends, S, said.Resolve(OTHER_TOKEN), "another migration")


def test_a_guest_is_not_taken_without_its_blobs() -> None:
    ends = after("precopy", 2)
    hold(ends, [(S, BlobPiece(BLOB, 0, b"123456789")), (S, said.RoundEnd(1))])
    refused(ends, S, said.Final(b"s", b"", False), "without all of blob abab")


def test_a_round_is_done_once() -> None:
    ends = at("postcopy", said.Ready)
    refused(ends, T, said.RoundDone(2), "said to be done")


def test_digests_wait_for_answers_within_a_window() -> None:
    ends = after("precopy", 2)
    one = encode_digests(*_one_page())
    hold(ends, [(S, Digests(seq, one)) for seq in range(said.WINDOW)])
    refused(ends, S, Digests(said.WINDOW, one), "without an answer")
    ends = after("precopy", 2)
    hold(ends, [(S, Digests(0, one))])
    refused(ends, S, said.RoundEnd(1), "not answered")


def _one_page() -> tuple:
    return np.array([7]), np.ones((1, 4096), dtype=np.uint8)


def test_digests_that_the_target_declined_are_refused() -> None:
    ends = pair("migrate")
    hold(ends, [(S, OFFER), (T, said.Accept(TOKEN))])
    refused(ends, S, Digests(0, DIGESTS), "nobody asked for")


def test_the_console_does_not_go_back() -> None:
    ends = after("console", 4)
    hold(ends, [(T, said.ConsoleData(100, b""))])
    refused(ends, T, said.ConsoleData(99, b"x"), "position 99, after 100")


def test_a_dry_run_ends_with_the_answer() -> None:
    ends = pair("migrate")
    hold(ends, [(S, replace(OFFER, dry_run=True)), (T, said.Accept(TOKEN))])
    assert ends[S].state == ends[T].state == "over"


def test_a_guest_without_pages_left_is_not_fetched() -> None:
    refused(at("precopy", said.Forget), T, said.Want([1]), r"target to send now \(moved\)|was not due")


# --- the end ------------------------------------------------------------------------------------------------

def test_words_that_cross_the_last_one_are_dropped() -> None:
    ends = after("aborted", 2)
    crossing = ends[S].send(PAGES) + ends[S].send(said.RoundEnd(1))
    last = ends[T].send(said.Aborted(TOKEN, "no memory"))
    assert ends[T].receive(crossing) == []
    assert ends[T].receive(b"anything at all") == ends[T].receive(b"") == []
    assert ends[S].receive(last + b"anything at all") == [said.Aborted(TOKEN, "no memory")]
    assert ends[S].send(PAGES) == b""
    with pytest.raises(ProtocolError, match=r"Joined is not for the target to send now \(over\)"):
        ends[T].send(said.Joined(TOKEN))


def test_a_connection_that_ends_early_is_an_error_which_says_when() -> None:
    ends = at("precopy", said.Committed)
    with pytest.raises(ProtocolError, match=r"the other host closed the connection \(committing\)"):
        ends[S].receive(b"")
    refuses_everything(ends[S])


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_either_end_can_give_up_whenever_it_may(name: str) -> None:
    _, turns = CONVERSATIONS[name]
    for count in range(len(turns)):
        for who in S, T:
            ends = after(name, count)
            last = ends[who].give_up("it is \x1b[1mover\n")  # type: ignore[attr-defined]
            heard = ends[T if who == S else S].receive(last) if last else []
            assert [message.reason for message in heard] in ([], ["it is  [1mover "])  # type: ignore
            assert bool(last) == (ends[who].state == "over")
            # once Commit is said there is no way back for the source
            if who == S and ends[S].state in ("committing", "fetching", "moved"):
                assert not last


@pytest.mark.parametrize(("state", "turns", "limit"), [
    ("preamble", 0, 12), ("hello", 0, 4 << 10), ("offer", 0, 256 << 10), ("copying", 2, 2 << 20)])
def test_little_is_kept_of_a_peer_that_sends_much(state: str, turns: int, limit: int) -> None:
    """A frame is refused by its header, so no more is kept than the largest that may come."""
    target: Session = Incoming()
    if state == "hello":
        target.receive(preamble(Spoken(1, 1)))
    elif state != "preamble":
        target = after("precopy", turns)[T]
    assert target.state == state
    header = {"preamble": MAGIC, "copying": b"\xff\xff\x0f\0\1"}.get(state, b"\xff\xff\xff\0\0")
    try:
        for _ in range(100):
            target.receive(header)
            header = bytes(1 << 16)
            assert target._splitter.kept <= limit + (1 << 16)
    except ProtocolError:
        assert target._splitter.kept == 0
        return
    raise AssertionError("it took everything")
