# SPDX-License-Identifier: GPL-2.0-or-later
"""Machine code of the tests' own, and what the kernel says about a window of this process."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

from vmm.bt.native import memory
from vmm.bt.native.windows import WINDOW_BYTES, Window


def function(code: str) -> ctypes._CFuncPtr:
    """Machine code as a function of two pointers."""
    data = bytes.fromhex(code)
    page = memory.reserve(memory.PAGE, memory.READ | memory.WRITE)
    memory.view(page, memory.PAGE)[:len(data)] = data
    memory.protect(page, memory.PAGE, memory.READ | memory.EXEC)
    return ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(page)


def host_mappings(window: Window) -> int:
    """How many mappings the kernel has between the ends of a window, as far as the window can tell."""
    count = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        match = re.match("([0-9a-f]+)-([0-9a-f]+)", line)
        assert match
        first, last = int(match[1], 16), int(match[2], 16)
        count += first < window.base + WINDOW_BYTES and last > window.base
    return count
