# SPDX-License-Identifier: GPL-2.0-or-later
"""Consoles of guests that went to another host: relayed over real connections between hosts in memory."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from hostd import serving, sockets
from hostd.api import make_app
from hostd.api.console import shortened
from hostd.config import Config
from hostd.errors import Failed, NotFound
from hostd.lifecycle import State
from hostd.line import Line
from hostd.migration import links, relay
from hostd.migration.conversation import Conversation, answer
from hostd.migration.departures import Departed
from hostd.migration.links import Link, LinkBroken, peer_name
from hostd.migration.messages import Attach, Bye, ConsoleData, encode
from hostd.migration.peers import Peer
from hostd.migration.relay import line_to, serve_console
from hostd.model import VmCreate
from tests.memory_host import Guest, MemoryHost

#: nothing here takes longer than this, unless it is broken
SOON = 10.0
Serve = Callable[[Conversation], Awaitable[None]]


@asynccontextmanager
async def listening(serve: Serve) -> AsyncIterator[str]:
    """A host's listener for migrations, which knows consoles only; the value is its address."""
    async def handler(link: Link, admit: Callable[[], None]) -> None:
        talk, purpose = await answer(link, ())
        assert purpose == "console"
        admit()
        await serve(talk)

    listener = sockets.tcp_listener("127.0.0.1", 0)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(links.serve, listener, handler, lambda: None, 8))
        yield peer_name(*listener.getsockname()[:2])
        nursery.cancel_scope.cancel()


class Hosts:
    """Hosts that listen, and one guest, on the first of them."""

    def __init__(self, hosts: list[MemoryHost], addresses: list[str]) -> None:
        self.all = hosts
        self.addresses = addresses
        self.at = 0
        self.guest = hosts[0].guests["web"] = Guest(VmCreate(name="web"), State.RUNNING)

    def move(self, to: int, meanwhile: bytes = b"") -> None:
        """As a migration does it: where it went is known before the console closes, and the console goes on
        there where it ended here."""
        source, target = self.all[self.at], self.all[to]
        old = source.guests["web"].console
        self.guest = Guest(VmCreate(name="web"), State.RUNNING)
        self.guest.console.load(old.scrollback(), old.written, old.boot)
        target.guests["web"] = self.guest
        target.migrations.gone.pop("web", None)
        source.migrations.gone["web"] = Departed(self.addresses[to], "t" * 32)
        del source.guests["web"]
        old.close()
        self.guest.console.write(meanwhile)
        self.at = to


@pytest.fixture
async def hosts() -> AsyncIterator[Hosts]:
    async with trio.open_nursery() as nursery:
        all = [MemoryHost(nursery) for _ in range(3)]
        for host in all:
            host.config = Config()
        serve = [partial(serve_console, host=host) for host in all]
        async with listening(serve[0]) as a, listening(serve[1]) as b, listening(serve[2]) as c:
            yield Hosts(all, [a, b, c])
        nursery.cancel_scope.cancel()


def nobody() -> str:
    """An address where nobody listens."""
    with sockets.tcp_listener("127.0.0.1", 0) as taken:
        return peer_name(*taken.getsockname()[:2])


async def read(line: Line, count: int) -> bytes:
    data = b""
    with trio.fail_after(SOON):
        while len(data) < count:
            data += await line.receive()
    return data


async def end(line: Line) -> tuple[str, bool]:
    """What the line says when it ends, with nothing before."""
    with trio.fail_after(SOON):
        assert await line.receive() == b""
    return line.farewell()


async def test_a_guest_is_found_where_it_went(hosts: Hosts) -> None:
    hosts.guest.console.write(b"boot 1\n")
    hosts.guest.console.mark_boot()
    hosts.guest.console.write(b"boot 2\n")
    hosts.move(1)
    async with line_to(hosts.all[0], "web", None) as line:
        assert line.position == 7
        assert await read(line, 7) == b"boot 2\n"
        hosts.guest.console.write(b"more")
        assert await read(line, 4) == b"more"
        assert line.position == 18
        await line.type(b"typed")
        assert await read(line, 5) == b"typed"              # it echoes
    async with line_to(hosts.all[0], "web", 3) as line:
        assert (line.position, await read(line, 20)) == (3, b"t 1\nboot 2\nmoretyped")
    async with line_to(hosts.all[0], "web", 10**9) as line:
        hosts.guest.console.write(b"!")
        assert await read(line, 1) == b"!"


