# SPDX-License-Identifier: GPL-2.0-or-later
"""Eight thousand malformed requests as bytes, on the socket of a real daemon.

Two thousand more, whose HTTP is right and whose content is not, are in test_api_malformed.py.
"""

from __future__ import annotations

import random
import re
import socket
from collections.abc import Iterator

import pytest

from hostd.api.routes import ROUTES
from tests.private_daemon import SOON, PrivateDaemon

_REQUESTS = 8000
#: the stream of events is no answer that ends
_ROUTES = [route for route in ROUTES if route.path != "/events"]
#: bytes that mean something to a parser of HTTP or JSON
_SPICE = [b"\r\n", b"\n", b"\0", b" ", b":", b"/", b"%", b"%00", b"?", b"#", b"{", b"}", b'"', b"\\u0000",
          b"-1", b"9" * 40, b"\xff\xfe", b"../", b"HTTP/9.9", b"Content-Length: 5\r\n",
          b"Transfer-Encoding: chunked\r\n",
          b"Upgrade: websocket\r\nConnection: Upgrade\r\n", b"Expect: 100-continue\r\n", b"A" * 5000]
#: a request that goes through could do something; these names do not exist, and this body defines nothing
_BODY = b'{"name": "vm", "kernel": 5, "memory": "all", "nonsense": true}'


def _whole(chance: random.Random) -> bytes:
    """A request of the table that is well-formed, but for its body."""
    route = chance.choice(_ROUTES)
    path = re.sub(r"{\w+}", "nonesuch", route.path).encode()
    query = chance.choice([b"", b"?", b"?nonsense=1", b"?timeout=x&wait=-1&since=a"])
    return (route.method.encode() + b" " + path + query + b" HTTP/1.1\r\nHost: hostd\r\nContent-Length: "
            + str(len(_BODY)).encode() + b"\r\n\r\n" + _BODY)


def _damaged(chance: random.Random) -> bytes:
    """One with a few places cut out, doubled, or replaced."""
    data = _whole(chance)
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(data) + 1)
        end = min(len(data), start + chance.choice([0, 0, 1, 1, 2, 5, 30]))
        filling = chance.choice([b"", chance.choice(_SPICE), chance.randbytes(3), data[start:end] * 2])
        data = data[:start] + filling + data[end:]
    return data


def _answer(daemon: PrivateDaemon, data: bytes) -> bytes:
    """What the daemon says to these bytes, with nothing after them."""
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(SOON)
        line.connect(str(daemon.socket))
        try:
            line.sendall(data)
            line.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError, OSError):
            pass                            # it had enough before the end
        answer = b""
        try:
            while piece := line.recv(65536):
                answer += piece
        except ConnectionResetError:
            pass
    return answer


@pytest.fixture(autouse=True)
def untouched(daemon: PrivateDaemon) -> Iterator[None]:
    before = daemon.worker_pids()
    yield
    assert daemon.get("/vms") == daemon.get("/images") == daemon.get("/operations") == []
    assert daemon.worker_pids() == before
    assert "Traceback" not in daemon.said()


@pytest.mark.slow
def test_malformed_bytes(daemon: PrivateDaemon) -> None:
    chance = random.Random(1)
    for _ in range(_REQUESTS):
        data = _damaged(chance)
        answer = _answer(daemon, data)
        statuses = re.findall(rb"HTTP/1.1 (\d\d\d)", answer)
        # 501: a transfer coding nobody knows
        assert all(status < b"500" or status == b"501" for status in statuses), (data, answer)
