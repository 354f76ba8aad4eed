# SPDX-License-Identifier: GPL-2.0-or-later
"""The keeper of memory on a host whose guests do what they are told: whom it asks, and when."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import trio

from hostd.memory_keeper import STATISTICS_S, MemoryKeeper
from hostd.memory_state import HostMemoryState
from hostd.protocol import Message, SetBalloon
from hostd.reclaiming import Reclaimer
from hostd.swapfile import Full, SwapFile
from hostd.vm import Vm
from tests.told_host import MEMORY, ToldHost
from vmm.memory.p2mbits import PRESENT
from vmm.memory.physical import GuestMemory
from vmm.memory.pool import PAGE

#: guest-physical pages in which the kernel is not
PAGES = np.arange(100)


def keeper_of(told: ToldHost) -> MemoryKeeper:
    host = told.host
    return MemoryKeeper(host._guests, host._memory, Reclaimer(host._guests, host._memory), host.events,
                        HostMemoryState(), lambda urgent: None)


async def paused(told: ToldHost, name: str) -> Vm:
    """A guest that has written to PAGES, and that no worker has any more."""
    await told.running(name)
    await told.host.pause(name).outcome()
    vm = told.host._guests.vms[name]
    assert vm.block is not None
    memory = GuestMemory(vm.block.p2m, told.host._memory.books.frames_for_loading(len(PAGES)))
    for page in PAGES.tolist():
        memory.write(page * PAGE, bytes([page]) * PAGE)
    return vm


async def test_what_is_shared_with_nobody_any_more_can_be_swapped(told: ToldHost) -> None:
    vm, books = await paused(told, "web"), told.host._memory.books
    assert vm.block is not None
    keeper = keeper_of(told)
    copy = books.clone(vm.block)
    vm.definition = msgspec.structs.replace(vm.definition, limit=len(PAGES) * PAGE // 2)
    for _ in range(3):
        await keeper.decide()
    assert vm.memory_state.swapped_out == 0, "it would free nothing"
    books.free(copy)                                    # a snapshot that is done, a clone that has gone
    for _ in range(3):
        await keeper.decide()
    assert vm.memory_state.swapped_out >= len(PAGES) // 2
    assert all(vm.block.p2m.contents(page) == bytes([page]) * PAGE for page in PAGES.tolist())


async def test_a_swap_file_that_takes_nothing_is_left_in_peace_for_a_while(
        told: ToldHost, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    vm, tries = await paused(told, "web"), 0
    assert vm.block is not None
    vm.definition = msgspec.structs.replace(vm.definition, limit=len(PAGES) * PAGE // 2)
    keeper = keeper_of(told)

    def full(swap: SwapFile, contents: object) -> None:
        nonlocal tries
        tries += 1
        raise Full("no room")

    with monkeypatch.context() as patch:
        patch.setattr(SwapFile, "write", full)
        for rests in 1, 2:
            for _ in range(3):
                await keeper.decide()
            assert tries == rests and vm.block.memory_counts()["shared"] == 0
            keeper._rests = trio.current_time()
    assert caplog.text.count("no page can be swapped") == 1
    for _ in range(3):
        await keeper.decide()
    assert vm.memory_state.swapped_out and keeper._rests is None


async def test_while_there_is_plenty_guests_are_woken_for_those_who_look(
        told: ToldHost, monkeypatch: pytest.MonkeyPatch) -> None:
    await told.running("web")
    vm = told.host._guests.vms["web"]
    sent: list[Message] = []
    monkeypatch.setattr(vm.worker, "send", sent.append)
    keeper = keeper_of(told)

    async def asked() -> list[tuple[int, bool]]:
        await keeper.decide()
        questions = [(message.pages, message.statistics) for message in sent
                     if isinstance(message, SetBalloon)]
        sent.clear()
        return questions

    assert await asked() == [(0, False)], "whether there is a driver wakes nobody"
    assert await asked() == []
    told.host.get("web")
    assert not keeper._looked_at() and await asked() == [], "it was asked just now"
    keeper._watches["web"].asked -= STATISTICS_S + 1
    assert keeper._looked_at()
    assert await asked() == [(0, True)]
    keeper._watches["web"].asked -= STATISTICS_S + 1
    assert not keeper._looked_at(), "nobody has looked since"
    vm.definition = msgspec.structs.replace(vm.definition, memory_target=MEMORY // 2)
    assert await asked() == [(MEMORY // 2 >> 12, False)]


async def test_a_target_that_cannot_be_told_now_is_told_soon(told: ToldHost) -> None:
    await told.running("web")
    vm = told.host._guests.vms["web"]
    keeper = keeper_of(told)
    await keeper.decide()
    assert keeper._plenty()
    vm.definition = msgspec.structs.replace(vm.definition, memory_target=MEMORY // 2)
    async with vm.lock:
        await keeper.decide()
    assert not keeper._plenty()
    await keeper.decide()
    assert keeper._plenty() and keeper._watches["web"].target == MEMORY // 2 >> 12
    await told.host.pause("web").outcome()
    paused = keeper._claims()
    await told.host.resume("web").outcome()
    assert keeper._claims() != paused, "a guest that goes on is worth a decision"


async def test_a_guest_that_wakes_up_is_believed_within_the_period(told: ToldHost) -> None:
    await told.running("web")
    vm = told.host._guests.vms["web"]
    assert vm.block is not None
    keeper = keeper_of(told)
    await keeper.decide()
    watch = keeper._watches["web"]
    watch.working_set.feed(0, 100)
    await keeper.decide()
    assert watch.working_set.estimate == 0
    watch.sample = np.flatnonzero(vm.block.leaf() & np.uint64(PRESENT))
    await keeper.decide()
    assert watch.working_set.estimate == 0.5
