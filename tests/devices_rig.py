# SPDX-License-Identifier: GPL-2.0-or-later
"""A board on a test bench: its clocks stand still until the test moves them."""

from __future__ import annotations

from tests.virtio_rig import RAM, Pages, Ram
from vmm.devices.board import Board

MS = 1_000_000
SECOND = 1_000_000_000
#: the guest TSC runs at 2 GHz
TSC_PER_NS = 2
#: 2026-11-23 15:30:00 UTC, a Monday
WALL = 1_795_447_800
MEMORY = 128 << 20


class Rig:
    """A board and everything outside it."""

    def __init__(self, now: int = 0) -> None:
        self.now = now
        self.console = bytearray()
        self.resets = 0
        self.poweroffs = 0
        self.exits: list[int] = []
        #: what devices see of the memory
        self.ram = Ram(RAM)
        self.pages = Pages(MEMORY >> 12)
        self.board = Board(
            now=lambda: self.now, wall=lambda: WALL + self.now / SECOND,
            read_tsc=lambda: self.now * TSC_PER_NS, tsc_to_ns=lambda tsc: -(-tsc // TSC_PER_NS),
            console_sink=self.console.extend, on_reset=self._reset, on_poweroff=self._power_off,
            on_debug_exit=self.exits.append, memory_bytes=MEMORY, ram=self.ram, sink=self.pages,
            entropy=lambda count: bytes(index & 0xFF for index in range(count)))
        self.interrupts = self.board.interrupts
        self.lapic = self.board.lapic

    def _reset(self) -> None:
        self.resets += 1

    def _power_off(self) -> None:
        self.poweroffs += 1

    def inb(self, port: int) -> int:
        return self.board.ports.read(port, 1)

    def outb(self, port: int, value: int) -> None:
        self.board.ports.write(port, 1, value)

    def mmio_read(self, address: int) -> int:
        return self.board.mmio.read(address, 4)

    def mmio_write(self, address: int, value: int) -> None:
        self.board.mmio.write(address, 4, value)

    def apic_read(self, register: int) -> int:
        return self.mmio_read(0xFEE0_0000 + register * 16)

    def apic_write(self, register: int, value: int) -> None:
        self.mmio_write(0xFEE0_0000 + register * 16, value)

    def ioapic_read(self, register: int) -> int:
        self.mmio_write(0xFEC0_0000, register)
        return self.mmio_read(0xFEC0_0010)

    def ioapic_write(self, register: int, value: int) -> None:
        self.mmio_write(0xFEC0_0000, register)
        self.mmio_write(0xFEC0_0010, value)

    def route(self, pin: int, entry: int) -> None:
        """Write a redirection entry, high half first as kernels do."""
        self.ioapic_write(0x11 + 2 * pin, entry >> 32)
        self.ioapic_write(0x10 + 2 * pin, entry & 0xFFFF_FFFF)

    def cmos(self, index: int) -> int:
        self.outb(0x70, index)
        return self.inb(0x71)

    def set_cmos(self, index: int, value: int) -> None:
        self.outb(0x70, index)
        self.outb(0x71, value)

    def advance(self, ns: int) -> None:
        """Let time pass; timers expire when they are due."""
        end = self.now + ns
        timers = self.board.timers
        while timers.next <= end:
            self.now = max(self.now, timers.next)
            timers.run(self.now)
        self.now = end

    def stall(self, ns: int) -> None:
        """Let time pass while the guest does not run: timers are looked at only afterwards."""
        self.now += ns
        self.board.timers.run(self.now)

    def setup_pics(self, master_mask: int = 0, slave_mask: int = 0) -> None:
        """What Linux's init_8259A does, with vectors from 0x30."""
        for port, value in ((0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1),
                            (0xA0, 0x11), (0xA1, 0x38), (0xA1, 2), (0xA1, 1),
                            (0x21, master_mask), (0xA1, slave_mask)):
            self.outb(port, value)

    def enable_apic(self) -> None:
        """Software-enable the local APIC and shut out the 8259."""
        self.apic_write(0x0F, 0x1FF)
        self.apic_write(0x35, 0x10000)

    def enable_x2apic(self) -> None:
        self.enable_apic()
        self.lapic.msr_write(0x1B, self.lapic.msr_read(0x1B) | 0x400)
