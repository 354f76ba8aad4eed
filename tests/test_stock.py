# SPDX-License-Identifier: GPL-2.0-or-later
"""The frames that workers have in stock: few, back when others wait, and never those that are promised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trio

from hostd.errors import HostError
from hostd.events import Events
from hostd.leases import Leases
from hostd.memory import MachineMemory
from hostd.protocol import GiveBack, GivenBack, Grant, Message, NeedFrames, ProtocolError
from hostd.stock import Stock
from hostd.workers import Worker
from tests.test_limits import rounds_kernel
from tests.told_host import SOON, real_host
from vmm.memory.frames import Magazine

MIB = 1 << 20


def test_a_magazine_gives_what_is_asked_for_and_no_more() -> None:
    magazine = Magazine([(10, 5), (40, 2)])
    taken = magazine.take()
    given = magazine.give(3)
    assert sum(count for _, count in given) == 3 and len(magazine) == 3
    frames = {taken, *magazine.rest().tolist(),
              *(frame for first, count in given for frame in range(first, first + count))}
    assert frames == {10, 11, 12, 13, 14, 40, 41}
    assert magazine.give(1) == []


def test_a_stock_asks_once_and_can_do_without_the_rest() -> None:
    stock = Stock(64)
    assert stock.wanted() == NeedFrames(64) and stock.wanted() is None
    stock.granted([(100, 15)])
    assert stock.wanted() == NeedFrames(64)
    stock.granted([(200, 64)])
    assert stock.wanted() is None
    spare = stock.spare(guests=True)
    assert spare is not None and sum(count for _, count in spare.extents) == 15 + 64 - 16
    assert stock.wanted() is None and stock.spare(guests=True) is None
    assert stock.spare(guests=False) is not None and len(stock.magazine) == 0


class Hand(Worker):
    """A worker with a stock, and without guests."""

    def __init__(self, leases: Leases, index: int) -> None:
        super().__init__(index, 0)
        self._leases = leases
        self.stock = Stock(64)
        self.asked = 0

    def send(self, message: Message) -> None:
        match message:
            case Grant(extents=extents):
                self.stock.granted(extents)
            case GiveBack():
                self.asked += 1

    def need(self, count: int) -> None:
        self._leases.on_message(self, NeedFrames(count))

    def give_back(self) -> None:
        spare = self.stock.spare(guests=False)
        assert spare is not None
        self._leases.on_message(self, spare)


@pytest.fixture
def leases() -> Leases:
    return Leases(MachineMemory(4 * MIB), Events(), lambda vm, trigger, why: None)


async def test_what_others_have_in_stock_comes_to_those_who_wait(leases: Leases) -> None:
    idle, hungry = Hand(leases, 0), Hand(leases, 1)
    idle.need(1 << 12)
    had = len(idle.stock.magazine)
    hungry.need(100)
    assert (leases.waiting(), len(hungry.stock.magazine)) == (1, 0)
    leases.collect_stock()
    leases.collect_stock()
    assert (idle.asked, hungry.asked) == (1, 0)
    idle.give_back()
    assert (leases.waiting(), len(hungry.stock.magazine)) == (0, 100)
    idle.need(1 << 12)
    assert len(idle.stock.magazine) == had - 100
    hungry.need(100)
    leases.collect_stock()
    assert idle.asked == 2, "it was given frames again"


@pytest.mark.parametrize("frames", ["another's", "shared", "no", "too many"])
async def test_what_a_worker_cannot_have_in_stock_is_not_believed(leases: Leases, frames: str) -> None:
    books, worker = leases._memory.books, Hand(leases, 0)
    worker.need(10)
    mine = worker.stock.magazine.take()
    if frames == "shared":
        books.pin(np.array([mine]))
    extent = {"another's": books.lend(1, 3)[0], "shared": (mine, 1), "no": (-5, 10),
              "too many": (mine, 1 << 40)}[frames]
    free = books.free_frames()
    with pytest.raises(ProtocolError, match="stock given back that cannot be"):
        leases.on_message(worker, GivenBack([extent]))
    assert books.free_frames() == free


async def test_whatever_is_reserved_can_be_had(tmp_path: Path) -> None:
    """While another worker, whose guest needs little, has a stock."""
    tables = '[memory]\nswap = "0"\n[sharing]\nenabled = false\n'
    async with real_host(tmp_path, tables) as told:
        host = told.host
        await told.running("small", kernel=await told.blob(rounds_kernel(16)), memory=4 * MIB)
        for size in range(64, 0, -1):
            try:
                await told.create("large", kernel=await told.blob(rounds_kernel((size - 2) * 256)),
                                  memory=size * MIB, reservation=size * MIB)
                break
            except HostError:
                continue
        assert size > 56
        await host.start("large").outcome()
        large, small = host._guests.vms["large"], host._guests.vms["small"]
        assert large.worker is not small.worker
        with trio.fail_after(SOON):
            while large.console.written < 3:
                await large.activity.wait()
        await told.stop("large", force=True)
