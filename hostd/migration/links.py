# SPDX-License-Identifier: GPL-2.0-or-later
"""Connections between hosts: streams of bytes over TCP, in TLS where this host has a certificate.

What the bytes mean is the sessions' business (wire.py); here is how they get there: who may connect, for how
long a peer may say nothing, how fast it goes, and that no socket outlives its owner.
"""

from __future__ import annotations

import logging
import math
import os
import re
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from ipaddress import IPv6Address

import trio

from hostd.errors import Conflict, Failed, HostError, Invalid
from hostd.migration.security import Tls, Untrusted, check_plain, reason
from hostd.migration.views import DEFAULT_PORT

log = logging.getLogger(__name__)

#: seconds for finding and reaching the other host, and for the TLS handshake with it
CONNECT_S = 10.0
HANDSHAKE_S = 10.0
#: seconds that a connection may take from its first byte until its peer is admitted, TLS handshake included
HELLO_S = 10.0
#: connections at a time whose peers are not admitted yet
NEWCOMERS = 64
#: seconds to take leave of a peer
CLOSE_S = 1.0
#: a peer that acknowledges nothing for so many seconds is gone; a silent one is asked after IDLE_S
LOST_S = 30
IDLE_S, PROBE_S, PROBES = 15, 5, 3
#: bytes taken from the kernel at a time
RECEIVED = 256 << 10
#: under a limit, links take turns after so many bytes
PIECE = 32 << 10
#: a limit not used for so many seconds is made up for: wake-ups are late, the rate is to be right
BURST_S = 0.02

_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}")


class LinkBroken(Failed):
    """There is no connection, or no longer one.  Another attempt may succeed."""


class Bandwidth:
    """A limit to bytes a second, for all the links that share it.  It has no clock of its own.

    Invariant: in any t seconds no more than rate * (t + BURST_S) bytes and one piece a link are let go.
    """

    def __init__(self, rate: int) -> None:
        #: bytes a second; 0: no limit.  It may be changed at any time
        self.rate = rate
        self._free = -math.inf

    def take(self, now: float, size: int) -> float:
        """The time from which on `size` more bytes may go: in the order in which they were taken."""
        if not self.rate:
            return now
        start = max(self._free, now - BURST_S)
        self._free = start + size / self.rate
        return start


class Line(trio.abc.HalfCloseableStream):
    """A TCP connection whose last words arrive.

    If a socket is closed that has data which nobody read, the kernel resets the connection, and what was sent
    last is lost with it.  So what the peer still sends is read until it has noticed, for CLOSE_S at most.
    """

    def __init__(self, tcp: trio.SocketStream) -> None:
        self._tcp = tcp

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._tcp.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._tcp.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._tcp.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._tcp.receive_some(max_bytes)

    async def aclose(self) -> None:
        # it is cut off at once where nobody is there any more, or another task is still in it
        gone = suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError)
        try:
            with trio.move_on_after(CLOSE_S), gone:
                await self._tcp.send_eof()
                while await self._tcp.receive_some(RECEIVED):
                    pass
        finally:
            await trio.aclose_forcefully(self._tcp)


class Link(trio.abc.AsyncResource):
    """A connection to another host.  One task may receive, while any number send.

    Invariant: what one `send` was given goes out in one piece.  If it could not (the task was cancelled),
    half a frame is out, and nothing more is sent.
    """

    def __init__(self, stream: trio.abc.Stream, peer: str, limits: Sequence[Bandwidth] = ()) -> None:
        self.peer = peer
        #: bytes so far, without what TLS adds
        self.sent = 0
        self.received = 0
        self._stream = stream
        self._limits = limits
        self._turn = trio.StrictFIFOLock()
        self._whole = True

    async def send(self, data: bytes) -> None:
        """Send all of it, no faster than the limits allow.  Raises LinkBroken or Untrusted."""
        async with self._turn:
            if not self._whole:
                raise LinkBroken(f"the connection with {self.peer} is broken")
            self._whole = False
            with _told(self.peer):
                for piece in self._pieces(data):
                    await self._wait(len(piece))
                    await self._stream.send_all(piece)
                    self.sent += len(piece)
            self._whole = True

    async def receive(self) -> bytes:
        """Some bytes, none at the end of the stream.  Raises LinkBroken or Untrusted."""
        with _told(self.peer):
            data = bytes(await self._stream.receive_some(RECEIVED))
        self.received += len(data)
        return data

    async def aclose(self) -> None:
        """Take leave, which takes 2 * CLOSE_S at most.  What was sent arrives if the peer receives."""
        with trio.move_on_after(2 * CLOSE_S), suppress(trio.BrokenResourceError):
            await self._stream.aclose()

    def _pieces(self, data: bytes) -> Iterator[memoryview]:
        size = PIECE if any(limit.rate for limit in self._limits) else max(1, len(data))
        whole = memoryview(data)
        return (whole[start:start + size] for start in range(0, len(data), size))

    async def _wait(self, size: int) -> None:
        now = trio.current_time()
        start = max((limit.take(now, size) for limit in self._limits), default=now)
        if start > now:
            await trio.sleep_until(start)


