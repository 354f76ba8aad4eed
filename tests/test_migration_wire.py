# SPDX-License-Identifier: GPL-2.0-or-later
"""Preambles, frames and messages: what goes in comes out however it is cut, and bounds are kept."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.migration import messages as said
from hostd.migration.capabilities import HostProfile, common_version, shown, unfit
from hostd.migration.messages import BlobPiece, Digests, Pages, decode, encode, limits_of, reason_of
from hostd.migration.wire import HEADER, MAGIC, Frame, Kind, ProtocolError, Splitter, Spoken, frame, preamble
from tests.migration_talk import ALL, OFFER, TOKEN

LIMITS = {Kind.CONTROL: 100, Kind.PAGES: 300}
frames = st.lists(st.builds(Frame, st.sampled_from([Kind.CONTROL, Kind.PAGES]), st.binary(max_size=100)))


# --- preamble and frames ------------------------------------------------------------------------------------

def taken(splitter: Splitter, data: bytes) -> list[Frame]:
    splitter.feed(data)
    return list(iter(lambda: splitter.take(LIMITS), None))


@given(frames, st.integers(1, 50))
def test_the_cuts_of_the_stream_do_not_matter(frames: list[Frame], cut: int) -> None:
    stream = b"".join(frame(*each) for each in frames)
    splitter = Splitter()
    received = []
    for start in range(0, len(stream), cut):
        received += taken(splitter, stream[start:start + cut])
        assert splitter.kept < HEADER.size + max(LIMITS.values())
    assert received == frames
    assert splitter.kept == 0


@pytest.mark.parametrize("header", [HEADER.pack(101, 0), HEADER.pack(301, 1), HEADER.pack(0xFFFFFFFF, 1),
                                    HEADER.pack(1, 2), HEADER.pack(0, 200)])
def test_a_frame_is_refused_by_its_header(header: bytes) -> None:
    splitter = Splitter()
    assert taken(splitter, header[:-1]) == []
    with pytest.raises(ProtocolError, match="a frame of"):
        taken(splitter, header[-1:])


def test_a_preamble_comes_first_and_byte_by_byte() -> None:
    splitter = Splitter()
    *most, last = preamble(Spoken(7, 6)) + b"!"
    for byte in most[:-1]:
        splitter.feed(bytes([byte]))
        assert splitter.preamble() is None
    splitter.feed(bytes([most[-1], last]))
    assert splitter.preamble() == Spoken(highest=7, lowest=6)
    assert splitter.kept == 1


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1", b"\x16\x03\x01", b"\x89HM!", MAGIC + bytes(4),
                                  preamble(Spoken(1, 2)), preamble(Spoken(1, 0))])
def test_what_is_no_preamble_is_refused_at_once(data: bytes) -> None:
    splitter = Splitter()
    splitter.feed(data)
    with pytest.raises(ProtocolError):
        splitter.preamble()


# --- messages -----------------------------------------------------------------------------------------------

def decoded(data: bytes) -> said.Said:
    splitter = Splitter()
    splitter.feed(data)
    piece = splitter.take(dict.fromkeys(Kind, 16 << 20))
    assert piece is not None
    return decode(piece)


@pytest.mark.parametrize("message", ALL, ids=lambda message: type(message).__name__)
def test_every_message_comes_back(message: said.Said) -> None:
    assert decoded(encode(message)) == message


def test_the_examples_are_all_messages_there_are() -> None:
    assert {type(message) for message in ALL} == set(get_args(said.Control)) | {Pages, Digests, BlobPiece}


def test_the_longest_messages_can_be_sent() -> None:
    long = [
        said.Final(bytes(said.MAX_STATE), bytes(said.MAX_LIFE), True, 1, bytes(said.MAX_BITMAP),
                   bytes(said.MAX_BITMAP)),
        msgspec.structs.replace(OFFER, definition=bytes(64 << 10), image=bytes(64 << 10),
                                cpu=[(0xFFFFFFFF,) * 6] * 64, blobs=[("f" * 64, 1 << 36)] * 16),
        said.Accept(TOKEN, ["f" * 64] * 16), said.Resumed(TOKEN, bytes(said.MAX_BITMAP)),
        said.Want([said.MAX_PAGES - 1] * said.URGENT), said.Missing(0xFFFFFFFF, bytes(said.DIGESTS // 8)),
        said.Aborted(TOKEN, "é" * said.MAX_REASON), said.ConsoleData(1, bytes(said.CHUNK)),
        said.Hello("migrate", "h" * 64, ["c" * 32] * 64), BlobPiece("f" * 64, 1 << 36, bytes(said.PIECE)),
        Digests(0, bytes(said.DIGESTS * said.DIGEST_ROW))]
    for message in long:
        data = encode(message)
        assert decoded(data) == message
        assert len(data) - HEADER.size <= max(limits_of(frozenset({type(message)})).values())


@pytest.mark.parametrize(("message", "why"), [
    (said.Resolve("x"), "Resolve|match"), (said.Resolve("0" * 31), "match"),
    (said.Resolve("0" * 32 + "\n"), "match"), (said.Cancel("two\nlines"), "match"),
    (said.Cancel("\x1b[2J"), "match"), (said.Cancel("x" * 1001), "length"),
    (said.Want([]), "length"), (said.Want([0] * 65), "length"), (said.Want([said.MAX_PAGES]), "int"),
    (said.Want([-1]), "int"), (said.RoundEnd(0), "int"), (said.Attach("../web"), "match"),
    (said.Join(TOKEN, 16), "int"), (said.Commit(TOKEN, -1), "int"),
    (said.Hello("dance", "", []), "dance"), (said.Hello("migrate", "", ["a" * 33]), "length"),  # type: ignore
    (said.Hello("migrate", "", ["a"] * 65), "length"), (said.Missing(0, bytes(129)), "length"),
    (msgspec.structs.replace(OFFER, memory_bytes=(1 << 20) + 1), "multiple"),
    (msgspec.structs.replace(OFFER, memory_bytes=1 << 40), "int"),
    (msgspec.structs.replace(OFFER, name="WEB"), "match"),
    (msgspec.structs.replace(OFFER, blobs=[("f" * 63, 1)]), "match"),
    (msgspec.structs.replace(OFFER, blobs=[("f" * 64, -1)]), "int"),
    (msgspec.structs.replace(OFFER, cpu=[(1 << 32, 0, 0, 0, 0, 0)]), "int"),
    (msgspec.structs.replace(OFFER, cpu=[(0,) * 5]), "length"),
])
def test_a_message_out_of_its_bounds_is_refused(message: said.Control, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        decoded(encode(message))


@pytest.mark.parametrize("payload", [
    b"", b"\xc1", b"\xc0", b"\x80", b"\x90", b"\x91\xa3abc", b"\x91\xa9\x1b[2Jabcde", b"\x91" * 4096,
    msgspec.msgpack.encode(["Ready", TOKEN, 1]), msgspec.msgpack.encode(["Ready"]),
    msgspec.msgpack.encode(["Ready", TOKEN]) + b"\x00"])
def test_what_is_no_message_is_refused_in_one_printable_sentence(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a message") as caught:
        decoded(frame(Kind.CONTROL, payload))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(("kind", "payload"), [
    (Kind.DIGESTS, bytes(4)), (Kind.DIGESTS, bytes(23)), (Kind.BLOB, bytes(40)), (Kind.BLOB, b"")])
def test_a_binary_frame_without_contents_is_refused(kind: Kind, payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        decoded(frame(kind, payload))


def test_what_is_too_long_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="Final has"):
        encode(said.Final(bytes(12 << 20), b"", False))


@given(st.text())
def test_any_text_can_be_a_reason(text: str) -> None:
    message = said.Cancel(reason_of(text))
    assert decoded(encode(message)) == message


# --- versions and fitness -----------------------------------------------------------------------------------

@pytest.mark.parametrize(("ours", "theirs", "version"), [
    ((1, 1), (1, 1), 1), ((2, 1), (1, 1), 1), ((2, 1), (2, 1), 2), ((2, 1), (3, 2), 2), ((2, 1), (9, 1), 2)])
def test_two_hosts_speak_the_highest_version_both_know(ours: tuple[int, int], theirs: tuple[int, int],
                                                       version: int) -> None:
    assert common_version(Spoken(*ours), Spoken(*theirs)) == version
    assert common_version(Spoken(*theirs), Spoken(*ours)) == version


@pytest.mark.parametrize(("ours", "theirs"), [((1, 1), (3, 2)), ((4, 3), (2, 1))])
def test_hosts_too_far_apart_do_not_speak(ours: tuple[int, int], theirs: tuple[int, int]) -> None:
    with pytest.raises(ProtocolError, match="update the older of them"):
        common_version(Spoken(*ours), Spoken(*theirs))


HOST = HostProfile(frozenset({"hw", "bt"}), tsc_khz=OFFER.tsc_khz)


def more(leaf: int, register: int, bits: int) -> said.Offer:
    """The offer of a guest that was shown more features."""
    words = [list(words) for words in shown("hw")]
    if leaf not in [words[0] for words in words]:
        words.append([leaf, 0, 0, 0, 0, 0])
    for row in words:
        if row[0] == leaf:
            row[2 + register] |= bits
    return msgspec.structs.replace(OFFER, cpu=[tuple(row) for row in words])


@pytest.mark.parametrize(("offer", "host", "why"), [
    (OFFER, HOST, None),
    (msgspec.structs.replace(OFFER, cpu=[]), HOST, None),
    (OFFER, HostProfile(frozenset({"hw"}), round(OFFER.tsc_khz * 1.0005)), None),
    (OFFER, HostProfile(frozenset({"hw"}), round(OFFER.tsc_khz * 1.0006)), "500 ppm"),
    (OFFER, HostProfile(frozenset({"hw"}), round(OFFER.tsc_khz * 0.9994)), "500 ppm"),
    (OFFER, HostProfile(frozenset({"bt"}), OFFER.tsc_khz), "monitor hw"),
    (msgspec.structs.replace(OFFER, state_version=2), HOST, "version 2"),
    (more(7, 1, 1 << 20), HOST, "smap"),
    (more(1, 2, 1 << 28 | 1 << 0), HOST, r"with CPUID 0x1\.ecx\[28\], which"),
    (more(0xD, 0, 7), HOST, r"0xd\.eax\[0\], CPUID 0xd\.eax\[1\]"),
])
def test_a_guest_goes_where_it_fits(offer: said.Offer, host: HostProfile, why: str | None) -> None:
    sentence = unfit(offer, host)
    if why is None:
        assert sentence is None
    else:
        with pytest.raises(ProtocolError, match=why):
            raise ProtocolError(sentence)
