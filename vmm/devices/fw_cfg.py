# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's firmware configuration ports 0x510 and 0x511, as far as kernels without firmware need them.

kvm-unit-tests' kernels ask here for the number of processors and the memory size (QEMU's docs/specs/fw_cfg).
A 16-bit write to 0x510 selects an item; byte reads of 0x511 give it, then zeros.
"""

from __future__ import annotations

from typing import ClassVar

from vmm.devices.bus import BYTES_AND_WORDS
from vmm.devices.saved import WORD, Kinds, Saved, between

SIGNATURE, IDENTITY, RAM_SIZE, CPU_COUNT, MOST_CPUS = 0x00, 0x01, 0x03, 0x05, 0x0F
LONGEST_ITEM = 8


class FirmwareConfiguration(Saved):
    """The selector and the data port."""

    sizes = BYTES_AND_WORDS
    __slots__ = ("_items", "position", "selected")

    SAVED: ClassVar[Kinds] = {"selected": WORD, "position": between(0, LONGEST_ITEM)}

    def __init__(self, memory_bytes: int) -> None:
        self._items = {
            SIGNATURE: b"QEMU",
            # the interface without DMA
            IDENTITY: (1).to_bytes(4, "little"),
            RAM_SIZE: memory_bytes.to_bytes(8, "little"),
            CPU_COUNT: (1).to_bytes(2, "little"),
            MOST_CPUS: (1).to_bytes(2, "little"),
        }
        self.selected = 0
        self.position = 0

    def read(self, offset: int, size: int) -> int:
        """The next byte of the item; the selector cannot be read."""
        if (offset, size) != (1, 1):
            return (1 << 8 * size) - 1
        item = self._items.get(self.selected, b"")
        if self.position >= len(item):
            return 0
        self.position += 1
        return item[self.position - 1]

    def write(self, offset: int, size: int, value: int) -> None:
        """Select an item."""
        if (offset, size) == (0, 2):
            self.selected = value
            self.position = 0
