# SPDX-License-Identifier: GPL-2.0-or-later
"""The MC146818 real-time clock and its CMOS memory, ports 0x70 and 0x71.

The clock shows the host's UTC plus what the guest set it off by.  Its events (update, alarm, periodic) are
found by looking back over the time since the last look, so a clock nobody asks costs nothing; a timer
is set only for an event whose interrupt is enabled.
"""

from __future__ import annotations

from calendar import monthrange, timegm
from collections.abc import Callable
from time import gmtime
from typing import ClassVar

from vmm.devices.bus import BYTES
from vmm.devices.saved import Kinds, Saved, between, bits, octets
from vmm.devices.timers import Timers

NS = 1_000_000_000

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM, WEEKDAY, DAY, MONTH, YEAR = range(10)
A, B, C, D = 10, 11, 12, 13
#: the century's place on a PC with ACPI; the FADT says so
CENTURY = 0x32
CMOS_SIZE = 128

A_UPDATING, A_RATE = 0x80, 0x0F
B_SET, B_PERIODIC, B_ALARM, B_UPDATE, B_BINARY, B_24H = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
C_REQUEST, C_PERIODIC, C_ALARM, C_UPDATE = 0x80, 0x40, 0x20, 0x10
D_VALID = 0x80
PM = 0x80
#: alarm bytes from here on match anything
ALARM_ANY = 0xC0

#: the update-in-progress bit comes this long before the update (data sheet, table 6)
UPDATE_WARNING_NS = 244_000

#: years the guest can set the clock to, so that its time in ns and the offset to it fit 64 bits
LEAST_YEAR, MOST_YEAR = 1970, 2149
MOST_OFFSET = 180 * 366 * 86_400 * NS


def cmos_memory_bytes(memory_bytes: int) -> dict[int, int]:
    """Where a PC BIOS notes the memory size: base and extended KiB, and 64 KiB blocks above 16 MiB."""
    extended = min(max(memory_bytes - (1 << 20), 0) >> 10, 0xFFFF)
    above = min(max(memory_bytes - (16 << 20), 0) >> 16, 0xFFFF)
    words = {0x15: 640, 0x17: extended, 0x30: extended, 0x34: above}
    return {place + half: value >> 8 * half & 0xFF for place, value in words.items() for half in (0, 1)}


