# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest at its limit: it gets no frame more, other pages of its make room at once, it goes on unharmed."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from hostd import memory_keeper
from hostd.books import Books
from hostd.definition import Definition
from hostd.events import Events
from hostd.lifecycle import Policy
from hostd.model import MONITORS, PAGE, VmPatch
from hostd.protocol import BalloonView, Message, Most, SetRation
from hostd.ration import Ration
from hostd.rationing import LEEWAY, ROOM, STANDS_STILL, Rationing
from hostd.saved import Life
from hostd.swapfile import NotStored, SwapFile
from hostd.vm import Vm
from tests.told_host import SOON, ToldHost, real_host
from vmm.memory.block import VmBlock, new_block
from vmm.memory.errors import OutOfFrames
from vmm.memory.frames import FrameAllocator, Magazine
from vmm.memory.physical import GuestMemory
from vmm.memory.pool import Pool
from vmm.memory.reclaim import freeze

MEMORY, LIMIT, TOUCHED = 8 << 20, 2 << 20, 800
_LOAD = 0x100000


def rounds_kernel(pages: int) -> bytes:
    """Multiboot.  Round after round it checks and changes a word in each of so many pages, and prints a dot;
    it ends itself if it finds something else there than it wrote."""
    page = (b"\x8b\x07"                             # page: mov eax, [edi]
            b"\x85\xed\x74\x08"                     #       test ebp, ebp; jz write
            b"\x8d\x5c\x2f\xff\x39\xd8\x75\x18"     #       lea ebx, [edi + ebp - 1]; cmp eax, ebx; jne bad
            b"\x8d\x1c\x2f\x89\x1f"                 # write: lea ebx, [edi + ebp]; mov [edi], ebx
            b"\x81\xc7\x00\x10\x00\x00"             #       add edi, 0x1000
            b"\x49\x75\xe4")                        #       dec ecx; jnz page
    code = (b"\x31\xed"                             #       xor ebp, ebp
            b"\xbf\x00\x00\x20\x00"                 # round: mov edi, 0x200000
            b"\xb9" + struct.pack("<I", pages)      #       mov ecx, pages
            + page
            + b"\x66\xba\xf8\x03\xb0.\xee"          #       mov dx, 0x3f8; mov al, '.'; out dx, al
            b"\x45\xeb\xd0"                         #       inc ebp; jmp round
            b"\xb0\x07\xe6\xf4\xeb\xfe")            # bad:  mov al, 7; out 0xf4, al; jmp to itself
    magic, flags, end = 0x1BADB002, 0x10000, _LOAD + 32 + len(code)
    return struct.pack("<8I", magic, flags, -(magic + flags) & 0xFFFFFFFF, _LOAD, _LOAD, end, end,
                       _LOAD + 32) + code


# --- the ration of a guest ---------------------------------------------------------------------------------


def test_a_ration_is_kept_to_the_frame_and_comes_back_with_what_is_given_back() -> None:
    allocator = FrameAllocator(Pool(4 << 20))
    block = new_block(allocator, 1 << 20)
    ration = Ration(Magazine(allocator.lend(0, 100)), block.p2m, Most(10))
    memory = GuestMemory(block.p2m, ration)
    for page in range(10):
        memory.write(page * PAGE, b"x")
    with pytest.raises(OutOfFrames, match="as it may"):
        memory.write(10 * PAGE, b"x")
    assert ration.used_up and len(ration) == 0
    memory.write(3 * PAGE, b"what it has it can use")
    for page in 1, 2:
        block.p2m.discard(page, ballooned=True)
    for page in 10, 11:
        memory.write(page * PAGE, b"x")
    assert not ration.used_up
    with pytest.raises(OutOfFrames):
        memory.write(12 * PAGE, b"x")
    ration.set(Most(11))
    memory.write(12 * PAGE, b"x")
    ration.set(Most(5))
    with pytest.raises(OutOfFrames):
        memory.write(13 * PAGE, b"x")
    ration.set(Most())
    memory.write(13 * PAGE, b"x")
    assert block.memory_counts()["private"] == 12


def test_what_is_shared_counts_and_writing_to_it_changes_nothing() -> None:
    allocator = FrameAllocator(Pool(4 << 20))
    block = new_block(allocator, 1 << 20)
    ration = Ration(Magazine(allocator.lend(0, 100)), block.p2m, Most(10))
    memory = GuestMemory(block.p2m, ration)
    for page in range(10):
        memory.write(page * PAGE, b"x")
    freeze(block.p2m, np.arange(10))                # as a snapshot does it, and sharing
    ration.recount()
    with pytest.raises(OutOfFrames, match="as it may"):
        memory.write(10 * PAGE, b"x")
    for page in range(6):
        memory.write(page * PAGE, b"its own now")
    ration.set(Most(10, own=8))                     # as for one that is blocked
    for page in range(6, 8):
        memory.write(page * PAGE, b"its own now")
    with pytest.raises(OutOfFrames, match="as it may"):
        memory.write(8 * PAGE, b"x")
    assert ration.used_up
    assert (block.memory_counts()["private"], block.memory_counts()["shared"]) == (8, 2)


