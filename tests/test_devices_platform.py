# SPDX-License-Identifier: GPL-2.0-or-later
"""The rest of the board: power management, resets, the keyboard controller, test ports."""

from __future__ import annotations

import pytest

from tests.devices_rig import MEMORY, SECOND, Rig
from vmm.devices.timers import NEVER

STATUS, ENABLE, CONTROL, TIMER = 0x600, 0x602, 0x604, 0x608


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    rig.setup_pics()
    return rig


def test_power_off(rig: Rig) -> None:
    assert rig.board.ports.read(CONTROL, 2) & 1
    rig.board.ports.write(CONTROL, 2, 0x0001)
    assert rig.poweroffs == 0
    rig.board.ports.write(CONTROL, 2, 1 << 13 | 0x0001)
    assert rig.poweroffs == 1
    assert not rig.board.ports.read(CONTROL, 2) & 1 << 13


def test_sleep_states_that_are_not_offered(rig: Rig) -> None:
    for kind in range(1, 8):
        rig.board.ports.write(CONTROL, 2, 1 << 13 | kind << 10)
    assert rig.poweroffs == 0


def test_power_off_by_bytes(rig: Rig) -> None:
    rig.outb(CONTROL + 1, 0x20)
    assert rig.poweroffs == 1


def test_the_power_button_interrupts_by_sci(rig: Rig) -> None:
    rig.outb(0x4D1, 0x02)
    rig.board.ports.write(ENABLE, 2, 0x0100)
    rig.board.acpi.power_button()
    assert rig.interrupts.acknowledge() == 0x39
    assert rig.board.ports.read(STATUS, 2) == 0x0100
    rig.board.ports.write(STATUS, 2, 0x0100)
    rig.outb(0xA0, 0x61)
    rig.outb(0x20, 0x62)
    assert not rig.interrupts.output


def test_a_press_before_the_guest_listens_is_kept(rig: Rig) -> None:
    rig.board.acpi.power_button()
    assert not rig.interrupts.output
    rig.board.ports.write(ENABLE, 2, 0x0100)
    assert rig.interrupts.output


def test_the_pm_timer(rig: Rig) -> None:
    rig.advance(SECOND)
    assert rig.board.ports.read(TIMER, 4) == 3_579_545
    assert rig.inb(TIMER) == 3_579_545 & 0xFF
    rig.board.ports.write(TIMER, 4, 0)
    rig.advance(2000 * SECOND)
    assert rig.board.ports.read(TIMER, 4) == 2001 * 3_579_545 & 0xFFFF_FFFF


