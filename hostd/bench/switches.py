# SPDX-License-Identifier: GPL-2.0-or-later
"""The world switch: one guest leaves the CPU, another is entered and makes its first exit."""

from __future__ import annotations

import time
from collections.abc import Mapping

from hostd.bench import programs
from hostd.bench.flat import MEMORY_BYTES, FlatGuest
from hostd.bench.measures import Benchmark, Measure, Samples, Settings
from hostd.bench.rig import rig


def measure(settings: Settings, wanted: frozenset[str]) -> Mapping[str, Samples]:
    """Two guests that only halt are entered in turn."""
    guest = FlatGuest(programs.HALT_FOR_EVER, 0)
    runs = []
    with rig(3 * MEMORY_BYTES) as machines:
        blocks = [machines.block(MEMORY_BYTES, guest.writes()) for _ in range(2)]
        with (machines.machine(blocks[0], guest.cpu()) as first,
              machines.machine(blocks[1], guest.cpu()) as second):
            vmrun, one, other = machines.cpu.vmrun, first.processor.guest, second.processor.guest
            for _ in range(settings.runs):
                began = time.thread_time()
                for _ in range(settings.operations):
                    vmrun(one)
                    vmrun(other)
                runs.append((time.thread_time() - began) / (2 * settings.operations) * 1e6)
    return {"world-switch": Samples(runs)}


BENCHMARK = Benchmark(
    (Measure("world-switch", "one guest off the CPU, another on it, up to its first exit", "us", 20),),
    measure,
)
