# SPDX-License-Identifier: GPL-2.0-or-later
"""Just enough of an AML assembler for the DSDT (ACPI 6.4, chapter 20; resources: chapter 6.4)."""

from __future__ import annotations

import struct

ZERO_OP, NAME_OP, BYTE_PREFIX, DWORD_PREFIX, STRING_PREFIX = b"\x00", b"\x08", b"\x0a", b"\x0c", b"\x0d"
SCOPE_OP, BUFFER_OP, PACKAGE_OP, DEVICE_OP = b"\x10", b"\x11", b"\x12", b"\x5b\x82"


def _sized(body: bytes) -> bytes:
    """The body behind its PkgLength, which counts itself: one byte below 64, else two."""
    if len(body) + 1 < 0x40:
        return bytes([len(body) + 1]) + body
    length = len(body) + 2
    return bytes([0x40 | length & 0xF, length >> 4]) + body


def integer(value: int) -> bytes:
    """A constant of up to 32 bits."""
    if value == 0:
        return ZERO_OP
    return BYTE_PREFIX + bytes([value]) if value < 0x100 else DWORD_PREFIX + struct.pack("<I", value)


def string(text: str) -> bytes:
    """A constant of ASCII characters."""
    return STRING_PREFIX + text.encode("ascii") + b"\0"


def name(segment: bytes, value: bytes) -> bytes:
    """Name (segment, value)."""
    return NAME_OP + segment + value


def package(*elements: bytes) -> bytes:
    """Package () {...}."""
    return PACKAGE_OP + _sized(bytes([len(elements)]) + b"".join(elements))


def scope(path: bytes, *terms: bytes) -> bytes:
    """Scope (path) {...}."""
    return SCOPE_OP + _sized(path + b"".join(terms))


def device(segment: bytes, *terms: bytes) -> bytes:
    """Device (segment) {...}."""
    return DEVICE_OP + _sized(segment + b"".join(terms))


def eisa_id(text: str) -> bytes:
    """EisaId ("PNP0501"): three compressed letters and four hexadecimal digits, big endian."""
    letters = 0
    for letter in text[:3]:
        letters = letters << 5 | ord(letter) - 0x40
    return DWORD_PREFIX + struct.pack(">HH", letters, int(text[3:], 16))


def resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate () {...}: a buffer of descriptors and an end tag without checksum."""
    template = b"".join(descriptors) + b"\x79\x00"
    return BUFFER_OP + _sized(integer(len(template)) + template)


def io(base: int, length: int) -> bytes:
    """IO (Decode16, base, base, 1, length)."""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, length)


def irq(line: int) -> bytes:
    """IRQNoFlags () {line}: edge-triggered, active high."""
    return struct.pack("<BH", 0x22, 1 << line)


def memory(base: int, length: int) -> bytes:
    """Memory32Fixed (ReadWrite, base, length)."""
    return struct.pack("<BHBII", 0x86, 9, 1, base, length)


def interrupt(line: int) -> bytes:
    """Interrupt (ResourceConsumer, Level, ActiveHigh, Exclusive) {line}."""
    return struct.pack("<BHBBI", 0x89, 6, 1, 1, line)
