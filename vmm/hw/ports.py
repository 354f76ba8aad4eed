# SPDX-License-Identifier: GPL-2.0-or-later
"""IN and OUT: the commonest exits of a booting guest, made as short as Python allows.

The two functions close over everything they touch; an attribute of an object costs as much as the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmm.exitcodes import ExitCode
from vmm.silicon.layout import HFLAGS
from vmm.stats import ExitStats

if TYPE_CHECKING:
    from vmm.hw.processor import Processor

_IOIO = int(ExitCode.IOIO)

PortIn = Callable[[int, int], int]
PortOut = Callable[[int, int, int], None]


def port_handlers(vcpu: Processor, stats: ExitStats) -> tuple[PortIn, PortOut]:
    """What serves IN and INS, and OUT and OUTS, of one guest.  They raise InstructionAborted."""
    hidden = vcpu.d
    counts, times = stats.counts, stats.times
    clock = time.perf_counter_ns
    read, write = vcpu.board.ports.read, vcpu.board.ports.write
    timers = vcpu.board.timers
    check, rearm = vcpu.check_port, vcpu.rearm

    def port_in(port: int, size: int) -> int:
        started = clock()
        if hidden[HFLAGS] & 3:      # CPL, which is 3 in virtual-8086 mode too
            check(port, size)
        counts[_IOIO] += 1
        value = read(port, size)
        times[_IOIO] += clock() - started
        return value

    def port_out(port: int, size: int, value: int) -> None:
        started = clock()
        if hidden[HFLAGS] & 3:
            check(port, size)
        counts[_IOIO] += 1
        before = timers.next
        write(port, size, value)
        if timers.next < before:
            rearm()
        times[_IOIO] += clock() - started

    return port_in, port_out
