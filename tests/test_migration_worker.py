# SPDX-License-Identifier: GPL-2.0-or-later
"""What workers do for a migration: they log what is written."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import trio

from hostd.errors import Conflict
from hostd.lifecycle import Trigger
from hostd.migration.dirty import DirtyLog
from hostd.vm import Vm
from tests import hw_modes as m
from tests.hw_rig import Machine, Rig
from tests.test_monitor_kernels import GOOD, MIX, PRIMES, boot
from tests.test_monitor_paging import HLT, store, word
from tests.test_virtio_machine import DATA, HALTED, QUEUE, USED, request, start
from tests.told_host import SOON, ToldHost, real_host
from vmm import guests
from vmm.devices.virtio import bank
from vmm.memory.block import VmBlock
from vmm.memory.p2mbits import KIND_MASK, KIND_SHIFT, LOGGED, Kind

MONITORS = ("hw", "bt")


def contents(block: VmBlock) -> np.ndarray:
    """What is in all pages (an array of bytes, 4096 a page)."""
    return np.frombuffer(b"".join(map(block.p2m.contents, range(block.pages))), np.uint8).reshape(-1, 4096)


class Copy:
    """The memory of a guest as a migration has it at its other end."""

    def __init__(self, block: VmBlock) -> None:
        self.block = block
        self.pages = contents(block).copy()
        self.taken = 0

    def take(self, pages: np.ndarray) -> None:
        for page in pages.tolist():
            self.pages[page] = np.frombuffer(self.block.p2m.contents(page), np.uint8)
        self.taken += len(pages)

    def differs(self) -> list[int]:
        return np.flatnonzero((self.pages != contents(self.block)).any(axis=1)).tolist()


# --- the log, under either monitor -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "append"), [MIX, PRIMES])
def test_a_copy_that_follows_the_log_is_the_guest_s_memory(rig: Rig, name: str, append: str) -> None:
    machine = boot(rig, name, append)
    machine.run(time.monotonic_ns() + 2_000_000)
    machine.leave_cpu()
    p2m = machine.block.p2m
    p2m.log("start")
    copy = Copy(machine.block)
    rounds = 0
    while not (stop := machine.run(time.monotonic_ns() + 3_000_000)).reason.final:
        machine.leave_cpu()
        copy.take(p2m.log("collect"))
        rounds += 1
        if rounds % 8 == 0:
            assert copy.differs() == []
    machine.leave_cpu()
    copy.take(p2m.log("collect"))
    assert stop == GOOD and copy.differs() == []
    assert copy.taken < rounds * machine.block.pages // 4
    p2m.log("stop")
    assert not (machine.block.leaf() & np.uint64(LOGGED)).any()


def test_what_devices_write_is_logged(rig: Rig) -> None:
    """The buffer and the used ring, each in a page of its own that the guest had written before."""
    setup = m.protected(start(bank.RNG, 0) + store(DATA, 1) + store(USED + 0x1000, 2) + HLT
                        + request(bank.RNG, 0, 1, DATA, 6) + HLT)
    machine = rig.machine(setup.state, setup.writes)
    assert machine.go() == HALTED
    machine.leave_cpu()
    machine.block.p2m.log("start")
    machine.processor.halted = False
    assert machine.go() == HALTED
    machine.leave_cpu()
    written = set(machine.block.p2m.log("collect").tolist())
    assert {DATA >> 12, QUEUE >> 12} <= written and USED + 0x1000 >> 12 not in written


def test_what_is_given_back_is_logged(rig: Rig) -> None:
    setup = m.protected(start(bank.BALLOON, 0) + store(DATA, 11) + store(0x2_6100, DATA >> 12) + HLT
                        + request(bank.BALLOON, 0, 1, 0x2_6100, 4, 0) + HLT)
    machine = rig.machine(setup.state, setup.writes)
    assert machine.go() == HALTED
    machine.leave_cpu()
    machine.block.p2m.log("start")
    machine.processor.halted = False
    assert machine.go() == HALTED
    machine.leave_cpu()
    assert DATA >> 12 in machine.block.p2m.log("collect")
    assert machine.block.leaf()[DATA >> 12] & np.uint64(KIND_MASK) == Kind.BALLOONED << KIND_SHIFT
    assert machine.block.p2m.contents(DATA >> 12) == bytes(4096)


def test_a_log_goes_on_under_whoever_takes_the_guest_over(rig: Rig) -> None:
    """Pages that are touched for the first time are the next one's to log."""
    setup = m.protected(HLT + store(DATA, 1) + HLT)
    machine: Machine = rig.machine(setup.state, setup.writes)
    assert machine.go() == HALTED
    machine.leave_cpu()
    p2m = machine.block.p2m
    p2m.log("start")
    state = machine.capture()
    fresh = VmBlock(rig.pool, machine.block.first, machine.block.memory_bytes)
    fresh.p2m.logging = True
    machine.close()
    machine = Machine(rig.cpu, fresh, machine.frames, state, rig.khz)
    machine.processor.halted = False
    assert machine.go() == HALTED
    machine.leave_cpu()
    assert DATA >> 12 in p2m.log("collect")
    assert word(1) == p2m.contents(DATA >> 12)[:4]


