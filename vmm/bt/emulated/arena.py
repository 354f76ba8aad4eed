# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory of the translation cache: read-only and executable for translated code, written from outside.

Laid out as that of the host's processor: a page of trampolines, the exit stubs, the units.
"""

from __future__ import annotations

import ctypes
import mmap

from vmm.bt.native.arena import STUB, STUB_BYTES, STUB_LEA
from vmm.memory.pool import PAGE


class Arena:
    """`size` bytes with room for `stubs` exit stubs, seen by translated code from `base` on.

    `changed` collects the ranges written since the processor was last told to forget translations of them.
    """

    def __init__(self, size: int, stubs: int, trampolines: bytes, base: int) -> None:
        units_at = PAGE + -(-stubs * STUB_BYTES // PAGE) * PAGE
        if size % PAGE or size <= units_at:
            raise ValueError(f"an arena of {size} bytes has no room for {stubs} stubs and a page of units")
        self.size = size
        self.stub_count = stubs
        self.base = base
        self._memory = mmap.mmap(-1, size)
        #: where the bytes are in this process
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._view = memoryview(self._memory)
        self._view[:len(trampolines)] = trampolines
        self._view[PAGE:PAGE + stubs * STUB_BYTES] = STUB * stubs
        self.stubs = base + PAGE
        #: what r13 is in stub number 0
        self.origin = self.stubs + STUB_LEA
        self.units = base + units_at
        self.units_bytes = size - units_at
        self.changed: list[tuple[int, int]] = []

    def stub(self, number: int) -> int:
        """Address of an exit stub."""
        return self.stubs + number * STUB_BYTES

    def write(self, address: int, code: bytes) -> None:
        """Put verified code at `address`, among the units."""
        offset, end = address - self.base, address + len(code)
        if not self.units <= address <= end <= self.base + self.size:
            raise ValueError(f"{address:#x} is not among the units")
        self._view[offset:offset + len(code)] = code
        self.changed.append((address, end))

    def read(self, address: int, length: int) -> bytes:
        """Bytes of the arena."""
        offset = address - self.base
        return bytes(self._view[offset:offset + length])

    def close(self) -> None:
        """Nothing is read or written any more; the memory goes with the arena and its processor."""
        self._view = memoryview(b"")
