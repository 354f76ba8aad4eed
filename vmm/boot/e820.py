# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory map of a guest, as the BIOS call E820 would report it.

Guest memory is one run of RAM from address 0.  The PC's first megabyte has its hole: what the EBDA, the
video memory and the ROMs would occupy is not for the guest to use; the firmware tables (ACPI, MP) lie there.
"""

from __future__ import annotations

from typing import NamedTuple

from vmm.boot.errors import BootError

RAM = 1
RESERVED = 2

#: end of conventional memory: 639 KiB, the last of 640 is the EBDA
LOW_END = 0x9FC00
#: the ROM area, where firmware tables are found by scanning
FIRMWARE_START = 0xE0000
HIGH_START = 0x100000

MEMORY_MIN = 1 << 20
#: above are the I/O APIC, the local APIC and the reset vector; this board has no memory over 4 GiB
MEMORY_MAX = 3 << 30


class Region(NamedTuple):
    start: int
    size: int
    kind: int

    @property
    def end(self) -> int:
        return self.start + self.size


def regions(memory_bytes: int) -> list[Region]:
    """The map of a machine with that much memory, ascending.  Raises BootError for an impossible size."""
    if not MEMORY_MIN <= memory_bytes <= MEMORY_MAX or memory_bytes % 4096:
        raise BootError(f"a machine cannot have {memory_bytes} bytes of memory: "
                        f"whole pages from {MEMORY_MIN >> 20} MiB to {MEMORY_MAX >> 30} GiB are possible")
    everything = [
        Region(0, LOW_END, RAM),
        Region(LOW_END, 0xA0000 - LOW_END, RESERVED),
        Region(FIRMWARE_START, HIGH_START - FIRMWARE_START, RESERVED),
        Region(HIGH_START, memory_bytes - HIGH_START, RAM),
    ]
    return [region for region in everything if region.size]
