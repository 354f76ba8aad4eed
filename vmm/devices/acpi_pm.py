# SPDX-License-Identifier: GPL-2.0-or-later
"""ACPI's fixed hardware (ACPI 6.4, 4.8): power management events and control, the PM timer, and reset.

The machine is always in ACPI mode (no SMI command port), sleeps in no state, and powers off in S5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from vmm.devices.bus import BYTES_TO_DWORDS
from vmm.devices.saved import QWORD, Kinds, Saved, bits
from vmm.devices.timers import Timers

PM_BASE = 0x600
#: offsets of the blocks: 16 bits of status and 16 of enable, 16 of control, 32 of timer
STATUS, CONTROL, TIMER = 0x0, 0x4, 0x8
PM_LENGTH = 0xC
RESET_PORT, RESET_VALUE = 0xCF9, 0x06

# PM1 status and enable
TIMER_CARRY, GLOBAL, POWER_BUTTON, RTC_ALARM, WAKE = 1 << 0, 1 << 5, 1 << 8, 1 << 10, 1 << 15
STATUS_BITS = TIMER_CARRY | GLOBAL | POWER_BUTTON | RTC_ALARM | WAKE
ENABLE_BITS = TIMER_CARRY | GLOBAL | POWER_BUTTON | RTC_ALARM
# PM1 control
SCI_ENABLED, SLEEP_TYPE, SLEEP_ENABLE = 1 << 0, 7 << 10, 1 << 13
CONTROL_BITS = SLEEP_TYPE | 1 << 1
#: the DSDT's \_S5 names this type; it is the one of QEMU's pc machine, which small kernels hard-code
S5_TYPE = 0

TIMER_HZ = 3_579_545
NS = 1_000_000_000


class AcpiPm(Saved):
    """PM1 event and control blocks and the 32-bit timer, in one range of ports.

    # Invariant: the SCI is asserted while a status bit and its enable bit are both set.
    """

    sizes = BYTES_TO_DWORDS
    __slots__ = ("_now", "_power_off", "_sci", "_timers", "carries", "control", "enable", "status")

    SAVED: ClassVar[Kinds] = {
        "status": bits(STATUS_BITS), "enable": bits(ENABLE_BITS), "control": bits(CONTROL_BITS),
        "carries": QWORD,
    }

    def __init__(self, timers: Timers, sci: Callable[[bool], None], power_off: Callable[[], None]) -> None:
        self._timers = timers
        self._now = timers.now
        self._sci = sci
        self._power_off = power_off
        self.status = self.enable = self.control = 0
        #: changes of the timer's highest bit that TIMER_CARRY has told of
        self.carries = 0

    def power_button(self) -> None:
        """The user pressed the power button."""
        self.status |= POWER_BUTTON
        self._drive()

    def rtc_alarm(self) -> None:
        """The real-time clock's alarm went off."""
        self.status |= RTC_ALARM
        self._drive()

    def read(self, offset: int, size: int) -> int:
        """Bytes of the block; a read does not cross from one register pair to the next."""
        if offset >= TIMER:
            word, within = self._now() * TIMER_HZ // NS, offset - TIMER
        elif offset >= CONTROL:
            word, within = self.control | SCI_ENABLED, offset - CONTROL
        else:
            self._count_carries()
            word, within = self.status | self.enable << 16, offset
        return word >> 8 * within & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Clear status bits, set enable bits, sleep.  The timer cannot be written."""
        if offset >= TIMER:
            return
        block = offset & ~3
        value, mask = value << 8 * (offset - block), (1 << 8 * size) - 1 << 8 * (offset - block)
        if block == CONTROL:
            self._write_control(self.control & ~mask | value & 0xFFFF)
            return
        self._count_carries()
        self.status &= ~value
        enable_mask = mask >> 16
        self.enable = (self.enable & ~enable_mask | value >> 16) & ENABLE_BITS
        self._drive()

    def expire(self, slot: int, now: int) -> None:
        """The timer's highest bit changes, and the guest wants to know."""
        self._count_carries()
        self._drive()

    def restored(self) -> None:
        """Wake for the next carry if it is enabled."""
        self._wait_for_carry()

    def _write_control(self, value: int) -> None:
        self.control = value & CONTROL_BITS
        # SLP_EN is write-only; types other than S5's are states the tables do not offer
        if value & SLEEP_ENABLE and (value & SLEEP_TYPE) >> 10 == S5_TYPE:
            self._power_off()

    def _count_carries(self) -> None:
        carries = self._now() * TIMER_HZ // NS >> 31
        if carries != self.carries:
            self.carries = carries
            self.status |= TIMER_CARRY

    def _wait_for_carry(self) -> None:
        ticks = self.carries + 1 << 31
        self._timers.set(self, 0, -(-ticks * NS // TIMER_HZ) if self.enable & TIMER_CARRY else None)

    def _drive(self) -> None:
        self._sci(bool(self.status & self.enable))
        self._wait_for_carry()


class ResetControl(Saved):
    """Port 0xcf9, the chipset's reset control register, amid the PCI configuration ports.

    It is a byte: wider accesses to 0xcf8-0xcfb are PCI configuration addresses, and there is no PCI.
    """

    sizes = BYTES_TO_DWORDS
    __slots__ = ("_reset", "latch")

    SAVED: ClassVar[Kinds] = {"latch": bits(0xFF)}
    OFFSET = 1

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset
        self.latch = 0

    def read(self, offset: int, size: int) -> int:
        """The register; all ones elsewhere."""
        return self.latch if (offset, size) == (self.OFFSET, 1) else (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Bit 2 resets, hard (bit 1) or soft."""
        if (offset, size) == (self.OFFSET, 1):
            self.latch = value & ~4
            if value & 4:
                self._reset()
