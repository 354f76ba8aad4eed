# SPDX-License-Identifier: GPL-2.0-or-later
"""Port 0x61, the PC's system control port B: gate and output of the 8254's counter 2.

Kernels calibrate their clocks by polling bit 5 here, thousands of times.
"""

from __future__ import annotations

from typing import ClassVar

from vmm.devices.bus import BYTES
from vmm.devices.pit8254 import Pit8254
from vmm.devices.saved import Kinds, Saved, bits
from vmm.devices.timers import Timers

GATE2 = 1 << 0
REFRESH = 1 << 4
OUT2 = 1 << 5
#: gate, speaker, and the two NMI masks, which mask nothing here
WRITABLE = 0x0F
#: the DRAM refresh request toggles with counter 1, every 15.085 us on a PC
REFRESH_NS = 15_085


class Port61(Saved):
    """System control port B."""

    sizes = BYTES
    __slots__ = ("_counter", "_now", "latch")

    SAVED: ClassVar[Kinds] = {"latch": bits(WRITABLE)}

    def __init__(self, timers: Timers, pit: Pit8254) -> None:
        self._now = timers.now
        self._counter = pit.counters[2]
        self.latch = 0

    def read(self, offset: int, size: int) -> int:
        """What was written, the refresh toggle and counter 2's output."""
        now = self._now()
        value = self.latch | (OUT2 if self._counter.output(now) else 0)
        return value | REFRESH if now // REFRESH_NS & 1 else value

    def write(self, offset: int, size: int, value: int) -> None:
        """Set gate and speaker."""
        self.latch = value & WRITABLE
        self._counter.set_gate(bool(value & GATE2), self._now())
