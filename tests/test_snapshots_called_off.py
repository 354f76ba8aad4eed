# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that are saved and restored while something else comes in between: nothing half-made is left."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from hostd.model import RestoreRequest, SnapshotRequest, SnapshotView
from hostd.operations import Operation
from hostd.snapshot import Snapshot
from tests.migration_guests import PAGES, witness
from tests.private_daemon import SOON, PrivateDaemon
from tests.told_host import ToldHost, real_host


def at_step(monkeypatch: pytest.MonkeyPatch, phase: str, act: Callable[[Operation], object]) -> None:
    """Have something happen when an operation says that it has come so far."""
    real = Operation.step

    def step(operation: Operation, now: str, progress: float) -> None:
        real(operation, now, progress)
        if now == phase:
            act(operation)

    monkeypatch.setattr(Operation, "step", step)


async def test_a_snapshot_that_is_called_off_leaves_nothing(told: ToldHost,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    await told.running("vm")
    # the thread that writes says so
    at_step(monkeypatch, "writing pages",
            lambda operation: trio.from_thread.run_sync(told.host.operations.cancel, operation.id))
    snapshot = told.host.snapshot("vm", SnapshotRequest())
    await snapshot.wait()
    assert snapshot.status == "cancelled"
    assert list((told.host.config.state_dir / "snapshots").iterdir()) == []
    assert told.host.get("vm").state == "running" and told.host.overview.frames().shared > 0
    await told.host.destroy("vm", force=True).outcome()
    counts = told.host.overview.frames()
    assert (counts.private, counts.shared, counts.overhead) == (0, 0, 1)


async def test_a_guest_that_crashes_while_it_is_saved_is_saved(told: ToldHost,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    await told.running("vm")

    async def crash() -> None:
        await told.tell("vm", "crash for no reason")
        await told.becomes("vm", "crashed")

    at_step(monkeypatch, "writing pages", lambda _: trio.from_thread.run(crash))
    saved: SnapshotView = await told.host.snapshot("vm", SnapshotRequest()).outcome()
    snapshot = Snapshot.open(Path(saved.file))
    snapshot.verify()
    snapshot.close()
    assert os.stat(saved.file).st_size == saved.size
    counts = told.host.overview.frames()
    assert (counts.private, counts.shared, counts.overhead) == (0, 0, 1)
    await told.host.start("vm").outcome()


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[ToldHost]:
    """A host in this process with real workers."""
    async with real_host(tmp_path) as told:
        yield told


async def test_a_restore_that_is_called_off_leaves_nothing(host: ToldHost,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    await host.running("vm")
    saved: SnapshotView = await host.host.snapshot("vm", SnapshotRequest()).outcome()
    await host.host.destroy("vm", force=True).outcome()
    request = RestoreRequest(file=saved.file)
    for phase in "reading the snapshot", "writing the definition", "waiting for a worker", "starting":
        with monkeypatch.context() as patch:
            at_step(patch, phase, lambda operation: host.host.operations.cancel(operation.id))
            restore = host.host.restore(request)
            await restore.wait()
        assert restore.status == "cancelled", phase
        assert host.host.views() == [] and host.definitions() == set()
        counts = host.host.overview.frames()
        assert (counts.private, counts.shared, counts.overhead) == (0, 0, 1)
        assert saved.file not in opened(os.getpid())
    assert (await host.host.restore(request).outcome()).name == "vm"
    assert host.host.get("vm").state == "running"


def opened(pid: int) -> set[str]:
    """The files that a process has open."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):           # closed meanwhile
            found.add(os.readlink(link))
    return found


def test_a_daemon_that_is_killed_while_it_saves_leaves_nothing(start_daemon: Callable[..., PrivateDaemon],
                                                               tmp_path: Path) -> None:
    first = start_daemon()
    first.create("vm", witness(PAGES, 1022), start=True)
    while first.get("/vms/vm")["memory_usage"]["private"] < PAGES * 4096:
        first.wait("vm", state="running")
    first.do("vm", "pause")
    directory = tmp_path / "state" / "snapshots"
    for number in range(8):                         # each has some megabytes to write
        first.post("/vms/vm/snapshot", to=str(directory / f"{number}.snap"))
    deadline = time.monotonic() + SOON
    while not any(file.startswith(str(directory)) for file in opened(first.process.pid)):
        assert time.monotonic() < deadline
    first.kill()
    # a moment later it would have been whole: either is right, in between there is nothing
    for file in directory.glob("[!.]*"):
        Snapshot.open(file).close()
    second = start_daemon()
    assert not list(directory.glob(".*"))
    second.do("vm", "start")
