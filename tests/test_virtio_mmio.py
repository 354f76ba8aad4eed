# SPDX-License-Identifier: GPL-2.0-or-later
"""The MMIO transport, driven through its registers: by the rules, and against them."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from tests.devices_rig import Rig
from tests.virtio_rig import BUFFERS, READY, ROUNDS, Bench, balloon_bench, rng_bench
from vmm.devices.virtio import bank
from vmm.devices.virtio.mmio import (
    ACKNOWLEDGE,
    CONFIG,
    CONFIG_CHANGED,
    DRIVER,
    FAILED,
    FEATURES_OK,
    INDIRECT_DESC,
    NEEDS_RESET,
    USED_BUFFER,
    VERSION_1,
    Register,
)
from vmm.devices.virtio.ring import MOST_DESCRIPTORS, NEXT, WRITE
from vmm.memory.errors import OutOfFrames


@pytest.fixture
def bench() -> Bench:
    return rng_bench()


def test_what_a_driver_looks_for_first(bench: Bench) -> None:
    driver = bench.driver
    assert bytes(bench.device.read(place, 1) for place in range(4)) == bytes(4)     # only as 32 bits
    assert driver.get(Register.MAGIC).to_bytes(4, "little") == b"virt"
    assert driver.get(Register.VERSION) == 2
    assert driver.get(Register.DEVICE) == 4
    assert driver.get(Register.STATUS) == 0
    assert [driver.get(place) for place in range(0xB0, 0xC0, 4)] == [0xFFFF_FFFF] * 4


def test_features_are_in_two_halves(bench: Bench) -> None:
    driver = bench.driver
    found = []
    for half in (0, 1, 2, 0xFFFF_FFFF):
        driver.put(Register.FEATURES_SELECT, half)
        found.append(driver.get(Register.FEATURES))
    assert found == [INDIRECT_DESC, VERSION_1 >> 32, 0, 0]


def test_a_driver_begins(bench: Bench) -> None:
    assert bench.driver.start() == READY
    assert bench.device.live
    assert bench.device.driver_features == INDIRECT_DESC | VERSION_1
    assert bench.driver.get(Register.QUEUE_READY) == 1


@pytest.mark.parametrize("features", [0, INDIRECT_DESC, VERSION_1 | 1, VERSION_1 << 1 | VERSION_1])
def test_features_that_are_refused(bench: Bench, features: int) -> None:
    driver = bench.driver
    for half in (0, 1):
        driver.put(Register.DRIVER_FEATURES_SELECT, half)
        driver.put(Register.DRIVER_FEATURES, features >> 32 * half & 0xFFFF_FFFF)
    driver.put(Register.STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
    assert driver.get(Register.STATUS) == ACKNOWLEDGE | DRIVER
    driver.put(Register.STATUS, READY)
    assert not bench.device.live


def test_features_are_settled_once(bench: Bench) -> None:
    bench.driver.start()
    bench.driver.put(Register.DRIVER_FEATURES, 0)
    bench.driver.put(Register.STATUS, ACKNOWLEDGE)          # bits do not go but by a reset
    assert bench.device.driver_features == INDIRECT_DESC | VERSION_1
    assert bench.driver.get(Register.STATUS) == READY


def test_a_queue_that_is_not_there(bench: Bench) -> None:
    driver = bench.driver
    for queue in (1, 2, 0xFFFF_FFFF):
        driver.put(Register.QUEUE_SELECT, queue)
        driver.put(Register.QUEUE_READY, 1)
        assert driver.get(Register.QUEUE_MOST) == driver.get(Register.QUEUE_READY) == 0
    driver.start()
    bench.serve()
    driver.put(Register.QUEUE_NOTIFY, 1)
    assert not bench.device.notified
    driver.put(Register.QUEUE_SELECT, 0)
    assert driver.get(Register.QUEUE_MOST) == MOST_DESCRIPTORS


def test_a_queue_in_use_is_not_moved(bench: Bench) -> None:
    bench.driver.start()
    before = bench.device.rings[0].save()
    for register in (Register.QUEUE_SIZE, Register.DESCRIPTORS, Register.DRIVER_AREA + 4):
        bench.driver.put(register, 4)
    assert bench.device.rings[0].save() == before
    bench.driver.put(Register.QUEUE_READY, 0)
    bench.driver.put(Register.QUEUE_SIZE, 4)
    assert bench.device.rings[0].size == 4


def test_addresses_have_64_bits(bench: Bench) -> None:
    bench.driver.put(Register.DESCRIPTORS, 0x1234_5670)
    bench.driver.put(Register.DESCRIPTORS + 4, 0x89AB_CDEF)
    assert bench.device.rings[0].descriptors == 0x89AB_CDEF_1234_5670


def test_a_request_interrupts_when_it_is_done(bench: Bench) -> None:
    bench.driver.start()
    bench.driver.send(0, [(BUFFERS, 16, True)])
    assert bench.called == 2                # with DRIVER_OK its queue was looked at, too
    assert not bench.level
    assert not bench.driver.used(0)         # nothing is done in the middle of the store
    bench.serve()
    assert bench.driver.used(0) == [(0, 16)]
    assert bench.interrupted() == USED_BUFFER
    assert bench.interrupted() == 0


def test_a_driver_that_wants_no_interrupt(bench: Bench) -> None:
    bench.driver.start()
    bench.ram.data[bench.driver.area(0) + 0x400] = 1
    bench.driver.send(0, [(BUFFERS, 16, True)])
    bench.serve()
    assert bench.driver.used(0) == [(0, 16)]
    assert bench.interrupted() == 0


def test_nothing_is_done_before_driver_ok(bench: Bench) -> None:
    driver = bench.driver
    driver.start()
    driver.put(Register.STATUS, 0)
    for half in (0, 1):
        driver.put(Register.DRIVER_FEATURES_SELECT, half)
        driver.put(Register.DRIVER_FEATURES, half)
    driver.put(Register.STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
    driver.place(0)
    driver.send(0, [(BUFFERS, 16, True)])
    assert not bench.device.notified
    driver.put(Register.STATUS, READY)      # but then what is there is served
    bench.serve()
    assert driver.used(0) == [(0, 16)]


def test_a_malformed_request_needs_a_reset(bench: Bench) -> None:
    driver = bench.driver
    driver.start()
    driver.descriptor(0, 0, BUFFERS, 16, WRITE | NEXT, 0)
    driver.offer(0)
    driver.put(Register.QUEUE_NOTIFY, 0)
    bench.serve()
    assert driver.get(Register.STATUS) == READY | NEEDS_RESET
    assert bench.interrupted() == CONFIG_CHANGED
    driver.send(0, [(BUFFERS, 16, True)])
    driver.put(Register.STATUS, READY)
    assert not bench.device.notified
    assert bench.interrupted() == 0
    assert driver.start() == READY
    driver.send(0, [(BUFFERS, 16, True)])
    bench.serve()
    assert driver.used(0) == [(0, 16)]


@pytest.mark.parametrize("register", [Register.DESCRIPTORS, Register.DRIVER_AREA, Register.DEVICE_AREA])
def test_a_queue_outside_memory_needs_a_reset(bench: Bench, register: int) -> None:
    driver = bench.driver
    driver.start()
    driver.put(Register.QUEUE_READY, 0)
    driver.put(register + 4, 1)
    driver.put(Register.QUEUE_READY, 1)
    driver.send(0, [(BUFFERS, 16, True)])
    bench.serve()
    assert driver.get(Register.STATUS) & NEEDS_RESET


@pytest.mark.parametrize(("register", "value"), [(Register.QUEUE_SIZE, 3), (Register.QUEUE_SIZE, 64),
                                                 (Register.DESCRIPTORS, 8), (Register.DEVICE_AREA, 2)])
def test_a_queue_that_cannot_be_needs_a_reset(bench: Bench, register: int, value: int) -> None:
    driver = bench.driver
    driver.start()
    driver.put(Register.QUEUE_READY, 0)
    driver.put(register, value)
    driver.put(Register.QUEUE_READY, 1)
    assert driver.get(Register.STATUS) == READY | NEEDS_RESET
    assert driver.get(Register.QUEUE_READY) == 0


def test_a_driver_that_gave_up(bench: Bench) -> None:
    bench.driver.start()
    bench.driver.put(Register.STATUS, FAILED)
    assert not bench.device.live
    bench.driver.put(Register.QUEUE_NOTIFY, 0)
    assert not bench.device.notified


def test_a_reset_forgets_everything(bench: Bench) -> None:
    driver = bench.driver
    driver.start()
    driver.send(0, [(BUFFERS, 16, True)])
    bench.serve()
    driver.send(0, [(BUFFERS, 16, True)])
    assert bench.level
    assert bench.device.notified
    driver.put(Register.STATUS, 0)
    assert not bench.level
    assert not bench.device.notified
    assert bench.device.driver_features == driver.get(Register.QUEUE_READY) == 0
    assert driver.start() == READY


def test_a_request_waits_for_a_frame(bench: Bench) -> None:
    """Whichever access lacks one: the request is served once, later."""
    bench.driver.start()
    bench.serve()
    for refused in range(1, 8):
        bench.driver.send(0, [(BUFFERS, 16, True)])
        bench.ram.refuse = refused
        with pytest.raises(OutOfFrames):
            bench.serve()
        assert bench.device.notified
        assert bench.device.live
        assert not bench.driver.used(0)
        bench.serve()
        assert bench.driver.used(0) == [(0, 16)]


def test_a_pass_is_bounded(bench: Bench) -> None:
    driver = bench.driver
    driver.start()
    bench.serve()
    for _ in range(ROUNDS):
        driver.send(0, [(BUFFERS, 16, True)])
    bench.ram.accesses = 0
    assert bench.serve() == 2               # the second finds nothing left
    assert bench.ram.accesses <= ROUNDS * 8
    assert len(driver.used(0)) == ROUNDS


def test_reads_beyond_the_configuration(bench: Bench) -> None:
    assert bench.device.read(CONFIG, 4) == 0
    bench.device.write(CONFIG, 4, 1)
    other = balloon_bench()
    other.device.write(CONFIG + 6, 4, 0xFFFF_FFFF)
    assert other.device.read(CONFIG + 4, 4) == 0
    assert other.device.read(0x1FF, 4) == 0


# -- on a board ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", bank.PLACES)
def test_its_place_on_the_board(place: bank.Place) -> None:
    rig = Rig()
    assert rig.mmio_read(place.base) == int.from_bytes(b"virt", "little")
    assert rig.mmio_read(place.base + 8) == rig.board.virtio.devices[place.name].IDENTITY
    assert rig.mmio_read(place.base + 0x200) == 0xFFFF_FFFF


def test_its_interrupt_through_either_controller() -> None:
    rig = Rig()
    rig.setup_pics()
    rig.outb(0x4D1, 1 << bank.BALLOON.interrupt - 8)
    balloon = rig.board.balloon
    balloon.status = READY
    balloon.target_pages = 5
    assert rig.interrupts.acknowledge() == 0x30 + bank.BALLOON.interrupt
    rig.mmio_write(bank.BALLOON.base + Register.INTERRUPT_ACKNOWLEDGE, CONFIG_CHANGED)
    rig.enable_apic()
    rig.route(bank.BALLOON.interrupt, 1 << 15 | 0x51)
    balloon.target_pages = 6
    assert rig.interrupts.acknowledge() == 0x51


def test_a_board_ends_a_pass_by_the_clock() -> None:
    rig = Rig()
    bench = rng_bench()
    bench.driver.device = rig.board.rng
    bench.driver.ram = rig.ram
    bench.driver.start()
    rig.board.virtio.serve()
    for _ in range(8):
        bench.driver.send(0, [(BUFFERS, 16, True)])
    rig.board.virtio.clock = itertools.count(0, bank.PASS_NS // 4).__next__
    rig.board.virtio.serve()
    assert len(bench.driver.used(0)) == 4
    assert rig.board.virtio.waiting
    rig.board.virtio.serve()
    assert len(bench.driver.used(0)) == 4
    rig.board.virtio.serve()
    assert not rig.board.virtio.waiting


def test_a_board_says_that_a_device_waits() -> None:
    rig = Rig()
    told = []
    rig.board.virtio.on_waiting = lambda: told.append(True)
    bench = rng_bench()
    bench.driver.device = rig.board.rng
    bench.driver.ram = rig.ram
    bench.driver.start()
    assert (rig.board.virtio.waiting, told) == (True, [True])
    rig.board.virtio.serve()
    assert not rig.board.virtio.waiting
    bench.driver.send(0, [(BUFFERS, 16, True)])
    assert (rig.board.virtio.waiting, told) == (True, [True, True])
    copy = Rig(now=rig.now)
    copy.board.load(msgspec.msgpack.decode(msgspec.msgpack.encode(rig.board.save())))
    assert copy.board.virtio.waiting
    copy.ram.data[:] = rig.ram.data
    copy.board.virtio.serve()
    assert copy.ram.data[BUFFERS:BUFFERS + 16] == bytes(range(16))
    assert copy.interrupts.ioapic.lines >> bank.RNG.interrupt & 1
