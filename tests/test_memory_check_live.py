# SPDX-License-Identifier: GPL-2.0-or-later
"""The books are right at every moment of a busy host, and wrong as soon as a worker has lost a frame."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from hostd.model import MONITORS
from tests.test_limits import LIMIT, MEMORY, TOUCHED, rounds_kernel
from tests.told_host import SOON, ToldHost, real_host

CHECKS = 100


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[ToldHost]:
    tables = '[memory]\nswap = "64M"\n[sharing]\npages_per_second = 100000\n'
    async with real_host(tmp_path, tables) as told:
        yield told


async def test_nothing_is_wrong_on_a_busy_host(host: ToldHost) -> None:
    """Whose guests swap, share, are cloned, moved between workers, and end."""
    kernel = await host.blob(rounds_kernel(TOUCHED))
    guests = host.host._guests
    for monitor in MONITORS:
        await host.running(f"{monitor}-full", kernel=kernel, memory=MEMORY, limit=LIMIT, vmm=monitor)
        await host.running(f"{monitor}-free", kernel=kernel, memory=MEMORY, vmm=monitor)

    busy = True

    async def move(name: str) -> None:
        while busy:
            for worker in host.host._workers.ready:
                await trio.sleep(0.01)
                await guests.try_move(guests.vms[name], worker)

    async def come_and_go(name: str) -> None:
        while busy:
            await host.clone(f"{name}-free", f"{name}-clone")
            await trio.sleep(0.05)
            await host.host.destroy(f"{name}-clone", force=True).outcome()

    async with trio.open_nursery() as nursery:
        for monitor in MONITORS:
            nursery.start_soon(move, f"{monitor}-full")
            nursery.start_soon(come_and_go, monitor)
        for _ in range(CHECKS):
            with trio.fail_after(SOON):
                assert (await host.host.overview.checked_memory()).wrong == []
        busy = False
    assert all(host.host.get(f"{monitor}-full").memory_events.swapped_in for monitor in MONITORS)
    assert all(guests.vms[f"{monitor}-full"].state != "crashed" for monitor in MONITORS)


async def test_a_frame_that_a_worker_lost_is_missed(host: ToldHost) -> None:
    await host.running("vm", kernel=await host.blob(rounds_kernel(TOUCHED)), memory=MEMORY)
    with trio.fail_after(SOON):
        assert (await host.host.overview.checked_memory()).wrong == []
    worker = host.host._guests.vms["vm"].worker
    assert worker is not None
    lost = host.host._memory.books.lend(worker.index, 1)
    (wrong,) = (await host.host.overview.checked_memory()).wrong
    assert wrong.startswith(f"worker {worker.index} has ")
    host.host._memory.books.given_back(worker.index, lost)
