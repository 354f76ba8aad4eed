# SPDX-License-Identifier: GPL-2.0-or-later
"""Counters of a VM, kept in its block of the pool.

The worker that runs the guest adds; the daemon reads whenever it likes, without asking, and can still read
them after the worker died.  Each counter is one aligned quadword, written by one process at a time.
"""

from __future__ import annotations

SLOTS = 256
#: exit codes from 0x400 up (nested page fault ...) follow the intercepts below 0xF0
_HIGH_SLOT = 0xF0
_HIGH_CODE = 0x400
INVALID_SLOT = SLOTS - 1


def slot_of(code: int) -> int:
    """Slot of an exit code (APM vol. 2, appendix C); all codes outside the tables share the last one."""
    if 0 <= code < _HIGH_SLOT:
        return code
    if _HIGH_CODE <= code < _HIGH_CODE + INVALID_SLOT - _HIGH_SLOT:
        return code - _HIGH_CODE + _HIGH_SLOT
    return INVALID_SLOT


def code_of(slot: int) -> int:
    """Exit code of a slot; -1 (VMEXIT_INVALID) for the last."""
    if slot < _HIGH_SLOT:
        return slot
    return -1 if slot == INVALID_SLOT else slot - _HIGH_SLOT + _HIGH_CODE


class ExitStats:
    """Count and nanoseconds of handling per exit code: two arrays of 256 quadwords in one frame."""

    def __init__(self, page: memoryview) -> None:
        quads = page.cast("Q")
        self.counts = quads[:SLOTS]
        self.times = quads[SLOTS:2 * SLOTS]

    def rows(self) -> list[tuple[int, int, float]]:
        """(exit code, count, seconds) of every code that occurred, most frequent first."""
        found = [(code_of(slot), count, self.times[slot] / 1e9)
                 for slot, count in enumerate(self.counts) if count]
        return sorted(found, key=lambda row: -row[1])

    def total(self) -> int:
        """Exits of every kind together."""
        return sum(self.counts)

    def seconds(self) -> float:
        """Time spent handling exits."""
        return sum(self.times) / 1e9


class _Quad:
    """Descriptor: one quadword of the accounting frame."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __get__(self, owner: Accounting, kind: type) -> int:
        return owner.raw[self.index]

    def __set__(self, owner: Accounting, value: int) -> None:
        owner.raw[self.index] = value


class Accounting:
    """Named counters of a VM over the quadwords of a frame; append only, snapshots carry them by name."""

    run_ns = _Quad(0)
    wait_ns = _Quad(1)
    sleep_ns = _Quad(2)
    world_switches = _Quad(3)
    interrupts = _Quad(4)
    cow_breaks = _Quad(5)
    frames_taken = _Quad(6)
    hypercalls = _Quad(7)
    boots = _Quad(8)
    crashes = _Quad(9)
    ticks_lost = _Quad(10)
    console_bytes_out = _Quad(11)
    console_bytes_in = _Quad(12)
    steal_ns = _Quad(13)
    slices = _Quad(14)
    #: pages: read from the swap file, told by the balloon driver as given and as taken back, reported as free
    swapped_in = _Quad(15)
    inflated = _Quad(16)
    deflated = _Quad(17)
    reported = _Quad(18)

    def __init__(self, page: memoryview) -> None:
        self.raw = page.cast("Q")

    def as_dict(self) -> dict[str, int]:
        """All of them by name."""
        return {name: self.raw[quad.index] for name, quad in _FIELDS.items()}

    def load(self, values: dict[str, int]) -> None:
        """Set counters by name; names unknown here are left out (a newer host wrote them)."""
        for name, value in values.items():
            if name in _FIELDS:
                self.raw[_FIELDS[name].index] = value & (1 << 64) - 1


_FIELDS = {name: quad for name, quad in vars(Accounting).items() if isinstance(quad, _Quad)}
