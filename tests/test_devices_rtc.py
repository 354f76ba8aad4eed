# SPDX-License-Identifier: GPL-2.0-or-later
"""The real-time clock: reading, setting, alarms, and that an idle clock needs no timer."""

from __future__ import annotations

from calendar import timegm

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.devices_rig import MEMORY, SECOND, WALL, Rig
from vmm.devices.rtc import cmos_memory_bytes
from vmm.devices.timers import NEVER


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    rig.setup_pics()
    return rig


def bcd(value: int) -> int:
    return (value >> 4) * 10 + (value & 0xF)


def epoch(rig: Rig) -> int:
    """What Linux's mc146818_get_time makes of the registers."""
    second, minute, hour, day, month, year, century = (
        bcd(rig.cmos(index)) for index in (0, 2, 4, 7, 8, 9, 0x32))
    return timegm((century * 100 + year, month, day, hour, minute, second))


def served(rig: Rig) -> bool:
    taken = rig.interrupts.acknowledge() == 0x38
    if taken:
        rig.outb(0xA0, 0x20)
        rig.outb(0x20, 0x20)
    return taken


def test_it_shows_the_host_time(rig: Rig) -> None:
    assert epoch(rig) == WALL
    rig.advance(86_399 * SECOND)
    assert epoch(rig) == WALL + 86_399
    assert [rig.cmos(register) for register in (0x0A, 0x0B, 0x0D)] == [0x26, 0x02, 0x80]


def test_formats(rig: Rig) -> None:
    assert (rig.cmos(4), rig.cmos(6)) == (0x15, 2)
    rig.set_cmos(0x0B, 0x06)
    assert (rig.cmos(4), rig.cmos(2)) == (15, 30)
    rig.set_cmos(0x0B, 0x00)
    assert rig.cmos(4) == 0x83
    rig.advance(9 * 3600 * SECOND)
    assert rig.cmos(4) == 0x12


def test_update_in_progress_warns_of_the_second(rig: Rig) -> None:
    assert not rig.cmos(0x0A) & 0x80
    rig.advance(SECOND - 100_000)
    assert rig.cmos(0x0A) & 0x80
    rig.advance(100_000)
    assert not rig.cmos(0x0A) & 0x80


def test_setting_the_clock(rig: Rig) -> None:
    rig.set_cmos(0x0B, 0x82)
    for index, value in ((0x32, 0x20), (9, 0x30), (8, 0x02), (7, 0x28), (4, 0x23), (2, 0x59), (0, 0x58)):
        rig.set_cmos(index, value)
    assert rig.cmos(0) == 0x58
    rig.advance(10 * SECOND)
    assert rig.cmos(0) == 0x58
    rig.set_cmos(0x0B, 0x02)
    assert epoch(rig) == timegm((2030, 2, 28, 23, 59, 58))
    rig.advance(2 * SECOND)
    assert epoch(rig) == timegm((2030, 3, 1, 0, 0, 0))


def test_dates_that_are_none_are_brought_into_range(rig: Rig) -> None:
    rig.set_cmos(0x0B, 0x82)
    for index, value in ((0x32, 0x99), (9, 0x99), (8, 0x77), (7, 0x99), (4, 0x99), (2, 0x99), (0, 0xFF)):
        rig.set_cmos(index, value)
    rig.set_cmos(0x0B, 0x02)
    assert epoch(rig) == timegm((2149, 12, 31, 23, 59, 59))
    rig.board.load(rig.board.save())
    rig.advance(2 * SECOND)
    rig.board.load(rig.board.save())


def test_setting_one_register_on_the_run(rig: Rig) -> None:
    rig.set_cmos(2, 0x45)
    assert epoch(rig) == WALL + 15 * 60


def test_an_idle_clock_has_no_timer(rig: Rig) -> None:
    assert rig.board.timers.next == NEVER
    rig.set_cmos(0x0B, 0x12)
    assert rig.board.timers.next < NEVER
    rig.set_cmos(0x0B, 0x02)
    assert rig.board.timers.next == NEVER


def test_update_interrupts(rig: Rig) -> None:
    rig.cmos(0x0C)
    rig.set_cmos(0x0B, 0x12)
    for _ in range(3):
        rig.advance(SECOND)
        assert served(rig)
        assert rig.cmos(0x0C) & 0xB0 == 0x90
        assert rig.cmos(0x0C) == 0
        assert not served(rig)


def test_an_unread_interrupt_is_not_repeated(rig: Rig) -> None:
    rig.set_cmos(0x0B, 0x12)
    rig.advance(SECOND)
    assert served(rig)
    assert rig.board.timers.next == NEVER


def test_alarm(rig: Rig) -> None:
    for index, value in ((5, 0x15), (3, 0x32), (1, 0x10)):
        rig.set_cmos(index, value)
    rig.set_cmos(0x0B, 0x22)
    rig.advance(130 * SECOND - 1000)
    assert not served(rig)
    rig.advance(1000)
    assert served(rig)
    assert rig.cmos(0x0C) & 0xA0 == 0xA0
    assert rig.board.timers.next == rig.now + 86_400 * SECOND
    assert rig.board.ports.read(0x600, 2) == 1 << 10


def test_alarm_with_any_byte(rig: Rig) -> None:
    for index in (5, 3):
        rig.set_cmos(index, 0xFF)
    rig.set_cmos(1, 0x30)
    rig.set_cmos(0x0B, 0x22)
    times = []
    for _ in range(3):
        rig.advance(rig.board.timers.next - rig.now)
        assert served(rig)
        rig.cmos(0x0C)
        times.append(rig.now // SECOND)
    assert times == [30, 90, 150]


def test_an_alarm_at_no_time(rig: Rig) -> None:
    rig.set_cmos(5, 0x77)
    rig.set_cmos(0x0B, 0x22)
    assert rig.board.timers.next == NEVER


def test_periodic_interrupts(rig: Rig) -> None:
    rig.set_cmos(0x0A, 0x26)
    rig.set_cmos(0x0B, 0x42)
    count = 0
    while rig.now < SECOND:
        rig.advance(SECOND // 4096)
        if served(rig):
            assert rig.cmos(0x0C) & 0xC0 == 0xC0
            count += 1
    assert 1020 <= count <= 1024


def test_flags_without_interrupts(rig: Rig) -> None:
    """Polling register C works with every interrupt disabled."""
    rig.cmos(0x0C)
    rig.advance(2 * SECOND)
    assert rig.cmos(0x0C) == 0x50
    assert not rig.interrupts.output


def test_memory_size_bytes(rig: Rig) -> None:
    def word(place: int) -> int:
        return rig.cmos(place) | rig.cmos(place + 1) << 8

    assert word(0x15) == 640
    assert word(0x17) == word(0x30) == 0xFFFF
    assert word(0x34) << 16 == MEMORY - (16 << 20)
    assert cmos_memory_bytes(8 << 20)[0x34] == 0
    assert cmos_memory_bytes(3 << 30)[0x35] == 0xBF


def test_memory_bytes_are_memory(rig: Rig) -> None:
    rig.set_cmos(0x0F, 0x5A)
    rig.set_cmos(0x8F, 0xA5)
    assert rig.cmos(0x0F) == 0xA5


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255), st.integers(0, 5 * SECOND)), max_size=40))
def test_no_setting_upsets_the_clock(operations: list[tuple[int, int, int]]) -> None:
    rig = Rig()
    for index, value, ns in operations:
        rig.set_cmos(index, value)
        assert 0 <= rig.cmos(index) <= 0xFF
        rig.stall(ns)
        assert rig.board.timers.next > rig.now
