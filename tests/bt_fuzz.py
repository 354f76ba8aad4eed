# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that execute random bytes under the software monitor, among frames that are not theirs.

    python -m tests.bt_fuzz --seconds 600 [--seed N]

Each guest has a megabyte of random bytes, or of random instructions, to execute at CPL 0 or CPL 3; its
exception handler goes on in the middle of them.  It may break itself in any way.  It must not take this
process down, and the frames around its own, which are filled with a pattern, must never change: exit status 0
says so.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import sys
import time

import numpy as np

from tests.bt_encodings import encodings
from vmm.bt.engine import TranslationEngine
from vmm.machine import VirtualMachine
from vmm.memory.block import VmBlock, free_block, new_block
from vmm.memory.frames import FrameAllocator, LocalFrames
from vmm.memory.physical import GuestMemory
from vmm.memory.pool import PAGE, Pool
from vmm.monitor import StopReason
from vmm.silicon import tsc
from vmm.silicon.cpu import Cpu, new_engine
from vmm.state import CpuState, MachineState, Segment, Table
from vmm.x86.flags import CR0_ET, CR0_NE, CR0_PE, CR0_PG, CR4_OSFXSR, CR4_PSE

MEMORY = 4 << 20
GDT, IDT, TSS, HANDLER, DIRECTORY, STACK = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x8000
WILD, WILD_BYTES = 0x100000, 1 << 20
#: of a slice, and of a guest's life
SLICE_NS, LIFE_NS = 5_000_000, 60_000_000
#: of this process with one guest: then it hangs, and says where
PATIENCE_S = 60
_POOL = 64 << 20
_PATTERN = 0xA5
_CODE, _DATA = 0xC9B, 0xC93


def _descriptor(kind: int, dpl: int) -> bytes:
    return (0x00CF_0000_0000_FFFF | (kind | dpl << 5) << 40).to_bytes(8, "little")


def _handler(code: int, data: int) -> bytes:
    """Go on somewhere else in the wild, whatever happened; iretd leaves SS and ESP on the stack at CPL 0."""
    return b"".join((
        b"\xBC", (STACK).to_bytes(4, "little"),                          # mov esp, STACK
        b"\xA1", (HANDLER + 0x800).to_bytes(4, "little"),                # mov eax, [place]
        b"\x69\xC0\x0D\x66\x19\x00", b"\x05\x5F\xF3\x6E\x3C",            # a random number
        b"\xA3", (HANDLER + 0x800).to_bytes(4, "little"),                # mov [place], eax
        b"\xC1\xE8\x0C", b"\x05", WILD.to_bytes(4, "little"),            # shr eax, 12; add eax, WILD
        b"\x6A", bytes([data]), b"\x68", (STACK + 0x4000).to_bytes(4, "little"),    # push ss; push esp
        b"\x6A\x02", b"\x6A", bytes([code]), b"\x50", b"\xCF"))          # push flags, cs, eax; iretd


