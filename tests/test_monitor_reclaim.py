# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests under either monitor whose pages are frozen, merged, dropped, swapped and watched all the time: they
never notice."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest

from hostd.swapfile import SwapFile
from tests.hw_rig import Machine, Rig
from tests.test_monitor_kernels import GOOD, MIX, PRIMES, boot, last_line
from vmm.memory.reclaim import carry_out

MONITORS = ("hw", "bt")
NONE = np.zeros(0, dtype=np.int64)


class Host:
    """Takes what it can from one guest; the frames of frozen pages are kept, as an allocator would see to."""

    def __init__(self, machine: Machine, swap: SwapFile, random: Random) -> None:
        self.machine, self.swap, self.random = machine, swap, random
        self.frozen: dict[bytes, int] = {}
        self.done = dict.fromkeys(("freeze", "merge", "zeros", "store", "watch"), 0)

    def some(self) -> np.ndarray:
        """Pages that have frames, a third of them."""
        leaf = self.machine.block.leaf()
        pages = np.flatnonzero(leaf & np.uint64(3 << 9))
        return pages[[self.random.random() < 0.3 for _ in pages]]

    def disturb(self) -> None:
        self.machine.leave_cpu()
        p2m = self.machine.block.p2m
        pages = self.some()
        frozen, frames = carry_out("freeze", p2m, pages, NONE, NONE)
        self.done["freeze"] += len(frozen)
        contents = [bytes(p2m.pool.page(frame)) for frame in frames.tolist()]
        self.frozen |= dict(zip(contents, frames.tolist()))
        carry_out("watch", p2m, frozen, NONE, NONE)
        slots = np.array(self.swap.write([memoryview(page) for page in contents]), dtype=np.int64)
        stored, _ = carry_out("store", p2m, frozen, frames, slots)
        self.done["store"] += len(stored)
        others = self.some()
        alike = [(page, self.frozen[data]) for page in others.tolist()
                 if (data := p2m.contents(page)) in self.frozen]
        if alike:
            merged, _ = carry_out("merge", p2m, *np.array(alike, dtype=np.int64).T, NONE)
            self.done["merge"] += len(merged)
            self.machine.processor.cpu.invalidate(1, p2m.pool.frames - 1)
        zeros, _ = carry_out("zeros", p2m, self.some(), NONE, NONE)
        self.done["zeros"] += len(zeros)
        watched = self.some()
        carry_out("watch", p2m, watched, NONE, NONE)
        self.done["watch"] += len(watched)


@pytest.mark.parametrize(("name", "append"), [MIX, PRIMES])
def test_a_guest_does_not_notice(rig: Rig, tmp_path: Path, name: str, append: str) -> None:
    undisturbed = boot(rig, name, append)
    assert undisturbed.go() == GOOD
    swap = SwapFile(tmp_path / "swap", 256 << 20)
    machine = boot(rig, name, append)
    machine.block.p2m.fetch = swap.read_into
    host = Host(machine, swap, Random(7))
    for turn in itertools.count():
        stop = machine.run(time.monotonic_ns() + 1_000_000)
        if stop.reason.final:
            break
        if turn % 4 == 0 and turn < 120:
            host.disturb()
    assert (stop, last_line(machine)) == (GOOD, last_line(undisturbed))
    assert all(host.done[what] for what in ("freeze", "store", "watch")), host.done
    assert machine.block.p2m.fetched
    swap.close()
    # the books are not kept here: frames that were let go of come back with the rig's own stock
    machine.block.leaf()[:] = 0
