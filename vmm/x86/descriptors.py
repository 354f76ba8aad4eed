# SPDX-License-Identifier: GPL-2.0-or-later
"""Segment descriptors, gates and task-state segments (APM vol. 2, chapters 4, 8 and 12).

Descriptors are 8-byte little-endian integers as they lie in the GDT or LDT; long-mode system
descriptors and gates have a second 8-byte half, given separately.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vmm.state import Segment, Table
from vmm.x86.faults import GuestFault, Vector

# `Segment.attributes` bits
TYPE = 0xF
CODE_DATA = 1 << 4  # S: clear for system segments
DPL_SHIFT = 5
DPL = 3 << DPL_SHIFT
PRESENT = 1 << 7
AVAILABLE = 1 << 8
LONG = 1 << 9  # L: 64-bit code
BIG = 1 << 10  # D/B: 32-bit code, stack or limit
GRANULAR = 1 << 11  # G: limit counts 4 KiB units

# bits of the type of code and data segments (with S set)
ACCESSED = 1 << 0
WRITABLE = 1 << 1  # data
EXPAND_DOWN = 1 << 2  # data
READABLE = 1 << 1  # code
CONFORMING = 1 << 2  # code
CODE = 1 << 3

# types of system segments and gates (with S clear); 64-bit ones share the codes of the 32-bit ones
TSS16 = 0x1
LDT = 0x2
TSS16_BUSY = 0x3
CALL_GATE16 = 0x4
TASK_GATE = 0x5
INTERRUPT_GATE16 = 0x6
TRAP_GATE16 = 0x7
TSS32 = 0x9
TSS32_BUSY = 0xB
CALL_GATE32 = 0xC
INTERRUPT_GATE32 = 0xE
TRAP_GATE32 = 0xF

# selectors
RPL = 3
TABLE_INDICATOR = 4  # set: LDT

# task-state segments: where the stack of ring n lies (APM vol. 2, 12.2.3 - 12.2.5)
TSS16_SIZE = 0x2C
TSS32_SIZE = 0x68
TSS_IO_MAP_BASE = 0x66  # u16, in 32-bit and 64-bit TSSs


def tss16_stack(ring: int) -> int:
    """Offset of SPn (u16), followed by SSn (u16)."""
    return 2 + 4 * ring


def tss32_stack(ring: int) -> int:
    """Offset of ESPn (u32), followed by SSn (u16)."""
    return 4 + 8 * ring


def tss64_stack(ring: int) -> int:
    """Offset of RSPn (u64)."""
    return 4 + 8 * ring


def tss64_ist(number: int) -> int:
    """Offset of ISTn (u64), 1 <= n <= 7."""
    return 0x1C + 8 * number


class Gate(NamedTuple):
    """A call, interrupt, trap or task gate."""

    selector: int
    offset: int
    type: int
    dpl: int
    present: bool
    #: interrupt stack table index (long mode), 0 = none
    ist: int = 0


def decode_segment(selector: int, descriptor: int, high: int = 0) -> Segment:
    """The segment register that loading `descriptor` gives.

    `high` is the second half of a long-mode LDT or TSS descriptor: bits 63:32 of its base.
    """
    attributes = (descriptor >> 40 & 0xFF) | (descriptor >> 52 & 0xF) << 8
    limit = (descriptor & 0xFFFF) | (descriptor >> 48 & 0xF) << 16
    if attributes & GRANULAR:
        limit = limit << 12 | 0xFFF
    base = (descriptor >> 16 & 0xFFFFFF) | (descriptor >> 56 & 0xFF) << 24 | (high & 0xFFFFFFFF) << 32
    return Segment(selector, attributes, limit, base)


def encode_segment(segment: Segment) -> int:
    """The low 8 bytes of a descriptor for `segment` (its inverse as far as 20 bits of limit reach)."""
    limit = segment.limit >> 12 if segment.attributes & GRANULAR else segment.limit
    return ((limit & 0xFFFF) | (segment.base & 0xFFFFFF) << 16 | (segment.attributes & 0xFF) << 40
            | (limit >> 16 & 0xF) << 48 | (segment.attributes >> 8 & 0xF) << 52
            | (segment.base >> 24 & 0xFF) << 56)


def decode_gate(descriptor: int) -> Gate:
    """A legacy-mode gate."""
    kind = descriptor >> 40 & 0x1F
    offset = descriptor & 0xFFFF
    if kind in (CALL_GATE32, INTERRUPT_GATE32, TRAP_GATE32):
        offset |= descriptor >> 32 & 0xFFFF0000
    return Gate(descriptor >> 16 & 0xFFFF, offset, kind, descriptor >> 45 & 3, bool(descriptor >> 47 & 1))


def decode_gate64(descriptor: int, high: int) -> Gate:
    """A long-mode gate: two halves, 64 bits of offset, an IST index."""
    offset = (descriptor & 0xFFFF) | (descriptor >> 32 & 0xFFFF0000) | (high & 0xFFFFFFFF) << 32
    return Gate(descriptor >> 16 & 0xFFFF, offset, descriptor >> 40 & 0x1F, descriptor >> 45 & 3,
                bool(descriptor >> 47 & 1), descriptor >> 32 & 7)


def dpl(attributes: int) -> int:
    return attributes >> DPL_SHIFT & 3


def is_code(attributes: int) -> bool:
    return attributes & (CODE_DATA | CODE) == CODE_DATA | CODE


def is_conforming(attributes: int) -> bool:
    """For code segments."""
    return bool(attributes & CONFORMING)


def is_writable_data(attributes: int) -> bool:
    return attributes & (CODE_DATA | CODE | WRITABLE) == CODE_DATA | WRITABLE


def is_null(selector: int) -> bool:
    return selector & ~RPL == 0


def locate(selector: int, gdtr: Table, ldtr: Segment, vector: int = Vector.GP, size: int = 8,
           external: int = 0) -> int:
    """Linear address of the descriptor `selector` names.

    Raises `vector` with the selector's error code (`external` is its EXT bit) when the selector points
    beyond its table or into an LDT that is not there.  `size` is 16 for long-mode system descriptors.
    """
    offset = selector & 0xFFF8
    if selector & TABLE_INDICATOR:
        usable = ldtr.attributes & PRESENT and not is_null(ldtr.selector)
        base, limit = ldtr.base, ldtr.limit if usable else -1
    else:
        base, limit = gdtr.base, gdtr.limit
    if offset + size - 1 > limit:
        raise GuestFault(vector, selector & 0xFFFC | external)
    return base + offset


def io_permitted(tr: Segment, port: int, size: int, read_linear: Callable[[int, int], bytes]) -> bool:
    """Whether the I/O permission map of the task allows `size` bytes at `port` (APM vol. 2, 12.2.4).

    To be asked when CPL > IOPL or in virtual-8086 mode.  Two bytes of the map are always read,
    both within the TSS limit; only 32-bit and 64-bit TSSs have a map.
    """
    if tr.attributes & (TYPE & ~2) != TSS32 or tr.limit < TSS_IO_MAP_BASE + 1:
        return False
    at = int.from_bytes(read_linear(tr.base + TSS_IO_MAP_BASE, 2), "little") + (port >> 3)
    if at + 1 > tr.limit:
        return False
    bits = int.from_bytes(read_linear(tr.base + at, 2), "little") >> (port & 7)
    return not bits & ((1 << size) - 1)