class Rtc(Saved):
    """The clock chip."""

    sizes = BYTES
    __slots__ = ("_alarm", "_irq8", "_timers", "_wall", "cmos", "index", "looked", "offset", "periodic_from")

    SAVED: ClassVar[Kinds] = {
        "index": bits(CMOS_SIZE - 1), "cmos": octets(CMOS_SIZE, CMOS_SIZE),
        "offset": between(-MOST_OFFSET, MOST_OFFSET), "looked": between(-MOST_OFFSET, (1 << 63) - 1),
        "periodic_from": between(0, 1 << 62),
    }

    def __init__(self, timers: Timers, irq8: Callable[[bool], None], alarm: Callable[[], None],
                 wall: Callable[[], float], memory_bytes: int) -> None:
        self._timers = timers
        self._irq8 = irq8
        #: told of each alarm whose interrupt is enabled; ACPI has a status bit for it
        self._alarm = alarm
        self._wall = wall
        self.index = 0
        self.cmos = bytearray(CMOS_SIZE)
        self.cmos[A] = 0x26
        self.cmos[B] = B_24H
        self.cmos[D] = D_VALID
        for place, value in cmos_memory_bytes(memory_bytes).items():
            self.cmos[place] = value
        #: clock minus host UTC, in ns
        self.offset = 0
        #: clock time of the last look for update and alarm events, guest time of the last for periodic ones
        self.looked = self._clock()
        self.periodic_from = timers.now()

    def read(self, offset: int, size: int) -> int:
        """Port 0x71: the byte the index selects.  Port 0x70 is write-only."""
        if offset == 0:
            return 0xFF
        index = self.index
        if index in _SHOWN:
            return self._encode(index)
        if index == A:
            until = NS - self._clock() % NS
            updating = until <= UPDATE_WARNING_NS and not self.cmos[B] & B_SET
            return self.cmos[A] | (A_UPDATING if updating else 0)
        if index == C:
            self._look()
            value = self.cmos[C]
            self.cmos[C] = 0
            self._irq8(False)
            self._arm()
            return value
        return self.cmos[index]

    def write(self, offset: int, size: int, value: int) -> None:
        """Port 0x70: the index (bit 7, the NMI mask, is ignored); port 0x71: the byte there."""
        if offset == 0:
            self.index = value & CMOS_SIZE - 1
            return
        index = self.index
        if index in _SHOWN:
            self._set(index, value)
        elif index == A:
            self._look()
            self.cmos[A] = value & ~A_UPDATING
            self.periodic_from = self._timers.now()
        elif index == B:
            self._write_b(value)
        elif index not in (C, D):
            self.cmos[index] = value
        if index < C:
            self._arm()

    def expire(self, slot: int, now: int) -> None:
        """An event whose interrupt is enabled is due."""
        self._look()
        self._arm()

    def restored(self) -> None:
        """The registers only the clock writes are its own; set the timer of the next event."""
        self.cmos[A] &= ~A_UPDATING
        self.cmos[D] = D_VALID
        self._arm()

    # time of day

    def _clock(self) -> int:
        return int(self._wall() * NS) + self.offset

    def _encode(self, index: int) -> int:
        """A time register, from the stopped copy (SET) or the running clock."""
        if self.cmos[B] & B_SET:
            return self.cmos[index]
        return self._fields(self._clock() // NS)[index]

    def _fields(self, seconds: int) -> dict[int, int]:
        now = gmtime(min(max(seconds, 0), timegm((MOST_YEAR, 12, 31, 23, 59, 59))))
        century, year = divmod(now.tm_year, 100)
        plain = {SECONDS: now.tm_sec, MINUTES: now.tm_min, WEEKDAY: (now.tm_wday + 1) % 7 + 1,
                 DAY: now.tm_mday, MONTH: now.tm_mon, YEAR: year, CENTURY: century}
        fields = {index: self._to_register(value) for index, value in plain.items()}
        if self.cmos[B] & B_24H:
            fields[HOURS] = self._to_register(now.tm_hour)
        else:
            fields[HOURS] = self._to_register((now.tm_hour - 1) % 12 + 1) | (PM if now.tm_hour >= 12 else 0)
        return fields

    def _set(self, index: int, value: int) -> None:
        """The guest sets the clock; while SET is on, the bytes only gather."""
        if not self.cmos[B] & B_SET:
            self._stop()
            self.cmos[index] = value
            self._start()
        else:
            self.cmos[index] = value

    def _stop(self) -> None:
        for index, value in self._fields(self._clock() // NS).items():
            self.cmos[index] = value

    def _start(self) -> None:
        """Let the clock go on from the bytes in memory; what makes no date is brought into range."""
        cmos, value = self.cmos, self._from_register
        hours = cmos[HOURS]
        if cmos[B] & B_24H:
            hour = value(hours)
        else:
            hour = value(hours & ~PM) % 12 + (12 if hours & PM else 0)
        year = min(max(value(cmos[CENTURY]) * 100 + value(cmos[YEAR]), LEAST_YEAR), MOST_YEAR)
        month = min(max(value(cmos[MONTH]), 1), 12)
        day = min(max(value(cmos[DAY]), 1), monthrange(year, month)[1])
        seconds = timegm((year, month, day, min(hour, 23), min(value(cmos[MINUTES]), 59),
                          min(value(cmos[SECONDS]), 59)))
        wanted = seconds * NS + self._clock() % NS
        self.offset = min(max(self.offset + wanted - self._clock(), -MOST_OFFSET), MOST_OFFSET)
        self.looked = self._clock()

    def _to_register(self, value: int) -> int:
        return value if self.cmos[B] & B_BINARY else value // 10 << 4 | value % 10

    def _from_register(self, value: int) -> int:
        return value if self.cmos[B] & B_BINARY else (value >> 4) * 10 + (value & 0xF)

    # events

    def _write_b(self, value: int) -> None:
        old = self.cmos[B]
        self._look()
        if value & B_SET:
            # starting to set the clock also turns the update interrupt off (data sheet)
            value &= ~B_UPDATE
            if not old & B_SET:
                self._stop()
        self.cmos[B] = value
        if old & B_SET and not value & B_SET:
            self._start()
        self._request()

    def _period(self) -> int:
        """Nanoseconds between periodic events with the 32768 Hz crystal; 0 = none."""
        rate = self.cmos[A] & A_RATE
        if rate == 0:
            return 0
        return NS * (1 << (rate + 6 if rate < 3 else rate - 1)) // 32_768

    def _alarm_after(self, second: int) -> int | None:
        """The first second of the clock after `second` that the alarm matches."""
        cmos = self.cmos
        wanted: list[int | None] = []
        for index in (HOURS_ALARM, MINUTES_ALARM, SECONDS_ALARM):
            register = cmos[index]
            if register >= ALARM_ANY:
                wanted.append(None)
            elif index == HOURS_ALARM and not cmos[B] & B_24H:
                wanted.append(self._from_register(register & ~PM) % 12 + (12 if register & PM else 0))
            else:
                wanted.append(self._from_register(register))
        return _next_match(second + 1, *wanted)

    def _look(self) -> None:
        """Note in register C what has happened since the last look."""
        clock, now = self._clock(), self._timers.now()
        before, second = self.looked // NS, clock // NS
        if second != before:
            self.looked = clock
            if second > before and not self.cmos[B] & B_SET:
                self.cmos[C] |= C_UPDATE
                alarm = self._alarm_after(before)
                if alarm is not None and alarm <= second:
                    self.cmos[C] |= C_ALARM
                    if self.cmos[B] & B_ALARM:
                        self._alarm()
        period = self._period()
        if period and now - self.periodic_from >= period:
            self.cmos[C] |= C_PERIODIC
            self.periodic_from = now - (now - self.periodic_from) % period
        self._request()

    def _request(self) -> None:
        """Interrupt while an event and its enable bit are both set; they have the same place in B and C."""
        if self.cmos[B] & self.cmos[C] & (C_PERIODIC | C_ALARM | C_UPDATE):
            self.cmos[C] |= C_REQUEST
            self._irq8(True)
        else:
            self.cmos[C] &= ~C_REQUEST
            self._irq8(False)

    def _arm(self) -> None:
        """Wake for the next event that will interrupt; none is needed while one is unread."""
        enabled = self.cmos[B] & ~self.cmos[C]
        now, clock = self._timers.now(), self._clock()
        times = []
        if self.cmos[C] & C_REQUEST:
            enabled = 0
        if enabled & B_PERIODIC and self._period():
            times.append(max(self.periodic_from + self._period(), now))
        if not self.cmos[B] & B_SET:
            if enabled & B_UPDATE:
                times.append(now + NS - clock % NS)
            if enabled & B_ALARM:
                alarm = self._alarm_after(clock // NS)
                if alarm is not None:
                    times.append(now + alarm * NS - clock)
        self._timers.set(self, 0, min(times, default=None))


#: registers that show the running clock
_SHOWN = frozenset({SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY})


def _next_match(second: int, hour: int | None, minute: int | None, at: int | None) -> int | None:
    """The first second of the epoch, not before `second`, whose time of day matches; None = any value."""
    if (hour or 0) > 23 or (minute or 0) > 59 or (at or 0) > 59:
        return None
    for day_hour in range(second // 3600, second // 3600 + 25):
        if hour is not None and day_hour % 24 != hour:
            continue
        start = max(second, day_hour * 3600)
        for day_minute in range(start // 60, (day_hour + 1) * 60):
            if minute is not None and day_minute % 60 != minute:
                continue
            found = max(start, day_minute * 60) if at is None else day_minute * 60 + at
            if start <= found < (day_minute + 1) * 60:
                return found
    return None
