# SPDX-License-Identifier: GPL-2.0-or-later
"""Connections between hosts: who gets in, what a broken one says, what it leaves behind."""

from __future__ import annotations

import logging
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
import trustme

from hostd import sockets
from hostd.config import TlsSection, parse
from hostd.errors import ConfigError, Conflict, HostError, Invalid
from hostd.migration import links, security
from hostd.migration.links import PIECE, Bandwidth, Link, LinkBroken, dial, serve
from hostd.migration.security import Tls, Untrusted

KEYS = ("certificate", "key", "ca")


class Hosts:
    """Certificates of a CA, as files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ca = trustme.CA()
        self.ca.cert_pem.write_to_path(directory / "ca")

    def section(self, *names: str, ca: trustme.CA | None = None, **dates: datetime) -> TlsSection:
        leaf = (ca or self.ca).issue_cert(*names, **dates)
        leaf.private_key_pem.write_to_path(self.directory / "key")
        leaf.cert_chain_pems[0].write_to_path(self.directory / "certificate")
        return TlsSection(**{key: str(self.directory / key) for key in KEYS})

    def tls(self, *names: str, ca: trustme.CA | None = None, **dates: datetime) -> Tls:
        tls = security.load(self.section(*names, ca=ca, **dates))
        assert tls is not None
        return tls


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Hosts:
    return Hosts(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def good(hosts: Hosts) -> Tls:
    return hosts.tls("127.0.0.1", "localhost")


async def echo(link: Link, admit: Callable[[], None]) -> None:
    while data := await link.receive():
        admit()
        await link.send(data)


@asynccontextmanager
async def listening(handler: links.Handler = echo, tls: Tls | None = None,
                    limit: int = 4) -> AsyncIterator[int]:
    """A host that listens; the answer is its port."""
    with sockets.tcp_listener("127.0.0.1", 0) as listener:
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve, listener, handler, lambda: tls, limit))
            yield listener.getsockname()[1]
            nursery.cancel_scope.cancel()


def open_sockets() -> list[str]:
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return sorted(target for link in links if os.path.lexists(link)
                  for target in [os.readlink(link)] if target.startswith("socket:"))


# --- who gets in --------------------------------------------------------------------------------------------

async def ends_of(server: Tls | None, client: Tls | None, host: str = "127.0.0.1") -> tuple[str, str]:
    """What the caller and the called one say of a connection between them; "" where nothing is wrong."""
    called = ""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            nonlocal called
            called = record.__dict__["why"]

    listener = Listener()
    links.log.addHandler(listener)
    try:
        async with listening(tls=server) as port:
            try:
                async with await dial(host, port, client) as link:
                    await link.send(b"hello")
                    caller = "" if await link.receive() == b"hello" else "closed"
            except HostError as error:
                caller = str(error).replace(f"{host}:{port}", "HOST")
            await trio.testing.wait_all_tasks_blocked(0.02)
    finally:
        links.log.removeHandler(listener)
    return caller, called.partition(": ")[2] or called


async def test_hosts_of_one_ca_talk(good: Tls) -> None:
    assert await ends_of(good, good) == ("", "")
    assert await ends_of(good, good, "localhost") == ("", "")


async def test_strangers_are_refused_and_both_ends_say_why(hosts: Hosts, good: Tls) -> None:
    wrong = hosts.tls("127.0.0.1", ca=trustme.CA())
    past = datetime.now(UTC) - timedelta(days=2)
    expired = hosts.tls("127.0.0.1", not_before=past, not_after=past + timedelta(days=1))
    elsewhere = hosts.tls("elsewhere.example")
    nobody = Tls(good.server, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    nobody.client.load_verify_locations(hosts.directory / "ca")
    old = Tls(good.server, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    old.client.maximum_version = ssl.TLSVersion.TLSv1_2
    unknown = "its certificate is not accepted: unable to get local issuer certificate"
    outdated = "its certificate is not accepted: certificate has expired"
    no = "no connection with HOST: "
    assert {name: await ends_of(server, client) for name, server, client in (
        ("wrong CA there", wrong, good), ("wrong CA here", good, wrong), ("expired there", expired, good),
        ("expired here", good, expired), ("no certificate", good, nobody), ("wrong name", elsewhere, good),
        ("old TLS", good, old))} == {
        "wrong CA there": (no + unknown, "it does not know the CA of this host's certificate"),
        "wrong CA here": (no + "it does not know the CA of this host's certificate", unknown),
        "expired there": (no + outdated, "this host's certificate has expired"),
        "expired here": (no + "this host's certificate has expired", outdated),
        "no certificate": (no + "it wants a certificate, and this host has shown none",
                           "it shows no certificate"),
        "wrong name": (no + "its certificate is not accepted: IP address mismatch, certificate is not valid "
                       "for '127.0.0.1'", "it does not accept this host's certificate"),
        "old TLS": (no + "it does not speak TLS 1.3", "it does not speak TLS 1.3"),
    }


async def test_who_speaks_no_tls_gets_no_further(good: Tls) -> None:
    async def greet(link: Link, admit: Callable[[], None]) -> None:
        await link.send(b"good day")
        await link.receive()

    assert await ends_of(good, None) == ("closed", "it does not speak TLS")
    async with listening(greet) as port:
        with pytest.raises(Untrusted, match=r"^no connection with .*: it does not speak TLS$"):
            await dial("127.0.0.1", port, good)


async def test_nothing_goes_to_another_machine_in_plain() -> None:
    for host in "192.0.2.1", "::ffff:192.0.2.1", "::":
        with pytest.raises(Invalid, match="is another machine, and this host has no certificate"):
            await dial(host, 9178, None)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_what_is_this_machine(host: str) -> None:
    assert security.is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "web", "localhost.example", "", "127.1"])
def test_what_may_be_another(host: str) -> None:
    assert not security.is_loopback(host)


async def test_nobody_there() -> None:
    with sockets.tcp_listener("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(LinkBroken, match=rf"^cannot connect to 127.0.0.1:{port}: Connection refused$"):
        await dial("127.0.0.1", port, None)
    with pytest.raises(LinkBroken, match=r"^cannot find a\.\.b: it is no host name$"):
        await dial("a..b", port, None)


async def test_one_that_does_not_answer_is_given_up(good: Tls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "HANDSHAKE_S", 0.01)
    silent = sockets.tcp_listener("127.0.0.1", 0)
    with silent, pytest.raises(LinkBroken, match="did not finish the TLS handshake"):
        await dial("127.0.0.1", silent.getsockname()[1], good)


# --- configuration ------------------------------------------------------------------------------------------

def test_certificates_are_told_by_their_keys(hosts: Hosts, tmp_path: Path) -> None:
    section = hosts.section("a")
    empty = tmp_path / "empty"
    empty.write_text("nothing")
    other = tmp_path / "other"
    hosts.ca.issue_cert("b").private_key_pem.write_to_path(other)
    files = {key: getattr(section, key) for key in KEYS}
    for changes, sentence in [
        ({"ca": ""}, "migration.tls.ca: is missing; certificate, key and ca go together"),
        ({"key": "key.pem"}, "migration.tls.key: must be an absolute path, got 'key.pem'"),
        ({"key": "/absent"}, "migration.tls.key: cannot read /absent: No such file or directory"),
        ({"certificate": str(empty)}, f"migration.tls.certificate: no certificate in PEM in {empty}"),
        ({"ca": str(empty)}, f"migration.tls.ca: no certificate in PEM in {empty}"),
        ({"key": str(empty)}, f"migration.tls.key: there is no unencrypted key in PEM in {empty}"),
        ({"key": str(other)}, "migration.tls.key: it is not the key of migration.tls.certificate"),
    ]:
        lines = "".join(f'{key} = "{file}"\n' for key, file in (files | changes).items())
        with pytest.raises(ConfigError) as failure:
            parse("[migration.tls]\n" + lines)
        assert str(failure.value) == sentence


def test_an_address_for_all_needs_certificates(hosts: Hosts) -> None:
    section = hosts.section("a")
    everywhere = '[migration]\naddress = "0.0.0.0:9178"\n'
    with pytest.raises(ConfigError, match=r"^migration.address: without \[migration.tls\] it must be"):
        parse(everywhere)
    parse(everywhere + "allow_plain = true")
    files = "".join(f'{key} = "{getattr(section, key)}"\n' for key in KEYS)
    assert parse(everywhere + "[migration.tls]\n" + files).migration.bind() == ("0.0.0.0", 9178)
    assert parse('[migration]\naddress = "[::1]:0"').migration.bind() == ("::1", 0)


# --- links --------------------------------------------------------------------------------------------------

def link_pair(*limits: Bandwidth) -> tuple[Link, Link]:
    left, right = trio.testing.memory_stream_pair()
    return Link(left, "right", limits), Link(right, "left")


async def send_always(link: Link) -> None:
    while True:
        await link.send(bytes(100_000))


async def receive_always(link: Link) -> None:
    while True:
        await link.receive()


async def test_bytes_are_counted_and_the_end_is_seen() -> None:
    left, right = link_pair()
    async with right:
        async with left:
            await left.send(b"abc")
            await left.send(b"")
        assert await right.receive() == b"abc"
        assert await right.receive() == b""
    assert (left.sent, right.received, right.sent) == (3, 3, 0)
    with pytest.raises(LinkBroken, match="the connection with left was closed"):
        await right.receive()


async def test_what_several_send_does_not_mix() -> None:
    left, right = link_pair(Bandwidth(1 << 30))
    size = 3 * PIECE + 1
    async with left, right, trio.open_nursery() as nursery:
        for letter in b"abc":
            nursery.start_soon(left.send, bytes([letter]) * size)
        got = b""
        while len(got) < 3 * size:
            got += await right.receive()
    runs = [set(got[start:start + size]) for start in range(0, 3 * size, size)]
    assert sorted(runs, key=min) == [{letter} for letter in b"abc"]


async def test_half_a_frame_is_followed_by_nothing() -> None:
    near, far = trio.testing.lockstep_stream_pair()             # nothing is sent before it is received
    link = Link(near, "right")
    async with far, trio.open_nursery() as nursery:
        nursery.start_soon(link.send, b"x" * 100)
        await far.receive_some(1)
        nursery.cancel_scope.cancel()
    with pytest.raises(LinkBroken, match="the connection with right is broken"):
        await link.send(b"y")
    await link.aclose()


async def test_a_stream_cut_short_is_no_end(good: Tls) -> None:
    async def cut(link: Link, admit: Callable[[], None]) -> None:
        await link.receive()
        await trio.aclose_forcefully(link._stream)

    async with listening(cut, good) as port, await dial("127.0.0.1", port, good) as link:
        await link.send(b"x")
        with pytest.raises(LinkBroken, match=r"^the connection with .*:\d+ broke: it ended in the middle$"):
            await link.receive()


@pytest.mark.parametrize("encrypted", [True, False])
async def test_last_words_arrive_at_one_that_is_talking(encrypted: bool, good: Tls) -> None:
    """The one that leaves has not read all that was sent to it."""
    async def leave(link: Link, admit: Callable[[], None]) -> None:
        await link.receive()
        await link.send(b"no memory")

    tls = good if encrypted else None
    async with (listening(leave, tls) as port, await dial("127.0.0.1", port, tls) as link,
                trio.open_nursery() as nursery):
        nursery.start_soon(send_always, link)
        assert await link.receive() == b"no memory"
        nursery.cancel_scope.cancel()


# --- those who come in --------------------------------------------------------------------------------------

async def test_what_breaks_one_connection_breaks_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(link: Link, admit: Callable[[], None]) -> None:
        data = await link.receive()
        if data == b"fail":
            raise RuntimeError("a mistake")
        await link.send(data)

    async with listening(handler) as port, await dial("127.0.0.1", port, None) as calm:
        async with await dial("127.0.0.1", port, None) as other:
            await other.send(b"fail")
            assert await other.receive() == b""
        await calm.send(b"still here")
        assert await calm.receive() == b"still here"
    assert [record.__dict__["why"] for record in caplog.records] == ["RuntimeError('a mistake')"]


@pytest.mark.parametrize("first", [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01"])
@pytest.mark.parametrize("encrypted", [True, False])
async def test_who_says_nothing_is_sent_away(first: bytes, encrypted: bool, good: Tls,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "HELLO_S", 0.02)

    async def listen(link: Link, admit: Callable[[], None]) -> None:
        while await link.receive():
            pass

    async with listening(listen, good if encrypted else None) as port:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            await stream.send_all(first)
            assert await stream.receive_some() == b""


async def test_who_is_admitted_has_time(monkeypatch: pytest.MonkeyPatch,
                                        autojump_clock: trio.testing.MockClock) -> None:
    async with listening() as port, await dial("127.0.0.1", port, None) as link:
        await link.send(b"a")
        assert await link.receive() == b"a"
        await trio.sleep(links.HELLO_S * 3)
        await link.send(b"b")
        assert await link.receive() == b"b"


async def test_there_are_so_many_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "NEWCOMERS", 2)
    refused: list[str] = []

    async def handler(link: Link, admit: Callable[[], None]) -> None:
        await link.receive()
        try:
            admit()
            admit()
        except Conflict as error:
            refused.append(str(error))
            raise
        await link.send(b"in")
        await link.receive()

    async def ask(link: Link) -> bytes:
        await link.send(b"?")
        return await link.receive()

    async with listening(handler, limit=1) as port:
        call: Callable[[], Awaitable[Link]] = partial(dial, "127.0.0.1", port, None)
        async with await call() as one, await call() as two:
            await trio.testing.wait_all_tasks_blocked(0.02)
            async with await call() as three:                   # the first two have said nothing yet
                assert await three.receive() == b""
            assert await ask(one) == b"in"
            assert await ask(two) == b""                        # there is one already
        await trio.testing.wait_all_tasks_blocked(0.02)
        async with await call() as four:
            assert await ask(four) == b"in"                     # it has left
    assert refused == ["1 connections are open already, which is the most there may be"]


# --- cancellation -------------------------------------------------------------------------------------------

class CancelAt(trio.abc.Instrument):
    """Cancels a scope when a task has been scheduled for the n-th time."""

    def __init__(self, task: trio.lowlevel.Task, scope: trio.CancelScope, step: int) -> None:
        self.task, self.scope, self.step = task, scope, step

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            self.step -= 1
            if self.step == 0:
                self.scope.cancel()


async def talk(port: int, tls: Tls | None) -> None:
    async with await dial("127.0.0.1", port, tls) as link:
        await link.send(b"x" * 100_000)
        got = 0
        while got < 100_000:
            got += len(await link.receive())


@pytest.mark.parametrize("encrypted", [True, False])
async def test_cancelled_anywhere_it_leaves_no_socket(encrypted: bool, good: Tls) -> None:
    """At every await of the caller; each time the one called must have noticed, too."""
    tls = good if encrypted else None
    before = open_sockets()
    for step in range(1, 1000):
        async with listening(tls=tls) as port:
            during = len(open_sockets())
            with trio.CancelScope() as scope:
                instrument = CancelAt(trio.lowlevel.current_task(), scope, step)
                trio.lowlevel.add_instrument(instrument)
                try:
                    await talk(port, tls)
                finally:
                    trio.lowlevel.remove_instrument(instrument)
            with trio.fail_after(5):
                while len(open_sockets()) > during:
                    await trio.testing.wait_all_tasks_blocked()
        assert open_sockets() == before
        if not scope.cancelled_caught:
            assert step > 5
            return


async def test_a_listener_that_ends_takes_its_connections_along(good: Tls) -> None:
    before = open_sockets()
    async with listening(tls=good) as port:
        silent = socket.create_connection(("127.0.0.1", port))
        link = await dial("127.0.0.1", port, good)
        await link.send(b"x")
        assert await link.receive() == b"x"
    silent.close()
    await link.aclose()
    assert open_sockets() == before
