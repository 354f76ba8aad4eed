# SPDX-License-Identifier: GPL-2.0-or-later
"""Migration connections under a hostile or unlucky peer, and under all orders in which words can cross."""

from __future__ import annotations

import tracemalloc
from collections import deque
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, replace
from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostd.migration import messages as said
from hostd.migration.incoming import Incoming
from hostd.migration.messages import BlobPiece, Digests, Said
from hostd.migration.outgoing import Outgoing
from hostd.migration.session import Session
from hostd.migration.wire import HEADER, PREAMBLE, ProtocolError, Splitter
from tests.migration_talk import (
    BLOB,
    CAPABILITIES,
    CONVERSATIONS,
    HELLO,
    LEFT,
    OFFER,
    PAGES,
    TOKEN,
    S,
    T,
    Turn,
    hold,
)

LARGEST = said.MAX_STATE + said.MAX_LIFE + 2 * said.MAX_BITMAP + (8 << 10)

# --- recordings, and what may become of them ----------------------------------------------------------------


def recording(name: str) -> tuple[list[Turn], dict[str, list[bytes]]]:
    """All turns of a conversation from Hello on, and what each end sends in frames, its preamble first."""
    purpose, turns = CONVERSATIONS[name]
    opening: list[Turn] = [(S, said.Hello(purpose, "hostd 0", CAPABILITIES)),
                           (T, said.Welcome("hostd 0", CAPABILITIES))]
    turns = opening + turns
    ends: dict[str, Session] = {S: Outgoing(purpose), T: Incoming()}
    frames = {who: [end.preamble()] for who, end in ends.items()}
    ends[T].receive(frames[S][0])
    ends[S].receive(frames[T][0])
    for who, message in turns:
        data = ends[who].send(message)
        frames[who].append(data)
        ends[T if who == S else S].receive(data)
    return turns, frames


RECORDINGS = {name: recording(name) for name in CONVERSATIONS}


def frames_of(name: str, who: str) -> list[bytes]:
    """What one end sends in a conversation."""
    return RECORDINGS[name][1][who]


@st.composite
def damaged(draw: st.DrawFn, name: str, who: str) -> list[bytes]:
    """One end's frames with something wrong with them."""
    frames = list(frames_of(name, who))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(frames) - 1))
        other = draw(st.sampled_from(sorted(CONVERSATIONS)))
        match draw(st.sampled_from(["flip", "truncate", "drop", "repeat", "swap", "foreign", "noise"])):
            case "flip" if frames[at]:
                data = bytearray(frames[at])
                data[draw(st.integers(0, min(len(data), 200) - 1))] ^= draw(st.integers(1, 255))
                frames[at] = bytes(data)
            case "truncate":
                frames[at] = frames[at][:draw(st.integers(0, len(frames[at])))]
            case "drop" if len(frames) > 1:
                del frames[at]
            case "repeat":
                frames.insert(at, frames[at])
            case "swap":
                second = draw(st.integers(0, len(frames) - 1))
                frames[at], frames[second] = frames[second], frames[at]
            case "foreign":
                frames.insert(at, draw(st.sampled_from(frames_of(other, draw(st.sampled_from([S, T]))))))
            case "noise":
                frames.insert(at, draw(st.binary(min_size=1, max_size=40)))
    return frames


def play(name: str, listener: str, heard: list[bytes], cut: int | None = None) -> Session:
    """One end that says its part when it has heard as much as in the recording, while it hears `heard`.

    Nothing but ProtocolError may come of it, and after that nothing but ProtocolError comes any more.
    """
    end: Session = Outgoing(CONVERSATIONS[name][0]) if listener == S else Incoming()
    mine: deque[tuple[int, Said]] = deque()
    before = 1                                 # the preamble
    for who, message in RECORDINGS[name][0]:
        if who == listener:
            mine.append((before, message))
        else:
            before += 1
    for number, data in enumerate(heard, 1):
        pieces = [data] if cut is None else [data[at:at + cut] for at in range(0, len(data), cut)]
        try:
            for piece in filter(None, pieces):
                end.receive(piece)
                assert end._splitter.kept <= LARGEST + HEADER.size
        except ProtocolError as error:
            assert "\n" not in str(error)
            assert end._splitter.kept == 0
            for again in (heard[0], b"", b"\0"):
                with pytest.raises(ProtocolError, match="this connection is over"):
                    end.receive(again)
            with pytest.raises(ProtocolError, match="this connection is over"):
                end.send(PAGES)
            return end
        while mine and mine[0][0] <= number:
            with suppress(ProtocolError):      # what it heard was not what it is an answer to
                end.send(mine[0][1])
            mine.popleft()
    return end


