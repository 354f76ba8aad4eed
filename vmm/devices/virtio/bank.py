# SPDX-License-Identifier: GPL-2.0-or-later
"""The virtio devices of a board: where they are, and which of them wait to be served.

Serving reads and writes the guest's memory, which is done only while the guest is off the CPU: the monitor
looks at `waiting` before it lets the guest run on, and calls `serve` (vmm/hw/processor.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from vmm.devices.saved import part
from vmm.devices.virtio.mmio import MmioDevice
from vmm.devices.virtio.ring import GuestRam


class Place(NamedTuple):
    """Where the guest finds a device.

    The interrupts are free ISA interrupts, so that kernels which use the 8259 pair can have them; the windows
    lie in a page each, above all memory and below the I/O APIC.
    """

    name: str
    base: int
    interrupt: int


BALLOON = Place("balloon", 0xFEB0_0000, 10)
RNG = Place("rng", 0xFEB0_1000, 11)
PLACES = (BALLOON, RNG)

#: a pass over a device ends after so long: a guest's slice, and who wants its CPU, wait for no more than that
PASS_NS = 1_000_000


class DeviceRam(GuestRam, Protocol):
    """The guest's memory for devices."""

    def take_written(self) -> Sequence[int]:
        """Machine frames that were written since the last call: what was translated from them is stale."""


def _nobody() -> None:
    pass


class Bank:
    """The devices, in the order of PLACES.

    Invariant: between two passes `waiting` says whether any device has a notified queue.
    """

    __slots__ = ("clock", "devices", "memory", "on_waiting", "waiting")

    def __init__(self, memory: DeviceRam) -> None:
        self.memory = memory
        #: the host's, in ns
        self.clock: Callable[[], int] = time.monotonic_ns
        self.devices: dict[str, MmioDevice] = {}
        #: a device wants to be served
        self.waiting = False
        #: told when that becomes true
        self.on_waiting: Callable[[], None] = _nobody

    def attention(self) -> None:
        """A device has something to do."""
        if not self.waiting:
            self.waiting = True
            self.on_waiting()

    def serve(self) -> None:
        """One bounded pass over all that wait; `waiting` stays true if that was not enough.

        Raises OutOfFrames when one of them needs a frame: it will go on where it is.
        """
        for device in self.devices.values():
            if device.notified:
                device.serve(self._enough())
        self.waiting = any(device.notified for device in self.devices.values())

    def _enough(self) -> Callable[[], bool]:
        """Whether a pass that begins now has taken its time."""
        end = self.clock() + PASS_NS
        return lambda: self.clock() >= end

    def save(self) -> dict[str, Any]:
        """The state as plain values."""
        return {name: device.save() for name, device in self.devices.items()}

    def load(self, state: Any) -> None:
        """Take over what `save` returned; StateError otherwise."""
        values = part(state, "Bank", tuple(self.devices))
        for device, value in zip(self.devices.values(), values, strict=True):
            device.load(value)