# --- the log of a guest on a host --------------------------------------------------------------------------


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[ToldHost]:
    """A host in this process with real workers."""
    async with real_host(tmp_path) as told:
        yield told


async def counting(host: ToldHost, monitor: str) -> Vm:
    """A guest that computes, and prints as it does."""
    await host.create("vm", kernel=await host.blob(guests.read("primes")), append="loop limit=500",
                      vmm=monitor, memory=8 << 20)
    await host.host.start("vm").outcome()
    await host.prints("vm", "round 1:")
    return host.host._guests.vms["vm"]


async def prints_more(host: ToldHost) -> None:
    console = host.host.console("vm")
    said = console.written
    with trio.fail_after(SOON):
        while console.scrollback(said).count(b": 95 below 500") < 2:
            await host.host._guests.vms["vm"].activity.wait()


@pytest.mark.parametrize("monitor", MONITORS)
async def test_a_running_guest_s_copy_follows_its_log(host: ToldHost, monitor: str) -> None:
    vm = await counting(host, monitor)
    guests_ = host.host._guests
    async with guests_.changing(vm):
        log = DirtyLog(guests_, vm)
        await log.start()
        assert vm.block is not None
        copy = Copy(vm.block)
        for _ in range(5):
            await prints_more(host)
            copy.take(await log.collect())
        assert 0 < copy.taken < vm.block.pages
        # from worker to worker, and to the daemon
        released = await guests_.leases.release(vm)
        vm.follow(Trigger.MOVE)
        await guests_.hand_over(vm, released.state, Trigger.MOVED, released.at_ns)
        await prints_more(host)
        await guests_.park(vm)
        copy.take(await log.collect())
        assert copy.differs() == []
        await log.stop()
        assert not (vm.block.leaf() & np.uint64(LOGGED)).any() and not vm.block.p2m.logging
        await guests_.unpark(vm)
    await prints_more(host)


async def test_the_log_of_a_guest_that_ends(host: ToldHost) -> None:
    vm = await counting(host, "hw")
    guests_ = host.host._guests
    async with guests_.changing(vm):
        log = DirtyLog(guests_, vm)
        await log.start()
        assert vm.worker is not None
        vm.worker.kill()
        await host.becomes("vm", "crashed")
        with pytest.raises(Conflict, match="VM vm is crashed: what was to be logged has ended"):
            await log.collect()
        await log.stop()


async def test_a_throttled_guest_gets_its_cap_back(told: ToldHost) -> None:
    await told.running("vm", cap=50)
    guests_ = told.host._guests
    for percent, cap in (20, 20), (80, 50), (10, 10), (None, 50):
        guests_.throttle(guests_.vms["vm"], percent)
        await told.prints("vm", f"share 100 {cap}\n$")
