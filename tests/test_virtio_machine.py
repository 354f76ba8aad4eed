# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that use the virtio devices, under either monitor: memory that changes under their feet."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable

import pytest

from tests import hw_modes as m
from tests.hw_rig import Machine, Refusing, Rig, halted, vector_of
from tests.test_monitor_paging import HLT, load, repeat, store, word
from tests.virtio_rig import READY
from vmm.devices.virtio import bank
from vmm.devices.virtio.mmio import (
    ACKNOWLEDGE,
    CONFIG_CHANGED,
    DRIVER,
    FEATURES_OK,
    VERSION_1,
    Register,
)
from vmm.devices.virtio.ring import WRITE
from vmm.memory.p2mbits import KIND_MASK, KIND_SHIFT, Kind
from vmm.monitor import Stop, StopReason

MONITORS = ("hw", "bt")
#: the queue's page, a page of code, a page of data, and where results go
QUEUE, CODE, DATA, RESULTS = 0x2_0000, 0x2_4000, 0x2_5000, 0x2_6000
AVAILABLE, USED = QUEUE + 0x400, QUEUE + 0x800
#: mov eax, number; ret
FIRST, SECOND = (b"\xb8" + struct.pack("<I", number) + b"\xc3" for number in (1, 2))
HALTED = Stop(StopReason.HALTED)
_NEVER = 1 << 60


def call(address: int) -> bytes:
    return b"\xb8" + word(address) + b"\xff\xd0"            # mov eax, address; call eax


def keep(index: int) -> bytes:
    return b"\xa3" + word(RESULTS + 4 * index)              # mov [RESULTS + 4 * index], eax


def start(place: bank.Place, queue: int, size: int = 8) -> bytes:
    """A driver that uses one queue of a device."""
    steps = [(Register.STATUS, ACKNOWLEDGE | DRIVER), (Register.DRIVER_FEATURES_SELECT, 1),
             (Register.DRIVER_FEATURES, VERSION_1 >> 32), (Register.DRIVER_FEATURES_SELECT, 0),
             (Register.DRIVER_FEATURES, 1 << 5 if place is bank.BALLOON else 0),
             (Register.STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)]
    return put(place, steps) + ready(place, queue, size) + put(place, [(Register.STATUS, READY)])


def ready(place: bank.Place, queue: int, size: int = 8) -> bytes:
    """Make a queue ready, of which no request was made yet."""
    return store(AVAILABLE, 0) + store(USED, 0) + put(place, [
        (Register.QUEUE_SELECT, queue), (Register.QUEUE_SIZE, size), (Register.DESCRIPTORS, QUEUE),
        (Register.DRIVER_AREA, AVAILABLE), (Register.DEVICE_AREA, USED), (Register.QUEUE_READY, 1)])


def put(place: bank.Place, values: Iterable[tuple[int, int]]) -> bytes:
    return b"".join(store(place.base + register, value) for register, value in values)


def request(place: bank.Place, queue: int, number: int, address: int, length: int,
            flags: int = WRITE) -> bytes:
    """Make a buffer available as request `number` (from 1), tell the device, and wait until it is back."""
    wait = b"\x81\x3d" + word(USED) + word(number << 16) + b"\x75\xf4"      # cmp dword [USED], it; jne back
    return (store(QUEUE, address) + store(QUEUE + 4, 0) + store(QUEUE + 8, length) + store(QUEUE + 12, flags)
            + store(AVAILABLE, number << 16) + store(place.base + Register.QUEUE_NOTIFY, queue) + wait)


def result(machine: Machine, index: int) -> int:
    return machine.memory.read_u32(RESULTS + 4 * index)


def code_is_overwritten(rounds: int) -> m.Setup:
    """Call a function that a device replaces between the calls."""
    code = start(bank.RNG, 0)
    for number in range(rounds):
        code += repeat(30, call(CODE)) + keep(number)
        code += request(bank.RNG, 0, number + 1, CODE, 6)
    setup = m.protected(code + call(CODE) + keep(rounds) + HLT)
    setup.put(CODE, FIRST)
    return setup


