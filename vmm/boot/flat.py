# SPDX-License-Identifier: GPL-2.0-or-later
"""Flat images: a boot sector, and whatever follows it in the file, entered in real mode.

The whole file is loaded at 0x7C00, as a BIOS loads the first sector, and entered with CS:IP 0:7C00, the stack
below the code, DL = 0x80, interrupts off.  There is no BIOS to call: such an image must do with the devices.
"""

from __future__ import annotations

from vmm.boot import entry
from vmm.boot.errors import BootError
from vmm.boot.layout import Layout
from vmm.state import CpuState

_ADDRESS = 0x7C00
_FIRST_DISK = 0x80


def is_flat(file: bytes) -> bool:
    """Whether `file` begins with a boot sector: 55 AA in its last two bytes."""
    return file[510:512] == b"\x55\xaa"


def load(layout: Layout, file: bytes, initrd: bytes | None, append: bytes) -> CpuState:
    """Lay out the image; the state at its first instruction."""
    if initrd is not None or append:
        raise BootError("a flat image takes neither an initrd nor a command line")
    layout.put_usable(_ADDRESS, file, "the flat image")
    return entry.boot_sector(_ADDRESS, _FIRST_DISK)
