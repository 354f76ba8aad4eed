# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests out of files, on a host with real workers: of one that was suspended, and restored ones."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from hostd import storage
from hostd.books import Books
from hostd.errors import Failed
from hostd.model import PAGE, RestoreRequest, SnapshotRequest
from hostd.resuming import Resumer
from tests.told_host import ToldHost, real_host
from vmm.memory.block import VmBlock


async def paused(told: ToldHost, name: str) -> None:
    """A guest that has all the pages it ever touches, and is paused."""
    await told.running(name)
    await told.prints(name, "idle: tick")
    await told.host.pause(name).outcome()


async def test_what_is_in_a_balloon_stays_there(tmp_path: Path) -> None:
    async with real_host(tmp_path, on_shutdown="suspend") as told:
        await paused(told, "vm")
        block = told.host._guests.vms["vm"].block
        assert block is not None
        pages = np.flatnonzero(block.leaf() == 0)[::2]          # as its device does, with a driver
        block.mark_ballooned(pages)
        given = len(pages) * PAGE
        saved = await told.host.snapshot("vm", SnapshotRequest()).outcome()
        await told.host.restore(RestoreRequest(file=saved.file, name="new")).outcome()
        assert told.host.get("new").memory_usage.ballooned == given
    async with real_host(tmp_path) as told:
        await told.becomes("vm", "paused")
        for name in "vm", "new":
            assert told.host.get(name).memory_usage.ballooned == given


async def suspended(directory: Path, *names: str) -> Path:
    """The state directory of a host that was suspended with these paused guests."""
    async with real_host(directory, on_shutdown="suspend") as told:
        for name in names:
            await paused(told, name)
    return directory / "state"


def left(state: Path) -> list[str]:
    return sorted(path.name for path in state.iterdir() if path.name.startswith("suspend"))


async def nothing_lost(told: ToldHost) -> None:
    """Without guests there is no memory that anybody has."""
    for view in told.host.views():
        await told.host.destroy(view.name, force=True).outcome()
    counts = told.host.overview.frames()
    assert (counts.private, counts.shared, counts.overhead) == (0, 0, 1)


async def test_a_member_that_is_no_good_is_left_out_and_kept(tmp_path: Path) -> None:
    state = await suspended(tmp_path, "good", "damaged", "gone")
    (state / "suspended" / "damaged.snap").write_bytes(b"")
    (state / "vms" / "gone.json").write_text("{")
    async with real_host(tmp_path) as told:
        await told.becomes("good", "paused")
        view = await told.becomes("damaged", "halted")
        assert view.reason.startswith("not resumed: ") and left(state)[0] == "suspended.broken-1"
        kept = state / "suspended.broken-1"
        await told.host.resume("good").outcome()
        await told.host.restore(RestoreRequest(file=str(kept / "gone.snap"))).outcome()
        await told.becomes("gone", "running")
    assert {path.name for path in kept.iterdir()} == {"_pages.snap", "damaged.snap", "gone.snap"}


async def test_a_guest_without_room_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = await suspended(tmp_path, "a", "b")
    real = Books.new

    def new(self: Books, size: int) -> VmBlock:
        monkeypatch.setattr(Books, "new", real)
        raise Failed("not enough machine memory: none")

    monkeypatch.setattr(Books, "new", new)
    async with real_host(tmp_path) as told:
        view = await told.becomes("a", "halted")
        assert view.reason == "not resumed: not enough machine memory: none"
        await told.becomes("b", "paused")
        assert left(state)[0] == "suspended.broken-1"
        await nothing_lost(told)


async def test_a_guest_that_is_stopped_while_it_gets_its_memory(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    state = await suspended(tmp_path, "a", "b")
    real = Resumer._load
    async with trio.open_nursery() as nursery:
        async def load(self: Resumer, *what: Any) -> np.ndarray:
            nursery.start_soon(self._guests.stop, self._guests.vms["a"], True, 0.0)
            await trio.testing.wait_all_tasks_blocked()
            return await real(self, *what)

        monkeypatch.setattr(Resumer, "_load", load)
        async with real_host(tmp_path) as told:
            await told.becomes("b", "paused")
            await told.becomes("a", "halted")
            assert told.host.get("a").reason == "power cut" and left(state) == []
            await nothing_lost(told)


async def test_a_set_that_cannot_be_taken_away_is_not_used_and_not_lost(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = await suspended(tmp_path, "vm")
    real = storage.sync_directory

    def sync(path: Path) -> None:
        if path == state:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(path)

    monkeypatch.setattr(storage, "sync_directory", sync)
    async with real_host(tmp_path) as told:
        await told.becomes("vm", "halted")
        assert "Input/output error" in told.host.get("vm").reason and left(state) == ["suspended"]
        counts = told.host.overview.frames()
        assert (counts.private, counts.shared, counts.overhead) == (0, 0, 1)
    monkeypatch.undo()
    async with real_host(tmp_path) as told:
        await told.becomes("vm", "paused")
        assert left(state) == []


async def test_guests_that_a_daemon_was_resuming_when_it_ended(tmp_path: Path) -> None:
    state = await suspended(tmp_path, "vm")
    (state / "suspended").rename(state / "suspended.resumed")   # as it is from then on until all is removed
    async with real_host(tmp_path) as told:
        view = told.host.get("vm")
        assert (view.state, view.reason) == ("defined", "lost: the daemon ended while it resumed the host")
        assert left(state) == []
