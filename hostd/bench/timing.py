# SPDX-License-Identifier: GPL-2.0-or-later
"""How long a program takes as a guest: CPU time, so that other load on the host does not count."""

from __future__ import annotations

import time

from hostd.bench.flat import MEMORY_BYTES, FlatGuest
from hostd.bench.rig import Rig, run_to_end
from hostd.ctl.errors import CtlError
from vmm.memory.block import VmBlock
from vmm.monitor import StopReason


def guest_seconds(rig: Rig, guest: FlatGuest, block: VmBlock | None = None) -> float:
    """Seconds from the program's first entry to its end, exits and all.

    It runs in fresh memory, or in `block`, which is gone afterwards.
    """
    memory = block if block is not None else rig.block(MEMORY_BYTES, guest.writes())
    with rig.machine(memory, guest.cpu()) as machine:
        began = time.thread_time()
        stop = run_to_end(machine)
        seconds = time.thread_time() - began
    if stop.reason is not StopReason.EXIT:
        raise CtlError(f"a guest that was to be timed ended early: {stop.detail or stop.reason.value}")
    return seconds
