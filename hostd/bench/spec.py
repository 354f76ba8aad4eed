# SPDX-License-Identifier: GPL-2.0-or-later
"""Processor-bound programs as guests, as a ratio to the same object code as a process of the host.

Every run's checksum is compared: an engine that computes something else is an error, not a figure.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import msgspec

from hostd.bench import spec_build
from hostd.bench.paper_engines import NATIVE, Guest, NoFigure, output, run_guest
from hostd.ctl.errors import CtlError
from hostd.loader import BootFiles

#: program -> rounds: some tenths of a second natively
ROUNDS = {
    "primes": 50_000, "fib": 10_000, "calls": 30_000_000, "hash": 150_000_000, "sieve": 80, "copy": 2_000,
    "string": 2_000, "compress": 500, "interpret": 100_000,
}  # fmt: skip
ABOUT = {
    "primes": "division: the paper's example", "fib": "recursive calls", "calls": "indirect calls",
    "hash": "add, rotate, exclusive or", "sieve": "strided stores",
    "copy": "a megabyte there and back, by words", "string": "the same by REP MOVSD",
    "compress": "LZ77", "interpret": "a stack machine's loop",
}  # fmt: skip
#: the work of primes grows with the square of its rounds
_QUADRATIC = {"primes"}
_MEMORY_BYTES = 32 << 20
_LINE = re.compile(r"^spec (\w+) (\d+) (\d+) (\d+)\r?$", re.M)


@dataclass(frozen=True)
class Settings:
    """How thoroughly to measure, and by what (names of paper_engines)."""

    engines: tuple[str, ...]
    runs: int = 3
    #: of the work of ROUNDS
    scale: float = 1.0
    say: Callable[[str], None] = lambda text: None

    def rounds(self, program: str) -> int:
        share = self.scale**0.5 if program in _QUADRATIC else self.scale
        return max(1, round(ROUNDS[program] * share))


class Timed(NamedTuple):
    """One run."""

    cycles: int
    checksum: int


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One program: median cycles by engine, and the median of the ratios to the native run before."""

    name: str
    about: str
    rounds: int
    checksum: int
    cycles: dict[str, float]
    ratios: dict[str, float]
    runs: dict[str, list[int]]


class Blank(msgspec.Struct, frozen=True, kw_only=True):
    """Why an engine has no figure of a program."""

    engine: str
    program: str
    reason: str


def timed(console: str, program: str) -> Timed:
    """The run of `program` that was printed.  Raises NoFigure where none was."""
    for name, _, cycles, checksum in _LINE.findall(console):
        if name == program:
            return Timed(int(cycles), int(checksum))
    raise NoFigure("the program printed no result")


@dataclass
class _Program:
    """What the runs of a program came to so far."""

    name: str
    samples: dict[str, list[int]] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)
    blanks: list[Blank] = field(default_factory=list)

    def run(self, engine: str, run: Callable[[], str]) -> None:
        """Once more, unless it failed before."""
        if any(blank.engine == engine for blank in self.blanks):
            return
        try:
            cycles, checksum = timed(run(), self.name)
        except NoFigure as error:
            self.blanks.append(Blank(engine=engine, program=self.name, reason=str(error)))
            return
        self.samples.setdefault(engine, []).append(cycles)
        self.checksums[engine] = checksum
        if len(set(self.checksums.values())) > 1:
            raise CtlError(f"{self.name} computes different things: " + ", ".join(
                f"{engine} {value}" for engine, value in self.checksums.items()))

    def figure(self, rounds: int) -> Figure:
        native = self.samples.get(NATIVE, [])
        return Figure(
            name=self.name, about=ABOUT[self.name], rounds=rounds, runs=self.samples,
            checksum=next(iter(self.checksums.values()), 0),
            cycles={engine: median(runs) for engine, runs in self.samples.items()},
            ratios={engine: median(ours / theirs for ours, theirs in zip(runs, native, strict=False))
                    for engine, runs in self.samples.items() if native})


def measure(settings: Settings) -> tuple[list[Figure], list[Blank]]:
    """Every program by every engine, alternating.  Raises CtlError where a compiler is missing, or where a
    checksum is not the same everywhere."""
    with tempfile.TemporaryDirectory(prefix="hostctl-bench-") as directory:
        try:
            built = spec_build.build(Path(directory))
        except NoFigure as error:
            raise CtlError(f"the programs cannot be compiled: {error}") from None
        programs = [_Program(name) for name in ROUNDS]
        for program in programs:
            word = f"{program.name}={settings.rounds(program.name)}"
            settings.say(f"measuring {program.name}")
            for _ in range(settings.runs):
                for engine in settings.engines:
                    program.run(engine, partial(_console, engine, built, word))
    return ([program.figure(settings.rounds(program.name)) for program in programs],
            [blank for program in programs for blank in program.blanks])


def _console(engine: str, built: spec_build.Built, word: str) -> str:
    """What the program prints, as a process or as a guest.  Raises NoFigure."""
    if engine == NATIVE:
        return output([str(built.process), word])
    return run_guest(engine, Guest(BootFiles(built.kernel.read_bytes(), None, word), _MEMORY_BYTES))
