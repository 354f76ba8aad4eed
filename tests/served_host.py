# SPDX-License-Identifier: GPL-2.0-or-later
"""The API of a host in memory, served as the daemon serves it: hypercorn on trio, on a Unix socket."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hypercorn.trio
import trio
from hypercorn.config import Config

from hostd.api import make_app
from tests.memory_host import MemoryHost


@dataclass
class ServedHost:
    socket: Path
    host: MemoryHost
    token: trio.lowlevel.TrioToken
    stop: trio.Event

    def do(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call something of the host in its own thread."""
        return trio.from_thread.run_sync(function, *args, trio_token=self.token)


@contextmanager
def served_host(directory: Path) -> Iterator[ServedHost]:
    """A running server for the length of the `with`."""
    socket = directory / "hostd.sock"
    started: queue.Queue[ServedHost] = queue.Queue()
    stop = trio.Event()

    async def serve() -> None:
        config = Config()
        config.bind = [f"unix:{socket}"]
        config.graceful_timeout = 0.1
        async with trio.open_nursery() as nursery:
            host = MemoryHost(nursery)
            serve = partial(hypercorn.trio.serve, make_app(host), config, shutdown_trigger=stop.wait)
            await nursery.start(serve)
            started.put(ServedHost(socket, host, trio.lowlevel.current_trio_token(), stop))
            await stop.wait()
            nursery.cancel_scope.cancel()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    served = started.get(timeout=10)
    try:
        yield served
    finally:
        with suppress(trio.RunFinishedError):  # a test may have stopped it
            served.do(stop.set)
        thread.join()