@pytest.mark.parametrize("who", [S, T])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_recording_can_be_played_to_the_other_end(name: str, who: str) -> None:
    end = play(name, S if who == T else T, frames_of(name, who))
    assert end.state == ("stream over" if name == "join" else "over")


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_damaged_recording_is_worse_than_an_error_at_neither_end(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(CONVERSATIONS)))
    who = data.draw(st.sampled_from([S, T]))
    heard = data.draw(damaged(name, who))
    play(name, S if who == T else T, heard, data.draw(st.none() | st.integers(5000, 50_000)))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(CONVERSATIONS)), st.sampled_from([S, T]), st.binary(max_size=400), st.data())
def test_noise_is_worse_than_an_error_at_no_time(name: str, who: str, noise: bytes,
                                                 data: st.DataObject) -> None:
    frames = frames_of(name, who)
    heard = frames[:data.draw(st.integers(0, len(frames)))]
    play(name, S if who == T else T, [*heard, noise])


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers(-2**63, 2**64 - 1) | st.text(max_size=5)
                    | st.binary(max_size=5) | st.floats(), lambda inner: st.lists(inner, max_size=4),
                    max_leaves=12),
       st.sampled_from([kind.__name__ for kind in get_args(said.Control)]))
def test_messages_of_any_shape_are_worse_than_an_error_at_no_end(shape: object, tag: str) -> None:
    payload = msgspec.msgpack.encode([tag, *(shape if isinstance(shape, list) else [shape])])
    for name, who in ("precopy", S), ("postcopy", T), ("console", T):
        play(name, S if who == T else T, [*frames_of(name, who)[:4], HEADER.pack(len(payload), 0) + payload])


@pytest.mark.parametrize("depth", [100, 4000])
def test_nesting_is_no_way_in(depth: int) -> None:
    payload = b"\x91" * depth
    play("precopy", T, [*frames_of("precopy", S)[:1], HEADER.pack(len(payload), 0) + payload])


def test_the_largest_frame_costs_its_size_and_no_more() -> None:
    """A State that never ends: what was announced is kept and nothing beyond."""
    at = next(index for index, frame in enumerate(frames_of("precopy", S)) if b"Final" in frame[:20])
    tracemalloc.start()
    try:
        endless = [HEADER.pack(LARGEST - (4 << 10), 0)] + [bytes(1 << 16)] * (LARGEST >> 16)
        play("precopy", T, [*frames_of("precopy", S)[:at], *endless])
        assert tracemalloc.get_traced_memory()[1] < 3 * LARGEST
    finally:
        tracemalloc.stop()


def test_a_peer_that_has_not_said_hello_can_make_this_end_keep_little() -> None:
    target = Incoming()
    target.receive(frames_of("precopy", S)[0])
    with pytest.raises(ProtocolError, match="at most 4096 are allowed"):
        target.receive(HEADER.pack(4097, 0))
    assert PREAMBLE.size == 12


# --- words that cross ---------------------------------------------------------------------------------------

#: how far the two ends may get ahead of each other, and how much of each thing they do
AHEAD, ROUNDS, NAMED = 3, 2, 2


