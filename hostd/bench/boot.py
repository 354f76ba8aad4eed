# SPDX-License-Identifier: GPL-2.0-or-later
"""Seconds from power-on until Debian's kernel has started /init, beside QEMU with the same files.

Both get vmlinux, the kernel as a bzImage has it inside, so neither is timed at decompressing it.  `boot` is
like a guest of a worker: the CPU is there already, the interpreter warm.  `boot-cold` is `hostctl run`, from
nothing, as QEMU is too.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hostd.bench import qemu
from hostd.bench.measures import Benchmark, Measure, Samples, Settings
from hostd.bench.rig import SLICE_NS, rig
from hostd.ctl.demo import Template
from hostd.ctl.errors import CtlError
from hostd.ctl.pull import PullError, build_debian
from hostd.loader import BootFiles, lay_out
from vmm.boot.linux import decompress_bzimage
from vmm.monitor import StopReason

MEMORY_BYTES = 128 << 20
#: what /init of the Debian image prints first
_UP = "INIT-UP"
#: tables of the machine, and some air
_OVERHEAD = 16 << 20
_TIMEOUT = 120.0


def debian(directory: Path, ready: str, say: Callable[[str], None]) -> Template:
    """The Debian image, its kernel as vmlinux in `directory`; it is up when it has printed `ready`."""
    try:
        image = build_debian(progress=say)
    except PullError as error:
        raise CtlError(f"this benchmark boots Debian: {error}") from None
    kernel = directory / "vmlinux"
    kernel.write_bytes(decompress_bzimage(image.kernel.read_bytes()))
    return Template(kernel, image.initrd, image.append, MEMORY_BYTES, ready)


def warm_seconds(guest: Template) -> float:
    """From laying out the files, on a fresh CPU, until the guest says that it is up."""
    initrd = guest.initrd.read_bytes() if guest.initrd else None
    files = BootFiles(guest.kernel.read_bytes(), initrd, guest.append)
    up, said = guest.ready.encode(), bytearray()
    with rig(guest.memory + _OVERHEAD) as machines:
        began = time.perf_counter()
        image = lay_out(files, guest.memory)
        block = machines.block(guest.memory, image.writes)
        with machines.machine(block, image.cpu, said.extend) as machine:
            while up not in said:
                stop = machine.run(time.monotonic_ns() + SLICE_NS)
                if stop.reason is StopReason.HALTED:
                    wake = machine.next_wake() or time.monotonic_ns() + SLICE_NS
                    time.sleep(max(0, wake - time.monotonic_ns()) / 1e9)
                if stop.reason.final or time.perf_counter() - began > _TIMEOUT:
                    raise CtlError(f"the guest did not print {guest.ready!r}: "
                                   f"{stop.detail or stop.reason.value}")
            return time.perf_counter() - began


def cold_seconds(command: Sequence[str], ready: str) -> float:
    """From starting a process until its guest says that it is up."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            qemu.await_output(process, ready, _TIMEOUT)
            return time.perf_counter() - began
        finally:
            process.kill()


def run_command(guest: Template) -> list[str]:
    """`hostctl run` with the guest's files."""
    initrd = ["--initrd", str(guest.initrd)] if guest.initrd else []
    return [sys.executable, "-c", "from hostd.cli import main; main()", "run", str(guest.kernel), *initrd,
            "--append", guest.append, "--memory", str(guest.memory)]


def measure(settings: Settings, wanted: frozenset[str]) -> Mapping[str, Samples]:
    """Ours and QEMU's alternate, so that both see the same state of the machine."""
    own: dict[str, list[float]] = {name: [] for name in sorted(wanted)}
    theirs: list[float] = []
    with tempfile.TemporaryDirectory(prefix="hostctl-bench-") as directory:
        guest = debian(Path(directory), _UP, settings.say)
        ours = {"boot": lambda: warm_seconds(guest),
                "boot-cold": lambda: cold_seconds(run_command(guest), guest.ready)}
        for _ in range(settings.runs):
            if settings.qemu:
                theirs.append(cold_seconds(qemu.command(guest), guest.ready))
            for name, runs in own.items():
                runs.append(ours[name]())
    return {name: Samples(runs, theirs) for name, runs in own.items()}


BENCHMARK = Benchmark(
    (Measure("boot", "Debian's kernel to /init, 128 MB, on a ready CPU", "s", 1.5, reach_is_ratio=True),
     Measure("boot-cold", "the same by hostctl run, from the start of the process", "s")),
    measure,
)
