# SPDX-License-Identifier: GPL-2.0-or-later
"""The initial memory of a guest: firmware tables, kernel, initrd and command line, written into the pool."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from hostd.errors import Invalid
from hostd.memory import MachineMemory
from hostd.model import MonitorName
from vmm.memory.pool import PAGE_SHIFT
from vmm.state import MachineState, encode

if TYPE_CHECKING:
    from vmm.boot.image import BootImage
    from vmm.memory.block import VmBlock
    from vmm.memory.frames import Magazine


#: entropy given to a booting Linux
SEED_BYTES = 32


@dataclass(frozen=True)
class BootFiles:
    """What a guest boots from."""

    kernel: bytes
    initrd: bytes | None
    append: str


def lay_out(files: BootFiles, memory_bytes: int) -> BootImage:
    """What goes where.  Takes its time: call it in a thread.  Raises Invalid."""
    # not needed before the first guest, and not small
    from vmm.boot.image import BootError, load
    from vmm.devices.acpi_tables import build

    tables = build(memory_bytes)
    rsdp = next((gpa for gpa, data in tables if data.startswith(b"RSD PTR ")), 0)
    try:
        return load(files.kernel, initrd=files.initrd, append=files.append, memory_bytes=memory_bytes,
                    acpi_rsdp=rsdp, extra_writes=tables, seed=os.urandom(SEED_BYTES))
    except BootError as error:
        raise Invalid(str(error)) from None


async def fill(memory: MachineMemory, block: VmBlock, image: BootImage, monitor: MonitorName) -> bytes:
    """Write `image` into the empty guest memory `block`; the answer is the machine's state at power-on, for
    `monitor` to run.  Raises Failed when memory is short, and stays so.

    A fill that is cancelled has nevertheless ended when this returns: the block can be freed."""
    pages: set[int] = set()
    for gpa, data in image.writes:
        pages.update(range(gpa >> PAGE_SHIFT, (gpa + len(data) - 1 >> PAGE_SHIFT) + 1))
    await memory.room_for(len(pages))
    magazine = memory.books.frames_for_loading(len(pages))
    try:
        # a start that was given up meanwhile may end here, before the thread has begun
        await trio.to_thread.run_sync(_write, block, magazine, image)
    finally:
        memory.books.loaded(len(pages) - len(magazine))
        memory.books.unused(magazine.rest())
    return encode(MachineState(memory_bytes=block.memory_bytes, cpu=image.cpu, monitor=monitor))


def _write(block: VmBlock, magazine: Magazine, image: BootImage) -> None:
    from vmm.memory.physical import GuestMemory

    guest = GuestMemory(block.p2m, magazine)
    for gpa, data in image.writes:
        guest.write(gpa, data)