def test_the_pm_timer_carry(rig: Rig) -> None:
    half = -(-(1 << 31) * SECOND // 3_579_545)
    assert rig.board.timers.next == NEVER
    rig.board.ports.write(ENABLE, 2, 0x0001)
    assert rig.board.timers.next == half
    rig.advance(half)
    assert rig.interrupts.output
    assert rig.board.ports.read(STATUS, 2) == 0x0001


@pytest.mark.parametrize("writes", [
    [(0x64, 0xFE)], [(0x64, 0xD1), (0x60, 0xFE)], [(0x92, 0x01)], [(0xCF9, 0x06)],
    [(0xCF9, 0x02), (0xCF9, 0x06)]])
def test_resets(rig: Rig, writes: list[tuple[int, int]]) -> None:
    for port, value in writes:
        rig.outb(port, value)
    assert rig.resets == 1


@pytest.mark.parametrize("writes", [
    [(0x64, 0xFF)], [(0x64, 0xD1), (0x60, 0xDF)], [(0x92, 0x02)], [(0xCF9, 0x02)], [(0x64, 0xF1)]])
def test_not_resets(rig: Rig, writes: list[tuple[int, int]]) -> None:
    for port, value in writes:
        rig.outb(port, value)
    assert rig.resets == 0


def test_there_is_no_pci(rig: Rig) -> None:
    """Probing configuration space must neither find a bridge nor hit the reset register in its midst."""
    for address in (0x8000_0000, 0x8000_0600, 0x8000_FF00):
        rig.board.ports.write(0xCF8, 4, address)
        assert rig.board.ports.read(0xCF8, 4) == 0xFFFF_FFFF
        assert rig.board.ports.read(0xCFC, 4) == 0xFFFF_FFFF
    assert rig.resets == 0


def command(rig: Rig, value: int) -> int:
    rig.outb(0x64, value)
    assert rig.inb(0x64) & 1
    return rig.inb(0x60)


def test_the_keyboard_controller_passes_its_tests(rig: Rig) -> None:
    assert not rig.inb(0x64) & 1
    assert [command(rig, value) for value in (0xAA, 0xAB, 0xA9, 0xD0)] == [0x55, 0x00, 0x01, 0x03]
    assert not rig.inb(0x64) & 1


def test_the_configuration_byte(rig: Rig) -> None:
    configuration = command(rig, 0x20)
    assert rig.interrupts.acknowledge() == 0x31
    rig.outb(0x20, 0x20)
    rig.outb(0x64, 0x60)
    rig.outb(0x60, configuration & ~1)
    rig.outb(0x64, 0xAD)
    assert command(rig, 0x20) == configuration & ~1 | 0x10
    assert not rig.interrupts.output


def test_the_absent_keyboard_times_out_at_once(rig: Rig) -> None:
    rig.outb(0x60, 0xF2)
    assert rig.inb(0x64) & 0x41 == 0x41
    assert rig.interrupts.acknowledge() == 0x31
    assert rig.inb(0x60) == 0xFE
    assert not rig.inb(0x64) & 0x41


def test_there_is_no_mouse_port(rig: Rig) -> None:
    """Linux's i8042_check_aux: the looped byte must not be marked as the mouse's."""
    rig.outb(0x64, 0xD3)
    rig.outb(0x60, 0x5A)
    assert rig.inb(0x64) & 0x21 == 0x01
    assert rig.inb(0x60) == 0x5A


def test_debug_exit(rig: Rig) -> None:
    rig.outb(0xF4, 0x10)
    rig.board.ports.write(0xF4, 4, 0x1234_5678)
    assert rig.exits == [0x21, 0x1234_5678 << 1 | 1]


def test_port_memory(rig: Rig) -> None:
    """kvm-unit-tests' test_ioport: any size, any offset within."""
    rig.board.ports.write(0xE0, 4, 0x1234_5678)
    assert rig.board.ports.read(0xE1, 2) == 0x3456
    rig.outb(0xE3, 0xAB)
    assert rig.board.ports.read(0xE0, 4) == 0xAB34_5678
    rig.board.ports.write(0xE8, 4, 0xDEAD_BEEF)
    assert rig.inb(0xE9) == 0xBE
    rig.board.ports.write(0xE4, 4, 0x1000)


def test_interrupt_lines_by_port(rig: Rig) -> None:
    """kvm-unit-tests' set_irq_line."""
    rig.outb(0x200E, 1)
    assert rig.interrupts.acknowledge() == 0x3E
    rig.outb(0x200E, 0)
    rig.outb(0x2002, 1)
    rig.enable_apic()
    rig.route(20, 0x77)
    rig.outb(0x2014, 1)
    assert rig.interrupts.acknowledge() == 0x77


def test_firmware_configuration(rig: Rig) -> None:
    def item(index: int, size: int) -> int:
        rig.board.ports.write(0x510, 2, index)
        return sum(rig.inb(0x511) << 8 * place for place in range(size))

    assert item(0x00, 4).to_bytes(4, "little") == b"QEMU"
    assert item(0x03, 8) == MEMORY
    assert (item(0x05, 2), item(0x0F, 2)) == (1, 1)
    assert item(0x99, 4) == 0


def test_the_post_code_port_is_somebodys(rig: Rig) -> None:
    """Linux writes there to wait; it must not look like probing for hardware."""
    rig.outb(0x80, 0)
    assert rig.board.ports.unclaimed == 0
