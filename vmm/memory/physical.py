# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's physical memory as the monitor reads and writes it, and the contract pure x86 code knows."""

from __future__ import annotations

from typing import Protocol

from vmm.memory.frames import FrameSource
from vmm.memory.p2m import P2M
from vmm.memory.pool import PAGE


class PhysicalMemory(Protocol):
    """Guest-physical memory, little endian.  Every access raises BadAddress where there is no RAM."""

    def read(self, gpa: int, n: int) -> bytes: ...
    def write(self, gpa: int, data: bytes) -> None: ...
    def read_u32(self, gpa: int) -> int: ...
    def read_u64(self, gpa: int) -> int: ...
    def write_u32(self, gpa: int, value: int) -> None: ...
    def write_u64(self, gpa: int, value: int) -> None: ...


class GuestMemory:
    """PhysicalMemory over a P2M: absent pages read as zero, writes bring frames and break shares.

    Raises OutOfFrames when a frame is needed and none is in stock.
    """

    def __init__(self, p2m: P2M, frames: FrameSource) -> None:
        self.p2m = p2m
        self.frames = frames
        self._view = p2m.pool.view

    def read(self, gpa: int, n: int) -> bytes:
        """`n` bytes from `gpa`."""
        parts = []
        while n > 0:
            chunk = min(n, PAGE - (gpa & 0xFFF))
            at = self.p2m.for_read(gpa, self.frames)
            parts.append(bytes(chunk) if at < 0 else bytes(self._view[at:at + chunk]))
            gpa += chunk
            n -= chunk
        return b"".join(parts)

    def write(self, gpa: int, data: bytes | memoryview) -> None:
        """Store `data` at `gpa`."""
        data = memoryview(data)
        done = 0
        while done < len(data):
            chunk = min(len(data) - done, PAGE - (gpa & 0xFFF))
            at = self.p2m.for_write(gpa, self.frames)
            self._view[at:at + chunk] = data[done:done + chunk]
            gpa += chunk
            done += chunk

    def read_u32(self, gpa: int) -> int:
        """The doubleword at `gpa`."""
        return int.from_bytes(self.read(gpa, 4), "little")

    def read_u64(self, gpa: int) -> int:
        """The quadword at `gpa`."""
        return int.from_bytes(self.read(gpa, 8), "little")

    def write_u32(self, gpa: int, value: int) -> None:
        """Store a doubleword at `gpa`."""
        self.write(gpa, value.to_bytes(4, "little"))

    def write_u64(self, gpa: int, value: int) -> None:
        """Store a quadword at `gpa`."""
        self.write(gpa, value.to_bytes(8, "little"))