def entropy(machine: Machine) -> None:
    """What the device gives is the code of one function, and then of the other."""
    given = [FIRST, SECOND]

    def give(count: int) -> bytes:
        assert count == len(FIRST)
        given.reverse()
        return given[0]

    machine.board.rng.entropy = give


def test_a_device_writes_code(rig: Rig) -> None:
    setup = code_is_overwritten(3)
    machine = rig.machine(setup.state, setup.writes)
    entropy(machine)
    assert machine.go() == HALTED
    assert [result(machine, index) for index in range(4)] == [1, 2, 1, 2]


def test_a_device_waits_for_a_frame(rig: Rig) -> None:
    """The request is served once there is one, and the guest has not noticed."""
    setup = m.protected(start(bank.RNG, 0) + request(bank.RNG, 0, 1, DATA, 6) + load(DATA) + keep(0) + HLT)
    frames = Refusing(rig.frames(), _NEVER)
    machine = rig.machine(setup.state, setup.writes, frames)
    asked = []

    def give(count: int) -> bytes:
        if not asked:
            frames.period = 1
        asked.append(count)
        return b"random"

    machine.board.rng.entropy = give
    assert machine.go().reason is StopReason.NO_FRAMES
    assert machine.go().reason is StopReason.NO_FRAMES
    assert machine.wake_pending()
    assert machine.block.p2m.leaf[DATA >> 12] == 0
    assert machine.memory.read_u32(USED) == 0
    frames.period = _NEVER
    assert machine.go() == HALTED
    assert asked == [6, 6, 6]
    assert result(machine, 0) == int.from_bytes(b"rand", "little")
    assert machine.memory.read_u32(USED) == 1 << 16


def test_a_device_writes_to_shared_memory(rig: Rig) -> None:
    """The other owner of the page keeps what it had."""
    setup = code_is_overwritten(1)
    machine = rig.machine(setup.state, setup.writes)
    state = machine.capture()
    state.monitor = rig.monitor
    clone = rig.clone(machine, state)
    for one in clone, machine:
        entropy(one)
        assert one.go() == HALTED
        assert [result(one, index) for index in range(2)] == [1, 2]


def test_a_page_in_the_balloon(rig: Rig) -> None:
    """It reads as zero, and comes back when it is written; the one beside it is not touched."""
    code = start(bank.BALLOON, 0) + store(DATA, 11) + store(DATA + 0x3000, 22) + load(DATA) + keep(0)
    code += store(RESULTS + 0x100, DATA >> 12) + request(bank.BALLOON, 0, 1, RESULTS + 0x100, 4, 0)
    code += HLT + load(DATA) + keep(1) + store(DATA + 4, 33) + load(DATA + 4) + keep(2)
    setup = m.protected(code + HLT)
    machine = halted(rig, setup)
    assert machine.balloon.counters["inflated"] == machine.block.accounting.inflated == 1
    leaf = machine.block.p2m.leaf
    assert leaf[DATA >> 12] == Kind.BALLOONED << KIND_SHIFT
    assert len(machine.block.p2m.freed) == 1
    machine.processor.halted = False
    assert machine.go() == HALTED
    assert [result(machine, index) for index in range(3)] == [11, 0, 33]
    assert machine.memory.read_u32(DATA + 0x3000) == 22
    assert leaf[DATA >> 12] & KIND_MASK == Kind.PRIVATE << KIND_SHIFT


@pytest.mark.parametrize("touched", [False, True])
def test_a_page_out_of_the_balloon(rig: Rig, touched: bool) -> None:
    """What the guest wrote before it told is not lost."""
    code = store(RESULTS + 0x100, DATA >> 12) + start(bank.BALLOON, 0)
    code += request(bank.BALLOON, 0, 1, RESULTS + 0x100, 4, 0)
    code += ready(bank.BALLOON, 1)
    code += store(DATA, 44) if touched else b""
    setup = m.protected(code + request(bank.BALLOON, 1, 1, RESULTS + 0x100, 4, 0) + HLT)
    machine = halted(rig, setup)
    assert machine.balloon.counters == {"inflated": 1, "deflated": 1, "reported": 0}
    assert machine.block.accounting.deflated == 1
    if touched:
        assert machine.memory.read_u32(DATA) == 44
    else:
        assert machine.block.p2m.leaf[DATA >> 12] == 0


