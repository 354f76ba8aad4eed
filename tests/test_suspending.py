# SPDX-License-Identifier: GPL-2.0-or-later
"""All guests into files, and what becomes of them where that fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from hostd import storage, suspending
from hostd.errors import Failed
from tests.told_host import ToldHost
from vmm.memory.block import VmBlock


async def three(told: ToldHost) -> None:
    """Guests that run, one that is paused, and one that is off."""
    for name in "a", "b", "paused":
        await told.running(name)
    await told.host.pause("paused").outcome()
    await told.create("off")


def states(told: ToldHost) -> dict[str, str]:
    return {view.name: view.state for view in told.host.views()}


GONE_ON = {"a": "running", "b": "running", "paused": "paused", "off": "defined"}


def left(told: ToldHost) -> list[str]:
    return [path.name for path in told.host.config.state_dir.iterdir() if path.name.startswith("suspend")]


async def test_a_suspended_host_tells_that_it_gets_on(told: ToldHost) -> None:
    await three(told)
    steps: list[None] = []
    assert await told.host._suspender.suspend(lambda: steps.append(None)) == {"a", "b", "paused"}
    assert set(states(told).values()) == {"paused", "defined"} and left(told) == ["suspended"]
    assert len(steps) >= 4                          # pages, and each guest


async def test_a_mistake_of_ours_lets_all_guests_go_on(told: ToldHost, monkeypatch: pytest.MonkeyPatch,
                                                       caplog: pytest.LogCaptureFixture) -> None:
    def fail(path: Path, blocks: Sequence[VmBlock], alive: object) -> None:
        raise MemoryError("none left")

    await three(told)
    monkeypatch.setattr(suspending, "_write_pages", fail)
    assert await told.host._suspender.suspend(lambda: None) == set()
    assert states(told) == GONE_ON and left(told) == []
    (record,) = (record for record in caplog.records if record.msg == "host not suspended")
    assert record.exc_info is not None


async def test_a_set_that_is_not_on_the_disk_for_good_is_not_there(told: ToldHost,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    real = storage.sync_directory

    def sync(path: Path) -> None:
        if path == told.host.config.state_dir:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(path)

    await three(told)
    monkeypatch.setattr(storage, "sync_directory", sync)
    assert await told.host._suspender.suspend(lambda: None) == set()
    assert states(told) == GONE_ON and left(told) == []


async def test_guests_that_no_worker_takes_back_stay_paused(told: ToldHost, monkeypatch: pytest.MonkeyPatch,
                                                            caplog: pytest.LogCaptureFixture) -> None:
    def fail(*args: object) -> None:
        raise MemoryError

    async def none() -> None:
        raise Failed("no worker process is ready")

    await three(told)
    monkeypatch.setattr(suspending, "_member", fail)
    monkeypatch.setattr(told.host._workers, "wait_ready", none)
    assert await told.host._suspender.suspend(lambda: None) == set()
    assert {state for name, state in states(told).items() if name != "off"} == {"paused"}
    assert [record.msg for record in caplog.records].count("guest does not go on") == 2
