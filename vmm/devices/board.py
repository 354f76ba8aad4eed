# SPDX-License-Identifier: GPL-2.0-or-later
"""The board: every device of a machine, wired and put on its buses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmm.devices import acpi_pm, ioapic, lapic_registers
from vmm.devices.acpi_pm import AcpiPm, ResetControl
from vmm.devices.acpi_tables import SCI_INTERRUPT
from vmm.devices.bus import Bus, BusOverlap, Device, PortBus
from vmm.devices.debug import DebugExit, LinePorts, PortMemory, Sink
from vmm.devices.fw_cfg import FirmwareConfiguration
from vmm.devices.i8042 import I8042, CommandPort, DataPort, Port92
from vmm.devices.interrupts import InterruptSystem
from vmm.devices.ioapic import PINS
from vmm.devices.pic8259 import CASCADE
from vmm.devices.pit8254 import Pit8254
from vmm.devices.port61 import Port61
from vmm.devices.rtc import Rtc
from vmm.devices.saved import Stateful, part
from vmm.devices.timers import Timers
from vmm.devices.uart16550 import Uart16550
from vmm.devices.virtio import bank
from vmm.devices.virtio.balloon import Balloon, PageSink
from vmm.devices.virtio.bank import Bank, DeviceRam
from vmm.devices.virtio.mmio import WINDOW_BYTES
from vmm.devices.virtio.rng import Rng
from vmm.memory.pool import PAGE

PIT_INTERRUPT, KEYBOARD_INTERRUPT, COM1_INTERRUPT, RTC_INTERRUPT = 0, 1, 4, 8


class Board:
    """The devices.  Time comes in through `now` (guest ns), `wall` (UTC seconds) and the guest's TSC; what
    leaves the machine goes out through the callbacks.  `ram` is the guest's memory for those devices that
    reach into it, `sink` takes the pages it gives back, and `entropy` gives as many random bytes as are asked
    for."""

    def __init__(self, now: Callable[[], int], wall: Callable[[], float], read_tsc: Callable[[], int],
                 tsc_to_ns: Callable[[int], int], console_sink: Callable[[bytes], None],
                 on_reset: Callable[[], None], on_poweroff: Callable[[], None],
                 on_debug_exit: Callable[[int], None], memory_bytes: int, ram: DeviceRam, sink: PageSink,
                 entropy: Callable[[int], bytes]) -> None:
        self.timers = Timers(now)
        self.interrupts = InterruptSystem(self.timers, read_tsc, tsc_to_ns)
        self.lapic = self.interrupts.lapic
        line = self.interrupts.isa_line
        self.pit = Pit8254(self.timers, line(PIT_INTERRUPT))
        self.port61 = Port61(self.timers, self.pit)
        self.acpi = AcpiPm(self.timers, line(SCI_INTERRUPT), on_poweroff)
        self.rtc = Rtc(self.timers, line(RTC_INTERRUPT), self.acpi.rtc_alarm, wall, memory_bytes)
        self.uart = Uart16550(line(COM1_INTERRUPT), console_sink)
        self.i8042 = I8042(line(KEYBOARD_INTERRUPT), on_reset)
        self.port92 = Port92(on_reset)
        self.reset_control = ResetControl(on_reset)
        self.fw_cfg = FirmwareConfiguration(memory_bytes)
        self.test_memory = PortMemory()
        self.test_bytes = PortMemory()
        test_lines = LinePorts([None if irq == CASCADE else line(irq) for irq in range(PINS)])

        self.virtio = Bank(ram)
        attention = self.virtio.attention
        self.balloon = Balloon(ram, sink, memory_bytes // PAGE, now, line(bank.BALLOON.interrupt), attention)
        self.rng = Rng(ram, entropy, self.timers, line(bank.RNG.interrupt), attention)
        self.virtio.devices = {bank.BALLOON.name: self.balloon, bank.RNG.name: self.rng}

        #: what `save` and `load` cover; the interrupt controllers first, since they hold the lines' levels
        self._saved: dict[str, Stateful] = {
            "interrupts": self.interrupts, "pit": self.pit, "port61": self.port61, "rtc": self.rtc,
            "uart": self.uart, "i8042": self.i8042, "port92": self.port92, "acpi": self.acpi,
            "reset_control": self.reset_control, "fw_cfg": self.fw_cfg, "test_memory": self.test_memory,
            "test_bytes": self.test_bytes, "virtio": self.virtio,
        }

        self.ports: Bus = PortBus()
        pic = self.interrupts.pic
        devices: tuple[tuple[int, int, Device, str], ...] = (
            (0x020, 2, pic.master, "pic master"),
            (0x0A0, 2, pic.slave, "pic slave"),
            (0x4D0, 2, self.interrupts.elcr, "elcr"),
            (0x040, 4, self.pit, "pit"),
            (0x060, 1, DataPort(self.i8042), "i8042 data"),
            (0x061, 1, self.port61, "port 61"),
            (0x064, 1, CommandPort(self.i8042), "i8042 command"),
            (0x070, 2, self.rtc, "rtc"),
            (0x080, 1, Sink(), "post code"),
            (0x092, 1, self.port92, "port 92"),
            (0x0E0, 4, self.test_memory, "test memory"),
            (0x0E4, 4, Sink(), "test flush"),
            (0x0E8, 4, self.test_bytes, "test bytes"),
            (0x0F4, 4, DebugExit(on_debug_exit), "debug exit"),
            (0x3F8, 8, self.uart, "com1"),
            (0x510, 2, self.fw_cfg, "fw_cfg"),
            (acpi_pm.PM_BASE, acpi_pm.PM_LENGTH, self.acpi, "acpi pm"),
            (acpi_pm.RESET_PORT - ResetControl.OFFSET, 4, self.reset_control, "reset control"),
            (0x2000, PINS, test_lines, "test lines"),
        )
        for base, length, device, name in devices:
            self.ports.attach(base, length, device, name)

        self.mmio = Bus()
        self.mmio.attach(ioapic.MMIO_BASE, ioapic.MMIO_LENGTH, self.interrupts.ioapic, "ioapic")
        self.mmio.attach(lapic_registers.MMIO_BASE, lapic_registers.MMIO_LENGTH, self.lapic, "lapic")
        for place in bank.PLACES:
            self.mmio.attach(place.base, WINDOW_BYTES, self.virtio.devices[place.name], place.name)
        self.lapic.moved = self._move_lapic

    def save(self) -> dict[str, Any]:
        """The state of every device, as plain values; what the guest has printed is given out first."""
        self.uart.flush()
        return {name: device.save() for name, device in self._saved.items()}

    def load(self, state: Any) -> None:
        """Take over what `save` returned.  Raises StateError on anything else; the board is then unusable.

        `now` and the TSC functions must already tell the time of the loaded machine.
        """
        for device, saved in zip(self._saved.values(), part(state, "Board", tuple(self._saved)), strict=True):
            device.load(saved)

    def _move_lapic(self, base: int) -> None:
        """IA32_APIC_BASE moved the local APIC; on top of another device it cannot be reached."""
        self.mmio.detach("lapic")
        try:
            self.mmio.attach(base, lapic_registers.MMIO_LENGTH, self.lapic, "lapic")
        except BusOverlap:
            return
