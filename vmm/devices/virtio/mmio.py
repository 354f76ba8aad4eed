# SPDX-License-Identifier: GPL-2.0-or-later
"""The MMIO transport (virtio 1.2, 4.2.2): registers, status and interrupt of one device, for modern drivers.

Notified queues are not served at once, in the middle of the guest's store: the device says that it has work,
and `serve` is called with the guest off the CPU.  A driver that breaks the rules gets DEVICE_NEEDS_RESET, and
nothing is done for it until it resets the device (2.1.2).

Invariant: `notified` has bits of queues only while the device is `live`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from vmm.devices.bus import BYTES_TO_DWORDS
from vmm.devices.saved import DWORD, QWORD, Kind, Kinds, Saved, bits
from vmm.devices.virtio.ring import MOST_DESCRIPTORS, Chain, GuestRam, Malformed, Ring
from vmm.memory.errors import BadAddress

#: addresses a device takes
WINDOW_BYTES = 0x200
CONFIG = 0x100

MAGIC = int.from_bytes(b"virt", "little")
VERSION = 2
VENDOR = int.from_bytes(b"HSTD", "little")

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
_DRIVERS_BITS = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED

USED_BUFFER, CONFIG_CHANGED = 1, 2

INDIRECT_DESC = 1 << 28
VERSION_1 = 1 << 32


class Register:
    """Offsets (4.2.2, table 4.1)."""

    MAGIC, VERSION, DEVICE, VENDOR = 0x000, 0x004, 0x008, 0x00C
    FEATURES, FEATURES_SELECT, DRIVER_FEATURES, DRIVER_FEATURES_SELECT = 0x010, 0x014, 0x020, 0x024
    QUEUE_SELECT, QUEUE_MOST, QUEUE_SIZE, QUEUE_READY, QUEUE_NOTIFY = 0x030, 0x034, 0x038, 0x044, 0x050
    INTERRUPT_STATUS, INTERRUPT_ACKNOWLEDGE, STATUS = 0x060, 0x064, 0x070
    #: each with its high half behind it
    DESCRIPTORS, DRIVER_AREA, DEVICE_AREA = 0x080, 0x090, 0x0A0
    SHARED_LENGTH_LOW, SHARED_LENGTH_HIGH, SHARED_BASE_LOW, SHARED_BASE_HIGH = 0x0B0, 0x0B4, 0x0B8, 0x0BC
    GENERATION = 0x0FC


#: register -> attribute of a ring, and which half of it
_ADDRESSES = {
    place + 4 * half: (name, 32 * half) for half in (0, 1) for place, name in (
        (Register.DESCRIPTORS, "descriptors"), (Register.DRIVER_AREA, "driver"),
        (Register.DEVICE_AREA, "device"))
}


def _rings(count: int) -> Kind:
    """The queues of a device."""

    def dump(rings: list[Ring]) -> list[Any]:
        return [ring.save() for ring in rings]

    def load(values: Any) -> list[Ring]:
        if type(values) is not list or len(values) != count:
            raise ValueError(f"not a list of {count}")
        rings = [Ring() for _ in values]
        for ring, value in zip(rings, values, strict=True):
            ring.load(value)
        return rings

    return Kind(dump, load)


def transport_kinds(queues: int) -> Kinds:
    """What a device with that many queues saves of its transport."""
    return {
        "status": bits(_DRIVERS_BITS | NEEDS_RESET), "interrupt": bits(USED_BUFFER | CONFIG_CHANGED),
        "features_select": DWORD, "driver_features_select": DWORD, "driver_features": QWORD,
        "queue_select": DWORD, "generation": DWORD, "notified": bits((1 << queues) - 1),
        "rings": _rings(queues),
    }


class MmioDevice(Saved, ABC):
    """A virtio device behind its registers.  A device says what it is, and what it does with a request."""

    __slots__ = ("_attention", "_line", "driver_features", "driver_features_select", "features_select",
                 "generation", "interrupt", "memory", "notified", "queue_select", "rings", "status")

    sizes = BYTES_TO_DWORDS
    #: virtio's number of this kind of device, the features offered beside VERSION_1, the number of queues
    IDENTITY: ClassVar[int]
    OFFERED: ClassVar[int]
    QUEUES: ClassVar[int]

    def __init__(self, memory: GuestRam, line: Callable[[bool], None], attention: Callable[[], None]) -> None:
        """`attention` is called when `serve` is to be."""
        self.memory = memory
        self._line = line
        self._attention = attention
        self.generation = 0
        self._power_on()

    def _power_on(self) -> None:
        self.status = self.interrupt = 0
        self.features_select = self.driver_features_select = self.driver_features = 0
        self.queue_select = 0
        #: queues that may have requests to be served, a bit each
        self.notified = 0
        self.rings = [Ring() for _ in range(self.QUEUES)]

    # -- what a device adds ------------------------------------------------------------------------

    @abstractmethod
    def step(self, queue: int, ring: Ring) -> bool:
        """Do some of the work there is for a queue, little enough that a step of each queue takes no longer
        than a pass may (vmm/devices/virtio/bank.py); False when there is no more to be done now.

        Raises Malformed, BadAddress; OutOfFrames when the same step is to be repeated.
        """

    def config(self) -> bytes:
        """The device's configuration space."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes to the configuration space, perhaps outside of it."""

    def forget(self) -> None:
        """The driver resets the device."""

    # -- what a device uses ------------------------------------------------------------------------

    @property
    def live(self) -> bool:
        """Whether a driver is there that keeps the rules."""
        return self.status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK

    def negotiated(self, feature: int) -> bool:
        """Whether both sides have agreed on a feature."""
        return bool(self.status & FEATURES_OK and self.driver_features & feature)

    def finish(self, ring: Ring, chain: Chain, written: int = 0) -> None:
        """A request is done.  Raises as `Ring.finish`."""
        if ring.finish(self.memory, chain, written):
            self._interrupt(USED_BUFFER)

    def call(self, queue: int) -> None:
        """There may be something to be done for a queue."""
        if self.live and self.rings[queue].ready:
            self.notified |= 1 << queue
            self._attention()

    def config_changed(self) -> None:
        """What `config` returns has changed by the host's will."""
        self.generation = self.generation + 1 & 0xFFFF_FFFF
        if self.live:
            self._interrupt(CONFIG_CHANGED)

    # -- serving -----------------------------------------------------------------------------------

    def serve(self, enough: Callable[[], bool]) -> None:
        """One pass over the notified queues: a step of each, again and again, until nothing is left or it is
        `enough`; what is left over stays notified.

        Raises OutOfFrames, and what was done until then stays done.
        """
        try:
            while self.notified:
                for queue, ring in enumerate(self.rings):
                    bit = 1 << queue
                    if self.notified & bit and not (ring.ready and self.step(queue, ring)):
                        self.notified &= ~bit
                if enough():
                    break
        except (Malformed, BadAddress):
            self._needs_reset()

    def _needs_reset(self) -> None:
        told = self.live
        self.status |= NEEDS_RESET
        self.notified = 0
        if told:
            self._interrupt(CONFIG_CHANGED)

    def _interrupt(self, cause: int) -> None:
        self.interrupt |= cause
        self._line(True)

    # -- registers ---------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """A register, 32 bits at a time, or part of the configuration space."""
        if offset >= CONFIG:
            offset -= CONFIG
            return int.from_bytes(self.config()[offset:offset + size], "little")
        if size != 4 or offset % 4:
            return 0
        ring = self._selected()
        match offset:
            case Register.MAGIC:
                return MAGIC
            case Register.VERSION:
                return VERSION
            case Register.DEVICE:
                return self.IDENTITY
            case Register.VENDOR:
                return VENDOR
            case Register.FEATURES:
                return (self.OFFERED | VERSION_1) >> 32 * min(self.features_select, 2) & 0xFFFF_FFFF
            case Register.QUEUE_MOST:
                return 0 if ring is None else MOST_DESCRIPTORS
            case Register.QUEUE_READY:
                return int(ring is not None and ring.ready)
            case Register.INTERRUPT_STATUS:
                return self.interrupt
            case Register.STATUS:
                return self.status
            case Register.GENERATION:
                return self.generation
            case (Register.SHARED_LENGTH_LOW | Register.SHARED_LENGTH_HIGH | Register.SHARED_BASE_LOW
                  | Register.SHARED_BASE_HIGH):
                return 0xFFFF_FFFF      # no region of shared memory has this number
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """As `read`; what the driver may not write it writes nowhere."""
        if offset >= CONFIG:
            self.write_config(offset - CONFIG, value.to_bytes(size, "little"))
            return
        if size != 4 or offset % 4:
            return
        match offset:
            case Register.FEATURES_SELECT:
                self.features_select = value
            case Register.DRIVER_FEATURES_SELECT:
                self.driver_features_select = value
            case Register.DRIVER_FEATURES:
                self._write_features(value)
            case Register.QUEUE_SELECT:
                self.queue_select = value
            case Register.QUEUE_NOTIFY:
                if value < self.QUEUES:
                    self.call(value)
            case Register.INTERRUPT_ACKNOWLEDGE:
                self.interrupt &= ~value
                self._line(bool(self.interrupt))
            case Register.STATUS:
                self._write_status(value)
            case _:
                self._write_queue(offset, value)

    def _selected(self) -> Ring | None:
        return self.rings[self.queue_select] if self.queue_select < self.QUEUES else None

    def _write_features(self, value: int) -> None:
        """The half that is selected; they are settled with FEATURES_OK."""
        if self.status & FEATURES_OK or self.driver_features_select > 1:
            return
        shift = 32 * self.driver_features_select
        self.driver_features = self.driver_features & ~(0xFFFF_FFFF << shift) | value << shift

    def _write_queue(self, offset: int, value: int) -> None:
        """The registers of the selected queue."""
        ring = self._selected()
        if ring is None:
            return
        if offset == Register.QUEUE_READY and not value:
            ring.ready = False
        elif ring.ready:
            return
        elif offset == Register.QUEUE_SIZE:
            ring.resize(value)
        elif offset in _ADDRESSES:
            name, shift = _ADDRESSES[offset]
            kept = getattr(ring, name) & ~(0xFFFF_FFFF << shift)
            setattr(ring, name, kept | value << shift)
        elif offset == Register.QUEUE_READY:
            try:
                ring.enable(self.negotiated(INDIRECT_DESC))
            except Malformed:
                self._needs_reset()

    def _write_status(self, value: int) -> None:
        """Zero resets; else bits are added, those that the device grants (3.1.1)."""
        if not value:
            self._power_on()
            self._line(False)
            self.forget()
            return
        added = value & _DRIVERS_BITS & ~self.status
        if added & FEATURES_OK:
            wanted = self.driver_features
            if not wanted & VERSION_1 or wanted & ~(self.OFFERED | VERSION_1):
                added &= ~FEATURES_OK
        if not (self.status | added) & FEATURES_OK:
            added &= ~DRIVER_OK
        self.status |= added
        if not self.live:
            self.notified = 0
        elif added & DRIVER_OK:
            # drivers make buffers available, and even notify, before they are done
            for queue in range(self.QUEUES):
                self.call(queue)

    def restored(self) -> None:
        """Only a device that is live has work."""
        if not self.live:
            self.notified = 0
        if self.notified:
            self._attention()
