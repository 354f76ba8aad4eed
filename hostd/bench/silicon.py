# SPDX-License-Identifier: GPL-2.0-or-later
"""A program that never leaves the guest: its speed there, compared with the bare silicon's.

The bare silicon is a Unicorn engine of its own with nothing but memory: the same bytes in it, the same page
tables, the same switch against stops in mid-instruction; but no nested paging, no hooks, and no turns.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping
from dataclasses import dataclass

from unicorn import UC_ARCH_X86, UC_MODE_64, Uc, x86_const

from hostd.bench import programs
from hostd.bench.flat import CODE, DATA, MEMORY_BYTES, FlatGuest
from hostd.bench.measures import Benchmark, Measure, Samples, Settings
from hostd.bench.rig import rig
from hostd.bench.timing import guest_seconds
from vmm.memory.pool import PAGE
from vmm.silicon import layout
from vmm.state import RBX, RSI
from vmm.x86.msr import EFER

#: the registers a program finds its arguments in
_ARGUMENTS = {x86_const.UC_X86_REG_RSI: RSI, x86_const.UC_X86_REG_RBX: RBX, x86_const.UC_X86_REG_R15: 15}
_CACHE_LINE = 64
#: what the memory-bound program works on
_WORKING_SET = 4 << 20


class BareSilicon:
    """An engine without a monitor."""

    def __init__(self) -> None:
        self._uc = Uc(UC_ARCH_X86, UC_MODE_64)
        self._uc.ctl_set_cpu_model(x86_const.UC_CPU_X86_EPYC)
        engine = self._uc._uch
        assert engine is not None
        place = layout.find(self._uc, engine.value or 0)
        ctypes.c_ubyte.from_address(place.no_exit_request).value = 1
        self._uc.mem_map(0, MEMORY_BYTES)

    def seconds(self, guest: FlatGuest) -> float:
        """CPU seconds from the program's first instruction to its end."""
        uc, cpu = self._uc, guest.cpu()
        for address, data in guest.writes():
            uc.mem_write(address, data)
        uc.ctl_remove_cache(0, MEMORY_BYTES)
        uc.reg_write(x86_const.UC_X86_REG_CR3, cpu.cr3)
        uc.reg_write(x86_const.UC_X86_REG_CR4, cpu.cr4)
        uc.msr_write(EFER, cpu.efer)
        uc.reg_write(x86_const.UC_X86_REG_CR0, cpu.cr0)
        for register, value in _ARGUMENTS.items():
            uc.reg_write(register, cpu.gpr[value])
        began = time.thread_time()
        uc.emu_start(CODE, CODE + len(guest.program) - programs.STAY)
        return time.thread_time() - began


@dataclass(frozen=True)
class _Program:
    about: str
    code: bytes
    #: R15 for one of `Settings.rounds`
    round: int
    count: int = 0


_PROGRAMS = {
    "cpu-primes": _Program("speed of counting primes, to the bare silicon", programs.PRIMES, 250),
    "cpu-memory": _Program("speed of going through 4 MiB of memory, to the bare silicon", programs.MEMORY, 10,
                           _WORKING_SET // _CACHE_LINE),
}


def measure(settings: Settings, wanted: frozenset[str]) -> Mapping[str, Samples]:
    """Each wanted program under the monitor and without one, alternating."""
    samples: dict[str, Samples] = {}
    with rig(2 * MEMORY_BYTES) as machines:
        bare = BareSilicon()
        for name, program in _PROGRAMS.items():
            if name in wanted:
                guest = FlatGuest(program.code, program.round * settings.rounds, DATA, program.count)
                runs = []
                for _ in range(settings.runs):
                    there = bare.seconds(guest)
                    # what its first touch costs is a measure of its own
                    block = machines.block(MEMORY_BYTES, guest.writes(touched=_WORKING_SET // PAGE))
                    runs.append(there / guest_seconds(machines, guest, block))
                samples[name] = Samples(runs)
    return samples


BENCHMARK = Benchmark(
    tuple(Measure(name, program.about, "x", 0.95, at_least=True) for name, program in _PROGRAMS.items()),
    measure,
)