def test_a_balloon_that_is_reset_is_empty(rig: Rig) -> None:
    """A kernel that boots another one does not tell which pages it had given back."""
    code = store(RESULTS + 0x100, DATA >> 12) + start(bank.BALLOON, 0)
    code += request(bank.BALLOON, 0, 1, RESULTS + 0x100, 4, 0) + HLT
    machine = halted(rig, m.protected(code + store(bank.BALLOON.base + Register.STATUS, 0) + HLT))
    assert machine.block.memory_counts()["ballooned"] == 1
    machine.processor.halted = False
    assert machine.go() == HALTED
    assert machine.block.memory_counts()["ballooned"] == 0
    assert machine.block.p2m.leaf[DATA >> 12] == 0


def reports(rig: Rig, memory: int) -> Machine:
    """A guest that reports the upper half of its memory as free."""
    setup = m.protected(start(bank.BALLOON, 2) + request(bank.BALLOON, 2, 1, memory // 2, memory // 2) + HLT)
    state = setup.state
    state.memory_bytes = memory
    return rig.machine(state, setup.writes)


def test_a_long_request_ends_with_the_slice(rig: Rig) -> None:
    machine = reports(rig, 128 << 20)
    pages = machine.block.pages // 2
    seen = []
    while machine.run(time.monotonic_ns() + 100_000) != HALTED:
        if not seen or machine.balloon.reported != seen[-1]:
            seen.append(machine.balloon.reported)
        assert machine.wake_pending() or machine.balloon.reported in (0, pages)
    assert len(seen) > 2
    assert machine.balloon.reported == pages


def test_a_kick_interrupts_a_long_request(rig: Rig) -> None:
    machine = reports(rig, 128 << 20)
    while not machine.balloon.reported:
        machine.run(time.monotonic_ns() + 100_000)
    rig.cpu.stop()
    assert machine.run(time.monotonic_ns() + 10**10).reason is StopReason.KICKED
    assert machine.balloon.reported < machine.block.pages // 2
    state = machine.capture()           # it goes on where the guest goes on
    again = rig.again(machine, state)
    assert again.go() == HALTED
    assert again.balloon.reported == again.block.accounting.reported == machine.block.pages // 2


def test_a_target_wakes_the_guest(rig: Rig) -> None:
    setup = m.protected(start(bank.BALLOON, 0) + b"\xfb" + HLT)             # sti; hlt
    machine = rig.machine(setup.state, setup.writes)
    board = machine.board
    board.mmio.write(0xFEE0_00F0, 4, 0x1FF)
    for register, value in ((0x11 + 2 * bank.BALLOON.interrupt, 0),
                            (0x10 + 2 * bank.BALLOON.interrupt, 1 << 15 | 0x41)):
        board.mmio.write(0xFEC0_0000, 4, register)
        board.mmio.write(0xFEC0_0010, 4, value)
    assert machine.go() == HALTED
    assert not machine.wake_pending()
    assert machine.balloon.driver_ok
    machine.balloon.target_pages = 100
    assert machine.wake_pending()
    assert machine.go() == HALTED
    assert vector_of(machine) == 0x41
    assert board.balloon.interrupt == CONFIG_CHANGED


def test_what_is_asked_of_a_halted_guest_is_done(rig: Rig) -> None:
    """The driver's buffer goes back while the guest sleeps, which it goes on to do."""
    code = start(bank.BALLOON, 2).replace(word(1 << 5), word(1 << 1))       # statistics instead of reports
    code += store(QUEUE, RESULTS) + store(QUEUE + 8, 0) + store(AVAILABLE, 1 << 16)
    machine = halted(rig, m.protected(code + store(bank.BALLOON.base + Register.QUEUE_NOTIFY, 2) + HLT))
    assert machine.go() == HALTED
    assert machine.balloon.request_statistics()
    assert machine.wake_pending()
    machine.pause_clock()
    where = machine.processor.guest.vmcb.rip
    assert machine.go() == HALTED
    assert machine.memory.read_u32(USED) == 1 << 16
    assert not machine.wake_pending()
    machine.pause_clock()
    assert machine.processor.guest.vmcb.rip == where
