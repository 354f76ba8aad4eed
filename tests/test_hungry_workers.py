# SPDX-License-Identifier: GPL-2.0-or-later
"""Whoever waits for frames is told when some come free, wherever they come from."""

from __future__ import annotations

import numpy as np
import pytest
import trio
import trio.testing

from hostd.definition import Definition
from hostd.events import Events
from hostd.leases import Leases
from hostd.lifecycle import Policy, Trigger
from hostd.memory import MachineMemory
from hostd.protocol import Adopted, Grant, Message, NeedFrames
from hostd.vm import Vm
from hostd.workers import Worker
from vmm.memory.block import VmBlock
from vmm.memory.frames import Magazine
from vmm.memory.physical import GuestMemory

PAGE = 4096
GUEST = 1 << 20
#: pages that its guest has written to
PAGES = np.arange(4)


@pytest.fixture
def memory() -> MachineMemory:
    return MachineMemory(4 << 20)


@pytest.fixture
def leases(memory: MachineMemory) -> Leases:
    def ended(vm: Vm, trigger: Trigger, why: str) -> None:
        assert vm.block is not None
        memory.books.free(vm.block)

    return Leases(memory, Events(), ended)


class Hand(Worker):
    """A worker that is there to be given frames."""

    def __init__(self, leases: Leases, index: int) -> None:
        super().__init__(index, 0)
        self._leases = leases
        self.frames = 0

    def send(self, message: Message) -> None:
        if isinstance(message, Grant):
            self.frames += sum(count for _, count in message.extents)

    def ask(self, count: int) -> None:
        self._leases.on_message(self, NeedFrames(count))


def guest(memory: MachineMemory) -> VmBlock:
    block = memory.books.new(GUEST)
    physical = GuestMemory(block.p2m, Magazine(memory.books.lend(0, len(PAGES))))
    for page in PAGES.tolist():
        physical.write(page * PAGE, b"something")
    return block


async def test_what_an_end_of_a_pin_frees_goes_to_those_who_wait(memory: MachineMemory,
                                                                 leases: Leases) -> None:
    books, worker = memory.books, Hand(leases, 0)
    block = guest(memory)
    books.freeze(block, PAGES)
    frames = (block.leaf()[PAGES] >> np.uint64(12)).astype(np.int64)
    books.pin(frames)                                   # as the table of shared pages does
    books.free(block)
    books.lend(1, books.free_frames())
    worker.ask(10)
    assert (worker.frames, leases.waiting()) == (0, 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(memory.room_for, 1)          # a guest about to start
        await trio.testing.wait_all_tasks_blocked()
        books.unpin(frames[:3])
        assert (worker.frames, leases.waiting()) == (3, 0)
        books.unpin(frames[3:])


async def test_what_a_dead_worker_had_goes_to_those_who_wait(memory: MachineMemory, leases: Leases) -> None:
    books, dying, waiting = memory.books, Hand(leases, 0), Hand(leases, 1)
    vm = Vm(Definition(name="web", memory=GUEST, weight=100, cap=0, on_crash=Policy.STOP,
                       on_poweroff=Policy.STOP), Events())
    vm.block = guest(memory)
    vm.follow(Trigger.START)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(leases.adopt, vm, dying, b"", Trigger.LOADED)
        await trio.testing.wait_all_tasks_blocked()
        leases.on_message(dying, Adopted(vm.lease))
    stock = books.free_frames()
    dying.ask(stock)
    dying.ask(10)
    waiting.ask(10)
    assert leases.waiting() == 2
    leases.on_death(dying, "somebody killed it")
    assert dying.frames == stock, "and nothing of what its guest left"
    assert waiting.frames > 0 and leases.waiting() == 0
    assert books.free_frames() >= stock - 10


async def test_what_a_guest_gave_back_of_shared_pages_goes_to_those_who_wait(memory: MachineMemory,
                                                                             leases: Leases) -> None:
    books, worker = memory.books, Hand(leases, 0)
    block = guest(memory)
    books.freeze(block, PAGES)
    books.lend(1, books.free_frames())
    worker.ask(10)
    for page in PAGES.tolist():
        block.p2m.discard(page, ballooned=True)
    books.reported(block, PAGES.tolist(), [], [])
    assert (worker.frames, leases.waiting()) == (len(PAGES), 0)
