# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine the figures were taken on: without it they mean nothing."""

from __future__ import annotations

import os
import platform
import re
import time
from pathlib import Path
from statistics import median

import msgspec
import unicorn

from hostd import __version__
from hostd.bench import qemu


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a reader needs to compare figures of two machines."""

    cpu: str
    #: that this process may use, and all
    cores: int
    cores_online: int
    memory_bytes: int
    kernel: str
    #: of the last minute, before the benchmarks: others' load spoils figures
    load: float
    #: an empty round of Python's `for`: what the machine's pace was, compared with other times or machines
    python_loop_ns: float
    python: str
    hostd: str
    unicorn: str
    qemu: str | None


def _python_loop_ns() -> float:
    """Median of several tries."""
    rounds = 200_000
    tries = []
    for _ in range(9):
        began = time.perf_counter_ns()
        for _ in range(rounds):
            pass
        tries.append((time.perf_counter_ns() - began) / rounds)
    return median(tries)


def gather(with_qemu: bool) -> Facts:
    """The facts of this machine.  Raises CtlError where QEMU is wanted and missing."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return Facts(
        cpu=model[1] if model else platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        cores_online=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=f"{platform.system()} {platform.release()}",
        load=os.getloadavg()[0],
        python_loop_ns=round(_python_loop_ns(), 2),
        python=platform.python_version(),
        hostd=__version__,
        unicorn=unicorn.__version__,
        qemu=qemu.version() if with_qemu else None,
    )