class Wilderness:
    """A process's worth of random guests."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        engine = new_engine()
        self.pool = Pool(_POOL)
        self.cpu = Cpu(self.pool, engine)
        self.allocator = FrameAllocator(self.pool)
        self.engine = TranslationEngine(self.pool, cache_bytes=8 << 20, kicker=self.cpu.kicker)
        self.khz = tsc.measure_khz()
        self.instructions = [one.code for one in encodings() if one.code32]
        self.guests = self.crashes = 0

    def wild(self) -> bytes:
        """What is executed."""
        if self.random.random() < 0.5:
            return self.random.randbytes(WILD_BYTES)
        code = bytearray()
        some = self.random.choices(self.instructions, k=20_000)
        while len(code) < WILD_BYTES:
            code += self.random.choice(some)
        return bytes(code[:WILD_BYTES])

    def guest(self, user: bool) -> tuple[VmBlock, VirtualMachine]:
        """A guest about to run wild."""
        block = new_block(self.allocator, MEMORY)
        frames = LocalFrames(self.allocator, MEMORY // PAGE)
        memory = GuestMemory(block.p2m, frames)
        code, data = (0x1B, 0x23) if user else (0x08, 0x10)
        memory.write(GDT, bytes(8) + _descriptor(0x9B, 0) + _descriptor(0x93, 0)
                     + _descriptor(0x9B, 3) + _descriptor(0x93, 3)
                     + (0x0000_8900_0000_0067 | TSS << 16).to_bytes(8, "little"))
        gate = (HANDLER & 0xFFFF | 0x8 << 16 | 0xEE00 << 32 | HANDLER >> 16 << 48).to_bytes(8, "little")
        memory.write(IDT, gate * 256)
        memory.write(TSS, bytes(4) + STACK.to_bytes(4, "little") + (0x10).to_bytes(4, "little") + bytes(92))
        memory.write(HANDLER, _handler(code, data))
        memory.write(HANDLER + 0x800, self.random.randbytes(4))
        memory.write(DIRECTORY, (0x87).to_bytes(4, "little") + (0x40_0087).to_bytes(4, "little"))
        memory.write(WILD, self.wild())
        flat = {"limit": 0xFFFF_FFFF, "base": 0}
        paging = CR0_PG if user or self.random.random() < 0.5 else 0
        state = CpuState(
            gpr=[self.random.getrandbits(22) for _ in range(8)] + [0] * 8, rip=HANDLER, rflags=2,
            cs=Segment(0x08, _CODE, **flat), ss=Segment(0x10, _DATA, **flat), ds=Segment(0x23, 0xCF3, **flat),
            es=Segment(0x23, 0xCF3, **flat), fs=Segment(0x23, 0xCF3, **flat), gs=Segment(0x23, 0xCF3, **flat),
            tr=Segment(0x28, 0x08B, 0x67, TSS), gdtr=Table(0x2F, GDT), idtr=Table(0x7FF, IDT),
            cr0=CR0_PE | CR0_ET | CR0_NE | paging, cr3=DIRECTORY, cr4=CR4_PSE | CR4_OSFXSR)
        machine = VirtualMachine(self.cpu, block, frames,
                                 MachineState(memory_bytes=MEMORY, cpu=state, monitor="bt"),
                                 lambda text: None, self.khz, lambda: self.engine)
        return block, machine

    def run_one(self) -> list[int]:
        """Let one guest live; frames that changed and were not its own."""
        free = np.frombuffer(self.pool.view, dtype=np.uint8).reshape(-1, PAGE)
        block, machine = self.guest(self.random.random() < 0.5)
        owner = self.allocator.owners()
        canaries = np.flatnonzero(owner == 0)[:2048]
        canaries = canaries[canaries > 0]
        free[canaries] = _PATTERN
        end = time.monotonic_ns() + LIFE_NS
        while (now := time.monotonic_ns()) < end:
            stop = machine.run(min(now + SLICE_NS, end))
            if stop.reason.final or stop.reason in (StopReason.HALTED, StopReason.NO_FRAMES):
                self.crashes += stop.reason is StopReason.CRASHED
                assert not stop.detail.startswith("the monitor"), stop
                break
        machine.pause_clock()
        machine.close()
        # frames taken meanwhile are the guest's
        still = canaries[self.allocator.owners()[canaries] == 0]
        changed = [int(frame) for frame in still if (free[frame] != _PATTERN).any()]
        free[canaries] = 0
        free_block(self.allocator, block)
        self.allocator.reclaim(0, [])
        self.cpu.invalidate(1, self.pool.frames - 1)
        self.guests += 1
        return changed


def main(arguments: list[str]) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description="guests that execute random bytes")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    wilderness = Wilderness(seed)
    faulthandler.enable()
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        faulthandler.dump_traceback_later(PATIENCE_S, exit=True)
        changed = wilderness.run_one()
        if changed:
            print(f"guest {wilderness.guests} changed frames that are not its own: {changed[:8]}")
            return 1
        if wilderness.guests % 500 == 0:
            print(f"{wilderness.guests} guests", flush=True)
    faulthandler.cancel_dump_traceback_later()
    counters = wilderness.engine.counters
    print(f"{wilderness.guests} guests, {wilderness.crashes} crashed; {counters.units} units, "
          f"{counters.instructions} instructions, {counters.rejected} rejected by the verifier")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
