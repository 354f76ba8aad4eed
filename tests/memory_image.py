# SPDX-License-Identifier: GPL-2.0-or-later
"""A boot image as the guest would find it in memory."""

from __future__ import annotations

from vmm.boot import BootImage


class Memory:
    """Reads from the writes of a boot image; what is not written is zero."""

    def __init__(self, image: BootImage) -> None:
        self._writes = image.writes

    def read(self, address: int, size: int) -> bytes:
        out = bytearray(size)
        for start, data in self._writes:
            first, last = max(start, address), min(start + len(data), address + size)
            if first < last:
                out[first - address : last - address] = data[first - start : last - start]
        return bytes(out)

    def u32(self, address: int) -> int:
        return int.from_bytes(self.read(address, 4), "little")

    def u64(self, address: int) -> int:
        return int.from_bytes(self.read(address, 8), "little")

    def string(self, address: int) -> bytes:
        return self.read(address, 4096).split(b"\0")[0]
