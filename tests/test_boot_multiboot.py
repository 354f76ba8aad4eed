# SPDX-License-Identifier: GPL-2.0-or-later
"""Multiboot 1: what a kernel finds in memory and in the registers, and headers that must be refused."""

from __future__ import annotations

import struct

import pytest

from tests.kernels import elf32, elf64, multiboot_header
from tests.memory_image import Memory
from vmm.boot import BootError, load
from vmm.state import RAX, RBX

MIB = 1 << 20
CODE = b"\xf4" * 64


def _elf(flags: int = 3) -> bytes:
    return elf32(0x100020, [(0x100000, multiboot_header(flags) + bytes(20) + CODE, 0x3000)])


def test_elf_kernel_is_entered_flat_with_the_magic() -> None:
    image = load(_elf(), memory_bytes=16 * MIB)
    cpu = image.cpu
    assert image.kind == "multiboot"
    assert cpu.rip == 0x100020 and cpu.gpr[RAX] == 0x2BADB002
    assert cpu.cr0 & 0x80000001 == 1 and cpu.rflags == 2 and cpu.efer == 0
    assert (cpu.cs.attributes, cpu.cs.limit, cpu.cs.base) == (0xC9B, 0xFFFFFFFF, 0)
    assert {(s.attributes, s.limit, s.base) for s in (cpu.ss, cpu.ds, cpu.es, cpu.fs, cpu.gs)} == {
        (0xC93, 0xFFFFFFFF, 0)}
    assert (cpu.tr.attributes, cpu.tr.limit) == (0x8B, 0x67)
    assert Memory(image).read(0x100020, 64) == CODE


def test_gdt_in_memory_says_what_the_segment_registers_say() -> None:
    image = load(_elf(), memory_bytes=16 * MIB)
    cpu = image.cpu
    gdt = Memory(image).read(cpu.gdtr.base, cpu.gdtr.limit + 1)
    for segment in (cpu.cs, cpu.ds, cpu.tr):
        low, high = struct.unpack_from("<II", gdt, segment.selector)
        limit = low & 0xFFFF | high & 0xF0000
        assert high >> 8 & 0xFF | high >> 20 << 8 & 0xF00 == segment.attributes
        assert (limit << 12 | 0xFFF if high >> 23 & 1 else limit) == segment.limit
        assert low >> 16 | high << 16 & 0xFF0000 | high & 0xFF000000 == segment.base


def test_information_structure() -> None:
    image = load(_elf(), append="limit=5 loop", initrd=b"module data", memory_bytes=16 * MIB)
    memory = Memory(image)
    info = image.cpu.gpr[RBX]
    flags, lower, upper, _, command_line, modules, module_list = struct.unpack("<7I", memory.read(info, 28))
    assert flags == 0b1001001101
    assert (lower, upper) == (639, 15 * 1024)
    assert memory.string(command_line) == b"kernel limit=5 loop"
    assert modules == 1
    start, end, name, _ = struct.unpack("<4I", memory.read(module_list, 16))
    assert start % 4096 == 0 and start >= 0x103000
    assert memory.read(start, end - start) == b"module data"
    assert memory.string(name) == b"initrd"
    map_length, map_at = struct.unpack("<II", memory.read(info + 44, 8))
    entries = list(struct.iter_unpack("<IQQI", memory.read(map_at, map_length)))
    assert entries[0] == (20, 0, 0x9FC00, 1) and entries[-1] == (20, 0x100000, 15 * MIB, 1)
    assert memory.string(memory.u32(info + 64)) == b"hostd"


def test_without_initrd_there_are_no_modules() -> None:
    image = load(_elf(), memory_bytes=16 * MIB)
    assert Memory(image).u32(image.cpu.gpr[RBX] + 20) == 0


def test_header_anywhere_in_the_first_8_kib_but_aligned() -> None:
    addresses = (0x100000 + 8180 - 20, 0x100000, 0, 0, 0x100000)
    header = multiboot_header(1 << 16, addresses)
    assert load(bytes(8160) + header + CODE, memory_bytes=16 * MIB).kind == "multiboot"
    for before in (8161, 8192):
        with pytest.raises(BootError, match="no kind known"):
            load(bytes(before) + header + CODE, memory_bytes=16 * MIB)


def test_address_fields_win_over_the_file_format() -> None:
    # load address 2 MiB, the header 16 bytes in, 48 bytes of it loaded, 4 KiB of bss
    header = multiboot_header(1 << 16 | 3, (0x200010, 0x200000, 0x200030, 0x201000, 0x200004))
    image = load(b"0123456789abcdef" + header + CODE, memory_bytes=16 * MIB, initrd=b"i")
    assert image.cpu.rip == 0x200004
    assert image.writes[0] == (0x200000, (b"0123456789abcdef" + header)[:48])
    assert any(start == 0x201000 for start, _ in image.writes), "the module lies after the bss"


@pytest.mark.parametrize(("fields", "words"), [
    ((0x200000, 0x200010, 0, 0, 0x200010), "truncated or corrupt"),  # starts after its own header
    ((0x200100, 0x200000, 0, 0, 0x200000), "truncated or corrupt"),  # starts before the file
    ((0x200000, 0x200000, 0x300000, 0, 0x200000), "truncated or corrupt"),  # ends after the file
    ((0x200000, 0x200000, 0x1FFFFF, 0, 0x200000), "truncated or corrupt"),  # ends before it starts
    ((0x200000, 0x200000, 0, 0, 0x100000), "entry point"),
    ((0xFFFFF000, 0xFFFFF000, 0, 0, 0xFFFFF000), "has only"),
    ((0xA0000, 0xA0000, 0, 0, 0xA0000), "hole"),
])
def test_bad_address_fields(fields: tuple[int, ...], words: str) -> None:
    with pytest.raises(BootError, match=words):
        load(multiboot_header(1 << 16, fields) + CODE, memory_bytes=16 * MIB)


def test_truncated_address_fields() -> None:
    with pytest.raises(BootError, match="truncated"):
        load(multiboot_header(1 << 16, (0x200000,)), memory_bytes=16 * MIB)


@pytest.mark.parametrize("flag", [1 << 2, 1 << 3, 1 << 15])
def test_unmet_demands_are_refused(flag: int) -> None:
    with pytest.raises(BootError, match="demands"):
        load(_elf(flag), memory_bytes=16 * MIB)


def test_optional_flags_are_ignored() -> None:
    assert load(_elf(1 << 17 | 1 << 31), memory_bytes=16 * MIB).kind == "multiboot"


def test_64_bit_elf_is_refused_with_the_cure() -> None:
    with pytest.raises(BootError, match="objcopy"):
        load(elf64(0x100000, [(0x100000, multiboot_header() + CODE, 100)]), memory_bytes=16 * MIB)


def test_wrong_checksum_is_no_header() -> None:
    broken = bytearray(_elf())
    broken[broken.index(struct.pack("<I", 0x1BADB002)) + 8] ^= 1
    assert load(bytes(broken), memory_bytes=16 * MIB).kind == "vmlinux"
