# SPDX-License-Identifier: GPL-2.0-or-later
"""Microseconds of guest time for one operation that leaves the guest, the loop around it subtracted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hostd.bench import programs
from hostd.bench.flat import DATA, DATA_PAGES, DEVICE_REGISTER, MEMORY_BYTES, UNMAPPED, FlatGuest
from hostd.bench.measures import Benchmark, Measure, Samples, Settings
from hostd.bench.rig import Rig, rig
from hostd.bench.timing import guest_seconds

#: a guest, its clone, and the tables of both
_POOL_BYTES = 3 * MEMORY_BYTES


@dataclass(frozen=True)
class _Operation:
    about: str
    code: bytes
    reach: float | None = None
    pointer: int = DATA
    ring: int = 0
    #: the memory it touches is shared with another guest
    shared: bool = False


_OPERATIONS = {
    "exit-in": _Operation("IN from the serial port", programs.IN, 1),
    "exit-out": _Operation("OUT to the serial port", programs.OUT),
    "exit-cpuid": _Operation("CPUID", programs.CPUID, 4),
    "exit-rdmsr": _Operation("RDMSR of APIC_BASE", programs.RDMSR),
    "exit-pf": _Operation("#PF through the guest's IDT, with its IRET", programs.PAGE_FAULT, 15, UNMAPPED),
    "exit-syscall": _Operation("SYSCALL, with its SYSRET", programs.SYSCALL, 4, ring=3),
    "exit-vmmcall": _Operation("VMMCALL", programs.VMMCALL),
    "exit-first-touch": _Operation("nested page fault: a page's first touch", programs.TOUCH_PAGE),
    "exit-cow": _Operation("nested page fault: a shared page's first write", programs.TOUCH_PAGE,
                           shared=True),
    "exit-mmio": _Operation("read of a local APIC register", programs.READ_DEVICE, pointer=DEVICE_REGISTER),
}  # fmt: skip


def measure(settings: Settings, wanted: frozenset[str]) -> Mapping[str, Samples]:
    """Each wanted operation's time; every run beside one of the empty loop."""
    rounds = min(settings.operations, DATA_PAGES)
    empty = FlatGuest(programs.repeat(programs.NOTHING), rounds)
    samples: dict[str, Samples] = {}
    with rig(_POOL_BYTES) as machines:
        for name, operation in _OPERATIONS.items():
            if name not in wanted:
                continue
            guest = FlatGuest(programs.repeat(operation.code), rounds, operation.pointer, ring=operation.ring)
            runs = []
            for _ in range(settings.runs):
                loop = guest_seconds(machines, empty)
                timed = _shared_seconds if operation.shared else guest_seconds
                runs.append((timed(machines, guest) - loop) / rounds * 1e6)
            samples[name] = Samples(runs)
    return samples


def _shared_seconds(machines: Rig, guest: FlatGuest) -> float:
    """The guest's time as a clone of another whose pages are all there."""
    template = machines.block(MEMORY_BYTES, guest.writes(touched=guest.rounds))
    try:
        return guest_seconds(machines, guest, machines.clone(template))
    finally:
        machines.free(template)


BENCHMARK = Benchmark(
    tuple(Measure(name, operation.about, "us", operation.reach) for name, operation in _OPERATIONS.items()),
    measure,
)
