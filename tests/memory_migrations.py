# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations of a host without machines: guests that leave at once, never, or not at all."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import trio

from hostd.errors import Conflict, Failed
from hostd.lifecycle import State
from hostd.migration.departures import Departed
from hostd.migration.totals import Totals
from hostd.migration.views import EvacuatedView, EvacuateRequest, MigrateRequest, MigrationView
from hostd.model import VmView
from hostd.operations import Operation

#: peers: one that nobody reaches, and one that memory goes to for ever
NOWHERE, SLOW = "nowhere", "slow:9178"


class MemoryMigrations:
    """What the API asks of `Host.migrations`; `forget` takes a guest from the host, `look` shows one."""

    def __init__(self, look: Callable[[str], VmView], forget: Callable[[str], None]) -> None:
        self._look = look
        self._forget = forget
        #: set by the host
        self.start: Callable[..., Operation]
        self.gone: dict[str, Departed] = {}
        self.views: dict[str, MigrationView] = {}
        self.requests: list[MigrateRequest | EvacuateRequest] = []
        self.totals = Totals()

    def migrate(self, name: str, request: MigrateRequest) -> Operation:
        vm = self._look(name)
        if vm.state not in (State.RUNNING, State.PAUSED):
            raise Conflict(f"VM {name} is {vm.state}: only one that runs or is paused can migrate")
        self.requests.append(request)

        async def work(operation: Operation) -> MigrationView:
            self.views[name] = MigrationView(
                token="t" * 32, vm=name, direction="out", peer=request.to, mode=request.mode, phase="copying",
                round=3, pages={"full": 4000, "delta": 40}, bytes={"full": 1 << 20, "other": 4096},
                remaining_pages=1200, dirty_rate=2000.0, throughput=100 << 20, expected_downtime=0.04,
                elapsed=0.5)
            operation.detail = lambda: self.views[name]
            operation.step("copying", 0.5)
            try:
                await self._go(request.to)
            except BaseException as error:
                self._change(name, phase="failed" if isinstance(error, Failed) else "cancelled",
                             reason=str(error))
                raise
            self._change(name, phase="done", remaining_pages=0, downtime=0.038, elapsed=1.42)
            if not request.dry_run:
                self._forget(name)
                self.gone[name] = Departed(request.to, "t" * 32)
            return self.views[name]

        return self.start("migrate", name, work)

    async def _go(self, peer: str) -> None:
        if peer == NOWHERE:
            raise Failed(f"cannot reach {NOWHERE}: no such host")
        if peer == SLOW:
            await trio.sleep_forever()

    def _change(self, name: str, **fields: object) -> None:
        self.views[name] = msgspec.structs.replace(self.views[name], **fields)

    def evacuate(self, request: EvacuateRequest) -> Operation:
        self.requests.append(request)

        async def work(operation: Operation) -> EvacuatedView:
            operation.step("1 of 3 guests", 0.3)
            return EvacuatedView(moved=["a"], failed={"b": "its memory does not fit", "c": "cancelled"},
                                 seconds=2.5)

        return self.start("evacuate", request.to, work)

    async def recover(self, name: str) -> VmView:
        vm = self._look(name)
        if vm.state is not State.MIGRATING:
            raise Conflict(f"VM {name} is {vm.state}: it is this host's")
        return vm

    def list(self) -> list[MigrationView]:
        return [*self.views.values()]

    def departed(self, name: str) -> Departed | None:
        return self.gone.get(name)
