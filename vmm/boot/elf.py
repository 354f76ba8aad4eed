# SPDX-License-Identifier: GPL-2.0-or-later
"""ELF executables for x86, as far as loading one into memory needs (System V gABI, chapters 4 and 5)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmm.boot.errors import BootError
from vmm.boot.layout import Layout

MAGIC = b"\x7fELF"

_LITTLE_ENDIAN = 1
_EXECUTABLE = 2
_LOAD = 1


@dataclass(frozen=True, slots=True)
class _Class:
    """What differs between the two classes of ELF file."""

    bits: int
    machine: int
    #: after e_ident: type, machine, version, entry, phoff, shoff, flags, ehsize, phentsize, phnum
    header: struct.Struct
    program_header: struct.Struct
    #: where in a program header are: type, offset, vaddr, paddr, filesz, memsz
    fields: tuple[int, int, int, int, int, int]


_CLASSES = {
    1: _Class(32, 3, struct.Struct("<HHIIIIIHHH"), struct.Struct("<8I"), (0, 1, 2, 3, 4, 5)),
    2: _Class(64, 62, struct.Struct("<HHIQQQIHHH"), struct.Struct("<IIQQQQQQ"), (0, 2, 3, 4, 5, 6)),
}


@dataclass(frozen=True, slots=True)
class Segment:
    """A loadable segment: `data`, then zeros up to `memory_size`."""

    physical: int
    virtual: int
    memory_size: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class Elf:
    bits: int
    #: physical address of the first instruction
    entry: int
    segments: tuple[Segment, ...]

    def load(self, layout: Layout) -> None:
        """Put every segment where it wants to be."""
        for segment in self.segments:
            layout.put_usable(segment.physical, segment.data, "the kernel", segment.memory_size)


def parse(file: bytes | memoryview) -> Elf:
    """The loadable parts of an x86 executable.  Raises BootError on anything that cannot be loaded."""
    view = memoryview(file)
    if bytes(view[:4]) != MAGIC:
        raise BootError("the kernel is not an ELF file")
    if len(view) < 16 or view[5] != _LITTLE_ENDIAN or view[4] not in _CLASSES:
        raise BootError("the kernel is an ELF file of an unknown class or byte order; x86 is little-endian")
    form = _CLASSES[view[4]]
    if len(view) < 16 + form.header.size:
        raise BootError("the kernel is a truncated ELF file: its header is incomplete")
    kind, machine, _, entry, offset, _, _, _, entry_size, count = form.header.unpack_from(view, 16)
    if machine != form.machine:
        raise BootError(f"the kernel is an ELF file for machine type {machine}; x86 is 3 or 62")
    if kind != _EXECUTABLE:
        raise BootError("the kernel is an ELF file but not an executable one")
    if count and entry_size != form.program_header.size:
        raise BootError(f"the kernel is a corrupt ELF file: program headers of {entry_size} bytes")
    if offset + count * entry_size > len(view):
        raise BootError("the kernel is a truncated ELF file: its program headers are incomplete")
    headers = [form.program_header.unpack_from(view, offset + i * entry_size) for i in range(count)]
    segments = tuple(_segment(view, *(header[i] for i in form.fields[1:]))
                     for header in headers if header[0] == _LOAD and header[form.fields[5]])
    return Elf(form.bits, _physical_entry(entry, segments), segments)


def _segment(
    view: memoryview, offset: int, virtual: int, physical: int, file_size: int, memory_size: int
) -> Segment:
    if file_size > memory_size:
        raise BootError(f"the kernel is a corrupt ELF file: a segment of {memory_size} bytes has "
                        f"{file_size} in the file")
    if offset + file_size > len(view):
        raise BootError("the kernel is a truncated ELF file: a segment is incomplete")
    return Segment(physical, virtual, memory_size, view[offset : offset + file_size])


def _physical_entry(entry: int, segments: tuple[Segment, ...]) -> int:
    """The entry point as a physical address; linkers of kernels give either sort."""
    for segment in segments:
        if 0 <= entry - segment.physical < segment.memory_size:
            return entry
    for segment in segments:
        if 0 <= entry - segment.virtual < segment.memory_size:
            return entry - segment.virtual + segment.physical
    raise BootError(f"the kernel is a corrupt ELF file: its entry point {entry:#x} is in no segment")
