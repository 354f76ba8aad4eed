# SPDX-License-Identifier: GPL-2.0-or-later
"""The I/O APIC: 24 inputs, each with a 64-bit redirection entry (Intel 82093AA data sheet, order 290566).

Inputs are "asserted" or not; the polarity bit is stored and has no effect, since devices here drive
asserted levels whatever their polarity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from vmm.devices.saved import BYTE, QWORD, Kinds, Saved, bits, list_of

MMIO_BASE = 0xFEC0_0000
MMIO_LENGTH = 0x20
PINS = 24
IDENTITY = 1
VERSION = 0x11

SELECT, WINDOW = 0x00, 0x10
REGISTER_ID, REGISTER_VERSION, REGISTER_ARBITRATION, FIRST_REDIRECTION = 0x00, 0x01, 0x02, 0x10

LOGICAL = 1 << 11
REMOTE_IRR = 1 << 14
LEVEL = 1 << 15
MASKED = 1 << 16
#: bits of an entry a guest can write; delivery status is never set here, deliveries take no time
WRITABLE = 0xFF00_0000_0001_AFFF

#: destination, logical?, delivery mode, vector, level? -> accepted
Deliver = Callable[[int, bool, int, int, bool], bool]


class IoApic(Saved):
    """The redirection table and its two-register window."""

    sizes = frozenset({1, 4})
    __slots__ = ("_deliver", "entries", "identity", "lines", "select")

    SAVED: ClassVar[Kinds] = {
        "select": BYTE, "identity": bits(0x0F00_0000), "lines": bits((1 << PINS) - 1),
        "entries": list_of(QWORD, PINS),
    }

    def __init__(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self.select = 0
        #: not 0, the local APIC's; firmware would have written it
        self.identity = IDENTITY << 24
        self.lines = 0
        self.entries = [MASKED] * PINS

    def set_line(self, pin: int, level: bool) -> None:
        """Assert or release an input.  An edge at a masked input is lost (82093AA, 3.2.4)."""
        bit = 1 << pin
        if level:
            if self.lines & bit:
                return
            self.lines |= bit
            if not self.entries[pin] & MASKED:
                self._send(pin)
        else:
            self.lines &= ~bit

    def end_of_interrupt(self, vector: int) -> None:
        """The local APIC's EOI of a level interrupt; inputs still asserted are delivered again."""
        for pin, entry in enumerate(self.entries):
            if entry & REMOTE_IRR and entry & 0xFF == vector:
                self.entries[pin] = entry & ~REMOTE_IRR
                self._offer_level(pin)

    def read(self, offset: int, size: int) -> int:
        """The register select, or the register it selects."""
        if offset & ~3 == SELECT:
            value = self.select
        elif offset & ~3 == WINDOW:
            value = self._read_register(self.select)
        else:
            value = 0
        return value if size == 4 else value >> 8 * (offset & 3) & 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        """Select a register (8 bits of it are enough), or write the selected one (only as 32 bits)."""
        if offset == SELECT:
            self.select = value & 0xFF
        elif offset == WINDOW and size == 4:
            self._write_register(self.select, value)

    def _read_register(self, register: int) -> int:
        if register >= FIRST_REDIRECTION:
            pin, high = divmod(register - FIRST_REDIRECTION, 2)
            return self.entries[pin] >> 32 * high & 0xFFFF_FFFF if pin < PINS else 0
        if register in (REGISTER_ID, REGISTER_ARBITRATION):
            return self.identity
        return (PINS - 1) << 16 | VERSION if register == REGISTER_VERSION else 0

    def _write_register(self, register: int, value: int) -> None:
        if register == REGISTER_ID:
            self.identity = value & 0x0F00_0000
        pin, high = divmod(register - FIRST_REDIRECTION, 2)
        if not 0 <= pin < PINS:
            return
        entry = self.entries[pin]
        if high:
            entry = value << 32 & WRITABLE | entry & 0xFFFF_FFFF
        else:
            entry = value & WRITABLE | entry & ~(WRITABLE & 0xFFFF_FFFF)
            if not entry & LEVEL:
                # the only way to drop a remote IRR without an EOI; kernels rely on it
                entry &= ~REMOTE_IRR
        self.entries[pin] = entry
        self._offer_level(pin)

    def _offer_level(self, pin: int) -> None:
        entry = self.entries[pin]
        if self.lines >> pin & 1 and entry & LEVEL and not entry & MASKED:
            self._send(pin)

    def _send(self, pin: int) -> None:
        entry = self.entries[pin]
        if entry & REMOTE_IRR:
            return
        level = bool(entry & LEVEL)
        accepted = self._deliver(entry >> 56, bool(entry & LOGICAL), entry >> 8 & 7, entry & 0xFF, level)
        if accepted and level:
            self.entries[pin] |= REMOTE_IRR
