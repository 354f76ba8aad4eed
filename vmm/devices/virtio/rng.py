# SPDX-License-Identifier: GPL-2.0-or-later
"""virtio-rng (virtio 1.2, 5.4): the host's randomness for the guest, with a quota a second of guest time.

A request beyond the quota waits in its queue until the next second begins; a timer runs for that only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from vmm.devices.saved import FLAG, TIME, Kinds, between
from vmm.devices.timers import Timers
from vmm.devices.virtio.mmio import INDIRECT_DESC, MmioDevice, transport_kinds
from vmm.devices.virtio.ring import GuestRam, Malformed, Ring, total

NS = 1_000_000_000
#: bytes a second, and in one step: a driver takes fewer than it asked for (5.4.6.1)
QUOTA = 256 << 10
MOST_BYTES = 8 << 10


class Rng(MmioDevice):
    """The entropy device; `entropy` gives as many random bytes as it is asked for."""

    IDENTITY = 4
    OFFERED = INDIRECT_DESC
    QUEUES = 1

    __slots__ = ("_timers", "entropy", "second", "spent", "stalled")

    SAVED: ClassVar[Kinds] = transport_kinds(QUEUES) | {
        "second": TIME, "spent": between(0, QUOTA), "stalled": FLAG,
    }

    def __init__(self, memory: GuestRam, entropy: Callable[[int], bytes], timers: Timers,
                 line: Callable[[bool], None], attention: Callable[[], None]) -> None:
        super().__init__(memory, line, attention)
        self.entropy = entropy
        self._timers = timers
        #: the second of guest time in which `spent` bytes were given
        self.second = self.spent = 0
        #: a request waits for the next second
        self.stalled = False

    def step(self, queue: int, ring: Ring) -> bool:
        """Serve one request."""
        chain = ring.next(self.memory)
        if chain is None:
            return False
        room = total(chain.writable)
        if not room:
            raise Malformed("a request for no random bytes")
        length = min(room, MOST_BYTES, self._left())
        if not length:
            self._stall()
            return False
        chain.write(self.memory, self.entropy(length))
        self.finish(ring, chain, length)
        self.spent += length
        return True

    def expire(self, slot: int, now: int) -> None:
        """The next second has begun."""
        self.stalled = False
        self.call(0)

    def forget(self) -> None:
        """Nothing waits any more.  What was spent stays spent."""
        self.stalled = False
        self._timers.set(self, 0, None)

    def restored(self) -> None:
        """As for all devices; and wait on."""
        super().restored()
        if self.stalled:
            self._stall()

    def _left(self) -> int:
        second = self._timers.now() // NS
        if second != self.second:
            self.second, self.spent = second, 0
        return QUOTA - self.spent

    def _stall(self) -> None:
        self.stalled = True
        self._timers.set(self, 0, (self.second + 1) * NS)
