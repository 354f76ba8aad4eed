# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's linear memory for its monitor, found where translated code would find it.

What a view shows was found in the guest's page tables and is what a TLB may still hold; so an access to a
page that is shown, and writable if it is written, needs no walk.  Everything else goes the general way.
"""

from __future__ import annotations

from vmm.bt.shadow import Shadow
from vmm.hw.linear import Linear
from vmm.memory.physical import GuestMemory
from vmm.x86.paging import Access


class ShadowLinear(Linear):
    """Accesses to the memory of the guest whose views are in `shadow`."""

    def __init__(self, q: memoryview, memory: GuestMemory, shadow: Shadow) -> None:
        super().__init__(q, memory)
        self._shadow = shadow

    def machine(self, address: int, write: bool) -> int:
        """Machine address of one byte for the supervisor, or -1 where it is an absent page only read."""
        shown = self._shadow.supervisor.window.pages.get(address >> 12)
        if shown is not None and (not write or shown & 1):
            return shown >> 1 << 12 | address & 0xFFF
        return super().machine(address, write)

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes at a linear address, for the supervisor."""
        if address & 0xFFF <= 0x1000 - size:
            place = self.machine(address, False)
            return bytes(size) if place < 0 else bytes(self.view[place:place + size])
        return super().read(address, size)

    def load(self, address: int, size: int, user: bool) -> int:
        """A little-endian value, read with the privilege of the guest's code."""
        shown = self._shadow.view(user).window.pages.get(address >> 12)
        if shown is not None and address & 0xFFF <= 0x1000 - size:
            place = shown >> 1 << 12 | address & 0xFFF
            return int.from_bytes(self.view[place:place + size], "little")
        return int.from_bytes(self.general().read(address, size, Access(user=user)), "little")

    def store(self, address: int, size: int, value: int, user: bool) -> None:
        """A little-endian value, written with the privilege of the guest's code."""
        shown = self._shadow.view(user).window.pages.get(address >> 12)
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        if shown is not None and shown & 1 and address & 0xFFF <= 0x1000 - size:
            place = shown >> 1 << 12 | address & 0xFFF
            self.view[place:place + size] = data
        else:
            self.general().write(address, data, Access(write=True, user=user))
