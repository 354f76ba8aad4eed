# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's console over a WebSocket: what the guest wrote and writes comes, what is sent is typed.

The server says in the header `Console-Position` of its handshake at which byte of the console its messages
begin; a client that counts them can come back with `?since=` and misses nothing.
"""

from __future__ import annotations

import logging

import msgspec
import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from hostd.api.call import decode_query
from hostd.api.handlers import MAX_INPUT
from hostd.api.schema import ConsoleQuery, ErrorView
from hostd.console import Reader
from hostd.errors import HostError, NotFound
from hostd.host import Host
from hostd.lifecycle import State

log = logging.getLogger(__name__)

# Close codes, RFC 6455 section 7.4.1 (1012 is IANA's "service restart": come back in a moment).
GONE = 1000
TOO_BIG = 1009
COME_BACK = 1012


class ConsoleSocket:
    """The ASGI application of /vms/{name}/console, for scopes of type websocket."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        socket = WebSocket(scope, receive, send)
        name: str = socket.path_params["name"]
        try:
            console = self._host.console(name)
            since = decode_query(socket.query_params, ConsoleQuery).since
        except HostError as error:
            body = msgspec.json.encode(ErrorView(error=str(error)))
            await socket.send_denial_response(Response(body, error.status, media_type="application/json"))
            return
        with console.listen() as reader:
            past = console.scrollback(console.boot if since is None else since)
            position = str(console.written - len(past)).encode()
            await socket.accept(headers=[(b"console-position", position)])
            if past:
                await socket.send_bytes(past)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write, socket, name, reader, nursery.cancel_scope)
                    await self._type(socket, name)
                    nursery.cancel_scope.cancel()
            except* WebSocketDisconnect:
                log.debug("the client at the console of %s went away", name)

    async def _write(self, socket: WebSocket, name: str, reader: Reader, scope: trio.CancelScope) -> None:
        """Guest to client, until the console ends."""
        while data := await reader.receive():
            await socket.send_bytes(data)
        await socket.close(*self._farewell(name))
        scope.cancel()

    async def _type(self, socket: WebSocket, name: str) -> None:
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
                await self._host.send_input(name, data)
            except HostError:
                # Nobody listens at the other end of the line, as with a machine that is off: the line stays.
                continue

    def _farewell(self, name: str) -> tuple[int, str]:
        try:
            migrating = self._host.get(name).state == State.MIGRATING
        except NotFound:
            migrating = False
        return (COME_BACK, "the VM is migrating") if migrating else (GONE, "the VM is gone")
