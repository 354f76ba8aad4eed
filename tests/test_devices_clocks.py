# SPDX-License-Identifier: GPL-2.0-or-later
"""What ticks: the 8254 with port 0x61, and the local APIC's timer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.devices_rig import MS, SECOND, TSC_PER_NS, Rig
from vmm.devices.lapic_timer import LEAST_PERIOD_NS
from vmm.devices.pit8254 import HZ, MOST_LATE_TICKS, ticks_to_ns
from vmm.devices.timers import NEVER

TICK = ticks_to_ns(1)
LVT_TIMER, INITIAL, CURRENT, DIVIDE = 0x32, 0x38, 0x39, 0x3E
PERIODIC, TSC_DEADLINE, MASKED = 1 << 17, 2 << 17, 1 << 16
DEADLINE_MSR = 0x6E0


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    rig.setup_pics()
    return rig


def program(rig: Rig, counter: int, mode: int, count: int, bcd: int = 0) -> None:
    rig.outb(0x43, counter << 6 | 0x30 | mode << 1 | bcd)
    rig.outb(0x40 + counter, count & 0xFF)
    rig.outb(0x40 + counter, count >> 8)


def latched(rig: Rig, counter: int) -> int:
    rig.outb(0x43, counter << 6)
    return rig.inb(0x40 + counter) | rig.inb(0x40 + counter) << 8


def serve(rig: Rig) -> int | None:
    """Take and end one interrupt of the 8259."""
    vector = rig.interrupts.acknowledge()
    if vector is not None:
        rig.outb(0x20, 0x20)
    return vector


def ticks_served(rig: Rig, ns: int, step: int = MS // 10) -> int:
    count = 0
    for _ in range(ns // step):
        rig.advance(step)
        count += serve(rig) is not None
    return count


def test_a_stopped_machine_has_no_timer(rig: Rig) -> None:
    assert rig.board.timers.next == NEVER


def test_periodic_ticks(rig: Rig) -> None:
    program(rig, 0, 2, HZ // 250)
    serve(rig)  # the rise of OUT by the control word
    assert ticks_served(rig, 100 * MS) == 25
    assert rig.board.pit.ticks_lost == 0


def test_periodic_ticks_do_not_drift(rig: Rig) -> None:
    program(rig, 0, 3, 1193)
    serve(rig)
    rig.advance(ticks_to_ns(1193 * 5000) - 1)
    served = rig.board.pit.edge - 1
    rig.advance(1)
    assert (served, rig.board.pit.edge - 1) == (4999, 5000)


def test_one_shot_strobe_as_tickless_linux_uses_it(rig: Rig) -> None:
    rig.outb(0x43, 0x38)
    serve(rig)
    for _ in range(3):
        rig.outb(0x40, 0xA9)
        rig.outb(0x40, 0x04)
        assert rig.board.timers.next == rig.now + ticks_to_ns(0x4A9 + 1)
        rig.advance(ticks_to_ns(0x4A9 + 1))
        assert serve(rig) == 0x30
        assert rig.board.timers.next == NEVER


def test_terminal_count_raises_once(rig: Rig) -> None:
    program(rig, 0, 0, 1000)
    assert not rig.interrupts.output
    rig.advance(ticks_to_ns(1000))
    assert serve(rig) == 0x30
    rig.advance(SECOND)
    assert not rig.interrupts.output


def test_lost_ticks_are_bounded_and_counted(rig: Rig) -> None:
    """A guest that could not run for a second gets a few of its ticks late, and not all at once."""
    program(rig, 0, 2, HZ // 1000)
    serve(rig)
    rig.stall(SECOND)
    late = serve(rig) is not None
    lost = rig.board.pit.ticks_lost
    assert 1000 - MOST_LATE_TICKS - 2 <= lost <= 1000 - MOST_LATE_TICKS + 1
    before = rig.now
    while rig.board.timers.next < before + 5 * MS:
        assert rig.board.timers.next - rig.now >= MS // 5
        rig.advance(rig.board.timers.next - rig.now)
        late += serve(rig) is not None
    assert MOST_LATE_TICKS <= late <= MOST_LATE_TICKS + 7
    assert ticks_served(rig, 100 * MS) in (99, 100, 101)
    assert rig.board.pit.ticks_lost == lost


def test_a_tiny_period_does_not_bury_the_host(rig: Rig) -> None:
    program(rig, 0, 2, 2)
    expiries = 0
    end = rig.now + 10 * MS
    while rig.board.timers.next <= end:
        rig.advance(rig.board.timers.next - rig.now)
        expiries += 1
    assert expiries <= 101


@pytest.mark.parametrize(("mode", "count", "after", "expected"), [
    (0, 1000, 10, 990), (0, 1000, 1001, 0xFFFF), (2, 1000, 10, 990), (2, 1000, 2010, 990), (3, 1000, 10, 980),
    (4, 0, 1, 0xFFFF)])
def test_counters_count_down(rig: Rig, mode: int, count: int, after: int, expected: int) -> None:
    program(rig, 0, mode, count)
    rig.advance(ticks_to_ns(after))
    assert latched(rig, 0) == expected


def test_a_latched_count_stands_still(rig: Rig) -> None:
    program(rig, 0, 2, 5000)
    rig.advance(ticks_to_ns(1000))
    rig.outb(0x43, 0x00)
    rig.advance(ticks_to_ns(500))
    rig.outb(0x43, 0x00)
    assert rig.inb(0x40) | rig.inb(0x40) << 8 == 4000
    assert rig.inb(0x40) | rig.inb(0x40) << 8 == 3500


def test_read_back_latches_status_and_count(rig: Rig) -> None:
    program(rig, 0, 2, 5000)
    rig.advance(ticks_to_ns(1000))
    rig.outb(0x43, 0xC2)
    assert rig.inb(0x40) == 0x80 | 0x30 | 2 << 1
    assert rig.inb(0x40) | rig.inb(0x40) << 8 == 4000


def test_status_tells_a_null_count(rig: Rig) -> None:
    rig.outb(0x43, 0x34)
    rig.outb(0x43, 0xE2)
    assert rig.inb(0x40) & 0x40


def test_bcd(rig: Rig) -> None:
    program(rig, 0, 2, 0x1000, bcd=1)
    rig.advance(ticks_to_ns(1))
    assert latched(rig, 0) == 0x0999


def test_byte_only_access(rig: Rig) -> None:
    rig.outb(0x43, 0x14)
    rig.outb(0x40, 100)
    rig.advance(ticks_to_ns(10))
    assert [rig.inb(0x40), rig.inb(0x40)] == [90, 90]


def test_calibration_by_channel_2(rig: Rig) -> None:
    """pit_calibrate_tsc: gate on, mode 0, poll port 0x61 until OUT rises."""
    rig.outb(0x61, rig.inb(0x61) & ~2 | 1)
    program(rig, 2, 0, HZ // 100)
    start = rig.now
    while not rig.inb(0x61) & 0x20:
        rig.advance(10_000)
    assert abs(rig.now - start - 10 * MS) < 20_000


def test_the_gate_holds_channel_2(rig: Rig) -> None:
    rig.outb(0x61, 0)
    program(rig, 2, 0, 1000)
    rig.advance(SECOND)
    assert latched(rig, 2) == 1000
    rig.outb(0x61, 1)
    rig.advance(ticks_to_ns(600))
    rig.outb(0x61, 0)
    rig.advance(SECOND)
    assert latched(rig, 2) == 400
    rig.outb(0x61, 1)
    rig.advance(ticks_to_ns(401))
    assert rig.inb(0x61) & 0x20


def test_a_rising_gate_triggers_the_one_shot(rig: Rig) -> None:
    rig.outb(0x61, 0)
    program(rig, 2, 1, 1000)
    assert rig.inb(0x61) & 0x20
    for _ in range(2):
        rig.outb(0x61, 1)
        assert not rig.inb(0x61) & 0x20
        rig.outb(0x61, 0)
    rig.advance(ticks_to_ns(1000))
    assert rig.inb(0x61) & 0x20


def test_a_low_gate_silences_the_square_wave(rig: Rig) -> None:
    rig.outb(0x61, 3)
    program(rig, 2, 3, 1000)
    rig.advance(ticks_to_ns(600))
    assert rig.inb(0x61) & 0x23 == 0x03
    rig.outb(0x61, 0)
    assert rig.inb(0x61) & 0x23 == 0x20


def test_the_refresh_bit_toggles(rig: Rig) -> None:
    seen = set()
    for _ in range(4):
        seen.add(rig.inb(0x61) & 0x10)
        rig.advance(10_000)
    assert seen == {0, 0x10}


@given(st.lists(st.one_of(
    st.tuples(st.sampled_from([0x40, 0x41, 0x42, 0x43, 0x61]), st.integers(0, 255)),
    st.tuples(st.just(0), st.integers(0, 10**8))), max_size=60))
def test_no_program_upsets_the_timer(operations: list[tuple[int, int]]) -> None:
    rig = Rig()
    for port, value in operations:
        if port:
            rig.outb(port, value)
            assert 0 <= rig.inb(port) <= 0xFF
        else:
            rig.stall(value)
            assert rig.board.timers.next > rig.now


@pytest.fixture
def apic() -> Rig:
    rig = Rig(now=1000)
    rig.enable_apic()
    rig.apic_write(DIVIDE, 0xB)
    return rig


def end(rig: Rig) -> None:
    if rig.lapic.base & 0x400:
        rig.lapic.msr_write(0x80B, 0)
    else:
        rig.apic_write(0xB, 0)


@pytest.mark.parametrize(("code", "divider"), [
    (0b0000, 2), (0b0001, 4), (0b0010, 8), (0b0011, 16), (0b1000, 32), (0b1001, 64), (0b1010, 128),
    (0b1011, 1)])
def test_dividers(apic: Rig, code: int, divider: int) -> None:
    apic.apic_write(DIVIDE, code)
    apic.apic_write(LVT_TIMER, 0x40)
    apic.apic_write(INITIAL, 1000)
    apic.advance(divider * 400)
    assert apic.apic_read(CURRENT) == 600
    apic.advance(divider * 600)
    assert apic.interrupts.acknowledge() == 0x40


def test_one_shot(apic: Rig) -> None:
    apic.apic_write(LVT_TIMER, 0x40)
    apic.apic_write(INITIAL, MS)
    apic.advance(MS - 1)
    assert not apic.interrupts.output
    apic.advance(1)
    assert apic.interrupts.acknowledge() == 0x40
    assert apic.apic_read(CURRENT) == 0
    assert apic.board.timers.next == NEVER


def test_stopping_the_count(apic: Rig) -> None:
    apic.apic_write(LVT_TIMER, 0x40)
    apic.apic_write(INITIAL, MS)
    apic.apic_write(INITIAL, 0)
    assert apic.board.timers.next == NEVER
    assert apic.apic_read(CURRENT) == 0


def test_periodic(apic: Rig) -> None:
    apic.apic_write(LVT_TIMER, PERIODIC | 0x40)
    apic.apic_write(INITIAL, 4 * MS)
    for _ in range(3):
        apic.advance(4 * MS)
        assert apic.interrupts.acknowledge() == 0x40
        end(apic)
    apic.stall(40 * MS + MS)
    assert apic.interrupts.acknowledge() == 0x40
    end(apic)
    assert not apic.interrupts.output
    assert apic.apic_read(CURRENT) == 3 * MS


def test_a_tiny_apic_period_does_not_bury_the_host(apic: Rig) -> None:
    apic.apic_write(LVT_TIMER, PERIODIC | 0x40)
    apic.apic_write(INITIAL, 1)
    apic.advance(10)
    assert apic.board.timers.next - apic.now >= LEAST_PERIOD_NS - 10


def test_a_masked_timer_counts_but_wakes_nobody(apic: Rig) -> None:
    """Linux calibrates against a masked timer."""
    apic.apic_write(LVT_TIMER, PERIODIC | MASKED | 0x40)
    apic.apic_write(INITIAL, 10 * MS)
    assert apic.board.timers.next == NEVER
    apic.advance(23 * MS)
    assert apic.apic_read(CURRENT) == 7 * MS
    apic.apic_write(LVT_TIMER, PERIODIC | 0x40)
    assert apic.board.timers.next == apic.now + 7 * MS


def test_a_one_shot_that_ended_masked_is_over(apic: Rig) -> None:
    apic.apic_write(LVT_TIMER, MASKED | 0x40)
    apic.apic_write(INITIAL, MS)
    apic.advance(2 * MS)
    assert apic.apic_read(CURRENT) == 0
    apic.apic_write(LVT_TIMER, 0x40)
    assert apic.board.timers.next == NEVER
    assert not apic.interrupts.output


def test_changing_the_divider_keeps_the_count(apic: Rig) -> None:
    apic.apic_write(LVT_TIMER, 0x40)
    apic.apic_write(INITIAL, MS)
    apic.advance(MS // 2)
    apic.apic_write(DIVIDE, 0x0)
    assert apic.apic_read(CURRENT) == MS // 2
    assert apic.board.timers.next == apic.now + MS


def test_tsc_deadline(apic: Rig) -> None:
    apic.enable_x2apic()
    apic.lapic.msr_write(0x832, TSC_DEADLINE | 0xEC)
    deadline = (apic.now + MS) * TSC_PER_NS
    apic.lapic.msr_write(DEADLINE_MSR, deadline)
    assert apic.lapic.msr_read(DEADLINE_MSR) == deadline
    assert apic.board.timers.next == apic.now + MS
    apic.advance(MS)
    assert apic.interrupts.acknowledge() == 0xEC
    assert apic.lapic.msr_read(DEADLINE_MSR) == 0
    assert apic.board.timers.next == NEVER


def test_a_past_deadline_fires_at_once_and_zero_disarms(apic: Rig) -> None:
    apic.apic_write(LVT_TIMER, TSC_DEADLINE | 0xEC)
    apic.lapic.msr_write(DEADLINE_MSR, 1)
    assert apic.interrupts.acknowledge() == 0xEC
    end(apic)
    apic.lapic.msr_write(DEADLINE_MSR, 2**63)
    assert apic.board.timers.next < NEVER
    apic.lapic.msr_write(DEADLINE_MSR, 0)
    assert apic.board.timers.next == NEVER


def test_the_last_deadline_is_never(apic: Rig) -> None:
    """Linux writes ULONG_MAX to mean no deadline."""
    apic.apic_write(LVT_TIMER, TSC_DEADLINE | 0xEC)
    apic.lapic.msr_write(DEADLINE_MSR, 2**64 - 1)
    apic.advance(1000 * SECOND)
    assert not apic.interrupts.output


def test_deadlines_exist_only_in_their_mode(apic: Rig) -> None:
    apic.apic_write(LVT_TIMER, 0xEC)
    apic.lapic.msr_write(DEADLINE_MSR, 1)
    assert apic.lapic.msr_read(DEADLINE_MSR) == 0
    apic.apic_write(LVT_TIMER, TSC_DEADLINE | 0xEC)
    apic.apic_write(INITIAL, 1000)
    assert apic.apic_read(CURRENT) == 0
    apic.lapic.msr_write(DEADLINE_MSR, 2**40)
    apic.apic_write(LVT_TIMER, 0xEC)
    assert apic.board.timers.next == NEVER


def test_a_jump_of_the_tsc_moves_the_deadline(apic: Rig) -> None:
    apic.apic_write(LVT_TIMER, TSC_DEADLINE | 0xEC)
    apic.lapic.msr_write(DEADLINE_MSR, (apic.now + 10 * MS) * TSC_PER_NS)
    apic.lapic.timer._tsc_to_ns = lambda tsc: tsc // TSC_PER_NS - 5 * MS
    apic.lapic.timer.tsc_changed()
    assert apic.board.timers.next == apic.now + 5 * MS
