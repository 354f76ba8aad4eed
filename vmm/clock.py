# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's time: host monotonic time and the host's TSC, each plus an offset.

The offsets are chosen at power-on and whenever the guest is taken over or resumed, so that guest time
neither jumps nor runs while it is paused.

Invariant: guest TSC = host TSC + tsc_offset (mod 2**64) is what RDTSC gives the guest, and guest time
advances with CLOCK_MONOTONIC while the clock is running.
"""

from __future__ import annotations

import time
from collections.abc import Callable

_MASK64 = (1 << 64) - 1


class GuestClock:
    """Starts stopped, at guest time `time_ns` and guest TSC `tsc`."""

    def __init__(self, tsc_khz: int, read_host_tsc: Callable[[], int],
                 time_ns: int = 0, tsc: int = 0) -> None:
        self.tsc_khz = tsc_khz
        self._read = read_host_tsc
        self._stopped: tuple[int, int] | None = (time_ns, tsc)
        #: monotonic ns at guest time 0, while running
        self.base_ns = 0
        self.tsc_offset = 0

    @property
    def running(self) -> bool:
        """Whether time passes for the guest."""
        return self._stopped is None

    def start(self, since_ns: int = 0) -> None:
        """Go on from where the clock stands.  `since_ns`: as if it had gone on at this CLOCK_MONOTONIC."""
        if self._stopped is None:
            return
        time_ns, tsc = self._stopped
        now = time.monotonic_ns()
        passed = max(0, now - since_ns) if since_ns else 0
        self.base_ns = now - passed - time_ns
        self.tsc_offset = tsc + passed * self.tsc_khz // 1_000_000 - self._read() & _MASK64
        self._stopped = None

    def stop(self) -> None:
        """Stand still."""
        if self._stopped is None:
            self._stopped = (self.now(), self.tsc())

    def now(self) -> int:
        """Guest time in ns since power-on."""
        if self._stopped is not None:
            return self._stopped[0]
        return time.monotonic_ns() - self.base_ns

    def tsc(self) -> int:
        """The guest's TSC."""
        if self._stopped is not None:
            return self._stopped[1]
        return self._read() + self.tsc_offset & _MASK64

    def set_tsc(self, value: int) -> None:
        """The guest wrote its TSC."""
        self.tsc_offset = value - self._read() & _MASK64

    def tsc_to_ns(self, tsc: int) -> int:
        """Guest time at which the guest's TSC reads `tsc` (before now for values in the past)."""
        ahead = tsc - self.tsc()
        return self.now() + ahead * 1_000_000 // self.tsc_khz

    def host_ns(self, guest_ns: int) -> int:
        """CLOCK_MONOTONIC at a guest time, up to the one at which the clock was stopped last."""
        return guest_ns + self.base_ns
