# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory of the translation cache, mapped twice: writable here, executable there, never both.

    +0          trampolines (one page)
    +4 KiB      exit stubs, 16 bytes each, all alike, written once
    behind      units, up to the end

A stub tells the monitor its number by where it is: `lea r13, [rip]; jmp [r14 + exit]`.
"""

from __future__ import annotations

import os

from vmm.bt.native import memory
from vmm.bt.native.block import OFFSETS
from vmm.bt.native.memory import PAGE

STUB_BYTES = 16
#: bytes of a stub up to the address its `lea` yields
STUB_LEA = 7
STUB = (bytes.fromhex("4C8D2D00000000")                         # lea r13, [rip]
        + bytes.fromhex("41FF66") + bytes([OFFSETS["exit"]])    # jmp [r14 + exit]
        ).ljust(STUB_BYTES, b"\xCC")                            # int3


class Arena:
    """`size` bytes with room for `stubs` exit stubs; `trampolines` is machine code of at most a page."""

    def __init__(self, size: int, stubs: int, trampolines: bytes) -> None:
        units_at = PAGE + -(-stubs * STUB_BYTES // PAGE) * PAGE
        if size % PAGE or size <= units_at:
            raise ValueError(f"an arena of {size} bytes has no room for {stubs} stubs and a page of units")
        self.size = size
        self.stub_count = stubs
        fd = os.memfd_create("hostd-translations", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            self._writable = memory.map_shared(0, size, memory.READ | memory.WRITE, fd, 0)
            #: address of the executable mapping; every address below lies in it
            self.base = memory.map_shared(0, size, memory.EXEC, fd, 0)
        finally:
            os.close(fd)
        self._view = memory.view(self._writable, size)
        self._view[:len(trampolines)] = trampolines
        self._view[PAGE:PAGE + stubs * STUB_BYTES] = STUB * stubs
        self.stubs = self.base + PAGE
        #: what r13 is in stub number 0
        self.origin = self.stubs + STUB_LEA
        self.units = self.base + units_at
        self.units_bytes = size - units_at

    def stub(self, number: int) -> int:
        """Address of an exit stub."""
        return self.stubs + number * STUB_BYTES

    def write(self, address: int, code: bytes) -> None:
        """Put verified code at `address`, among the units.  No guest may be running."""
        offset = address - self.base
        end = offset + len(code)
        if address < self.units or end > self.size:
            raise ValueError(f"{address:#x} is not among the units")
        self._view[offset:end] = code

    def read(self, address: int, length: int) -> bytes:
        """Bytes of the arena."""
        offset = address - self.base
        return bytes(self._view[offset:offset + length])

    def close(self) -> None:
        """Give both mappings back."""
        self._view = memoryview(b"")
        memory.unmap(self._writable, self.size)
        memory.unmap(self.base, self.size)
