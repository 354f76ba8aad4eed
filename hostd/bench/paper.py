# SPDX-License-Identifier: GPL-2.0-or-later
"""The tables of the paper's chapter 5.1.1: cycles for one operation, natively and under each monitor.

`nano`, a kernel, runs under everything that runs guests; what a process can do is timed on the host, too.
`linux-forkwait` is the paper's C program, one binary for the host and for a Linux guest; as it takes minutes,
it is run once.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import msgspec

from hostd.bench.paper_engines import NATIVE, Guest, NoFigure, compile_program, output, run_guest
from hostd.ctl.cpio import CpioArchive
from hostd.ctl.pull import RECIPES, PullError, build_debian
from hostd.loader import BootFiles
from vmm import guests

NANO, LINUX = "nano", "linux-forkwait"
#: operations of each benchmark; as many forks as in the paper
OPERATIONS = {
    "syscall": 20_000, "in": 50_000, "cr3wr": 20_000, "callret": 5_000_000, "pgfault": 10_240,
    "divzero": 20_000, "ptemod": 20_000, "forkwait": 40_000, LINUX: 40_000,
}  # fmt: skip
_NANO_BYTES, _LINUX_BYTES = 32 << 20, 128 << 20
_IMAGE = "debian-i386"
_LINE = re.compile(r"^nano ([\w-]+) (\d+) (\d+)\r?$", re.M)

# The kernel hands `forkwait=N` on in the environment.
_INIT = b"""\
#!/bin/sh
mount -t devtmpfs none /dev
exec </dev/console >/dev/console 2>&1
/bin/forkwait $forkwait
exec poweroff -f
"""


@dataclass(frozen=True)
class Settings:
    """How thoroughly to measure, and by what (names of paper_engines)."""

    engines: tuple[str, ...]
    runs: int = 3
    #: of OPERATIONS
    scale: float = 1.0
    say: Callable[[str], None] = lambda text: None

    def count(self, name: str) -> int:
        return max(1, round(OPERATIONS[name] * self.scale))

    def words(self) -> list[str]:
        """The counts as nano and nano_host take them."""
        return [f"{name}={self.count(name)}" for name in OPERATIONS if name != LINUX]


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One benchmark: median cycles for one operation by engine, and the runs they are the medians of."""

    name: str
    operations: int
    cycles: dict[str, float]
    runs: dict[str, list[float]]

    def ratio(self, engine: str, other: str) -> float | None:
        """How many times the other's cycles an engine takes; None where either has no figure."""
        if engine not in self.cycles or not self.cycles.get(other):
            return None
        return self.cycles[engine] / self.cycles[other]


class Blank(msgspec.Struct, frozen=True, kw_only=True):
    """Why an engine has no figures of the kernel nano, or of Linux."""

    engine: str
    guest: str
    reason: str


def cycles_per_operation(console: str) -> dict[str, float]:
    """The lines `nano NAME OPERATIONS CYCLES` of what was printed."""
    return {name: int(cycles) / int(count) for name, count, cycles in _LINE.findall(console)}


@dataclass
class _Attempts:
    """Whatever is run again and again, until it first fails."""

    run: dict[tuple[str, str], Callable[[], str]] = field(default_factory=dict)
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    blanks: list[Blank] = field(default_factory=list)

    def add(self, engine: str, guest: str, make: Callable[[], Callable[[], str]]) -> None:
        try:
            self.run[engine, guest] = make()
        except NoFigure as error:
            self.blanks.append(Blank(engine=engine, guest=guest, reason=str(error)))

    def round(self) -> Iterator[tuple[str, str]]:
        """Each once, in turn: all see the same state of the machine."""
        for (engine, guest), run in list(self.run.items()):
            yield engine, guest
            try:
                found = cycles_per_operation(run())
                if not found:
                    raise NoFigure("the guest printed no figures")
            except NoFigure as error:
                del self.run[engine, guest]
                self.blanks.append(Blank(engine=engine, guest=guest, reason=str(error)))
            else:
                for name, cycles in found.items():
                    self.samples.setdefault(name, {}).setdefault(engine, []).append(cycles)

    def leave_out(self, guest: str) -> None:
        """From now on."""
        self.run = {key: run for key, run in self.run.items() if key[1] != guest}


def measure(settings: Settings) -> tuple[list[Figure], list[Blank]]:
    """All benchmarks by all engines, alternating."""
    attempts = _Attempts()
    with tempfile.TemporaryDirectory(prefix="hostctl-bench-") as directory:
        linux = _Linux(settings, Path(directory))
        for engine in settings.engines:
            attempts.add(engine, NANO, partial(_nano, engine, settings, Path(directory)))
            attempts.add(engine, LINUX, partial(linux.under, engine))
        for number in range(settings.runs):
            for engine, guest in attempts.round():
                settings.say(f"run {number + 1} of {settings.runs}: {guest}, {engine}")
            attempts.leave_out(LINUX)
    return _figures(settings, attempts.samples), attempts.blanks


def _figures(settings: Settings, samples: Mapping[str, Mapping[str, list[float]]]) -> list[Figure]:
    return [
        Figure(name=name, operations=settings.count(name), runs=dict(samples.get(name, {})),
               cycles={engine: median(runs) for engine, runs in samples.get(name, {}).items()})
        for name in OPERATIONS
    ]


def _nano(engine: str, settings: Settings, directory: Path) -> Callable[[], str]:
    words = settings.words()
    if engine == NATIVE:
        program = compile_program("nano_host.c", directory)
        return lambda: output([str(program), *words])
    guest = Guest(BootFiles(guests.read(NANO), None, " ".join(words)), _NANO_BYTES)
    return lambda: run_guest(engine, guest)


class _Linux:
    """The paper's program, compiled once, and the guest made of it."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        self._settings = settings
        self._directory = directory
        self._program: Path | None = None
        self._guest: Guest | None = None

    def under(self, engine: str) -> Callable[[], str]:
        """How it is run.  Raises NoFigure."""
        if self._program is None:
            self._program = compile_program("nano_forkwait.c", self._directory)
        if engine == NATIVE:
            command = [str(self._program), str(self._settings.count(LINUX))]
            return lambda: output(command)
        if self._guest is None:
            self._guest = self._make_guest(self._program.read_bytes())
        guest = self._guest
        return lambda: run_guest(engine, guest)

    def _make_guest(self, program: bytes) -> Guest:
        try:
            image = build_debian(progress=self._settings.say, recipe=RECIPES[_IMAGE])
        except PullError as error:
            raise NoFigure(str(error)) from None
        # the kernel unpacks one archive after the other
        ours = CpioArchive()
        ours.file("bench", _INIT, 0o755)
        ours.file("bin/forkwait", program, 0o755)
        append = f"{image.append} rdinit=/bench forkwait={self._settings.count(LINUX)}"
        files = BootFiles(image.kernel.read_bytes(), image.initrd.read_bytes() + ours.finish(), append)
        return Guest(files, _LINUX_BYTES)