async def test_much_output_comes_whole_and_in_order(hosts: Hosts) -> None:
    hosts.move(1)
    lines = b"".join(b"%07d\n" % number for number in range(20_000))
    async with line_to(hosts.all[0], "web", None) as line:
        hosts.guest.console.write(lines)
        assert await read(line, len(lines)) == lines


async def test_a_line_ends_when_the_guest_moves_on_and_the_next_one_goes_on(hosts: Hosts) -> None:
    first, second, _ = hosts.all
    async with line_to(first, "web", None) as line:
        hosts.guest.console.write(b"1")
        assert await read(line, 1) == b"1"
        hosts.move(1, b"2")
        assert await end(line) == ("the VM is migrating", True)
        position = line.position
    async with line_to(first, "web", position) as line:
        assert await read(line, 1) == b"2"
        hosts.move(2, b"3")
        assert await end(line) == ("the VM is migrating", True)
        position = line.position
    async with line_to(first, "web", position) as line:     # the second host relays to the third
        assert await read(line, 1) == b"3"
        hosts.move(0, b"4")
        assert await end(line) == ("the VM is migrating", True)
        position = line.position
    async with line_to(first, "web", position) as line:
        assert await read(line, 1) == b"4"
    async with line_to(second, "web", None) as line:         # from there it is two hosts away
        assert await read(line, 4) == b"1234"


async def test_a_guest_whose_memory_is_still_here_is_where_it_runs(hosts: Hosts) -> None:
    left = hosts.all[0].guests["web"]
    hosts.move(1, b"there")
    left.state = State.MIGRATING
    hosts.all[0].guests["web"] = left
    async with line_to(hosts.all[0], "web", None) as line:
        assert await read(line, 5) == b"there"
    left.state = State.RUNNING                              # a new one of that name
    async with line_to(hosts.all[0], "web", None) as line:
        left.console.write(b"here")
        assert await read(line, 4) == b"here"


async def test_a_guest_that_is_gone_is_gone(hosts: Hosts) -> None:
    hosts.move(1)
    async with line_to(hosts.all[0], "web", None) as line:
        hosts.all[1].guests.pop("web").console.close()
        assert await end(line) == ("the VM is gone", False)
    with pytest.raises(NotFound, match=r"VM web went to 127.0.0.1:\d+, which says: no VM 'web'"):
        async with line_to(hosts.all[0], "web", None):
            pass
    with pytest.raises(NotFound, match="no VM 'other'"):
        async with line_to(hosts.all[0], "other", None):
            pass


