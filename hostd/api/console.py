# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's console over a WebSocket: what the guest wrote and writes comes, what is sent is typed, here or at
the host it went to.

The server says in the header `Console-Position` of its handshake at which byte of the console its messages
begin; a client that counts them can come back with `?since=` and misses nothing.
"""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack

import msgspec
import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from hostd.api.call import decode_query
from hostd.api.handlers import MAX_INPUT
from hostd.api.schema import ConsoleQuery, ErrorView
from hostd.errors import HostError
from hostd.host import Host
from hostd.line import Line

log = logging.getLogger(__name__)

# Close codes, RFC 6455 section 7.4.1 (1012 is IANA's "service restart": come back in a moment).
GONE = 1000
TOO_BIG = 1009
COME_BACK = 1012
#: bytes of the reason in a Close frame
MAX_REASON = 123


class ConsoleSocket:
    """The ASGI application of /vms/{name}/console, for scopes of type websocket."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # not needed for the daemon's first answer (hostd/daemon.py)
        from hostd.migration.relay import line_to

        socket = WebSocket(scope, receive, send)
        name: str = socket.path_params["name"]
        async with AsyncExitStack() as stack:
            try:
                since = decode_query(socket.query_params, ConsoleQuery).since
                line = await stack.enter_async_context(line_to(self._host, name, since))
            except HostError as error:
                body = msgspec.json.encode(ErrorView(error=str(error)))
                await socket.send_denial_response(Response(body, error.status, media_type="application/json"))
                return
            await socket.accept(headers=[(b"console-position", str(line.position).encode())])
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write, socket, line, nursery.cancel_scope)
                    await self._type(socket, line)
                    nursery.cancel_scope.cancel()
            except* WebSocketDisconnect:
                log.debug("the client at the console of %s went away", name)

    async def _write(self, socket: WebSocket, line: Line, scope: trio.CancelScope) -> None:
        """Guest to client, until the line ends."""
        while data := await line.receive():
            await socket.send_bytes(data)
        reason, come_back = line.farewell()
        await socket.close(COME_BACK if come_back else GONE, shortened(reason))
        scope.cancel()

    async def _type(self, socket: WebSocket, line: Line) -> None:
        """Client to guest, until the client leaves."""
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            data = message.get("bytes") or (message.get("text") or "").encode()
            if len(data) > MAX_INPUT:
                await socket.close(TOO_BIG, f"a message may have {MAX_INPUT} bytes")
                return
            try:
                await line.type(data)
            except HostError:
                # Nobody listens at the other end of the line, as with a machine that is off: the line stays.
                continue


def shortened(reason: str) -> str:
    """A reason that fits into a Close frame (RFC 6455 section 5.5: 125 bytes, two of them the code)."""
    data = reason.encode()
    return reason if len(data) <= MAX_REASON else data[:MAX_REASON - 3].decode(errors="ignore") + "..."
