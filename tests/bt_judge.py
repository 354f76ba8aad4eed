# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's own processor executing examples as they stand: the judge of their translations.

bt_judge.c is a process in compatibility mode; a batch of examples goes there and back by shared memory.
"""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.bt_example import (
    CODE,
    CODE_BYTES,
    CODE_LIMIT,
    DATA,
    DATA_BYTES,
    DS_SELECTOR,
    FLAT_SELECTOR,
    FS_SELECTOR,
    GS_SELECTOR,
    SOIL_BYTES,
    WRITABLE_BYTES,
    Example,
    Outcome,
    State,
)
from vmm.bt.native.block import LIVE_FLAGS
from vmm.x86.faults import Vector
from vmm.x86.flags import RFLAGS_IF, RFLAGS_ONE

SOURCE = Path(__file__).with_suffix(".c")
#: where the judge itself is, and its part of what is shared: examples may not go there
HELPER, HELPER_BYTES = 0x6000_0000, 0x20_0000
#: examples of a batch
SLOTS = 64

_NAMES = {"CODE": CODE, "CODE_BYTES": CODE_BYTES, "CODE_LIMIT": CODE_LIMIT, "DATA": DATA,
          "SOIL_BYTES": SOIL_BYTES, "SLOTS": SLOTS, "HELPER": HELPER, "HELPER_BYTES": HELPER_BYTES,
          "FS_SELECTOR": FS_SELECTOR, "GS_SELECTOR": GS_SELECTOR, "DS_SELECTOR": DS_SELECTOR,
          "FLAT_SELECTOR": FLAT_SELECTOR}
_FLAGS = ["-m32", "-O2", "-ffreestanding", "-mgeneral-regs-only", "-fno-pic", "-fno-stack-protector",
          "-fno-asynchronous-unwind-tables", "-fcf-protection=none", "-static", "-nostdlib", "-no-pie",
          "-Wl,--build-id=none", f"-Wl,-Ttext-segment={HELPER:#x}"]

# struct slot: registers, EFLAGS and EIP before; registers, EFLAGS, EIP, trap, error code and CR2 after;
# code_at, code_bytes, data_from, and three segment bases
_BEFORE, _AFTER, _REST = struct.Struct("<10I"), struct.Struct("<13I"), struct.Struct("<6I")
_BEFORE_FX, _AFTER_AT, _AFTER_FX, _REST_AT, _CODE_AT, _MEMORY_AT, _SLOT = 64, 576, 640, 1152, 1280, 1536, 9728
_SOIL_AT = CODE_BYTES + DATA_BYTES
_SLOTS_AT = _SOIL_AT + SOIL_BYTES
# of a page fault's error code
_WRITE, _FETCH = 2, 16


def build(directory: Path) -> Path:
    """The judge, compiled."""
    program = directory / "judge"
    names = [f"-D{name}={value:#x}" for name, value in _NAMES.items()]
    subprocess.run(["gcc", *_FLAGS, *names, "-o", program, SOURCE], check=True)
    return program


class Judge:
    """The process, and the memory shared with it.  OSError where the host runs no 32-bit programs."""

    def __init__(self, program: Path) -> None:
        fd = os.memfd_create("hostd-examples")
        size = _SLOTS_AT + SLOTS * _SLOT
        os.ftruncate(fd, size)
        self._shared = memoryview(mmap.mmap(fd, size))
        self._process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                                         pass_fds=(fd,))
        self._send(fd)
        self._wait()
        os.close(fd)

    def _send(self, number: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(number.to_bytes(4, "little"))

    def _wait(self) -> None:
        assert self._process.stdout is not None
        if not self._process.stdout.read(1):
            raise RuntimeError(f"the judge ended with status {self._process.wait()}")

    def sow(self, soil: bytes) -> None:
        """What the data of the examples to come are taken from."""
        self._shared[_SOIL_AT:_SOIL_AT + SOIL_BYTES] = soil

    def run(self, examples: Sequence[Example]) -> list[Outcome]:
        """What the processor does; up to SLOTS examples."""
        if not examples:
            return []
        for number, example in enumerate(examples):
            self._put(_SLOTS_AT + number * _SLOT, example)
        self._send(len(examples))
        self._wait()
        return [self._outcome(_SLOTS_AT + number * _SLOT) for number in range(len(examples))]

    def _put(self, at: int, example: Example) -> None:
        shared, state, code = self._shared, example.state, example.code
        _BEFORE.pack_into(shared, at, *state.registers, state.flags | RFLAGS_ONE | RFLAGS_IF, example.eip)
        shared[at + _BEFORE_FX:at + _BEFORE_FX + 512] = state.fx
        _REST.pack_into(shared, at + _REST_AT, example.eip - CODE, len(code), example.data_from,
                        *example.bases)
        shared[at + _CODE_AT:at + _CODE_AT + len(code)] = code

    def _outcome(self, at: int) -> Outcome:
        shared = self._shared
        *registers, flags, eip, vector, error, address = _AFTER.unpack_from(shared, at + _AFTER_AT)
        fx = bytes(shared[at + _AFTER_FX:at + _AFTER_FX + 512])
        memory = bytes(shared[at + _MEMORY_AT:at + _MEMORY_AT + WRITABLE_BYTES])
        access = ""
        if vector == Vector.PF:
            access = "fetch" if error & _FETCH else "write" if error & _WRITE else "read"
        return Outcome(eip - (vector == Vector.BP), vector, address if access else 0, access,
                       State(tuple(registers), flags & LIVE_FLAGS, fx), memory)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