async def test_keys_for_a_guest_that_is_off_are_lost_and_the_line_stays(
        hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts.move(1)
    there = hosts.all[1]
    typed = trio.Event()
    send_input = there.send_input

    async def watched(name: str, data: bytes) -> None:
        typed.set()
        await send_input(name, data)

    monkeypatch.setattr(there, "send_input", watched)
    async with line_to(hosts.all[0], "web", None) as line:
        hosts.guest.state = State.HALTED
        await line.type(b"nobody")
        with trio.fail_after(SOON):
            await typed.wait()
        hosts.guest.state = State.RUNNING
        await line.type(b"x" * (200 << 10))                  # more than one message may have
        assert await read(line, 200 << 10) == b"x" * (200 << 10)


async def test_nothing_is_left_of_a_visitor_who_left(hosts: Hosts) -> None:
    hosts.move(1)
    for how in ("politely", "cancelled"):
        with trio.CancelScope() as scope:
            async with line_to(hosts.all[0], "web", None):
                assert hosts.guest.console._readers
                if how == "cancelled":
                    scope.cancel()
                    await trio.sleep_forever()
        with trio.fail_after(SOON):
            while hosts.guest.console._readers:
                await trio.testing.wait_all_tasks_blocked(0.01)


async def test_a_host_that_cannot_be_reached_is_named(hosts: Hosts) -> None:
    closed = nobody()
    hosts.all[0].migrations.gone["gone"] = Departed(closed, "t" * 32)
    with pytest.raises(LinkBroken, match=f"cannot connect to {closed}"):
        async with line_to(hosts.all[0], "gone", None):
            pass


@asynccontextmanager
async def sent_to(serve: Serve) -> AsyncIterator[MemoryHost]:
    """A host whose guest went where `serve` answers for consoles."""
    host = MemoryHost(None)
    host.config = Config()
    async with listening(serve) as address:
        host.migrations.gone["web"] = Departed(address, "t" * 32)
        yield host


async def test_a_connection_that_breaks_is_worth_another_attempt() -> None:
    async def breaks(talk: Conversation) -> None:
        assert await talk.receive() == Attach("web", 5)
        await talk.send(ConsoleData(5, b"half"))

    async with sent_to(breaks) as host, line_to(host, "web", 5) as line:
        assert await read(line, 4) == b"half"
        reason, come_back = await end(line)
        assert come_back and "closed the connection" in reason


async def test_a_host_that_has_the_console_go_back_is_not_believed() -> None:
    async def goes_back(talk: Conversation) -> None:
        await talk.receive()
        await talk.send(ConsoleData(5, b"five"))
        await talk.link.send(encode(ConsoleData(3, b"three")))
        await trio.sleep_forever()

    async with sent_to(goes_back) as host, line_to(host, "web", 5) as line:
        assert await read(line, 4) == b"five"
        assert await end(line) == ("console data came for position 3, after 9", False)


async def test_a_host_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def says_nothing(talk: Conversation) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(relay, "ANSWER_S", 0.05)
    async with sent_to(says_nothing) as host:
        with pytest.raises(LinkBroken, match="does not answer"):
            async with line_to(host, "web", 5):
                pass


async def test_a_visitor_may_change_his_mind(hosts: Hosts) -> None:
    peer = Peer(hosts.addresses[0], Config().migration)
    async with peer.open("console") as talk:
        await talk.send(Bye("changed my mind"))
        with pytest.raises(Failed), trio.fail_after(SOON):
            await talk.receive()


async def test_hostctl_console_follows_a_counting_guest_back_and_forth(hosts: Hosts, tmp_path: Path) -> None:
    socket = tmp_path / "hostd.sock"
    api = sockets.unix_listener(socket, 0o600)
    words = [sys.executable, "-c", "from hostd.cli import main; main(prog_name='hostctl')",
             "--socket", str(socket), "console", "web"]
    closing = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(serving.serve, make_app(hosts.all[0]), api, closing)
        process = await trio.lowlevel.open_process(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdin and process.stdout and process.stderr
        seen = b""
        with trio.fail_after(SOON):
            for number, place in enumerate((0, 1, 2, 1, 0, 1)):
                if place != hosts.at:
                    hosts.move(place, b"c %d\n" % number)
                else:
                    hosts.guest.console.write(b"c %d\n" % number)
                while b"c %d\n" % number not in seen:
                    seen += await process.stdout.receive_some()
                await process.stdin.send_all(b"typed %d\n" % number)
                while b"typed %d\n" % number not in seen:
                    seen += await process.stdout.receive_some()
            hosts.move(2, b"c 6\n")                         # from where it cannot be reached at first
            hosts.all[1].migrations.gone["web"] = Departed(nobody(), "t" * 32)
            remarks = b""
            while remarks.count(b"reconnecting") < 6:
                remarks += await process.stderr.receive_some()
            hosts.all[1].migrations.gone["web"] = Departed(hosts.addresses[2], "t" * 32)
            while b"c 6\n" not in seen:
                seen += await process.stdout.receive_some()
            await process.stdin.aclose()                    # the end of the input ends the attachment
            assert await process.wait() == 0
        assert re.findall(rb"c (\d+)\n", seen) == [b"%d" % number for number in range(7)]
        assert re.findall(rb"typed (\d+)\n", seen) == [b"%d" % number for number in range(6)]
        assert remarks.count(b"[the VM is migrating, reconnecting]") == 6
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("reason", ["", "the VM is gone", "x" * 123, "x" * 124, "\N{GRINNING FACE}" * 60])
def test_a_reason_fits_into_a_close_frame(reason: str) -> None:
    short = shortened(reason)
    assert len(short.encode()) <= 123
    assert short == reason or (short.endswith("...") and reason.startswith(short[:-3]))
