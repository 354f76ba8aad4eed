# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest can be run by - the two monitors, and QEMU - behind one function; and the host itself.

A guest ends by the debug-exit port, with 0, or by powering off.  Its console is the answer.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hostd.bench.rig import SLICE_NS, rig
from hostd.loader import BootFiles, lay_out
from hostd.model import BtCpu
from hostd.translator import NoTranslator
from vmm.guests.build import SOURCES
from vmm.monitor import Stop, StopReason
from vmm.silicon.layout import SiliconError

QEMU = "qemu-system-i386"
#: seconds after which a guest is given up
TIMEOUT = 3600.0
#: tables of the machine, and some air
_OVERHEAD = 16 << 20
#: what the debug-exit port makes of 0, as the status of QEMU
_LEFT = 1


class NoFigure(Exception):
    """There is no figure, and the sentence says why: it is shown in its place."""


@dataclass(frozen=True)
class Guest:
    """What is run: its files, and its memory in bytes."""

    files: BootFiles
    memory_bytes: int
    timeout: float = TIMEOUT


Run = Callable[[Guest], str]


def _in_process(vmm: str, bt_cpu: BtCpu = "native") -> Run:
    """A monitor on a CPU of this process."""

    def run(guest: Guest) -> str:
        image = lay_out(guest.files, guest.memory_bytes)
        said = bytearray()
        until = time.monotonic_ns() + int(guest.timeout * 1e9)
        try:
            with rig(guest.memory_bytes + _OVERHEAD, bt_cpu) as machines:
                block = machines.block(guest.memory_bytes, image.writes)
                with machines.machine(block, image.cpu, said.extend, vmm) as machine:
                    while not (stop := machine.run(time.monotonic_ns() + SLICE_NS)).reason.final:
                        if time.monotonic_ns() > until:
                            raise NoFigure(f"the guest did not end in {guest.timeout:.0f} seconds")
                        if stop.reason is StopReason.HALTED:
                            wake = machine.next_wake() or time.monotonic_ns() + SLICE_NS
                            time.sleep(max(0, wake - time.monotonic_ns()) / 1e9)
        except (NoTranslator, SiliconError) as error:
            raise NoFigure(str(error)) from None
        _check_end(stop)
        return said.decode(errors="replace")

    return run


def _check_end(stop: Stop) -> None:
    if stop.reason is StopReason.POWEROFF or stop == Stop(StopReason.EXIT, stop.detail, _LEFT):
        return
    raise NoFigure(f"the guest ended wrongly: {stop.detail or stop.reason.value}")


def _qemu(guest: Guest) -> str:
    if shutil.which(QEMU) is None:
        raise NoFigure(f"{QEMU} is not installed (Debian package qemu-system-x86)")
    with tempfile.TemporaryDirectory(prefix="hostctl-bench-") as directory:
        kernel, initrd = Path(directory, "kernel"), Path(directory, "initrd")
        kernel.write_bytes(guest.files.kernel)
        initrd.write_bytes(guest.files.initrd or b"")
        return output([
            QEMU, "-accel", "tcg", "-M", "pc", "-nodefaults", "-no-reboot", "-display", "none",
            "-m", str(guest.memory_bytes >> 20), "-serial", "stdio",
            "-device", "isa-debug-exit,iobase=0xf4,iosize=4",
            "-kernel", str(kernel), *(["-initrd", str(initrd)] if guest.files.initrd else []),
            "-append", guest.files.append,
        ], guest.timeout, statuses=(0, _LEFT))  # fmt: skip


#: what runs guests, in the order in which it is shown
ENGINES: dict[str, Run] = {
    "bt": _in_process("bt"),
    "bt-unicorn": _in_process("bt", "unicorn"),
    "hw": _in_process("hw"),
    "qemu": _qemu,
}
#: programs on the host itself
NATIVE = "native"
NAMES = (NATIVE, *ENGINES)


def run_guest(engine: str, guest: Guest) -> str:
    """The console of the guest, run to its end.  Raises NoFigure."""
    return ENGINES[engine](guest)


def output(command: Sequence[str], timeout: float = TIMEOUT, statuses: tuple[int, ...] = (0,)) -> str:
    """What a program prints.  Raises NoFigure where it cannot be run, or fails."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout,
                              check=False)
    except OSError as error:
        raise NoFigure(f"{Path(command[0]).name} cannot be run: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise NoFigure(f"{Path(command[0]).name} did not end in {timeout:.0f} seconds") from None
    if done.returncode not in statuses:
        said = done.stderr.decode(errors="replace").splitlines() or [f"status {done.returncode}"]
        raise NoFigure(f"{Path(command[0]).name} failed: {said[-1]}")
    return done.stdout.decode(errors="replace")


def compile_program(source: str, directory: Path) -> Path:
    """A static 32-bit program for this host, from a source beside those of the guests.  Raises NoFigure."""
    program = directory / Path(source).stem
    compiler([str(SOURCES / source), "-static", "-o", str(program)])
    return program


def compiler(arguments: Sequence[str]) -> None:
    """Run gcc for 32-bit code.  Raises NoFigure."""
    if shutil.which("gcc") is None:
        raise NoFigure("gcc is not installed (Debian packages gcc and gcc-multilib)")
    output(["gcc", "-m32", "-O2", "-Wall", "-Wextra", *arguments])
