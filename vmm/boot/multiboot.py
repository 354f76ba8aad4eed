# SPDX-License-Identifier: GPL-2.0-or-later
"""Multiboot 1 kernels (Multiboot Specification 0.6.96): ELF32, or any file by the header's address fields.

The kernel gets the sizes of memory, a command line, the memory map, one module (the initrd) and the name
of the boot loader.  The command line begins with the word `kernel`, as QEMU's begins with the file's name:
kernels skip the first word.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmm.boot import e820, elf, entry
from vmm.boot.errors import BootError
from vmm.boot.layout import Layout
from vmm.state import CpuState

_MAGIC = 0x1BADB002
#: the header lies, 4-aligned, in the first 8 KiB (section 3.1)
_SEARCH_BYTES = 8192

_PAGE_ALIGN, _MEMORY_INFO, _ADDRESS_FIELDS = 1 << 0, 1 << 1, 1 << 16
#: flags 0-15 are demands: a loader that cannot meet one must refuse
_DEMANDS = 0xFFFF
_DEMANDS_MET = _PAGE_ALIGN | _MEMORY_INFO

#: information: memory sizes, command line, modules, memory map, loader name
_INFO_FLAGS = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
_INFO = struct.Struct("<IIIIIII16sIIIIIII20x")
_MODULE = struct.Struct("<IIII")
_MAP_ENTRY = struct.Struct("<IQQI")


@dataclass(frozen=True, slots=True)
class Header:
    offset: int
    flags: int


def find_header(file: bytes) -> Header | None:
    """The Multiboot header of `file`, if it has one with a right checksum."""
    magic = struct.pack("<I", _MAGIC)
    at = file.find(magic, 0, _SEARCH_BYTES)
    while at >= 0:
        if at % 4 == 0 and at + 12 <= min(len(file), _SEARCH_BYTES):
            _, flags, checksum = struct.unpack_from("<III", file, at)
            if (_MAGIC + flags + checksum) & 0xFFFFFFFF == 0:
                return Header(at, flags)
        at = file.find(magic, at + 1, _SEARCH_BYTES)
    return None


def load(layout: Layout, file: bytes, header: Header, initrd: bytes | None, append: bytes) -> CpuState:
    """Lay out the kernel, the module and the information structure; the state at the kernel's entry."""
    unmet = header.flags & _DEMANDS & ~_DEMANDS_MET
    if unmet:
        raise BootError(f"the multiboot kernel demands what is not here, such as video (flags {unmet:#x})")
    if header.flags & _ADDRESS_FIELDS:
        start = _load_addressed(layout, file, header)
    else:
        start = _load_elf(layout, file)
    modules = b""
    if initrd is not None:
        module = layout.place_after(initrd, "the initrd")
        name = layout.place_low(b"initrd\0", "the name of the module")
        modules = _MODULE.pack(module, module + len(initrd), name, 0)
    return entry.multiboot(layout, start, _place_info(layout, append, modules))


def _load_elf(layout: Layout, file: bytes) -> int:
    image = elf.parse(file)
    if image.bits != 32:
        raise BootError("the multiboot kernel is a 64-bit ELF file; multiboot takes a 32-bit one "
                        "(objcopy -O elf32-i386 makes it)")
    image.load(layout)
    return image.entry


def _load_addressed(layout: Layout, file: bytes, header: Header) -> int:
    """By the address fields of the header (section 3.1.3)."""
    if header.offset + 32 > len(file):
        raise BootError("the multiboot kernel is truncated: its header is incomplete")
    header_at, load, load_end, bss_end, start = struct.unpack_from("<5I", file, header.offset + 12)
    file_start = header.offset - (header_at - load)
    file_end = file_start + load_end - load if load_end else len(file)
    if load > header_at or file_start < 0 or not file_start < file_end <= len(file):
        raise BootError("the multiboot kernel is truncated or corrupt: its header asks for bytes "
                        f"{file_start} to {file_end} of a file of {len(file)}")
    data = memoryview(file)[file_start:file_end]
    size = max(len(data), bss_end - load)
    if not load <= start < load + size:
        raise BootError(f"the multiboot kernel is corrupt: its entry point {start:#x} is outside of it")
    layout.put_usable(load, data, "the kernel", size)
    return start


def _place_info(layout: Layout, append: bytes, modules: bytes) -> int:
    """The information structure (section 3.3) and what it points to, in low memory."""
    words = b"kernel " + append if append else b"kernel"
    command_line = layout.place_low(words + b"\0", "the command line")
    loader_name = layout.place_low(b"hostd\0", "the name of the boot loader")
    entries = b"".join(_MAP_ENTRY.pack(_MAP_ENTRY.size - 4, *region) for region in layout.regions)
    memory_map = layout.place_low(entries, "the memory map")
    module_list = layout.place_low(modules, "the list of modules") if modules else 0
    info = _INFO.pack(
        _INFO_FLAGS,
        e820.LOW_END >> 10, (layout.memory_bytes - e820.HIGH_START) >> 10,
        0, command_line,
        len(modules) // _MODULE.size, module_list,
        bytes(16),  # symbols: none
        len(entries), memory_map,
        0, 0, 0,  # drives, configuration table: none
        loader_name, 0,
    )
    return layout.place_low(info, "the multiboot information")
