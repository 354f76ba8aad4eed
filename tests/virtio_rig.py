# SPDX-License-Identifier: GPL-2.0-or-later
"""Virtio devices with nobody's memory but a test's, and a driver for them in Python."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from tests.plain_memory import PlainMemory
from vmm.devices.timers import Timers
from vmm.devices.virtio.balloon import Balloon
from vmm.devices.virtio.mmio import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
    VERSION_1,
    MmioDevice,
    Register,
)
from vmm.devices.virtio.ring import INDIRECT, NEXT, WRITE
from vmm.devices.virtio.rng import Rng
from vmm.memory.errors import BadAddress, OutOfFrames

PAGE = 4096
#: bytes that devices see, and pages that the guest has
RAM = 256 << 10
GUEST_PAGES = 1 << 15
#: where the driver has its queues, one page each, and its buffers
QUEUES = 0x1_0000
BUFFERS = 0x2_0000
#: times that a pass goes over the queues
ROUNDS = 8
READY = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK


class Ram(PlainMemory):
    """Memory of a device.  The access that is the `refuse`-th from now on is said to lack a frame."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.refuse = 0
        self.accesses = 0
        self.written: list[int] = []

    def _check(self, gpa: int, n: int) -> None:
        self.accesses += 1
        if self.refuse:
            self.refuse -= 1
            if not self.refuse:
                raise OutOfFrames("refused")
        super()._check(gpa, n)

    def write(self, gpa: int, data: bytes) -> None:
        super().write(gpa, data)
        self.written.append(gpa // PAGE)

    def take_written(self) -> list[int]:
        written, self.written = self.written, []
        return written


class Pages:
    """What became of the pages that were given back."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.discarded: list[tuple[int, bool]] = []
        self.deflated: list[int] = []
        self.emptied = 0

    def discard(self, page: int, ballooned: bool) -> None:
        if not 0 <= page < self.pages:
            raise BadAddress(page * PAGE)
        self.discarded.append((page, ballooned))

    def deflate(self, page: int) -> None:
        if not 0 <= page < self.pages:
            raise BadAddress(page * PAGE)
        self.deflated.append(page)

    def empty(self) -> None:
        self.emptied += 1


class Driver:
    """What a driver does, register by register."""

    def __init__(self, device: MmioDevice, ram: Ram, size: int = 8) -> None:
        self.device = device
        self.ram = ram
        self.size = size
        self.given = [0] * device.QUEUES
        self.taken = [0] * device.QUEUES

    def get(self, register: int) -> int:
        return self.device.read(register, 4)

    def put(self, register: int, value: int) -> None:
        self.device.write(register, 4, value)

    def start(self, features: int | None = None) -> int:
        """Through the whole of 3.1.1, with all the features offered; the status at its end."""
        self.put(Register.STATUS, 0)
        self.put(Register.STATUS, ACKNOWLEDGE)
        self.put(Register.STATUS, ACKNOWLEDGE | DRIVER)
        for half in (0, 1):
            self.put(Register.FEATURES_SELECT, half)
            offered = self.get(Register.FEATURES)
            self.put(Register.DRIVER_FEATURES_SELECT, half)
            self.put(Register.DRIVER_FEATURES,
                     offered if features is None else (features | VERSION_1) >> 32 * half & 0xFFFF_FFFF)
        self.put(Register.STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        for queue in range(self.device.QUEUES):
            self.place(queue)
        self.put(Register.STATUS, READY)
        return self.get(Register.STATUS)

    def area(self, queue: int) -> int:
        return QUEUES + PAGE * queue

    def place(self, queue: int) -> None:
        """Make a queue ready: table, available ring, used ring, all in one page."""
        base = self.area(queue)
        self.ram.data[base:base + PAGE] = bytes(PAGE)
        self.given[queue] = self.taken[queue] = 0
        self.put(Register.QUEUE_SELECT, queue)
        self.put(Register.QUEUE_SIZE, self.size)
        for register, address in ((Register.DESCRIPTORS, base), (Register.DRIVER_AREA, base + 0x400),
                                  (Register.DEVICE_AREA, base + 0x800)):
            self.put(register, address)
            self.put(register + 4, 0)
        self.put(Register.QUEUE_READY, 1)

    def descriptor(self, queue: int, index: int, address: int, length: int, flags: int, following: int,
                   table: int | None = None) -> None:
        place = (self.area(queue) if table is None else table) + 16 * index
        self.ram.data[place:place + 16] = struct.pack("<QIHH", address, length, flags, following)

    def chain(self, queue: int, segments: Sequence[tuple[int, int, bool]], first: int = 0,
              table: int | None = None) -> None:
        """Descriptors from `first` for (address, length, device writes?)."""
        for index, (address, length, writes) in enumerate(segments, first):
            flags = WRITE * writes | NEXT * (index < first + len(segments) - 1)
            self.descriptor(queue, index, address, length, flags, index + 1, table)

    def offer(self, queue: int, head: int = 0) -> None:
        """Make the chain at `head` available."""
        ring = self.area(queue) + 0x400
        slot = ring + 4 + 2 * (self.given[queue] % self.size)
        self.ram.data[slot:slot + 2] = head.to_bytes(2, "little")
        self.given[queue] += 1
        self.set_index(queue, self.given[queue])

    def set_index(self, queue: int, index: int) -> None:
        ring = self.area(queue) + 0x400
        self.ram.data[ring + 2:ring + 4] = (index & 0xFFFF).to_bytes(2, "little")

    def send(self, queue: int, segments: Sequence[tuple[int, int, bool]], indirect: bool = False) -> None:
        """A request, and a notification of it; served by the next pass."""
        if indirect:
            table = BUFFERS - PAGE
            self.chain(queue, segments, table=table)
            self.descriptor(queue, 0, table, 16 * len(segments), INDIRECT, 0)
        else:
            self.chain(queue, segments)
        self.offer(queue)
        self.put(Register.QUEUE_NOTIFY, queue)

    def used(self, queue: int) -> list[tuple[int, int]]:
        """(head, bytes written) of what came back since the last call."""
        ring = self.area(queue) + 0x800
        index = int.from_bytes(self.ram.data[ring + 2:ring + 4], "little")
        found = []
        while self.taken[queue] & 0xFFFF != index:
            slot = ring + 4 + 8 * (self.taken[queue] % self.size)
            found.append(struct.unpack_from("<II", self.ram.data, slot))
            self.taken[queue] += 1
        return found


class Bench:
    """One device on a test bench: its memory, its interrupt line, its time, and a driver."""

    def __init__(self, make: Callable[[Bench], MmioDevice], size: int = 8) -> None:
        self.ram = Ram(RAM)
        self.pages = Pages(GUEST_PAGES)
        self.now = 5_000_000_000
        self.timers = Timers(lambda: self.now)
        self.level = False
        #: how often the device asked to be served
        self.called = 0
        self.device = make(self)
        self.driver = Driver(self.device, self.ram, size)

    def line(self, level: bool) -> None:
        self.level = level

    def attention(self) -> None:
        self.called += 1

    def serve_once(self, rounds: int = ROUNDS) -> None:
        """One pass that is enough after so many times over the queues."""
        left = iter(range(1, rounds))
        self.device.serve(lambda: next(left, None) is None)

    def serve(self, most: int = 1000) -> int:
        """Pass after pass until nothing waits; how many there were."""
        for passes in range(most):
            if not self.device.notified:
                return passes
            self.serve_once()
        raise AssertionError("the device is never done")

    def interrupted(self) -> int:
        """What the device interrupted for since the last call; acknowledged."""
        assert self.level == bool(self.driver.get(Register.INTERRUPT_STATUS))
        causes = self.driver.get(Register.INTERRUPT_STATUS)
        self.driver.put(Register.INTERRUPT_ACKNOWLEDGE, causes)
        assert not self.level
        return causes


def balloon_bench(size: int = 8) -> Bench:
    return Bench(lambda bench: Balloon(bench.ram, bench.pages, GUEST_PAGES, lambda: bench.now, bench.line,
                                       bench.attention), size)


def rng_bench(size: int = 8) -> Bench:
    return Bench(lambda bench: Rng(bench.ram, lambda count: b"\xA5" * count, bench.timers, bench.line,
                                   bench.attention), size)
