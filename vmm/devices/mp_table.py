# SPDX-License-Identifier: GPL-2.0-or-later
"""The tables of the MultiProcessor Specification 1.4, for kernels that find their APICs without ACPI."""

from __future__ import annotations

import struct

from vmm.devices import ioapic, lapic_registers
from vmm.devices.virtio import bank

POINTER_BASE = 0xF0000
CONFIGURATION_BASE = POINTER_BASE + 16

OEM_ID, PRODUCT_ID = b"HOSTD   ", b"VIRTUAL PC  "
SPECIFICATION = 4

PROCESSOR, BUS, IO_APIC, IO_INTERRUPT, LOCAL_INTERRUPT = range(5)
INTERRUPT, NMI, EXTINT = 0, 1, 3
ISA_BUS = 0
#: the SCI and the virtio devices are active high, level-triggered; the others conform to the bus
FLAGS = dict.fromkeys((9, *(place.interrupt for place in bank.PLACES)), 0b1101)
#: CPU signature and features; informative, kernels ask CPUID
SIGNATURE, FEATURES = 0x0080_0F12, 0x0000_0201


def build() -> list[tuple[int, bytes]]:
    """The floating pointer (4.1) and the configuration table (4.2), as (guest-physical address, bytes)."""
    pointer = struct.pack("<4sIBBB5x", b"_MP_", CONFIGURATION_BASE, 1, SPECIFICATION, 0)
    return [(POINTER_BASE, _with_checksum(pointer, 10)), (CONFIGURATION_BASE, _configuration())]


def _configuration() -> bytes:
    entries = [
        struct.pack("<BBBBII8x", PROCESSOR, 0, lapic_registers.VERSION_VALUE & 0xFF, 3, SIGNATURE, FEATURES),
        struct.pack("<BB6s", BUS, ISA_BUS, b"ISA   "),
        struct.pack("<BBBBI", IO_APIC, ioapic.IDENTITY, ioapic.VERSION, 1, ioapic.MMIO_BASE),
    ]
    # the 8254 is on input 2, where the cascade would be
    pins = {irq: irq for irq in range(16) if irq != 2} | {0: 2}
    for irq, pin in pins.items():
        entries.append(struct.pack("<BBHBBBB", IO_INTERRUPT, INTERRUPT, FLAGS.get(irq, 0), ISA_BUS, irq,
                                   ioapic.IDENTITY, pin))
    for kind, lint in ((EXTINT, 0), (NMI, 1)):
        entries.append(struct.pack("<BBHBBBB", LOCAL_INTERRUPT, kind, 0, ISA_BUS, 0, 0xFF, lint))
    body = b"".join(entries)
    header = struct.pack("<4sHBB8s12sIHHIHBB", b"PCMP", 44 + len(body), SPECIFICATION, 0, OEM_ID, PRODUCT_ID,
                         0, 0, len(entries), lapic_registers.MMIO_BASE, 0, 0, 0)
    return _with_checksum(header + body, 7)


def _with_checksum(table: bytes, place: int) -> bytes:
    """The table with the byte at `place` making its sum a multiple of 256."""
    return table[:place] + bytes([-sum(table) & 0xFF]) + table[place + 1:]
