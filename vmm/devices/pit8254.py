# SPDX-License-Identifier: GPL-2.0-or-later
"""The 8254 interval timer (Intel data sheet, order 231164), ports 0x40-0x43.

Nothing counts: a counter remembers when its count was loaded, and its value and output follow from the
guest time.  Two simplifications, both invisible to software that waits for a terminal count: a count is
loaded at once (silicon takes one clock more), and a new count of a periodic mode starts a new period.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from vmm.devices.bus import BYTES
from vmm.devices.saved import BYTE, FLAG, QWORD, TIME, Kinds, Saved, between, part
from vmm.devices.timers import Timers
from vmm.state import StateError

HZ = 1_193_182
NS = 1_000_000_000

TERMINAL, ONE_SHOT, RATE, SQUARE, STROBE, TRIGGERED = range(6)
PERIODIC = frozenset({RATE, SQUARE})
#: modes whose counting a rising gate starts
GATE_STARTED = frozenset({ONE_SHOT, TRIGGERED})

# read/write modes of a control word; 0 is the latch command
LOW, HIGH, LOW_HIGH = 1, 2, 3

#: ticks of a periodic counter 0 that came while the guest did not run: at most this many are delivered
#: late, at a quarter of the period; the rest is lost, and counted
MOST_LATE_TICKS = 16
#: interrupts come no closer than this, whatever count a guest loads
LEAST_SPACING_NS = 100_000
#: the end of guest time, 146 years
LATEST = (1 << 62) - 1


def ticks_to_ns(ticks: int) -> int:
    """The first ns at which that many ticks have passed."""
    return -(-ticks * NS // HZ)


def _from_bcd(value: int) -> int:
    return sum((value >> 4 * digit & 0xF) * 10**digit for digit in range(4))


def _to_bcd(value: int) -> int:
    return sum(value // 10**digit % 10 << 4 * digit for digit in range(4))


class Counter(Saved):
    """One of the three counters."""

    __slots__ = ("access", "bcd", "gate", "held", "latched", "low_byte", "mode", "reads_high", "reload",
                 "running", "started", "status", "writes_high")

    SAVED: ClassVar[Kinds] = {
        "mode": between(TERMINAL, TRIGGERED), "access": between(LOW, LOW_HIGH), "bcd": FLAG, "gate": FLAG,
        "reload": between(0, 0x10000), "running": FLAG, "started": between(-LATEST, LATEST),
        "held": between(0, 1 << 50),
        "latched": between(-1, 0xFFFF), "status": between(-1, 0xFF), "reads_high": FLAG, "writes_high": FLAG,
        "low_byte": BYTE,
    }

    def __init__(self, gate: bool) -> None:
        self.gate = gate
        self.mode = TERMINAL
        self.access = LOW_HIGH
        self.bcd = False
        #: the count, 1 to 65536; 0 = none written since the control word
        self.reload = 0
        #: counting since guest time `started`; else standing at `held` ticks
        self.running = False
        self.started = self.held = 0
        #: latched count and status, -1 = none
        self.latched = self.status = -1
        self.reads_high = self.writes_high = False
        self.low_byte = 0

    def elapsed(self, now: int) -> int:
        """Clocks since the count was loaded, without those the gate held back."""
        return (now - self.started) * HZ // NS if self.running else self.held

    def output(self, now: int) -> bool:
        """The level of OUT."""
        mode, count = self.mode, self.reload
        if mode == TERMINAL:
            return count != 0 and self.elapsed(now) >= count
        if not self.running:
            return True
        elapsed = self.elapsed(now)
        if mode == RATE:
            return elapsed % count != count - 1
        if mode == SQUARE:
            return elapsed % count < count + 1 >> 1
        return elapsed >= count if mode == ONE_SHOT else elapsed != count

    def value(self, now: int) -> int:
        """The counting element as the guest reads it."""
        count, elapsed = self.reload, self.elapsed(now)
        if self.mode in PERIODIC and count:
            if self.mode == SQUARE:
                elapsed *= 2
            left = count - elapsed % count
        else:
            left = count - elapsed
        return _to_bcd(left % 10_000) if self.bcd else left & 0xFFFF

    def control(self, access: int, mode: int, bcd: bool) -> None:
        """A control word: nothing counts until a count is written."""
        self.access, self.mode, self.bcd = access, mode, bcd
        self.reload = self.held = 0
        self.running = False
        self.latched = self.status = -1
        self.reads_high = self.writes_high = False

    def latch(self, now: int) -> None:
        """Latch the count, unless a latched one is still unread."""
        if self.latched < 0:
            self.latched = self.value(now)

    def latch_status(self, now: int) -> None:
        """Latch output, null count and the control word."""
        if self.status < 0:
            self.status = (self.output(now) << 7 | (self.reload == 0) << 6 | self.access << 4
                           | self.mode << 1 | self.bcd)

    def read(self, now: int) -> int:
        """A byte: latched status, else latched count, else the count."""
        if self.status >= 0:
            status, self.status = self.status, -1
            return status
        value = self.latched if self.latched >= 0 else self.value(now)
        if self.access == LOW_HIGH:
            high = last = self.reads_high
            self.reads_high = not high
        else:
            high, last = self.access == HIGH, True
        if last:
            self.latched = -1
        return value >> 8 if high else value & 0xFF

    def write(self, value: int, now: int) -> bool:
        """A byte of the count; whether the count is complete."""
        if self.access == LOW_HIGH and not self.writes_high:
            self.low_byte = value
            self.writes_high = True
            if self.mode == TERMINAL:
                # the first byte stops the count and takes OUT low
                self.running = False
                self.reload = self.held = 0
            return False
        count = value if self.access == LOW else value << 8
        if self.access == LOW_HIGH:
            count |= self.low_byte
            self.writes_high = False
        if self.bcd:
            count = _from_bcd(count)
        self.reload = count or (10_000 if self.bcd else 0x10000)
        if self.mode not in GATE_STARTED:
            self._start(now)
        return True

    def set_gate(self, level: bool, now: int) -> None:
        """Drive the GATE input (data sheet, figure 21)."""
        if level == self.gate:
            return
        if level:
            self.gate = True
            if self.reload:
                if self.mode in (TERMINAL, STROBE):
                    self.started, self.running = now - ticks_to_ns(self.held), True
                else:
                    self._start(now)
        else:
            if self.mode not in GATE_STARTED:
                self.held = self.elapsed(now) if self.mode in (TERMINAL, STROBE) else 0
                self.running = False
            self.gate = False

    def _start(self, now: int) -> None:
        self.held = 0
        self.started = now
        self.running = self.gate


class Pit8254(Saved):
    """The chip.  Counter 0 drives `irq0`; counter 2's gate and output are at port 0x61."""

    sizes = BYTES
    __slots__ = ("_irq0", "_now", "_timers", "counters", "due", "edge", "ticks_lost")

    SAVED: ClassVar[Kinds] = {"edge": between(0, LATEST), "due": TIME, "ticks_lost": QWORD}

    def __init__(self, timers: Timers, irq0: Callable[[bool], None]) -> None:
        self._timers = timers
        self._now = timers.now
        self._irq0 = irq0
        self.counters = [Counter(gate=True), Counter(gate=True), Counter(gate=False)]
        #: the number of counter 0's next rising edge since its count was loaded, and the guest time at
        #: which it will be delivered (0 = none will)
        self.edge = self.due = 0
        #: edges never delivered, because the guest could not run for too long
        self.ticks_lost = 0

    def read(self, offset: int, size: int) -> int:
        """A counter; the control word register cannot be read."""
        return self.counters[offset].read(self._now()) if offset < 3 else 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        """A byte of a count, or a control word."""
        now = self._now()
        if offset < 3:
            complete = self.counters[offset].write(value, now)
            if offset == 0:
                self._irq0(self.counters[0].output(now))
                if complete or not self.counters[0].running:
                    self._schedule()
            return
        select, access = value >> 6, value >> 4 & 3
        if select == 3:
            self._read_back(value, now)
        elif access == 0:
            self.counters[select].latch(now)
        else:
            mode = value >> 1 & 7
            self.counters[select].control(access, mode & 3 if mode > TRIGGERED else mode, bool(value & 1))
            if select == 0:
                self._irq0(self.counters[0].output(now))
                self._schedule()

    def expire(self, slot: int, now: int) -> None:
        """Counter 0's output rises."""
        counter = self.counters[0]
        self._irq0(False)
        self._irq0(True)
        if counter.mode not in PERIODIC:
            self.due = 0
            return
        late = counter.elapsed(now) // counter.reload - self.edge
        if late > MOST_LATE_TICKS:
            self.ticks_lost += late - MOST_LATE_TICKS
            self.edge += late - MOST_LATE_TICKS
        self.edge += 1
        spacing = max(ticks_to_ns(counter.reload) // 4, LEAST_SPACING_NS)
        self._set_due(max(self._edge_time(), now + spacing))

    def _read_back(self, value: int, now: int) -> None:
        for index, counter in enumerate(self.counters):
            if value >> index + 1 & 1:
                if not value & 0x20:
                    counter.latch(now)
                if not value & 0x10:
                    counter.latch_status(now)

    def _schedule(self) -> None:
        """Find counter 0's next rising edge, if there is one."""
        self.edge = 1
        if self.counters[0].running and self.counters[0].mode not in GATE_STARTED:
            self._set_due(self._edge_time())
        else:
            self._set_due(0)

    def _edge_time(self) -> int:
        counter = self.counters[0]
        ticks = counter.reload * self.edge
        if counter.mode == STROBE:
            ticks += 1
        return counter.started + ticks_to_ns(ticks)

    def _set_due(self, due: int) -> None:
        self.due = min(due, LATEST)
        self._timers.set(self, 0, self.due or None)

    def save(self) -> dict[str, Any]:
        """The state as plain values."""
        return {"interrupt": super().save(), "counters": [counter.save() for counter in self.counters]}

    def load(self, state: Any) -> None:
        """Take over what `save` returned; StateError otherwise."""
        interrupt, counters = part(state, "Pit8254", ("interrupt", "counters"))
        if type(counters) is not list or len(counters) != len(self.counters):
            raise StateError("Pit8254 counters: not three")
        for counter, saved in zip(self.counters, counters, strict=True):
            counter.load(saved)
            if counter.running and not counter.reload:
                raise StateError("Pit8254: a counter runs without a count")
        super().load(interrupt)
        if self.due and not self.counters[0].running:
            raise StateError("Pit8254: an interrupt is due from a counter that stands")

    def restored(self) -> None:
        """Set the saved deadline again."""
        self._set_due(self.due)
