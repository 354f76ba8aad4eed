# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests out of files, on a host with real workers: of one that was suspended, and restored ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hostd.model import PAGE, RestoreRequest, SnapshotRequest
from tests.told_host import ToldHost, real_host


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
