# SPDX-License-Identifier: GPL-2.0-or-later
"""What has been reported of these benchmarks, to be set beside what is measured.

Cycles: Adams and Agesen, *A Comparison of Software and Hardware Techniques for x86 Virtualization* (ASPLOS
2006), the text of section 6.3; a Pentium 4.  What the text gives no number for is left out.
Seconds: the German paper, chapter 5.1.1, after the same authors; 40,000 processes, a Pentium 4 of 3.6 GHz.
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
    "in": Reported(3209, 3209 / 15, 15826),     # given as a fifteenth of the native cost
    "callret": Reported(11, 51, 11),
    "pgfault": Reported(1093, 3927, 11242),
    "divzero": Reported(889, 3223, 1014),
    "ptemod": Reported(1, 391, 12733),
    "linux-forkwait": _FORKWAIT_CYCLES,
}

#: which monitor figure 8 of the German paper has ahead; of divzero it says the opposite of the numbers above
AHEAD: dict[str, str] = {
    "syscall": "hw", "in": "bt", "cr3wr": "bt", "callret": "hw", "pgfault": "bt", "divzero": "bt",
    "ptemod": "bt", "linux-forkwait": "bt",
}  # fmt: skip
