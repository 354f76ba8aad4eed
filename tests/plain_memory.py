# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest-physical memory of a few pages, for tests of pure x86 code."""

from __future__ import annotations

from vmm.memory.errors import BadAddress


class PlainMemory:
    """PhysicalMemory over a bytearray starting at address 0."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    def _check(self, gpa: int, n: int) -> None:
        if not 0 <= gpa <= len(self.data) - n:
            raise BadAddress(gpa)

    def read(self, gpa: int, n: int) -> bytes:
        self._check(gpa, n)
        return bytes(self.data[gpa:gpa + n])

    def write(self, gpa: int, data: bytes) -> None:
        self._check(gpa, len(data))
        self.data[gpa:gpa + len(data)] = data

    def read_u32(self, gpa: int) -> int:
        return int.from_bytes(self.read(gpa, 4), "little")

    def read_u64(self, gpa: int) -> int:
        return int.from_bytes(self.read(gpa, 8), "little")

    def write_u32(self, gpa: int, value: int) -> None:
        self.write(gpa, value.to_bytes(4, "little"))

    def write_u64(self, gpa: int, value: int) -> None:
        self.write(gpa, value.to_bytes(8, "little"))
