# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's time-stamp counter, which the emulated CPU's RDTSC reads too (plus the VMCB's offset)."""

from __future__ import annotations

import ctypes
import mmap
import time

# rdtsc; shl rdx, 32; or rax, rdx; ret
_CODE = b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0\xc3"
_page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
_page.write(_CODE)

#: the counter now (about 0.15 us)
read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(_page)))

_BRACKETS = 16


def _pair() -> tuple[int, int]:
    """(TSC, monotonic ns) of one moment: the tightest of several attempts."""
    best: tuple[int, int, int] | None = None
    for _ in range(_BRACKETS):
        before = read()
        now = time.monotonic_ns()
        width = read() - before
        if best is None or width < best[0]:
            best = (width, before + width // 2, now)
    assert best is not None
    return best[1], best[2]


def measure_khz(window_ns: int = 50_000_000) -> int:
    """The counter's frequency in kHz against CLOCK_MONOTONIC over `window_ns`."""
    tsc0, ns0 = _pair()
    time.sleep(window_ns / 1e9)
    tsc1, ns1 = _pair()
    return round((tsc1 - tsc0) * 1_000_000 / (ns1 - ns0))
