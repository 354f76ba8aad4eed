# SPDX-License-Identifier: GPL-2.0-or-later
"""What a daemon costs its machine, as the kernel accounts it: memory and CPU of all its processes."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from hostd.model import HostView


def processes(host: HostView) -> list[int]:
    """The daemon and those of its workers that run."""
    return [host.pid, *(worker.pid for worker in host.workers if worker.pid)]


def proportional_bytes(pids: Iterable[int]) -> int:
    """PSS: private memory, and of shared memory this process's part, so that a sum counts nothing twice."""
    kilobytes = 0
    for pid in pids:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        match = re.search(r"^Pss:\s+(\d+) kB", rollup, re.M)
        assert match is not None, "smaps_rollup has a Pss line (proc(5))"
        kilobytes += int(match[1])
    return kilobytes * 1024


def own_bytes(pid: int) -> int:
    """Resident memory of a process, but for shared memory: without the guests' frames, that is."""
    status = Path(f"/proc/{pid}/status").read_text()
    sizes = re.findall(r"^Rss(?:Anon|File):\s+(\d+) kB", status, re.M)
    assert len(sizes) == 2, "status has both lines (proc(5))"
    return sum(map(int, sizes)) * 1024


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time so far (fields 14 and 15 of stat in proc(5); the name before may hold spaces)."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class CpuMeter:
    """How much CPU some processes use, from here on."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = list(pids)
        self._seconds = cpu_seconds(self._pids)
        self._time = time.monotonic()

    def share(self) -> float:
        """CPUs in use on average since the start of measuring."""
        return (cpu_seconds(self._pids) - self._seconds) / max(time.monotonic() - self._time, 1e-9)
