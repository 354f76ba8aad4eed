# SPDX-License-Identifier: GPL-2.0-or-later
"""The software monitor: what a callout and a hidden page fault cost it, and how long it takes to boot.

Debian's i386 kernel is booted twice on one CPU, from its bzImage: the second time it is translated already.
QEMU gets the same files; it unpacks the kernel in the guest, where we do it in the loader.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hostd.bench import flat32, qemu
from hostd.bench.boot import MEMORY_BYTES, cold_seconds
from hostd.bench.flat32 import FlatGuest32
from hostd.bench.measures import Benchmark, Measure, Samples, Settings
from hostd.bench.rig import SLICE_NS, Rig, rig, run_to_end
from hostd.ctl.demo import Template
from hostd.ctl.errors import CtlError
from hostd.ctl.pull import RECIPES, PullError, build_debian
from hostd.loader import BootFiles, lay_out
from vmm.bt.cache import TranslationCache
from vmm.bt.mode import Mode
from vmm.bt.native.cpu import NativeCpu
from vmm.monitor import StopReason

_POOL_BYTES = 64 << 20
_UP = "INIT-UP"
_OVERHEAD = 16 << 20
_TIMEOUT = 120.0
#: pages between two changes of CR3
_PAGES = 1024


def _guest_seconds(machines: Rig, guest: FlatGuest32) -> float:
    block = machines.block(flat32.MEMORY_BYTES, guest.writes())
    with machines.machine(block, guest.cpu(), vmm="bt") as machine:
        began = time.thread_time()
        stop = run_to_end(machine)
        seconds = time.thread_time() - began
    if stop.reason is not StopReason.EXIT:
        raise CtlError(f"the benchmark's guest ended otherwise than it should: {stop}")
    return seconds


def _round_trip_us(rounds: int) -> float:
    """A callout that is nothing but that: out of translated code, to Python, and in again."""
    cpu = NativeCpu(1 << 20, 64)
    cache = TranslationCache(cpu.arena)
    block = cpu.new_block()
    try:
        page = cache.page(Mode(), 1, b"\xf4" * 4096)
        address = cache.get(page, 0x1000, lambda: b"").address
        enter, exits = cpu.enter, cache.exits
        cpu.prepare()
        began = time.thread_time()
        for _ in range(rounds):
            exits[enter(block, address)]
        return (time.thread_time() - began) / rounds * 1e6
    finally:
        block.close()
        cpu.close()


def measure_costs(settings: Settings, wanted: frozenset[str]) -> Mapping[str, Samples]:
    """Every run beside one of the empty loop."""
    rounds = settings.operations
    turns = max(4 * rounds // _PAGES, 1)
    operations = {
        "bt-rdtsc": (flat32.RDTSC, rounds, 1, rounds),
        "bt-in": (flat32.IN, rounds, 1, rounds),
        "bt-hidden-fault": (flat32.TOUCH_PAGES, turns, _PAGES, turns * _PAGES),
    }
    samples = {name: Samples([_round_trip_us(20 * rounds) for _ in range(settings.runs)])
               for name in wanted & {"bt-callout"}}
    with rig(_POOL_BYTES) as machines:
        empty = FlatGuest32(flat32.repeat(flat32.NOTHING), rounds)
        for name in sorted(wanted & operations.keys()):
            code, times, count, divided = operations[name]
            guest = FlatGuest32(flat32.repeat(code), times, count)
            runs = []
            for _ in range(settings.runs):
                loop = _guest_seconds(machines, empty)
                runs.append((_guest_seconds(machines, guest) - loop) / divided * 1e6)
            samples[name] = Samples(runs)
    return samples


@contextmanager
def _debian(settings: Settings) -> Iterator[Template]:
    try:
        image = build_debian(progress=settings.say, recipe=RECIPES["debian-i386"])
    except PullError as error:
        raise CtlError(f"this benchmark boots Debian for i386: {error}") from None
    with tempfile.TemporaryDirectory(prefix="hostctl-bench-") as directory:
        kernel = Path(directory) / "vmlinuz"
        kernel.write_bytes(image.kernel.read_bytes())
        yield Template(kernel, image.initrd, image.append, MEMORY_BYTES, _UP)


def _boot_seconds(machines: Rig, guest: Template) -> float:
    """From laying out the files until the guest says that it is up."""
    initrd = guest.initrd.read_bytes() if guest.initrd else None
    files = BootFiles(guest.kernel.read_bytes(), initrd, guest.append)
    up, said = guest.ready.encode(), bytearray()
    began = time.perf_counter()
    image = lay_out(files, guest.memory)
    block = machines.block(guest.memory, image.writes)
    with machines.machine(block, image.cpu, said.extend, vmm="bt") as machine:
        while up not in said:
            stop = machine.run(time.monotonic_ns() + SLICE_NS)
            if stop.reason is StopReason.HALTED:
                wake = machine.next_wake() or time.monotonic_ns() + SLICE_NS
                time.sleep(max(0, wake - time.monotonic_ns()) / 1e9)
            if stop.reason.final or time.perf_counter() - began > _TIMEOUT:
                raise CtlError(f"the guest did not print {guest.ready!r}: {stop.detail or stop.reason.value}")
        return time.perf_counter() - began


def measure_boots(settings: Settings, wanted: frozenset[str]) -> Mapping[str, Samples]:
    """QEMU, then ours twice on a fresh CPU; again and again."""
    first: list[float] = []
    again: list[float] = []
    theirs: list[float] = []
    with _debian(settings) as guest:
        for _ in range(settings.runs):
            if settings.qemu:
                theirs.append(cold_seconds(qemu.command(guest, "qemu-system-i386"), guest.ready))
            with rig(guest.memory + _OVERHEAD) as machines:
                first.append(_boot_seconds(machines, guest))
                if "bt-boot-again" in wanted:
                    again.append(_boot_seconds(machines, guest))
    return {"bt-boot": Samples(first, theirs), "bt-boot-again": Samples(again, theirs)}


COSTS = Benchmark(
    (Measure("bt-callout", "a callout: translated code to the monitor and back", "us", 0.8),
     Measure("bt-rdtsc", "RDTSC under bt, a callout with its work", "us"),
     Measure("bt-in", "IN from the serial port under bt", "us"),
     Measure("bt-hidden-fault", "a hidden page fault under bt", "us", 15)),
    measure_costs,
)
BOOTS = Benchmark(
    (Measure("bt-boot", "Debian's i386 kernel to /init under bt", "s", 2.0, reach_is_ratio=True),
     Measure("bt-boot-again", "the same when it has been translated", "s", 1.0, reach_is_ratio=True)),
    measure_boots,
)
