# SPDX-License-Identifier: GPL-2.0-or-later
"""HTTP on a listening socket: hypercorn's connections, each on its own.

hypercorn.trio.serve keeps all connections in one nursery, so that what goes wrong in one of them ends them
all and whoever serves them.  A client that closes its half of the line at the wrong moment is enough.
Here such a client loses its connection, and nobody else anything.
"""

from __future__ import annotations

import logging
import socket
from functools import partial

import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState
from hypercorn.utils import wrap_app

log = logging.getLogger(__name__)

#: how long requests under way may take once the server is closing
DRAIN_S = 1.0
#: the largest WebSocket message, that is, piece of console input
MAX_WEBSOCKET_MESSAGE = 1 << 20


class Connection(TCPServer):
    """A connection that may be answered while it is being closed: then the answer is lost."""

    async def protocol_send(self, event: Event) -> None:
        try:
            await super().protocol_send(event)
        except trio.BusyResourceError:
            await self.protocol.handle(Closed())


async def serve(app: ASGIFramework, listener: socket.socket, closing: trio.Event,
                task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Serve an ASGI application on a listening socket until `closing`."""
    config = Config()
    config.graceful_timeout = DRAIN_S
    config.errorlog = logging.getLogger("hypercorn.error")
    config.include_server_header = False
    config.websocket_max_message_size = MAX_WEBSOCKET_MESSAGE
    context = WorkerContext(None)
    wrapped = wrap_app(app, config.wsgi_max_body_size, "asgi")

    async def connection(stream: trio.SocketStream) -> None:
        try:
            # hypercorn takes plain streams too, whatever its annotation says
            await Connection(wrapped, config, context, ConnectionState({}), stream)  # type: ignore[arg-type]
        except* Exception as errors:
            log.warning("connection broken off", extra={"why": repr(errors.exceptions[0])})

    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as accepting:
            listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(listener))]
            accepting.start_soon(partial(trio.serve_listeners, connection, listeners,
                                         handler_nursery=connections))
            task_status.started()
            await closing.wait()
            accepting.cancel_scope.cancel()
        await context.terminated.set()
        connections.cancel_scope.deadline = trio.current_time() + DRAIN_S
