# SPDX-License-Identifier: GPL-2.0-or-later
"""A real daemon is told what a real source once said, changed at random: it stays up, and nothing is left.

The word Commit is left out.  A guest whose pages are changed on the way is a guest like any other; up to that
word it is nobody's here.
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostd.migration.wire import HEADER, PREAMBLE, Kind
from tests.migration_guests import witness
from tests.migration_wire import wire
from tests.private_daemon import SOON
from tests.two_hosts import MigratingDaemon, TwoHosts, two_hosts

pytestmark = pytest.mark.slow

#: words that the other end answers before the source goes on, and what it says then
ANSWERS = {"Hello": b"Welcome", "Offer": b"Accept", "DIGESTS": b"Missing", "RoundEnd": b"RoundDone",
           "Final": b"Ready"}
#: for an answer to something that may have none
PATIENCE_S = 0.05
#: the daemon may grow by so much while it is told nonsense
MOST_GROWTH = 48 << 20


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """`b` has a guest `twin`, booted from what `vm` was booted from: what is told by name may be its."""
    with two_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        hosts.b.create("twin", witness(40, 20), start=True)
        hosts.b.wait("twin", console=r"(.*\n){5}")
        hosts.b.do("twin", "pause")
        yield hosts
        hosts.clear()


@pytest.fixture(scope="module")
def recordings(hosts: TwoHosts) -> list[list[bytes]]:
    """What the source said on its connection, frame by frame from the preamble on up to Commit: of a guest
    that was sent before it was handed over, and of one whose pages follow."""
    found = []
    hosts.a.create("vm", witness(40, 20), start=True)
    hosts.a.wait("vm", console="\n")
    for mode in "precopy", "postcopy":
        with wire(hosts.b.address) as line:
            hosts.a.migrate("vm", line.address, mode=mode)
            said = frames(bytes(line.said[0]))
        found.append(said[:[word(frame) for frame in said].index("Commit")])
        hosts.there("vm")
    hosts.a.clear()
    words = {word(frame) for said in found for frame in said}
    assert words == {"preamble", "Hello", "Offer", "DIGESTS", "PAGES", "RoundEnd", "Final"}, words
    return found


def frames(said: bytes) -> list[bytes]:
    """The preamble and all frames."""
    found, at = [said[:PREAMBLE.size]], PREAMBLE.size
    while at < len(said):
        end = at + HEADER.size + HEADER.unpack_from(said, at)[0]
        found.append(said[at:end])
        at = end
    return found


def word(frame: bytes) -> str:
    """What a frame is: a kind, or the name of a message."""
    if len(frame) == PREAMBLE.size:
        return "preamble"
    kind = Kind(frame[4])
    return msgspec.msgpack.decode(frame[HEADER.size:])[0] if kind is Kind.CONTROL else kind.name


#: what is done to which frame, and a seed for all else that has to be chosen
CHANGES = st.lists(
    st.tuples(st.sampled_from(["flip", "fill", "cut", "grow", "drop", "double", "swap", "end", "length"]),
              st.integers(0, 1000), st.integers(0, 1 << 32)),
    min_size=1, max_size=3)


def changed(said: list[bytes], changes: list[tuple[str, int, int]]) -> list[bytes]:
    """What is sent instead."""
    said = list(said)
    for what, which, seed in changes:
        draw = random.Random(seed)
        # with a preamble that is none all is over
        number = which % len(said) or (seed % 4 and len(said) - 1)
        data = bytearray(said[number])
        at = draw.randrange(len(data) or 1)
        match what:
            case "flip":
                data[at:at + 1] = bytes([draw.randrange(256)])
            case "fill":
                data[at:at + 64] = draw.randbytes(len(data[at:at + 64]))
            case "cut":
                del data[at:]
            case "grow":
                data[at:at] = draw.randbytes(draw.randrange(1, 5000))
            case "drop":
                data.clear()
            case "double":
                data *= 2
            case "swap":
                other = draw.randrange(len(said))
                said[number], said[other] = said[other], said[number]
                continue
            case "length":
                data[:4] = draw.choice([bytes(4), b"\xff" * 4, (len(data) * 2).to_bytes(4, "little")])
            case "end":
                said = said[:number + 1]
        said[number] = bytes(data)
    return said


def tell(daemon: MigratingDaemon, said: list[bytes], answers: list[bytes], patience: float) -> bytes:
    """Say it, and wait for the answers there once were; what came back."""
    host, _, port = daemon.address.rpartition(":")
    heard = b""
    with (socket.create_connection((host, int(port)), timeout=patience) as caller,
          suppress(BrokenPipeError, ConnectionResetError)):
        for data, answer in zip(said, answers):
            caller.sendall(data)
            before = heard.count(answer)
            with suppress(TimeoutError):
                while answer and heard.count(answer) == before:
                    if not (more := caller.recv(1 << 16)):
                        return heard
                    heard += more
    return heard


def answers(said: list[bytes]) -> list[bytes]:
    """To each frame, b"" where there is none."""
    return [ANSWERS.get(word(frame), b"") for frame in said]


def anonymous(daemon: MigratingDaemon) -> int:
    """Bytes of the daemon's own memory."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def settled(hosts: TwoHosts, unused: int) -> None:
    """Wait until nothing is left at `b` but the twin."""
    daemon, deadline = hosts.b, time.monotonic() + SOON
    while True:
        under_way = [view for view in daemon.get("/migrations")
                     if view["phase"] not in ("done", "failed", "cancelled")]
        counts = daemon.get("/host")["frames"]
        if not under_way and counts["free"] + counts["granted"] == unused:
            break
        assert time.monotonic() < deadline, (under_way, counts)
    assert daemon.names() == ["twin"] and daemon.records() == []


@pytest.mark.parametrize("number", [0, 1])
def test_what_was_said_is_heard_up_to_the_last_word(hosts: TwoHosts, recordings: list[list[bytes]],
                                                    number: int) -> None:
    """Or else the changes would be of no interest."""
    said = recordings[number]
    counts = hosts.b.get("/host")["frames"]
    heard = tell(hosts.b, said, answers(said), SOON)
    settled(hosts, counts["free"] + counts["granted"])
    assert all(answer in heard for answer in answers(said))


@pytest.mark.parametrize("number", [0, 1])
def test_a_source_that_says_anything(hosts: TwoHosts, recordings: list[list[bytes]], number: int) -> None:
    said, daemon = recordings[number], hosts.b
    counts = daemon.get("/host")["frames"]
    unused, before = counts["free"] + counts["granted"], anonymous(daemon)
    due = answers(said)

    @settings(max_examples=100, derandomize=True, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))
    @given(CHANGES)
    def run(changes: list[tuple[str, int, int]]) -> None:
        tell(daemon, changed(said, changes), due, PATIENCE_S)
        settled(hosts, unused)

    run()
    assert daemon.is_balanced()
    assert anonymous(daemon) < before + MOST_GROWTH
    assert "Traceback" not in daemon.said() and "exception" not in daemon.said().lower()
    # and it is as good as ever
    hosts.a.create("vm", witness(40, 20), start=True)
    hosts.a.wait("vm", console="\n")
    hosts.there("vm")
    operation = hosts.b.client.delete("/vms/vm", params={"force": "true"}).json()
    assert hosts.b.ended(operation)["status"] == "done"
