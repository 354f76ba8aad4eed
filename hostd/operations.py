# SPDX-License-Identifier: GPL-2.0-or-later
"""Long work as objects: started, followed, waited for, cancelled, and remembered for a while."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import trio

from hostd.errors import HostError, NotFound
from hostd.events import Events
from hostd.model import OperationView

log = logging.getLogger(__name__)

HISTORY = 256

Status = Literal["running", "done", "failed", "cancelled"]


class Operation:
    """One piece of work.  The work itself moves `progress` (0 to 1) and `phase`."""

    def __init__(self, kind: str, target: str) -> None:
        self.id = secrets.token_hex(8)
        self.kind = kind
        self.target = target
        self.status: Status = "running"
        self.progress = 0.0
        self.phase = ""
        self.error: HostError | None = None
        self.result: Any = None
        #: the work may set it to what tells more of how it goes, whenever somebody looks
        self.detail: Callable[[], Any] = lambda: None
        self.created = time.time()
        self.finished: float | None = None
        self._scope = trio.CancelScope()
        self._done = trio.Event()

    def step(self, phase: str, progress: float) -> None:
        """Tell where the work is."""
        self.phase, self.progress = phase, progress

    async def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended; False if it has not within `timeout` seconds."""
        with trio.move_on_after(float("inf") if timeout is None else timeout):
            await self._done.wait()
        return self._done.is_set()

    async def outcome(self) -> Any:
        """Wait for the end; its result, or its error raised."""
        await self._done.wait()
        if self.error is not None:
            raise self.error
        return self.result

    def view(self) -> OperationView:
        return OperationView(
            id=self.id, kind=self.kind, target=self.target, status=self.status, progress=self.progress,
            phase=self.phase, error=None if self.error is None else str(self.error), created=self.created,
            finished=self.finished, result=self.result, detail=self.detail())


class Operations:
    """All running operations and the last finished ones."""

    def __init__(self, nursery: trio.Nursery, events: Events) -> None:
        self._nursery = nursery
        self._events = events
        #: by id, oldest first
        self._all: dict[str, Operation] = {}

    def start(self, kind: str, target: str, work: Callable[[Operation], Awaitable[Any]]) -> Operation:
        """Begin `work` in the background."""
        operation = Operation(kind, target)
        self._all[operation.id] = operation
        self._forget_old()
        self._nursery.start_soon(self._run, operation, work, name=f"{kind} {target}")
        return operation

    def list(self) -> list[Operation]:
        return list(self._all.values())

    def get(self, id: str) -> Operation:
        try:
            return self._all[id]
        except KeyError:
            raise NotFound(f"no operation {id[:64]!r}: finished ones are remembered until "
                           f"{HISTORY} others have followed") from None

    def cancel(self, id: str) -> Operation:
        """Ask a running operation to stop; what it did so far is undone by itself.  A finished one stays."""
        operation = self.get(id)
        operation._scope.cancel()
        return operation

    async def _run(self, operation: Operation, work: Callable[[Operation], Awaitable[Any]]) -> None:
        self._announce(operation)
        try:
            with operation._scope:
                operation.result = await work(operation)
                operation.status = "done"
                operation.progress = 1.0
            if operation.status == "running":
                operation.status = "cancelled"
        except HostError as error:
            operation.status, operation.error = "failed", error
        except trio.Cancelled:
            operation.status = "cancelled"
            raise
        except Exception as error:
            log.exception("%s %s failed unexpectedly", operation.kind, operation.target)
            operation.status = "failed"
            operation.error = HostError(f"internal error: {type(error).__name__}: {error}")
        finally:
            last = operation.detail()
            operation.detail = lambda: last         # lets go of what the work held
            operation.finished = time.time()
            operation._done.set()
            self._announce(operation)

    def _announce(self, operation: Operation) -> None:
        self._events.publish("operation", id=operation.id, kind=operation.kind, target=operation.target,
                             status=operation.status)

    def _forget_old(self) -> None:
        excess = len(self._all) - HISTORY
        for id, operation in list(self._all.items()):
            if excess <= 0:
                break
            if operation.status != "running":
                del self._all[id]
                excess -= 1
