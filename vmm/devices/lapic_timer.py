# SPDX-License-Identifier: GPL-2.0-or-later
"""The local APIC's timer: one-shot, periodic and TSC-deadline (Intel SDM vol. 3, 11.5.4).

The count runs at 1 GHz before the divider, so a tick is `divider` ns of guest time.  Whether the count
runs does not depend on the mask: a masked timer counts but sets no deadline, so it wakes nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from vmm.devices.saved import DWORD, QWORD, TIME, Kinds, Saved, bits
from vmm.devices.timers import Timers

ONE_SHOT, PERIODIC, TSC_DEADLINE = range(3)

LVT_MASKED = 1 << 16
#: writable bits of the LVT timer register: vector, mask, mode
LVT_WRITABLE = 0x0007_00FF

#: Interrupts of a periodic timer come no closer than this, so that a guest cannot bury its worker in
#: expiries.  KVM has the same bound.
LEAST_PERIOD_NS = 200_000


class ApicTimer(Saved):
    """Timer registers and the one deadline that follows from them."""

    __slots__ = ("_fire", "_read_tsc", "_timers", "_tsc_to_ns", "divide_configuration", "expiry", "initial",
                 "lvt", "tsc_deadline")

    SAVED: ClassVar[Kinds] = {
        "lvt": bits(LVT_WRITABLE), "initial": DWORD, "divide_configuration": bits(0xB), "expiry": TIME,
        "tsc_deadline": QWORD,
    }

    def __init__(self, timers: Timers, fire: Callable[[int], None], read_tsc: Callable[[], int],
                 tsc_to_ns: Callable[[int], int]) -> None:
        self._timers = timers
        #: called with the LVT register when the timer expires
        self._fire = fire
        self._read_tsc = read_tsc
        self._tsc_to_ns = tsc_to_ns
        self.reset()

    def reset(self) -> None:
        """The state after power-on or INIT."""
        self.lvt = LVT_MASKED
        self.initial = 0
        self.divide_configuration = 0
        #: guest ns at which the count reaches zero; 0 = it stands still
        self.expiry = 0
        #: IA32_TSC_DEADLINE in guest TSC units; 0 = not armed
        self.tsc_deadline = 0
        self._timers.set(self, 0, None)

    @property
    def mode(self) -> int:
        """ONE_SHOT, PERIODIC, TSC_DEADLINE or the reserved 3, which does nothing."""
        return self.lvt >> 17

    @property
    def divider(self) -> int:
        """Nanoseconds of one tick, from the divide configuration (bits 3, 1 and 0)."""
        code = self.divide_configuration
        return 1 << ((code & 3 | code >> 1 & 4) + 1 & 7)

    def set_lvt(self, value: int) -> None:
        """Write the LVT timer register.  Entering or leaving TSC-deadline mode disarms the timer."""
        old, self.lvt = self.mode, value & LVT_WRITABLE
        if old != self.mode and TSC_DEADLINE in (old, self.mode):
            self.initial = self.expiry = self.tsc_deadline = 0
        self._settle()
        self._arm()

    def set_initial(self, value: int) -> None:
        """Write the initial count: starts counting from it; 0 stops."""
        if self.mode != TSC_DEADLINE:
            self.initial = value
            self.expiry = self._timers.now() + value * self.divider if value else 0
            self._arm()

    def set_divide(self, value: int) -> None:
        """Write the divide configuration; a running count goes on at the new rate."""
        count = self.current()
        self.divide_configuration = value & 0xB
        if count:
            self.expiry = self._timers.now() + count * self.divider
            self._arm()

    def current(self) -> int:
        """The current count register."""
        self._settle()
        return -(-(self.expiry - self._timers.now()) // self.divider) if self.expiry else 0

    def set_deadline(self, tsc: int) -> None:
        """Write IA32_TSC_DEADLINE; one already past fires at once, 0 disarms."""
        lvt = self.lvt
        if lvt >> 17 != TSC_DEADLINE:
            return
        self.tsc_deadline = tsc
        if not tsc or lvt & LVT_MASKED:
            self._timers.set(self, 0, None)
        elif tsc <= self._read_tsc():
            self._timers.set(self, 0, None)
            self.tsc_deadline = 0
            self._fire(lvt)
        else:
            self._timers.set(self, 0, self._tsc_to_ns(tsc))

    def deadline(self) -> int:
        """Read IA32_TSC_DEADLINE: 0 once it has passed."""
        self._settle()
        return self.tsc_deadline

    def tsc_changed(self) -> None:
        """The guest's TSC jumped: the same deadline is now another time."""
        if self.tsc_deadline:
            self._arm()

    def restored(self) -> None:
        """Set the deadline of the loaded registers; one that passed meanwhile is due at once."""
        self._arm()

    def expire(self, slot: int, now: int) -> None:
        """The armed deadline has come."""
        if self.mode == TSC_DEADLINE:
            self.tsc_deadline = 0
        elif self.mode == PERIODIC:
            self._next_period(now)
            self._timers.set(self, 0, max(self.expiry, now + LEAST_PERIOD_NS))
        else:
            self.expiry = 0
        self._fire(self.lvt)

    def _next_period(self, now: int) -> None:
        """Move `expiry` to the first multiple of the period after `now`; missed periods are one interrupt."""
        period = self.initial * self.divider
        if period:
            self.expiry += period * ((now - self.expiry) // period + 1)
        else:
            self.expiry = 0

    def _settle(self) -> None:
        """Bring a timer whose expiries nobody waits for, since it is masked, up to now."""
        if not self.lvt & LVT_MASKED or not (self.expiry or self.tsc_deadline):
            return
        now = self._timers.now()
        if self.tsc_deadline and self.tsc_deadline <= self._read_tsc():
            self.tsc_deadline = 0
        if self.expiry and self.expiry <= now:
            if self.mode == PERIODIC:
                self._next_period(now)
            else:
                self.expiry = 0

    def _arm(self) -> None:
        deadline = None
        if not self.lvt & LVT_MASKED:
            if self.mode == TSC_DEADLINE:
                deadline = self._tsc_to_ns(self.tsc_deadline) if self.tsc_deadline else None
            elif self.mode in (ONE_SHOT, PERIODIC) and self.expiry:
                deadline = self.expiry
        self._timers.set(self, 0, deadline)
