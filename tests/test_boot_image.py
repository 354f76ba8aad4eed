# SPDX-License-Identifier: GPL-2.0-or-later
"""`load` as a whole: detection, flat images, command lines, and files nobody should trust."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels import COMPRESSORS, bzimage, elf32, elf64, multiboot_header
from vmm import guests
from vmm.boot import BootError, BootImage, load, unpack
from vmm.state import RDX, RSP

MIB = 1 << 20
SECTOR = b"\xeb\xfe".ljust(510, b"\0") + b"\x55\xaa"
KERNEL = elf64(0x1000000, [(0x1000000, b"\xf4" * 100, 4096)])


def test_flat_image_is_entered_like_a_boot_sector() -> None:
    image = load(SECTOR + b"more", memory_bytes=2 * MIB)
    cpu = image.cpu
    assert image.kind == "flat" and image.writes == ((0x7C00, SECTOR + b"more"),)
    assert (cpu.cs.selector, cpu.cs.base, cpu.cs.attributes, cpu.rip) == (0, 0, 0x9B, 0x7C00)
    assert cpu.cr0 & 1 == 0 and cpu.rflags == 2
    assert cpu.gpr[RDX] == 0x80 and cpu.gpr[RSP] == 0x7C00
    assert (cpu.idtr.base, cpu.idtr.limit) == (0, 0x3FF)


def test_flat_image_takes_neither_initrd_nor_command_line() -> None:
    for extra in ({"append": "x"}, {"initrd": b"x"}):
        with pytest.raises(BootError, match="neither"):
            load(SECTOR, memory_bytes=2 * MIB, **extra)  # type: ignore[arg-type]


def test_flat_image_too_large() -> None:
    with pytest.raises(BootError, match="hole"):
        load(SECTOR + bytes(1 << 20), memory_bytes=2 * MIB)


@pytest.mark.parametrize("kernel", [b"", b"\0", b"hello", bytes(100_000), b"\x7fEL", b"MZ" + bytes(10000)])
def test_what_is_no_kernel(kernel: bytes) -> None:
    with pytest.raises(BootError):
        load(kernel, memory_bytes=16 * MIB)


def test_empty_initrd() -> None:
    with pytest.raises(BootError, match="initrd is an empty file"):
        load(KERNEL, initrd=b"", memory_bytes=64 * MIB)


@pytest.mark.parametrize(("append", "words"), [
    ("a\0b", "control character"),
    ("a\nb", "control character"),
    ("\x7f", "control character"),
    ("\ud800", "not valid text"),
    ("x" * 2048, "2048 bytes"),
    ("ä" * 1024, "2048 bytes"),
])
def test_bad_command_lines(append: str, words: str) -> None:
    for kernel in (KERNEL, guests.read("idle")):
        with pytest.raises(BootError, match=words):
            load(kernel, append=append, memory_bytes=64 * MIB)


def test_longest_command_line() -> None:
    load(KERNEL, append="x" * 2047, memory_bytes=64 * MIB)
    with pytest.raises(BootError, match="at most 255"):
        load(bzimage(KERNEL, cmdline_size=255), append="x" * 256, memory_bytes=64 * MIB)


def test_firmware_tables_and_kernels_do_not_overlap() -> None:
    kernel = elf32(0x9000, [(0x9000, b"\xf4" * 100, 100)])
    image = load(kernel, memory_bytes=16 * MIB, extra_writes=[(0xE0000, b"table"), (0x400, b"bda")])
    assert (0xE0000, b"table") in image.writes and (0x400, b"bda") in image.writes
    with pytest.raises(BootError, match="overlaps a firmware table"):
        load(kernel, memory_bytes=16 * MIB, extra_writes=[(0x9010, b"table")])


def _check(image: BootImage, memory_bytes: int) -> None:
    spans = sorted((start, start + len(data)) for start, data in image.writes)
    assert all(0 <= start < end <= memory_bytes for start, end in spans)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    assert 0 <= image.cpu.rip < memory_bytes


_BASES = [
    *(bzimage(compress(KERNEL)) for compress in COMPRESSORS.values()),
    KERNEL,
    elf32(0x1000000, [(0x1000000, b"\xf4" * 100, 4096)]),
    elf32(0x100020, [(0x100000, multiboot_header(3) + bytes(64), 4096)]),
    multiboot_header(1 << 16, (0x200000, 0x200000, 0, 0, 0x200000)) + bytes(64),
    SECTOR,
    *(guests.read(name) for name in guests.names()),
]


@given(
    base=st.sampled_from(_BASES),
    edits=st.lists(st.tuples(st.integers(0, 3000), st.binary(min_size=1, max_size=8)), max_size=4),
    cut=st.one_of(st.none(), st.integers(0, 5000)),
    initrd=st.sampled_from((None, b"initrd", bytes(3 * MIB))),
    memory_bytes=st.sampled_from((2 * MIB, 17 * MIB, 64 * MIB)),
)
def test_damaged_files_load_or_are_refused(
    base: bytes, edits: list[tuple[int, bytes]], cut: int | None, initrd: bytes | None, memory_bytes: int
) -> None:
    file = bytearray(base[:cut])
    for at, data in edits:
        start = at % (len(file) + 1)
        file[start : start + len(data)] = data
    try:
        image = load(bytes(file), initrd=initrd, append="x=1", memory_bytes=memory_bytes)
        load(unpack(bytes(file)), initrd=initrd, append="x=1", memory_bytes=memory_bytes)
    except BootError as error:
        assert "\n" not in str(error) and len(str(error)) < 200
        return
    _check(image, memory_bytes)
