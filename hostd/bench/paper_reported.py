# SPDX-License-Identifier: GPL-2.0-or-later
"""What has been reported of these benchmarks, to be set beside what is measured.

All of it as the German paper has it in chapter 5.1.1, after Adams and Agesen, *A Comparison of Software
and Hardware Techniques for x86 Virtualization* (ASPLOS 2006): the seconds of forkwait (40,000 processes, a
Pentium 4 of 3.6 GHz), and of the nanobenchmarks which monitor is ahead in figure 8.
"""

from __future__ import annotations

from typing import NamedTuple


class Reported(NamedTuple):
    """Native, under the software monitor, under the hardware-assisted one."""

    native: float | None = None
    bt: float | None = None
    hw: float | None = None

    def ratio(self, one: str, other: str) -> float | None:
        """As `Figure.ratio`."""
        above, below = getattr(self, one, None), getattr(self, other, None)
        return above / below if above and below else None


FORKWAIT_SECONDS = Reported(6.0, 36.9, 106.4)
#: the processes of FORKWAIT_SECONDS, and the Hz of its machine
FORKWAIT_PROCESSES, PENTIUM_HZ = 40_000, 3.6e9

_FORKWAIT_CYCLES = Reported(*(
    seconds * PENTIUM_HZ / FORKWAIT_PROCESSES for seconds in FORKWAIT_SECONDS if seconds is not None))

#: cycles for one operation
CYCLES: dict[str, Reported] = {
    "linux-forkwait": _FORKWAIT_CYCLES,
}

#: which monitor figure 8 of the German paper has ahead
AHEAD: dict[str, str] = {
    "syscall": "hw", "in": "bt", "cr3wr": "bt", "callret": "hw", "pgfault": "bt", "divzero": "bt",
    "ptemod": "bt", "linux-forkwait": "bt",
}  # fmt: skip
