# SPDX-License-Identifier: GPL-2.0-or-later
"""What is done to a page, each at its price: broken, looked at, merged, watched, swapped out and in again.

What a guest waits for is timed with a guest: one that touches many pages, each of which has to be brought or
broken, beside one that does nothing.  It has the silicon (hw) or the translator (bt) to itself.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hostd.bench import flat, flat32, programs
from hostd.bench.flat import FlatGuest
from hostd.bench.flat32 import FlatGuest32
from hostd.bench.measures import Benchmark, Measure, Samples, Settings
from hostd.bench.rig import Rig, rig, run_to_end
from hostd.ctl.errors import CtlError
from hostd.sharing import PageHash, ScanGuest, Scanner
from hostd.swapfile import SwapFile
from vmm.memory import reclaim
from vmm.memory.block import VmBlock
from vmm.memory.pool import PAGE, PAGE_SHIFT
from vmm.monitor import StopReason

#: pages that a guest touches, or that are worked on at once
PAGES = 2048
_POOL_BYTES = 128 << 20
_SWAP_BYTES = 64 << 20
_SEED = 1

#: a byte of each of EBX pages from ESI on is read, or written: 32-bit code, which 64-bit mode reads the same
_READ_EACH = (
    b"\x89\xd9"                  #       mov ecx, ebx
    b"\x89\xf7"                  #       mov edi, esi
    b"\x8a\x07"                  # page: mov al, [edi]
    b"\x81\xc7\x00\x10\x00\x00"  #       add edi, 0x1000
    b"\x83\xe9\x01"              #       sub ecx, 1
    b"\x75\xf3"                  #       jnz page
)
_WRITE_EACH = _READ_EACH.replace(b"\x8a\x07", b"\x88\x07")       # mov [edi], al


def _pages(first: int, count: int) -> np.ndarray:
    return np.arange(first >> PAGE_SHIFT, (first >> PAGE_SHIFT) + count, dtype=np.int64)


def _contents(count: int) -> list[bytes]:
    """Pages of which one half cannot be compressed."""
    random = np.random.default_rng(_SEED)
    return [random.bytes(PAGE // 2) + bytes(PAGE // 2) for _ in range(count)]


@dataclass
class _Bench:
    """Memory for a guest, as it is to be when the guest begins to run: `plain`, with all of its pages there
    and its own, or otherwise."""

    machines: Rig
    swap: SwapFile
    vmm: str
    #: CPU seconds of what is done beside guests, for all pages
    beside: dict[str, list[float]] = field(default_factory=dict)
    _slots: list[int] = field(default_factory=list)

    @property
    def data(self) -> int:
        return flat.DATA if self.vmm == "hw" else flat32.DATA

    def guest(self, operation: bytes) -> FlatGuest | FlatGuest32:
        if self.vmm == "hw":
            return FlatGuest(programs.repeat(operation), 1, count=PAGES)
        return FlatGuest32(flat32.repeat(operation), 1, PAGES)

    def plain(self, guest: FlatGuest | FlatGuest32) -> VmBlock:
        memory = flat.MEMORY_BYTES if self.vmm == "hw" else flat32.MEMORY_BYTES
        data = [(self.data + index * PAGE, page) for index, page in enumerate(_contents(PAGES))]
        return self.machines.block(memory, [*guest.writes(), *data])

    def cloned(self, guest: FlatGuest | FlatGuest32) -> VmBlock:
        source = self.plain(guest)
        clone = self.machines.clone(source)
        self.machines.free(source)
        # one more owner: the frames stay shared, as they are among many clones
        self.machines.allocator.retain(self.frames(clone))
        return clone

    def watched(self, guest: FlatGuest | FlatGuest32) -> VmBlock:
        block = self.plain(guest)
        with self._timed("watch"):
            reclaim.watch(block.p2m, _pages(self.data, PAGES))
        return block

    def stored(self, guest: FlatGuest | FlatGuest32) -> VmBlock:
        block, allocator = self.plain(guest), self.machines.allocator
        pages = _pages(self.data, PAGES)
        reclaim.watch(block.p2m, pages)
        with self._timed("swap-out"):
            pages, frames = reclaim.freeze(block.p2m, pages)
            self._slots = self.swap.write([block.pool.page(frame) for frame in frames.tolist()])
            reclaim.store(block.p2m, pages, frames, np.array(self._slots, dtype=np.int64))
        allocator.adopt_shared(frames)
        allocator.drop(frames.tolist())
        block.p2m.fetch = self.swap.read_into
        return block

    def forget(self) -> None:
        """What was swapped is read, or not needed."""
        self.swap.free(self._slots)
        self._slots = []

    def frames(self, block: VmBlock) -> np.ndarray:
        shared = self.machines.allocator.split(block.leaf()[_pages(self.data, PAGES)])
        return np.concatenate(shared)

    def _timed(self, name: str) -> _Timed:
        return _Timed(self.beside.setdefault(name, []))


class _Timed:
    """Adds the CPU seconds of a `with` to a list."""

    def __init__(self, into: list[float]) -> None:
        self._into = into

    def __enter__(self) -> None:
        self._began = time.process_time()

    def __exit__(self, *exc: object) -> None:
        self._into.append(time.process_time() - self._began)


#: what a guest does to pages in what state
_TOUCHES: dict[str, tuple[bytes, Callable[[_Bench, FlatGuest | FlatGuest32], VmBlock]]] = {
    "none": (b"", _Bench.plain),
    "plain": (_WRITE_EACH, _Bench.plain),
    "cow-break": (_WRITE_EACH, _Bench.cloned),
    "refault": (_READ_EACH, _Bench.watched),
    "swap-in": (_READ_EACH, _Bench.stored),
}


def _seconds(bench: _Bench, what: str) -> float:
    """CPU seconds of a guest from its first instruction to its end."""
    operation, prepare = _TOUCHES[what]
    guest = bench.guest(operation)
    with bench.machines.machine(prepare(bench, guest), guest.cpu(), vmm=bench.vmm) as machine:
        began = time.thread_time()
        stop = run_to_end(machine)
        seconds = time.thread_time() - began
    bench.forget()
    if stop.reason is not StopReason.EXIT:
        raise CtlError(f"the benchmark's guest ended otherwise than it should: {stop}")
    return seconds


def measure_touches(settings: Settings, wanted: frozenset[str]) -> Mapping[str, Samples]:
    """Every run beside one of a guest that touches nothing; the runs alternate."""
    runs: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="hostctl-bench-") as directory:
        swap = SwapFile(Path(directory, "swap"), _SWAP_BYTES)
        for vmm in "hw", "bt":
            names = [name for name in _TOUCHES if f"{name}-{vmm}" in wanted]
            if vmm == "hw" and "swap-out" in wanted and "swap-in" not in names:
                names.append("swap-in")
            if vmm == "hw" and "watch" in wanted and "refault" not in names:
                names.append("refault")
            for _ in range(settings.runs if names else 0):
                with rig(_POOL_BYTES) as machines:
                    bench = _Bench(machines, swap, vmm)
                    empty = _seconds(bench, "none")
                    for name in names:
                        us = (_seconds(bench, name) - empty) / PAGES * 1e6
                        runs.setdefault(f"{name}-{vmm}", []).append(us)
                    if vmm == "hw":
                        for name, seconds in bench.beside.items():
                            runs.setdefault(name, []).extend(one / PAGES * 1e6 for one in seconds)
        swap.close()
    return {name: Samples(runs[name]) for name in wanted}


def measure_looks(settings: Settings, wanted: frozenset[str]) -> Mapping[str, Samples]:
    """Hashing alone, the whole of a scan in which nothing is found, and merging, without the messages to a
    worker."""
    runs: dict[str, list[float]] = {name: [] for name in wanted}
    memory = (PAGES << PAGE_SHIFT)
    pages = _pages(0, PAGES)
    with rig(_POOL_BYTES) as machines:
        writes = [(index * PAGE, page) for index, page in enumerate(_contents(PAGES))]
        for _ in range(settings.runs):
            one, other = machines.block(memory, writes), machines.block(memory, writes)
            key = np.random.default_rng(_SEED)
            hash_ = PageHash(machines.pool, key)
            frames, _ = machines.allocator.split(one.leaf())
            timings: dict[str, list[float]] = {"hash": [], "scan": [], "merge": []}
            with _Timed(timings["hash"]):
                hash_(frames)
            scanner = Scanner(hash_, machines.pool.frames, key)
            with _Timed(timings["scan"]):
                scanner.scan([ScanGuest("one", "image", one.leaf())], PAGES)
            with _Timed(timings["merge"]):
                _, frozen = reclaim.freeze(one.p2m, pages)
                done, freed = reclaim.merge(other.p2m, pages, frozen)
            assert done.all(), "equal pages merge"
            machines.allocator.adopt_shared(frozen)
            machines.allocator.retain(frozen)
            machines.allocator.give_back(freed.tolist())
            for name in wanted:
                runs[name].append(timings[name][0] / PAGES * 1e6)
            machines.free(one)
            machines.free(other)
    return {name: Samples(runs[name]) for name in wanted}


TOUCHES = Benchmark(
    (Measure("cow-break-hw", "a write to a shared page: nested fault, frame and copy, under hw", "us"),
     Measure("cow-break-bt", "the same under bt, with the hidden page fault that any page costs first", "us"),
     Measure("plain-hw", "beside it: a write to a page that is there, under hw", "us"),
     Measure("plain-bt", "the same under bt: the hidden page fault", "us"),
     Measure("watch", "have the next use of a page noticed", "us"),
     Measure("refault-hw", "that use, under hw", "us"),
     Measure("refault-bt", "the same under bt", "us"),
     Measure("swap-out", "a page, half of which can be compressed, goes to the swap file", "us"),
     Measure("swap-in-hw", "it comes back when it is touched, under hw", "us"),
     Measure("swap-in-bt", "the same under bt", "us")),
    measure_touches,
)
LOOKS = Benchmark(
    (Measure("hash", "page sharing: hash a page", "us"),
     Measure("scan", "look at a page that nobody else has, hash and all", "us"),
     Measure("merge", "compare two equal pages in full, and make them one", "us")),
    measure_looks,
)