def test_an_empty_stock_is_not_a_ration_used_up() -> None:
    allocator = FrameAllocator(Pool(4 << 20))
    block = new_block(allocator, 1 << 20)
    ration = Ration(Magazine(allocator.lend(0, 1)), block.p2m, Most(10))
    memory = GuestMemory(block.p2m, ration)
    memory.write(0, b"x")
    with pytest.raises(OutOfFrames, match="stock"):
        memory.write(PAGE, b"x")
    assert not ration.used_up


# --- guests on a host --------------------------------------------------------------------------------------


@pytest.fixture(params=["64M", "0"])
async def host(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[ToldHost]:
    """A host in this process with real workers, and with as much swap."""
    tables = f'[memory]\nswap = "{request.param}"\n[sharing]\nenabled = false\n'
    async with real_host(tmp_path, tables) as told:
        yield told


def resident(vm: Vm) -> int:
    assert vm.block is not None
    return vm.block.memory_counts()["resident"]


async def rounds(host: ToldHost, vm: Vm, count: int) -> int:
    """Wait until the guest has done so many more; the most frames that it had at the end of one, or when it
    stood still."""
    most, leases = 0, host.host._guests.leases
    before = leases.on_limit

    def note(vm: Vm) -> None:
        nonlocal most
        most = max(most, resident(vm))
        before(vm)
        assert vm.view().memory_waiting

    leases.on_limit = note
    goal = vm.console.written + count
    with trio.fail_after(SOON):
        while vm.console.written < goal:
            await vm.activity.wait()
            most = max(most, resident(vm))
    leases.on_limit = before
    return most


@pytest.mark.parametrize("monitor", MONITORS)
@pytest.mark.parametrize("host", ["64M"], indirect=True)
async def test_a_limit_holds_at_every_moment(host: ToldHost, monitor: str) -> None:
    kernel = await host.blob(rounds_kernel(TOUCHED))
    await host.running("vm", kernel=kernel, memory=MEMORY, limit=LIMIT, vmm=monitor)
    await host.running("other", kernel=kernel, memory=MEMORY, vmm=monitor)
    vm, other = (host.host._guests.vms[name] for name in ("vm", "other"))
    assert 0 < await rounds(host, vm, 4) <= LIMIT // PAGE
    assert vm.memory_state.swapped_out > TOUCHED - LIMIT // PAGE
    assert vm.view().memory_events.swapped_in > TOUCHED - LIMIT // PAGE
    assert await rounds(host, other, 4) >= TOUCHED and other.memory_state.swapped_out == 0
    await host.host.update("vm", VmPatch(limit=MEMORY))
    await rounds(host, vm, 200)
    assert resident(vm) > LIMIT // PAGE and (vm.state, other.state) == ("running", "running")
    await host.host.pause("vm").outcome()


@pytest.mark.parametrize("host", ["64M"], indirect=True)
async def test_a_clone_that_shares_all_that_its_limit_allows_goes_on(host: ToldHost) -> None:
    kernel = await host.blob(rounds_kernel(TOUCHED))
    await host.running("vm", kernel=kernel, memory=MEMORY, limit=LIMIT)
    await rounds(host, host.host._guests.vms["vm"], 2)
    await host.clone("vm", "clone")
    for name in "vm", "clone":
        assert 0 < await rounds(host, host.host._guests.vms[name], 4) <= LIMIT // PAGE


@pytest.mark.parametrize("host", ["0", "64M"], indirect=True)
async def test_without_swap_and_without_a_driver_a_guest_stands_still_at_its_limit(
        host: ToldHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or with a disk that fails.  It says so, and goes on with a higher limit."""
    def fail(swap: SwapFile, contents: object) -> None:
        raise NotStored("cannot write: the disk is broken")

    monkeypatch.setattr(SwapFile, "write", fail)
    await host.running("vm", kernel=await host.blob(rounds_kernel(TOUCHED)), memory=MEMORY, limit=LIMIT)
    vm = host.host._guests.vms["vm"]
    with trio.fail_after(SOON):
        while vm.reason != STANDS_STILL:
            await vm.activity.wait()
    assert resident(vm) <= LIMIT // PAGE and not vm.console.written
    await host.host.update("vm", VmPatch(limit=MEMORY))
    await rounds(host, vm, 2)
    assert vm.reason == "" and resident(vm) >= TOUCHED


@pytest.mark.parametrize("monitor", MONITORS)
@pytest.mark.parametrize("host", ["32K"], indirect=True)
async def test_a_full_swap_file_changes_nothing_for_a_guest_which_goes_on_when_there_is_room(
        host: ToldHost, monitor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_keeper, "REST_S", 0.1)
    kernel = await host.blob(rounds_kernel(TOUCHED))
    await host.running("other", kernel=kernel, memory=MEMORY, limit=LIMIT, vmm=monitor)
    await rounds(host, host.host._guests.vms["other"], 2)
    await host.host.pause("other").outcome()
    await host.running("vm", kernel=kernel, memory=MEMORY, limit=LIMIT, vmm=monitor)
    vm = host.host._guests.vms["vm"]
    with trio.fail_after(SOON):
        while vm.reason != STANDS_STILL:
            await vm.activity.wait()
    assert vm.block is not None and vm.block.memory_counts()["shared"] == 0, "nothing is left frozen"
    assert host.host.overview.check_memory() == []
    await host.host.destroy("other", force=True).outcome()
    await rounds(host, vm, 4)
    assert vm.reason == "" and resident(vm) <= LIMIT // PAGE


# --- the daemon's side of it --------------------------------------------------------------------------------


def one_page_vm() -> Vm:
    """A VM with a limit of one page."""
    return Vm(Definition(name="vm", memory=1 << 20, limit=PAGE, weight=100, cap=0, on_crash=Policy.STOP,
                         on_poweroff=Policy.STOP), Events())


async def test_a_guest_that_lives_on_from_another_daemon_has_its_limit_at_once() -> None:
    before, after = one_page_vm(), one_page_vm()
    Life.of(before, paused=False).give_to(after)
    assert after.ration == Most(1)


class Refusals:
    """A guest that is refused frames, and a daemon that swaps out `room` pages of it then; None: it is not to
    be had."""

    def __init__(self, room: int | None) -> None:
        self.vm = one_page_vm()
        self.vm.begin_life()
        self.vm.block, self.vm.lease = Books(Pool(4 << 20)).new(1 << 20), "vm#1"
        #: what its worker is told
        self.told: list[Message] = []
        self.vm.worker = SimpleNamespace(send=self.told.append)     # type: ignore[assignment]
        self.leases: Any = SimpleNamespace()

        async def evict(vm: Vm, count: int, shared: bool) -> int | None:
            return room

        self.rationing = Rationing(self.leases, evict)

    async def refused(self) -> list[Message]:
        """What its worker is told when the guest was refused a frame."""
        self.told.clear()
        self.leases.on_limit(self.vm)
        await trio.testing.wait_all_tasks_blocked()
        return self.told


async def test_a_driver_gets_room_once_a_decision_and_not_while_its_guest_is_blocked() -> None:
    guest = Refusals(room=0)
    vm, refused, rationing = guest.vm, guest.refused, guest.rationing
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rationing.run)
        assert await refused() == [] and vm.reason == STANDS_STILL
        vm.balloon = BalloonView(vm.lease, True, 0, {})
        assert await refused() == [], "it had its turn"
        rationing.set(vm, Most(1))
        assert guest.told == [SetRation(vm.lease, Most(1))], "it tries again"
        assert await refused() == [SetRation(vm.lease, Most(ROOM))] and vm.reason == ""
        assert await refused() == []
        rationing.set(vm, Most(1, own=0))
        assert await refused() == []
        nursery.cancel_scope.cancel()


async def test_a_driver_that_gives_nothing_back_comes_to_a_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Refusals(room=0)
    vm, resident = guest.vm, 0
    vm.balloon = BalloonView(vm.lease, True, 0, {})
    monkeypatch.setattr(VmBlock, "memory_counts", lambda block: {"resident": resident})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest.rationing.run)
        while await guest.refused():
            resident += ROOM
            guest.rationing.set(vm, Most(1))
        assert LEEWAY <= resident < LEEWAY + 2 * ROOM and vm.reason == STANDS_STILL
        nursery.cancel_scope.cancel()


async def test_a_guest_waits_from_its_refusal_until_it_can_try_again() -> None:
    for room in 0, 5:
        guest = Refusals(room)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.rationing.run)
            guest.leases.on_limit(guest.vm)
            assert guest.vm.memory_state.waits
            await trio.testing.wait_all_tasks_blocked()
            assert guest.vm.memory_state.waits == (not room)
            guest.rationing.set(guest.vm, Most(2))
            assert not guest.vm.memory_state.waits
            nursery.cancel_scope.cancel()


async def test_a_guest_that_no_worker_has_waits_for_nothing(told: ToldHost) -> None:
    await told.running("vm")
    told.host._guests.vms["vm"].memory_state.waits = True
    assert told.host.get("vm").memory_waiting
    await told.host.pause("vm").outcome()
    assert not told.host.get("vm").memory_waiting


async def test_a_guest_that_is_being_migrated_does_not_stand_still_at_its_limit(
        autojump_clock: trio.testing.MockClock) -> None:
    guest = Refusals(room=None)
    vm = guest.vm
    async with trio.open_nursery() as nursery, vm.lock:     # as whoever changes it holds it
        nursery.start_soon(guest.rationing.run)
        assert await guest.refused() == [], "a change is soon over"
        vm.away = "it is being migrated"
        await trio.sleep(2)
        assert guest.told == [SetRation(vm.lease, Most(ROOM))]
        assert await guest.refused() == [SetRation(vm.lease, Most(ROOM))], "as often as it needs some"
        guest.rationing.set(vm, Most(1, own=0))
        assert await guest.refused() == [], "it is blocked"
        guest.rationing.set(vm, Most(1))
        assert await guest.refused() == [SetRation(vm.lease, Most(ROOM))]
        nursery.cancel_scope.cancel()
