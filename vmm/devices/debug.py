# SPDX-License-Identifier: GPL-2.0-or-later
"""Ports for kernels made for testing: QEMU's isa-debug-exit and pc-testdev, and the POST code port.

kvm-unit-tests' flat kernels use them: 0xf4 ends the run, 0xe0-0xe3 are memory for tests of I/O
instructions (0xe8-0xeb the same by bytes), 0xe4 takes a page address to drop, and 0x2000+n drives
interrupt line n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from vmm.devices.bus import BYTES, BYTES_TO_DWORDS
from vmm.devices.saved import DWORD, Kinds, Saved


class DebugExit:
    """Port 0xf4: writing v ends the machine with status v << 1 | 1."""

    sizes = BYTES_TO_DWORDS

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        self._on_exit = on_exit

    def read(self, offset: int, size: int) -> int:
        """Nothing to read."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """End the machine."""
        self._on_exit(value << 1 | 1)


class PortMemory(Saved):
    """Four bytes of port memory."""

    sizes = BYTES_TO_DWORDS
    __slots__ = ("data",)

    SAVED: ClassVar[Kinds] = {"data": DWORD}

    def __init__(self) -> None:
        self.data = 0

    def read(self, offset: int, size: int) -> int:
        """What was written."""
        return self.data >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Keep it."""
        mask = (1 << 8 * size) - 1 << 8 * offset
        self.data = self.data & ~mask | value << 8 * offset


class Sink:
    """Ports that take anything and do nothing: the POST code at 0x80 (Linux writes there to wait), and
    pc-testdev's 0xe4, which drops a host mapping of a page: here nested tables see to that."""

    sizes = BYTES_TO_DWORDS

    def read(self, offset: int, size: int) -> int:
        """All ones, as if nobody were here."""
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Done."""


class LinePorts:
    """Ports 0x2000+n: the level of interrupt line n.  A line no device can drive is None."""

    sizes = BYTES

    def __init__(self, lines: Sequence[Callable[[bool], None] | None]) -> None:
        self._lines = lines

    def read(self, offset: int, size: int) -> int:
        """Nothing to read."""
        return 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        """Drive the line."""
        line = self._lines[offset]
        if line is not None:
            line(value != 0)
