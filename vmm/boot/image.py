# SPDX-License-Identifier: GPL-2.0-or-later
"""From files to a machine ready to run: the kind of kernel, and what memory and processor hold at entry.

Nothing here touches a guest: `load` returns what to write and the state to start from.  Files are untrusted;
whatever is wrong with them is a `BootError`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vmm.boot import flat, linux, multiboot
from vmm.boot.errors import BootError
from vmm.boot.layout import Layout, Write, put_all
from vmm.state import CpuState

__all__ = ["APPEND_MAX", "BootError", "BootImage", "load", "unpack"]

#: longest command line, as in Linux on x86
APPEND_MAX = 2047


@dataclass(frozen=True, slots=True)
class BootImage:
    """A machine at its first instruction.

    `writes` are disjoint and inside the memory; everything else must read as zero (a fresh machine's memory
    does), since uninitialized data of kernels and the unused parts of tables are not written.
    """

    kind: str
    writes: tuple[Write, ...]
    cpu: CpuState


def load(
    kernel: bytes,
    *,
    initrd: bytes | None = None,
    append: str = "",
    memory_bytes: int,
    acpi_rsdp: int = 0,
    seed: bytes = b"",
    extra_writes: Iterable[Write] = (),
) -> BootImage:
    """Lay out `kernel`, of whichever kind, with its initrd and command line in `memory_bytes` of memory.

    `extra_writes` are firmware tables that others made; `seed` (32 random bytes) is for
    Linux's random number generator; `acpi_rsdp` is where the ACPI ones begin, for kernels
    that are told instead of searching.
    """
    layout = Layout(memory_bytes)
    put_all(layout, extra_writes, "a firmware table")
    command_line = _command_line(append)
    if not kernel:
        raise BootError("the kernel is an empty file")
    if initrd is not None and not initrd:
        raise BootError("the initrd is an empty file")
    if linux.is_bzimage(kernel):
        kind, cpu = "bzimage", linux.load(layout, kernel, initrd, command_line, acpi_rsdp, seed)
    elif header := multiboot.find_header(kernel):
        kind, cpu = "multiboot", multiboot.load(layout, kernel, header, initrd, command_line)
    elif linux.is_vmlinux(kernel):
        kind, cpu = "vmlinux", linux.load(layout, kernel, initrd, command_line, acpi_rsdp, seed)
    elif flat.is_flat(kernel):
        kind, cpu = "flat", flat.load(layout, kernel, initrd, command_line)
    else:
        raise BootError("the kernel is of no kind known here: bzImage, ELF, multiboot, or a flat image "
                        "beginning with a boot sector")
    return BootImage(kind, tuple(layout.writes), cpu)


def unpack(kernel: bytes) -> bytes:
    """An equivalent kernel file that `load` need not decompress; `kernel` itself if it is one already."""
    return linux.unpack(kernel) if linux.is_bzimage(kernel) else kernel


def _command_line(append: str) -> bytes:
    """The command line as bytes.  Raises BootError for one that kernels would misread."""
    if any(ord(c) < 0x20 or ord(c) == 0x7F for c in append):
        raise BootError("the kernel command line has a control character in it")
    try:
        encoded = append.encode()
    except UnicodeEncodeError:
        raise BootError("the kernel command line is not valid text") from None
    if len(encoded) > APPEND_MAX:
        raise BootError(f"the kernel command line has {len(encoded)} bytes; at most {APPEND_MAX} are taken")
    return encoded
