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


#: order of the quadwords of an accounting frame; append only (a snapshot carries them by name)
FIELDS = ("run_ns", "wait_ns", "sleep_ns", "world_switches", "interrupts", "cow_breaks", "frames_taken",
          "hypercalls", "boots", "crashes", "ticks_lost", "console_bytes_out", "console_bytes_in",
          "steal_ns", "slices", "last_run_ns")


class Accounting:
    """Named counters of a VM, each a property over its quadword."""

    def __init__(self, page: memoryview) -> None:
        self.raw = page.cast("Q")

    def as_dict(self) -> dict[str, int]:
        """All of them by name."""
        return dict(zip(FIELDS, self.raw[:len(FIELDS)].tolist(), strict=True))

    def load(self, values: dict[str, int]) -> None:
        """Set counters by name; unknown names are ignored (a newer host wrote them)."""
        for name, value in values.items():
            if name in FIELDS:
                self.raw[FIELDS.index(name)] = value & (1 << 64) - 1


def _field(index: int) -> property:
    def get(self: Accounting) -> int:
        return self.raw[index]

    def put(self: Accounting, value: int) -> None:
        self.raw[index] = value

    return property(get, put)


for _index, _name in enumerate(FIELDS):
    setattr(Accounting, _name, _field(_index))
