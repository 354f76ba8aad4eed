# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest memory while it is being filled for a boot: what goes where, without overlaps."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import TypeAlias

from vmm.boot import e820
from vmm.boot.errors import BootError

Data: TypeAlias = bytes | memoryview
Write: TypeAlias = tuple[int, Data]

#: the interrupt vectors and the BIOS data area; never given to anything of ours
_BIOS_END = 0x1000


class Layout:
    """Collects the writes of a boot image.

    Invariant: claims are disjoint, inside the machine's memory, and in ascending order; every write lies
    in a claim of its own, so no two writes touch the same byte.
    """

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self.regions = e820.regions(memory_bytes)
        self.writes: list[Write] = []
        self._claims: list[tuple[int, int, str]] = []

    def claim(self, start: int, size: int, what: str) -> None:
        """Keep [start, start + size) for `what`, also outside of what a guest may use as RAM."""
        end = start + size
        if start < 0 or end > self.memory_bytes:
            raise BootError(f"{what} needs memory {start:#x}-{end:#x}, and the machine has only "
                            f"{self.memory_bytes >> 20} MiB")
        if size == 0:
            return
        at = bisect_left(self._claims, (start, end, ""))
        for other_start, other_end, other in self._claims[max(at - 1, 0) : at + 1]:
            if other_start < end and start < other_end:
                raise BootError(f"{what} at {start:#x}-{end:#x} overlaps {other} at "
                                f"{other_start:#x}-{other_end:#x}")
        self._claims.insert(at, (start, end, what))

    def put(self, start: int, data: Data, what: str, size: int = 0) -> None:
        """Write `data` at `start`; claim `size` bytes if that is more (the rest stays zero, as RAM is)."""
        self.claim(start, max(size, len(data)), what)
        if len(data):
            self.writes.append((start, data))

    def put_usable(self, start: int, data: Data, what: str, size: int = 0) -> None:
        """The same, but only in RAM that the memory map gives to the guest."""
        end = start + max(size, len(data))
        if end > e820.LOW_END and start < e820.HIGH_START:
            raise BootError(f"{what} at {start:#x}-{end:#x} lies in the memory hole below 1 MiB")
        self.put(start, data, what, size)

    def reserve_low(self, size: int, what: str, align: int = 16) -> int:
        """Claim the first gap of conventional memory that has `size` bytes; return its address."""
        return self._claim_first(_BIOS_END, e820.LOW_END, size, what, align)

    def place_low(self, data: Data, what: str, align: int = 16) -> int:
        """Write `data` in the first gap of conventional memory; return its address."""
        start = self.reserve_low(len(data), what, align)
        self.writes.append((start, data))
        return start

    def place_after(self, data: Data, what: str, align: int = 4096) -> int:
        """Write `data` above 1 MiB and everything claimed so far; return its address."""
        last = max((end for _, end, _ in self._claims), default=0)
        start = self._claim_first(max(last, e820.HIGH_START), self.memory_bytes, len(data), what, align)
        self.writes.append((start, data))
        return start

    def place_high(self, data: Data, what: str, limit: int, align: int = 4096) -> int:
        """Write `data` as high as possible above 1 MiB and below `limit`; return its address."""
        end = min(limit, self.memory_bytes)
        for claim_start, claim_end, _ in [*reversed(self._claims), (0, e820.HIGH_START, "")]:
            start = (end - len(data)) // align * align
            if start >= max(claim_end, e820.HIGH_START):
                self.put(start, data, what)
                return start
            end = min(end, claim_start)
        raise self._no_room(len(data), what, limit)

    def _claim_first(self, low: int, high: int, size: int, what: str, align: int) -> int:
        start = -(-low // align) * align
        for claim_start, claim_end, _ in self._claims:
            if claim_end <= start:
                continue
            if start + size <= claim_start:
                break
            start = -(-claim_end // align) * align
        if start + size > high:
            raise self._no_room(size, what, high)
        self.claim(start, size, what)
        return start

    def _no_room(self, size: int, what: str, limit: int) -> BootError:
        return BootError(f"{what} of {size} bytes does not fit below {limit:#x} beside the kernel "
                         f"in {self.memory_bytes >> 20} MiB of memory")


def put_all(layout: Layout, writes: Iterable[Write], what: str) -> None:
    """Claim and write each of `writes`, which somebody else laid out."""
    for start, data in writes:
        layout.put(start, data, what)
