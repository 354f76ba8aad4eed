# SPDX-License-Identifier: GPL-2.0-or-later
"""The ACPI tables that describe the board (ACPI 6.4, chapter 5), and the MP table for older kernels.

All of it stands in the BIOS area below 1 MiB, which the memory map reserves.
"""

from __future__ import annotations

import struct

from vmm.devices import acpi_pm, aml, ioapic, lapic_registers, mp_table
from vmm.devices.rtc import CENTURY
from vmm.devices.virtio import bank
from vmm.devices.virtio.mmio import WINDOW_BYTES

TABLES_BASE = 0xE0000
SCI_INTERRUPT = 9

OEM_ID, TABLE_ID, CREATOR_ID = b"HOSTD ", b"HOSTDVM ", b"HSTD"

#: interrupt source override flags: active high, level-triggered
ACTIVE_HIGH_LEVEL = 0b1101

# FADT flags: WBINVD works, HLT is C1, no sleep button, 32-bit PM timer, reset register
FADT_FLAGS = 1 << 0 | 1 << 2 | 1 << 5 | 1 << 8 | 1 << 10
# IA-PC boot architecture: legacy devices, no VGA, no MSI, no ASPM; an 8042 is not promised, since no
# keyboard is there and probing for one takes time
BOOT_ARCHITECTURE = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 4
#: latencies that say: no C2, no C3
NO_C2, NO_C3 = 101, 1001
ENTERPRISE_SERVER = 4


def build(memory_bytes: int) -> list[tuple[int, bytes]]:
    """All tables, as (guest-physical address, bytes).  Raises ValueError if memory ends below them."""
    if memory_bytes < 1 << 20:
        raise ValueError("a machine with firmware tables needs at least 1 MiB of memory")
    placed: list[tuple[int, bytes]] = []
    place = TABLES_BASE + 0x40

    def put(table: bytes) -> int:
        nonlocal place
        address = place
        placed.append((address, table))
        place = address + len(table) + 63 & ~63
        return address

    facs = put(_facs())
    dsdt = put(_table(b"DSDT", 2, _dsdt()))
    fadt = put(_table(b"FACP", 6, _fadt(facs, dsdt)))
    madt = put(_table(b"APIC", 5, _madt()))
    rsdt = put(_table(b"RSDT", 1, struct.pack("<II", fadt, madt)))
    xsdt = put(_table(b"XSDT", 1, struct.pack("<QQ", fadt, madt)))
    return [(TABLES_BASE, _rsdp(rsdt, xsdt)), *placed, *mp_table.build()]


def checksum(data: bytes) -> int:
    """The byte that makes the sum of all bytes a multiple of 256."""
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A table with its 36-byte header (5.2.6)."""
    header = struct.pack("<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, OEM_ID, TABLE_ID, 1,
                         CREATOR_ID, 1)
    return header[:9] + bytes([checksum(header + body)]) + header[10:] + body


def _rsdp(rsdt: int, xsdt: int) -> bytes:
    """Root system description pointer, revision 2 (5.2.5.3): a checksum over 20 bytes, one over all 36."""
    first = struct.pack("<8sB6sBI", b"RSD PTR ", 0, OEM_ID, 2, rsdt)
    first = first[:8] + bytes([checksum(first)]) + first[9:]
    second = struct.pack("<IQB3x", 36, xsdt, 0)
    return first + second[:12] + bytes([checksum(first + second)]) + second[13:]


def _facs() -> bytes:
    """Firmware ACPI control structure (5.2.10); no waking vector is ever used."""
    return struct.pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2)


def _io_register(port: int, bits: int, access: int) -> bytes:
    """Generic address structure of a port (5.2.3.2); access 1 byte, 2 word, 3 dword."""
    return struct.pack("<BBBBQ", 1, bits, 0, access, port)


def _fadt(facs: int, dsdt: int) -> bytes:
    """Fixed ACPI description table, revision 6.4 (5.2.9)."""
    event, control, timer = (acpi_pm.PM_BASE + offset for offset in
                             (acpi_pm.STATUS, acpi_pm.CONTROL, acpi_pm.TIMER))
    none = bytes(12)
    return b"".join((
        struct.pack("<IIBBHIBBBB", facs, dsdt, 0, ENTERPRISE_SERVER, SCI_INTERRUPT, 0, 0, 0, 0, 0),
        # PM1a/b event, PM1a/b control, PM2 control, timer, GPE0/1 blocks, then their lengths
        struct.pack("<8I", event, 0, control, 0, 0, timer, 0, 0),
        struct.pack("<8B", 4, 2, 0, 4, 0, 0, 0, 0),
        struct.pack("<HHHHBB", NO_C2, NO_C3, 0, 0, 0, 0),
        # alarm day and month: none; century; boot architecture; flags
        struct.pack("<BBBHBI", 0, 0, CENTURY, BOOT_ARCHITECTURE, 0, FADT_FLAGS),
        _io_register(acpi_pm.RESET_PORT, 8, 1), bytes([acpi_pm.RESET_VALUE]),
        # ARM boot architecture, minor version; X_FIRMWARE_CTRL stays 0 as FIRMWARE_CTRL is given
        struct.pack("<HBQQ", 0, 4, 0, dsdt),
        _io_register(event, 32, 2), none, _io_register(control, 16, 2), none, none,
        _io_register(timer, 32, 3), none, none,
        # sleep control and status, hypervisor vendor
        none, none, bytes(8),
    ))


def _madt() -> bytes:
    """Multiple APIC description table (5.2.12)."""
    return b"".join((
        # a dual-8259 setup exists too
        struct.pack("<II", lapic_registers.MMIO_BASE, 1),
        struct.pack("<BBBBI", 0, 8, 0, 0, 1),
        struct.pack("<BBBBII", 1, 12, ioapic.IDENTITY, 0, ioapic.MMIO_BASE, 0),
        struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0),
        struct.pack("<BBBBIH", 2, 10, 0, SCI_INTERRUPT, SCI_INTERRUPT, ACTIVE_HIGH_LEVEL),
        # LINT1 of all processors is NMI
        struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1),
    ))


def _dsdt() -> bytes:
    """\\_S5, the legacy devices with interrupts, and the virtio devices."""
    s5 = aml.integer(acpi_pm.S5_TYPE)
    return b"".join((
        aml.name(b"_S5_", aml.package(s5, s5, aml.integer(0), aml.integer(0))),
        aml.scope(
            b"\\_SB_",
            aml.device(
                b"COM1",
                aml.name(b"_HID", aml.eisa_id("PNP0501")),
                aml.name(b"_UID", aml.integer(1)),
                aml.name(b"_CRS", aml.resources(aml.io(0x3F8, 8), aml.irq(4))),
            ),
            aml.device(
                b"RTC_",
                aml.name(b"_HID", aml.eisa_id("PNP0B00")),
                aml.name(b"_CRS", aml.resources(aml.io(0x70, 2), aml.irq(8))),
            ),
            *(_virtio(number, place) for number, place in enumerate(bank.PLACES)),
        ),
    ))


def _virtio(number: int, place: bank.Place) -> bytes:
    """A virtio-mmio device, by the identifier that kernels look for."""
    window, interrupt = aml.memory(place.base, WINDOW_BYTES), aml.interrupt(place.interrupt)
    return aml.device(
        b"VIR%d" % number,
        aml.name(b"_HID", aml.string("LNRO0005")),
        aml.name(b"_UID", aml.integer(number)),
        aml.name(b"_CRS", aml.resources(window, interrupt)),
    )