def parse_peer(text: str) -> tuple[str, int]:
    """Host and port of "HOST[:PORT]", where HOST is a name, an IPv4 address, or an IPv6 address in brackets.

    Raises Invalid.
    """
    bracketed = re.fullmatch(r"\[(.*)\](?::(.*))?", text, re.DOTALL)
    if bracketed:
        host, port = bracketed[1], bracketed[2]
        with _named(f"{host!r} is no IPv6 address"):
            IPv6Address(host)
    else:
        host, colon, port_text = text.partition(":")
        port = port_text if colon else None
        if ":" in (port or ""):
            raise Invalid(f"expected HOST or HOST:PORT, with an IPv6 address in brackets, got {text!r}")
        if not _HOST.fullmatch(host):
            raise Invalid(f"{host!r} is no host name")
    if port is None:
        return host, DEFAULT_PORT
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536):
        raise Invalid(f"a port is a number from 1 to 65535, got {port!r}")
    return host, int(port)


@contextmanager
def _named(sentence: str) -> Iterator[None]:
    try:
        yield
    except ValueError:
        raise Invalid(sentence) from None


def peer_name(host: str, port: int) -> str:
    """What `parse_peer` takes apart."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def dial(host: str, port: int, tls: Tls | None, allow_plain: bool = False,
               limits: Sequence[Bandwidth] = ()) -> Link:
    """A link to the host that listens there, in TLS if this host has a certificate.

    Raises Invalid (nothing may go there in plain), LinkBroken, or Untrusted.  A peer that does not accept
    this host's certificate says so only when something is received from it: that is how TLS 1.3 goes.
    """
    tcp = await _connect(host, port, plain_anywhere=tls is not None or allow_plain)
    return await _open(tcp, peer_name(host, port), tls and tls.client, host.partition("%")[0], limits)


async def _connect(host: str, port: int, plain_anywhere: bool) -> trio.SocketStream:
    """TCP to the first of the host's addresses that answers."""
    peer = peer_name(host, port)
    why = f"no answer in {CONNECT_S:.0f} seconds"
    with trio.move_on_after(CONNECT_S):
        try:
            found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            why = (isinstance(error, OSError) and error.strerror) or "it is no host name"
            raise LinkBroken(f"cannot find {host}: {why}") from None
        if not plain_anywhere:
            for *_, address in found:
                check_plain(str(address[0]))
        for family, kind, protocol, _, address in found:
            # one address that swallows everything leaves time for the next
            with trio.move_on_after(CONNECT_S / len(found)):
                connection = trio.socket.socket(family, kind, protocol)
                try:
                    await connection.connect(address)
                    return trio.SocketStream(connection)
                except OSError as error:
                    why = os.strerror(error.errno or 0)
                    connection.close()
                except BaseException:
                    connection.close()
                    raise
    raise LinkBroken(f"cannot connect to {peer}: {why}")


async def _open(tcp: trio.SocketStream, peer: str, context: ssl.SSLContext | None, name: str | None,
                limits: Sequence[Bandwidth]) -> Link:
    """A link over a connection that is there.  `name`: of the host that was called; None: this one was."""
    try:
        _watch(tcp)
        line = Line(tcp)
        stream = line if context is None else await _handshake(line, peer, context, name)
        return Link(stream, peer, limits)
    except BaseException:
        await trio.aclose_forcefully(tcp)
        raise


