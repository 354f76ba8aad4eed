# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's memory as its devices use it: what they write is noted, and pages can be given back."""

from __future__ import annotations

from vmm.memory.frames import FrameSource
from vmm.memory.p2m import P2M
from vmm.memory.p2mbits import FRAME_MASK, KIND_MASK, KIND_SHIFT, Kind
from vmm.memory.physical import GuestMemory
from vmm.memory.pool import PAGE_SHIFT

_PRIVATE, _BALLOONED = Kind.PRIVATE << KIND_SHIFT, Kind.BALLOONED << KIND_SHIFT


class DeviceMemory(GuestMemory):
    """Guest-physical memory for devices.  Who may have translated code from a frame must hear of writes."""

    def __init__(self, p2m: P2M, frames: FrameSource) -> None:
        super().__init__(p2m, frames)
        self._written: set[int] = set()

    def write(self, gpa: int, data: bytes | memoryview) -> None:
        """As GuestMemory's."""
        if len(data):
            self._written.update(range(gpa >> PAGE_SHIFT, (gpa + len(data) - 1 >> PAGE_SHIFT) + 1))
        super().write(gpa, data)

    def take_written(self) -> list[int]:
        """The frames of the pages that were written since the last call."""
        written, self._written = self._written, set()
        entries = [self.p2m.leaf[page] for page in written if page < self.p2m.pages]
        return [(entry & FRAME_MASK) >> PAGE_SHIFT for entry in entries if entry & KIND_MASK == _PRIVATE]


class GivenBack:
    """Pages that a guest gives back to its host, and takes again."""

    def __init__(self, p2m: P2M) -> None:
        self._p2m = p2m

    def discard(self, page: int, ballooned: bool) -> None:
        """As `P2M.discard`."""
        self._p2m.discard(page, ballooned)

    def deflate(self, page: int) -> None:
        """The page is out of the balloon.  Its contents are kept, if the guest has used it since."""
        if self._p2m.leaf[page] & KIND_MASK == _BALLOONED:
            self._p2m.discard(page, False)

    def empty(self) -> None:
        """As `P2M.empty_balloon`."""
        self._p2m.empty_balloon()
