# SPDX-License-Identifier: GPL-2.0-or-later
"""Microseconds for a guest instruction to become verified host code, by the code of a whole kernel.

That is Debian's for i386, if it was pulled before, else copies of the project's own.  Units are made in the
order of a guest that calls every function and takes every branch once.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from hostd.bench.measures import Benchmark, Measure, Samples, Settings
from hostd.ctl import pull
from vmm import guests
from vmm.boot import elf
from vmm.boot.linux import decompress_bzimage
from vmm.bt.cache import Edge, TranslationCache
from vmm.bt.engine import BYTES_PER_STUB, DEFAULT_CACHE
from vmm.bt.mode import Mode
from vmm.bt.native.cpu import NativeCpu
from vmm.bt.unit import Mark
from vmm.memory.pool import PAGE

_KERNEL = "debian-i386"
_OWN = ("mix", "fuzz", "primes", "idle")
#: of `Settings.operations`, to a page of code: about 200 units
_OPERATIONS = 10
#: where the copies begin, and how far apart they are: as far as the largest is long, and more
_FIRST, _APART = 0x40_0000, 0x1_0000
_MODE = Mode()
_CALL, _NOP = 0xE8, bytes.fromhex("0F1F440000")
#: what follows does so when the guest comes back
_COME_BACK = (Mark.CALL, Mark.CALLOUT)


class Corpus(NamedTuple):
    """Guest code by page number, and where in each page functions begin."""

    pages: Mapping[int, bytes]
    entries: Mapping[int, list[int]]


class Step(NamedTuple):
    """One unit to be made: by a jump that leaves by an exit stub, or without one."""

    page: int
    eip: int
    stub: int | None


def corpus(pages: int) -> Corpus:
    """The code to be translated, of so many pages."""
    images = sorted(pull.cache_directory().glob(f"{_KERNEL}-[0-9]*/vmlinuz"))
    if images:
        code = elf.parse(decompress_bzimage(images[-1].read_bytes())).segments[0]
        return _functions(code.virtual, _patched(bytes(code.data)), pages)
    programs = [elf.parse(guests.read(name)).segments[0] for name in _OWN]
    copies = bytearray()
    for number in range(pages):
        copies += bytes(programs[number % len(programs)].data).ljust(_APART, b"\xF4")
    return _functions(_FIRST, bytes(copies), pages)


def _calls(code: bytes) -> Iterator[tuple[int, int]]:
    """What looks like a call, and where it leads, among these bytes."""
    for found in re.finditer(bytes([_CALL]), code[:-4]):
        at = found.start()
        target = at + 5 + int.from_bytes(code[at + 1:at + 5], "little", signed=True)
        if 0 <= target < len(code):
            yield at, target


def _patched(code: bytes) -> bytes:
    """Without the calls to the tracer that Linux's functions begin with: it drops them when it boots."""
    patched = bytearray(code)
    (tracer, _), = Counter(target for _, target in _calls(code)).most_common(1)
    for at, target in _calls(code):
        if target == tracer:
            patched[at:at + 5] = _NOP
    return bytes(patched)


def _functions(base: int, code: bytes, count: int) -> Corpus:
    entries: dict[int, set[int]] = {}
    for _, target in _calls(code):
        entries.setdefault((base + target) // PAGE, set()).add(base + target)
    chosen = sorted(entries)[:count]
    pages = {number: code[number * PAGE - base:][:PAGE].ljust(PAGE, b"\xF4")
             for first in chosen for number in (first, first + 1)}
    return Corpus(pages, {number: sorted(entries[number]) for number in chosen})


def plan(cache: TranslationCache, work: Corpus) -> list[Step]:
    """All units, in order; they are made in `cache`, which has to be empty."""
    steps: list[Step] = []
    for number, entries in work.entries.items():
        page = cache.page(_MODE, number, work.pages[number])
        beyond = partial(work.pages.__getitem__, number + 1)
        waiting: list[int | Edge] = list(reversed(entries))
        while waiting:
            where = waiting.pop()
            eip, stub = (where, None) if isinstance(where, int) else (where.eip, where.stub)
            if eip // PAGE != number or (stub is None and cache.find(page, eip, beyond)):
                continue
            known = cache.counters.units
            made = cache.get(page, eip, beyond) if isinstance(where, int) else cache.follow(where, beyond)
            steps.append(Step(number, eip, stub))
            if cache.counters.units > known:
                *_, last = made.pieces
                if last.mark in _COME_BACK:
                    waiting.append(made.eip + made.guest_bytes)
                waiting.extend(edge for edge in made.edges if edge.target is None)
    return steps


def translate(cache: TranslationCache, work: Corpus, steps: Iterable[Step]) -> None:
    """Make every unit, as a monitor does."""
    pages = {number: cache.page(_MODE, number, code) for number, code in work.pages.items()}
    get, follow, exits = cache.get, cache.follow, cache.exits
    beyond = {number: partial(work.pages.__getitem__, number + 1) for number in work.pages}
    for number, eip, stub in steps:
        if stub is None:
            get(pages[number], eip, beyond[number])
        else:
            edge = exits[stub]
            assert isinstance(edge, Edge)
            follow(edge, beyond[number])


@contextmanager
def _cache() -> Iterator[TranslationCache]:
    cpu = NativeCpu(DEFAULT_CACHE, DEFAULT_CACHE // BYTES_PER_STUB)
    try:
        yield TranslationCache(cpu.arena)
    finally:
        cpu.close()


def measure(settings: Settings, wanted: frozenset[str]) -> Mapping[str, Samples]:
    """CPU time, so that other load on the host does not count.

    Each run begins without any template or stem, in a process that has decoded this code before.
    """
    work = corpus(max(settings.operations // _OPERATIONS, 1))
    with _cache() as cache:
        steps = plan(cache, work)
    runs = []
    for _ in range(settings.runs):
        with _cache() as cache:
            began = time.thread_time()
            translate(cache, work, steps)
            runs.append((time.thread_time() - began) / cache.counters.instructions * 1e6)
    return {"translate": Samples(runs)}


BENCHMARK = Benchmark(
    (Measure("translate", "translation and verification, per guest instruction", "us", 2),), measure)
