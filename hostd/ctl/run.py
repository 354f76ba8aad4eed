# SPDX-License-Identifier: GPL-2.0-or-later
"""`hostctl run`: one guest in the foreground, on a CPU of this process, with no daemon."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol

import click

from hostd.ctl.attach import LEAVE, raw_terminal
from hostd.ctl.errors import TIMEOUT, CtlError
from hostd.ctl.session import SIZE
from hostd.errors import Invalid
from hostd.loader import BootFiles, lay_out
from hostd.model import BT_CPUS, MONITORS, BtCpu
from hostd.translator import NoTranslator, Translator
from vmm.machine import VirtualMachine
from vmm.memory.block import VmBlock, check_memory_size, new_block
from vmm.memory.frames import FrameAllocator, Magazine
from vmm.memory.physical import GuestMemory
from vmm.memory.pool import PAGE, Pool
from vmm.monitor import Stop, StopReason
from vmm.silicon import selftest, tsc
from vmm.silicon.cpu import Cpu
from vmm.silicon.layout import SiliconError
from vmm.state import MachineState

_FILE = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)

#: how long the guest runs before we look at signals and the time
_SLICE_NS = 100_000_000
_FOREVER = 1 << 62


class Machine(Protocol):
    """What is needed of a VirtualMachine here."""

    def run(self, deadline_ns: int) -> Stop: ...
    def next_wake(self) -> int | None: ...
    def feed(self, data: bytes) -> None: ...


@click.command("run")
@click.argument("file", type=_FILE)
@click.option("--initrd", type=_FILE, help="Its initial RAM disk or module.")
@click.option("--append", default="", help="Its command line.")
@click.option("--memory", type=SIZE, default="128M", show_default=True, help="RAM, like 128M or 1G.")
@click.option("--vmm", type=click.Choice(MONITORS), default=MONITORS[0], show_default=True,
              help="The monitor.")
@click.option("--bt-cpu", type=click.Choice(BT_CPUS), default=BT_CPUS[0], show_default=True,
              help="What executes translated code, with --vmm bt.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), metavar="S", help="Fail after so long.")
def run_command(
    file: Path, initrd: Path | None, append: str, memory: int, vmm: str, bt_cpu: BtCpu,
    timeout: float | None
) -> None:
    """Run the kernel FILE in the foreground, its serial console on this terminal; Ctrl-] ends it.

    The exit status is that of the guest: what it wrote to the debug-exit port 0xf4, as (value << 1) | 1; 0
    when it powered off; 1 when it crashed or reset itself; 4 when the time was up.
    """
    files = BootFiles(file.read_bytes(), initrd.read_bytes() if initrd else None, append)
    with machine(files, memory, vmm, bt_cpu) as (guest, cpu), _interrupts_are_flags() as interrupted:
        keys = Keys(sys.stdin.fileno())
        cpu.kicker.on_readable(keys.descriptor)
        with raw_terminal():
            stop = drive(guest, keys, timeout, interrupted)
    sys.exit(exit_status(stop))


@contextmanager
def machine(files: BootFiles, memory_bytes: int, vmm: str = "hw",
            bt_cpu: BtCpu = "native") -> Iterator[tuple[VirtualMachine, Cpu]]:
    """A machine with these files in its memory, on a CPU of its own."""
    try:
        check_memory_size(memory_bytes)
        image = lay_out(files, memory_bytes)
    except (ValueError, Invalid) as error:
        raise CtlError(str(error)) from None
    pages = memory_bytes // PAGE
    # One frame more than the guest can use: the allocator keeps the first.
    pool = Pool((1 + VmBlock.frames_for(memory_bytes) + pages) * PAGE)
    allocator = FrameAllocator(pool)
    block = new_block(allocator, memory_bytes)
    magazine = Magazine(allocator.lend(0, pages))
    memory = GuestMemory(block.p2m, magazine)
    for gpa, data in image.writes:
        memory.write(gpa, data)
    state = MachineState(memory_bytes=memory_bytes, cpu=image.cpu, monitor=vmm)
    try:
        cpu = Cpu(pool)
        selftest.run(cpu)
    except SiliconError as error:
        raise CtlError(str(error)) from None
    translator = Translator(pool, cpu.kicker, bt_cpu)
    try:
        guest = VirtualMachine(cpu, block, magazine, state, write_out, tsc.measure_khz(), translator.engine)
        try:
            yield guest, cpu
        finally:
            guest.close()
    except NoTranslator as error:
        raise CtlError(str(error)) from None
    finally:
        translator.close()
        cpu.close()


class Keys:
    """What is typed, read by a thread of its own, so that it can stop a guest that computes.

    The thread ends with the process; standard input itself keeps its flags, which belong to the shell too.
    """

    def __init__(self, descriptor: int) -> None:
        self._near, self._far = socket.socketpair()
        self._near.setblocking(False)
        threading.Thread(target=self._pump, args=(descriptor,), daemon=True).start()

    @property
    def descriptor(self) -> int:
        """Becomes readable when something was typed."""
        return self._near.fileno()

    def read(self) -> bytes:
        """What was typed since the last call."""
        try:
            return self._near.recv(4096)
        except BlockingIOError:
            return b""

    def wait(self, seconds: float) -> None:
        """Sleep until something is typed, at most so long."""
        try:
            self._near.settimeout(max(seconds, 1e-6))
            self._near.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            pass
        finally:
            self._near.setblocking(False)

    def _pump(self, descriptor: int) -> None:
        while data := os.read(descriptor, 4096):
            self._far.sendall(data)


def drive(guest: Machine, keys: Keys, timeout: float | None, interrupted: threading.Event) -> Stop:
    """Run the guest until it ends.  Raises CtlError when the time is up or the user leaves."""
    deadline = _FOREVER if timeout is None else time.monotonic_ns() + int(timeout * 1e9)
    while True:
        now = time.monotonic_ns()
        if now >= deadline:
            raise CtlError(f"the guest did not end within {timeout:g} seconds", TIMEOUT)
        stop = guest.run(min(now + _SLICE_NS, deadline))
        match stop.reason:
            case StopReason.SLICE | StopReason.KICKED:
                pass
            case StopReason.HALTED:
                wake = min(guest.next_wake() or _FOREVER, deadline, time.monotonic_ns() + _SLICE_NS)
                keys.wait((wake - time.monotonic_ns()) / 1e9)
            case _:
                return stop
        typed = keys.read()
        if LEAVE in typed or interrupted.is_set():
            raise CtlError("left before the guest ended")
        if typed:
            guest.feed(typed)


def exit_status(stop: Stop) -> int:
    """The status of `hostctl run` for the way a guest ended."""
    match stop.reason:
        case StopReason.POWEROFF:
            return 0
        case StopReason.EXIT if stop.status is not None:
            return stop.status & 0xFF
        case StopReason.RESET:
            raise CtlError("the guest reset its machine")
    raise CtlError(f"the guest crashed: {stop.detail or stop.reason.value}")


def write_out(data: bytes) -> None:
    """The guest's console is our standard output."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


@contextmanager
def _interrupts_are_flags() -> Iterator[threading.Event]:
    """Ctrl-C (where the terminal is not raw) and SIGTERM end the run between two slices: an exception that
    came up inside the silicon's callbacks would leave it in the middle of an instruction."""
    flag = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        flag.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
