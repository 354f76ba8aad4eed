# SPDX-License-Identifier: GPL-2.0-or-later
"""The processor-bound programs: compiled once, the same objects linked into a kernel and a host program.

They are for a 686 without SSE, which is what the monitors' guests can all be.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from hostd.bench.paper_engines import compiler
from vmm.guests.build import SOURCES

#: what is measured; the same bytes everywhere
_SHARED = ("spec.c", "spec_numbers.c", "spec_memory.c", "spec_interpret.c", "options.c")
_KERNEL = ("header.S", "start.S", "console.c", "spec_guest.c")
_PROCESS = ("spec_host.c",)

_FLAGS = (
    *("-march=i686", "-mno-sse", "-mno-mmx", "-std=gnu11", "-ffreestanding", "-fno-builtin", "-nostdlib"),
    *("-fno-pic", "-no-pie", "-fno-stack-protector", "-fno-asynchronous-unwind-tables"),
    "-fcf-protection=none",
    # a program is no faster for where the linker put it
    "-falign-functions=64",
    # a loop that clears memory stays a loop: there is no library to call
    "-fno-tree-loop-distribute-patterns",
)
_LINK = ("-static", "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,-z,norelro", "-Wl,--strip-all")


class Built(NamedTuple):
    """The two files."""

    kernel: Path
    process: Path


def build(directory: Path) -> Built:
    """Compile and link, into `directory`.  Raises NoFigure where gcc cannot."""
    shared = [_compile(source, directory) for source in _SHARED]
    built = Built(directory / "spec.elf", directory / "spec")
    for target, sources, script in (
        (built.kernel, _KERNEL, ["-T", str(SOURCES / "guest.ld"), "-Wl,--nmagic"]),
        (built.process, _PROCESS, []),
    ):
        objects = [_compile(source, directory) for source in sources]
        # the multiboot header is the first thing the kernel's script wants
        compiler([*_FLAGS, *_LINK, *script, *map(str, (*objects, *shared)), "-o", str(target)])
    return built


def _compile(source: str, directory: Path) -> Path:
    target = directory / f"{source}.o"
    compiler([*_FLAGS, "-c", str(SOURCES / source), "-o", str(target)])
    return target