@dataclass
class World:
    """Two ends, and what is on its way between them."""

    ends: dict[str, Session]
    way: dict[str, deque[tuple[Said, bytes]]] = field(default_factory=lambda: {S: deque(), T: deque()})
    #: post-copy batches the target has; it has all when it has one
    fetched: int = 0
    sent: int = 0

    def key(self) -> tuple:
        return (*((end.state, end._hung_up, end.state != "over" and repr(end.facts),
                   end.state != "over" and tuple(data for _, data in self.way[who]))
                  for who, end in self.ends.items()), self.fetched, self.sent)

    def copy(self) -> World:
        return World({who: _copy(end) for who, end in self.ends.items()},
                     {who: deque(way) for who, way in self.way.items()}, self.fetched, self.sent)

    def words(self, who: str) -> list[Said]:
        """All that one end might say; what it may not is refused by itself."""
        facts = self.ends[who].facts
        if who == T:
            oldest = facts.unanswered[0][0] if facts.unanswered else 0
            return [
                said.Accept(TOKEN, [BLOB], True), said.Refuse(""), said.Aborted(TOKEN, ""),
                said.Missing(oldest, b"\1"), said.RoundDone(max(facts.round, 1)), said.Ready(TOKEN),
                said.Committed(TOKEN), said.Complete(TOKEN) if self.fetched else said.Want([3])]
        words: list[Said] = [
            OFFER, said.Cancel(""), BlobPiece(BLOB, 0, b"x" * 10), said.Commit(TOKEN, 1),
            said.Forget(TOKEN)]
        if facts.next_seq < NAMED:
            words.append(Digests(facts.next_seq, b"\0" * said.DIGEST_ROW))
        if facts.round < ROUNDS:
            words.append(said.RoundEnd(facts.round + 1))
        if self.ends[who].state != "fetching" or not self.sent:
            words.append(PAGES)
        return [*words, said.Final(b"s", b"", False), said.Final(b"s", b"", False, 9, LEFT)]


def _copy(end: Session) -> Session:
    """Of an end that has heard whole frames only."""
    assert end._splitter.kept == 0
    twin = copy(end)
    twin._splitter = Splitter()
    twin.facts = replace(end.facts, unanswered=deque(end.facts.unanswered), arrived=dict(end.facts.arrived))
    return twin


def test_no_words_that_cross_are_misunderstood() -> None:
    """All orders in which two ends that keep to the protocol can speak and hear, in a small migration."""
    ends: dict[str, Session] = {S: Outgoing("migrate"), T: Incoming()}
    ends[T].receive(ends[S].preamble())
    ends[S].receive(ends[T].preamble())
    hold(ends, [(S, HELLO), (T, said.Welcome("", CAPABILITIES))])
    first = World(ends)
    seen, open_worlds, last_states = {first.key()}, [first], set()
    while open_worlds:
        world = open_worlds.pop()
        following = [each for who in (S, T) for each in (*_heard(world, who), *_spoken(world, who))]
        if not following:
            last_states.add((world.ends[S].state, world.ends[T].state))
        for each in following:
            key = each.key()
            if key not in seen:
                seen.add(key)
                open_worlds.append(each)
    assert last_states == {("over", "over")}
    both = {(source[0], target[0]) for source, target, *_ in seen}
    assert {("final", "round done"), ("over", "ready"), ("committing", "over"), ("fetching", "moved"),
            ("moved", "moved")} <= both


def _heard(world: World, who: str) -> list[World]:
    """The world after one end has heard what is due to it."""
    if not world.way[who]:
        return []
    after = world.copy()
    message, data = after.way[who].popleft()
    fetching = after.ends[who].state == "fetching"
    heard = after.ends[who].receive(data)           # Invariant: no ProtocolError here, ever
    assert heard == [message] or after.ends[who].state == "over"
    after.fetched += message == PAGES and fetching
    return [after]


def _spoken(world: World, who: str) -> list[World]:
    """The worlds after one end has said something that it may say."""
    other = T if who == S else S
    if len(world.way[other]) >= AHEAD or world.ends[who].state == "over":
        return []
    worlds = []
    for message in world.words(who):
        after = world.copy()
        fetching = after.ends[who].state == "fetching"
        try:
            data = after.ends[who].send(message)
        except ProtocolError:
            continue
        after.sent += message == PAGES and fetching
        after.way[other].append((message, data))
        worlds.append(after)
    return worlds
