# SPDX-License-Identifier: GPL-2.0-or-later
"""Short words for tests that drive a host whose guests do what they are told (fake_worker.py)."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio

from hostd.config import parse
from hostd.host import Host
from hostd.model import CloneRequest, StopRequest, VmCreate, VmView
from vmm import guests

FAKE_WORKER = (sys.executable, str(Path(__file__).parent / "fake_worker.py"))
KERNEL = guests.read("idle")
MEMORY = 2 << 20
#: nothing here takes longer than this, unless it is broken
SOON = 20.0


class ToldHost:
    def __init__(self, host: Host) -> None:
        self.host = host

    async def blob(self, data: bytes = KERNEL) -> str:
        async def chunks() -> AsyncIterator[bytes]:
            yield data

        return (await self.host.add_blob(chunks())).sha256

    async def create(self, name: str, **fields: Any) -> VmView:
        """A VM of 2 MiB with a kernel that exists."""
        if "image" not in fields and "kernel" not in fields:
            fields["kernel"] = await self.blob()
        return await self.host.create(msgspec.convert({"name": name, "memory": MEMORY, **fields}, VmCreate))

    async def running(self, name: str, **fields: Any) -> None:
        """The same, running."""
        await self.create(name, **fields)
        await self.host.start(name).outcome()

    def definitions(self) -> set[str]:
        """Names of the files in the inventory."""
        return {path.name for path in (self.host.config.state_dir / "vms").iterdir()}

    async def tell(self, name: str, words: str) -> None:
        await self.host.send_input(name, words.encode())

    async def becomes(self, name: str, state: str) -> VmView:
        return await self.host.wait(name, state=state, timeout=SOON)

    async def prints(self, name: str, expression: str) -> None:
        await self.host.wait(name, console=expression, timeout=SOON)

    async def stop(self, name: str, *, force: bool = False, timeout: float = SOON) -> None:
        await self.host.stop(name, StopRequest(force=force, timeout=timeout)).outcome()

    async def clone(self, name: str, *names: str, start: bool = True) -> None:
        await self.host.clone(name, CloneRequest(names=list(names), start=start)).outcome()

    async def ready_workers(self, count: int = 2) -> list[int]:
        """The process ids of the workers, once there are so many."""
        with trio.fail_after(SOON):
            while sum(worker.ready for worker in self.host.overview.workers()) < count:
                await trio.sleep(0.01)
        return [worker.pid for worker in self.host.overview.workers()]


@asynccontextmanager
async def real_host(directory: Path, tables: str = "", on_shutdown: str = "stop") -> AsyncIterator[ToldHost]:
    """A host in this process with real workers; `tables`: more of its configuration.  Its books are right in
    the end."""
    config = parse(f'[host]\nstate_dir = "{directory}/state"\nmemory = "64M"\nworkers = 2\n'
                   f'shutdown_timeout = 0\non_shutdown = "{on_shutdown}"\n'
                   f'[scheduler]\nbalance_interval = 60\n{tables}')
    async with trio.open_nursery() as nursery:
        host = Host(config, nursery)
        nursery.start_soon(host.run)
        told = ToldHost(host)
        await told.ready_workers()
        yield told
        assert (await host.overview.checked_memory()).wrong == []
        await host.shut_down()
        host.close()
        nursery.cancel_scope.cancel()
    assert host.overview.check_memory() == []