def _watch(tcp: trio.SocketStream) -> None:
    """Have the kernel notice when the peer is gone.  (Small writes go out at once: trio sees to that.)"""
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, IDLE_S), (socket.TCP_KEEPINTVL, PROBE_S),
                          (socket.TCP_KEEPCNT, PROBES), (socket.TCP_USER_TIMEOUT, LOST_S * 1000)):
        tcp.setsockopt(socket.IPPROTO_TCP, option, value)


async def _handshake(line: Line, peer: str, context: ssl.SSLContext,
                     name: str | None) -> trio.SSLStream[Line]:
    stream = trio.SSLStream(line, context, server_hostname=name, server_side=name is None)
    try:
        with trio.fail_after(HANDSHAKE_S), _told(peer):
            await stream.do_handshake()
    except trio.TooSlowError:
        raise LinkBroken(f"{peer} did not finish the TLS handshake in {HANDSHAKE_S:.0f} seconds") from None
    except Untrusted:
        # the peer is told why: trio leaves OpenSSL's alert where it is
        with trio.move_on_after(CLOSE_S), suppress(trio.BrokenResourceError):
            await line.send_all(stream._outgoing.read())
        await line.aclose()
        raise
    return stream


@contextmanager
def _told(peer: str) -> Iterator[None]:
    """Turn what trio and OpenSSL say of a broken connection into a sentence."""
    try:
        yield
    except trio.ClosedResourceError:
        raise LinkBroken(f"the connection with {peer} was closed") from None
    except trio.BrokenResourceError as error:
        cause = error.__cause__
        why = "it ended in the middle"
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
            raise Untrusted(f"no connection with {peer}: {reason(cause)}") from None
        if isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError):
            why = cause.strerror or why
        raise LinkBroken(f"the connection with {peer} broke: {why}") from None


#: what a connection is for: it ends with this.  The second argument is to be called when the peer has said
#: who it is and what it wants: until then its time is short.  It raises Conflict where there are too many
Handler = Callable[[Link, Callable[[], None]], Awaitable[None]]


async def serve(listener: socket.socket, handler: Handler, tls: Callable[[], Tls | None], limit: int,
                limits: Sequence[Bandwidth] = (),
                task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Have `handler` called in a task of its own for each connection that comes in, until cancelled.

    What goes wrong in it ends this connection and is told in one line of the log.  `tls` is asked each time,
    so that certificates can be renewed.

    Invariant: at most NEWCOMERS connections are not admitted, each for at most HELLO_S seconds; at most
    `limit` are.
    """
    counts: Counter[str] = Counter()

    async def attend(tcp: trio.SocketStream) -> None:
        standing = "newcomer"
        peer = "a peer that is gone"

        def admit() -> None:
            nonlocal standing
            if standing == "newcomer":
                if counts["admitted"] >= limit:
                    raise Conflict(f"{limit} connections are open already, which is the most there may be")
                counts.subtract([standing])
                standing = "admitted"
                counts.update([standing])
                patience.deadline = math.inf

        counts.update([standing])
        try:
            async with tcp:
                peer = peer_name(*tcp.socket.getpeername()[:2])
                if counts["newcomer"] > NEWCOMERS:
                    raise Conflict("too many connections that have not said what they want")
                with trio.move_on_after(HELLO_S) as patience:
                    context = tls()
                    async with await _open(tcp, peer, context and context.server, None, limits) as link:
                        await handler(link, admit)
                if patience.cancelled_caught:
                    raise LinkBroken(f"it did not say what it wants in {HELLO_S:.0f} seconds")
        except* Exception as errors:
            error = _first(errors)
            log.warning("connection ended", extra={
                "peer": peer, "why": str(error) if isinstance(error, HostError) else repr(error)})
        finally:
            counts.subtract([standing])

    async with trio.open_nursery() as connections:
        listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(listener))]
        await connections.start(partial(trio.serve_listeners, attend, listeners, handler_nursery=connections))
        task_status.started()


def _first(group: BaseExceptionGroup) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
