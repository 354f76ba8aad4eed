# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages between daemon and worker: what goes in comes out, however the stream cuts it."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hostd import protocol
from hostd.model import TranslatorView
from hostd.protocol import LENGTH, MAX_MESSAGE, ProtocolError, Splitter, ToDaemon, ToWorker, encode

TO_WORKER = [
    protocol.Adopt("web#1", 17, 1 << 27, b"state", 0, 3, 100, 50),
    protocol.Release("web#1"),
    protocol.Input("web#1", bytes(range(256))),
    protocol.SetShare("web#1", 1, 0),
    protocol.Reclaim("web#1", "merge", bytes(8), bytes(8)),
    protocol.DirtyLog("web#1", "collect"),
    protocol.SetBalloon("web#1", 4096),
    protocol.SetRation("web#1", protocol.Most(5)),
    protocol.CloseStore(3),
    protocol.PowerButton("web#1"),
    protocol.ListTranslations("web#1", None),
    protocol.ListTranslations("web#1", 0x101000),
    protocol.Grant([(1, 2), (3, 4)]),
    protocol.Ping(7),
    protocol.Ping(7, 1000),
    protocol.GiveBack(),
    protocol.Quit(),
]
TO_DAEMON = [
    protocol.Hello(1234, 2_600_000, "silicon"),
    protocol.Adopted("web#1"),
    protocol.Released("web#1", b"state", 99),
    protocol.Refused("web#1", "adopt", "no"),
    protocol.Stopped("web#1", "exit", "", 3),
    protocol.Console("web#1", b"login:"),
    protocol.Listing("web#1", "00101000  mov ecx, edi", False),
    protocol.NeedFrames(1024),
    protocol.GivenBack([(7, 3), (20, 1)]),
    protocol.AtLimit("web#1"),
    protocol.Reported("web#1", [1, 2, 3], [9], []),
    protocol.Reclaimed("web#1", b"", bytes(8)),
    protocol.Dirty("web#1", bytes(16)),
    protocol.Wanted("web#1", [7, 9]),
    protocol.BalloonView("web#1", True, 5, {"free": 7}),
    protocol.Pong(7, [0, 1], 5, TranslatorView(units=3, used_bytes=4096)),
]


@pytest.mark.parametrize(("kind", "messages"), [(ToWorker, TO_WORKER), (ToDaemon, TO_DAEMON)])
def test_every_message_survives_a_stream_that_comes_byte_by_byte(kind: object, messages: list) -> None:
    splitter: Splitter = Splitter(kind)
    received = []
    for byte in b"".join(encode(message) for message in messages):
        received += splitter.feed(bytes([byte]))
    assert received == messages


@given(st.lists(st.sampled_from(TO_DAEMON)), st.lists(st.integers(1, 100)))
def test_the_cuts_of_the_stream_do_not_matter(messages: list, cuts: list[int]) -> None:
    stream = b"".join(encode(message) for message in messages)
    splitter: Splitter = Splitter(ToDaemon)
    received = []
    for cut in cuts:
        received += splitter.feed(stream[:cut])
        stream = stream[cut:]
    received += splitter.feed(stream)
    assert received == messages


@given(st.binary(min_size=1, max_size=64))
@example(b"\x91\xa2\x00\x80")          # a tag that is no UTF-8
def test_garbage_is_a_protocol_error_and_nothing_else(garbage: bytes) -> None:
    try:
        messages = Splitter(ToDaemon).feed(LENGTH.pack(len(garbage)) + garbage)
    except ProtocolError:
        return
    assert all(isinstance(message, protocol.Message) for message in messages)


def test_an_endless_message_is_refused_before_it_is_received() -> None:
    with pytest.raises(ProtocolError, match="a message of"):
        Splitter(ToDaemon).feed(LENGTH.pack(MAX_MESSAGE + 1))


def test_a_worker_cannot_send_what_only_the_daemon_may() -> None:
    with pytest.raises(ProtocolError):
        Splitter(ToDaemon).feed(encode(protocol.Quit()))
