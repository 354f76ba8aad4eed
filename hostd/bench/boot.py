# SPDX-License-Identifier: GPL-2.0-or-later
"""Seconds from power-on until Debian's kernel has started /init, beside QEMU with the same files.

Both get vmlinux, the kernel as bzImage has it inside, so neither is timed at decompressing it.  `boot` is a guest of a worker: the
CPU is there already, the interpreter warm.  `boot-cold` is `hostctl run`, from nothing, as QEMU is too.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hostd.bench import qemu
from hostd.bench.measures import Benchmark, Measure, Samples, Settings
from hostd.bench.rig import SLICE_NS, rig
from hostd.ctl.errors import CtlError
from hostd.ctl.pull import PullError, build_debian
from hostd.loader import BootFiles, lay_out
from vmm.boot.linux import decompress_bzimage
from vmm.monitor import StopReason

MEMORY_BYTES = 128 << 20
#: what /init of the Debian image prints first
UP = b"INIT-UP"
_TIMEOUT = 120.0


@dataclass(frozen=True)
class LinuxFiles:
    """What both sides boot."""

    kernel: Path
    initrd: Path
    append: str


def debian(directory: Path, say: Callable[[str], None]) -> LinuxFiles:
    """The Debian image, its kernel as vmlinux in `directory`."""
    try:
        image = build_debian(progress=say)
    except PullError as error:
        raise CtlError(f"this benchmark boots Debian: {error}") from None
    kernel = directory / "vmlinux"
    kernel.write_bytes(decompress_bzimage(image.kernel.read_bytes()))
    return LinuxFiles(kernel, image.initrd, image.append)


def warm_seconds(files: LinuxFiles) -> float:
    """From laying out the files, on a fresh CPU, until /init says so."""
    contents = BootFiles(files.kernel.read_bytes(), files.initrd.read_bytes(), files.append)
    said = bytearray()
    with rig(MEMORY_BYTES + (16 << 20)) as machines:
        began = time.perf_counter()
        image = lay_out(contents, MEMORY_BYTES)
        block = machines.block(MEMORY_BYTES, image.writes)
        with machines.machine(block, image.cpu, said.extend) as machine:
            while UP not in said:
                stop = machine.run(time.monotonic_ns() + SLICE_NS)
                if stop.reason is StopReason.HALTED:
                    wake = machine.next_wake() or time.monotonic_ns() + SLICE_NS
                    time.sleep(max(0, wake - time.monotonic_ns()) / 1e9)
                if stop.reason.final or time.perf_counter() - began > _TIMEOUT:
                    raise CtlError(f"the kernel did not start /init: {stop.detail or stop.reason.value}")
            return time.perf_counter() - began


def cold_seconds(command: Sequence[str]) -> float:
    """From starting a process until /init says so in its output."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            qemu.await_output(process, UP, _TIMEOUT)
            return time.perf_counter() - began
        finally:
            process.kill()


def _run_command(files: LinuxFiles) -> list[str]:
    return [sys.executable, "-c", "from hostd.cli import main; main()",
            "run", str(files.kernel), "--initrd", str(files.initrd),
            "--append", files.append, "--memory", str(MEMORY_BYTES)]


def measure(settings: Settings, wanted: frozenset[str]) -> Mapping[str, Samples]:
    """Ours and QEMU's alternate, so that both see the same state of the machine."""
    own: dict[str, list[float]] = {name: [] for name in sorted(wanted)}
    theirs: list[float] = []
    with tempfile.TemporaryDirectory(prefix="hostctl-bench-") as directory:
        files = debian(Path(directory), settings.say)
        ours = {"boot": lambda: warm_seconds(files), "boot-cold": lambda: cold_seconds(_run_command(files))}
        peer = qemu.command(files.kernel, files.initrd, files.append, MEMORY_BYTES)
        for _ in range(settings.runs):
            if settings.qemu:
                theirs.append(cold_seconds(peer))
            for name, runs in own.items():
                runs.append(ours[name]())
    return {name: Samples(runs, theirs) for name, runs in own.items()}


BENCHMARK = Benchmark(
    (Measure("boot", "Debian's kernel to /init, 128 MB, on a ready CPU", "s", 1.5, reach_is_ratio=True),
     Measure("boot-cold", "the same by hostctl run, from the start of the process", "s")),
    measure,
)
