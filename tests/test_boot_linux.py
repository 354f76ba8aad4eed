# SPDX-License-Identifier: GPL-2.0-or-later
"""Linux: every compression, both protocols, the zero page, and kernels that must be refused."""

from __future__ import annotations

import struct

import pytest

from hostd.ctl import pull
from tests.kernels import COMPRESSORS, bzimage, elf32, elf64
from tests.memory_image import Memory
from vmm.boot import BootError, BootImage, load, unpack
from vmm.state import RSI

MIB = 1 << 20
TEXT = bytes(range(256)) * 64
KERNEL_64 = elf64(0x1000000, [(0x1000000, TEXT, len(TEXT)), (0x1200000, b"data", 0x40000)])
KERNEL_32 = elf32(0x1000040, [(0x1000000, TEXT, 0x20000)])


def _zero_page(image: BootImage) -> bytes:
    return Memory(image).read(image.cpu.gpr[RSI], 4096)


@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize("kernel", [KERNEL_32, KERNEL_64])
def test_every_compression(compression: str, kernel: bytes) -> None:
    image = load(bzimage(COMPRESSORS[compression](kernel)), memory_bytes=64 * MIB)
    assert image.kind == "bzimage"
    assert Memory(image).read(0x1000000, len(TEXT)) == TEXT


@pytest.mark.parametrize("compression", COMPRESSORS)
def test_unpacked_kernels_boot_the_same(compression: str) -> None:
    packed = bzimage(COMPRESSORS[compression](KERNEL_64))
    unpacked = unpack(packed)
    before = load(packed, append="a", initrd=b"i", memory_bytes=64 * MIB)
    after = load(unpacked, append="a", initrd=b"i", memory_bytes=64 * MIB)
    assert KERNEL_64 in unpacked and before.cpu == after.cpu
    zero_page = before.cpu.gpr[RSI]
    assert [write for write in before.writes if write[0] != zero_page] == [
        write for write in after.writes if write[0] != zero_page]


def test_other_kernels_are_unpacked_already() -> None:
    assert unpack(KERNEL_64) is KERNEL_64


def test_64_bit_protocol() -> None:
    cpu = load(KERNEL_64, memory_bytes=64 * MIB).cpu
    assert cpu.rip == 0x1000000
    assert cpu.efer == 0x500 and cpu.cr4 & 0x20 and cpu.cr0 & 0x80000001 == 0x80000001
    assert cpu.rflags == 2
    assert (cpu.cs.selector, cpu.cs.attributes) == (0x10, 0xA9B)
    assert {(s.selector, s.attributes) for s in (cpu.ds, cpu.es, cpu.ss)} == {(0x18, 0xC93)}
    assert (cpu.tr.attributes, cpu.tr.limit) == (0x8B, 0x67)


@pytest.mark.parametrize("memory", [64 * MIB, 1 << 30, (1 << 30) + 4096, 3 << 30])
def test_identity_map_covers_all_of_memory(memory: int) -> None:
    image = load(KERNEL_64, memory_bytes=memory)
    tables = Memory(image)

    def walk(address: int) -> int:
        entry = image.cpu.cr3
        for shift in (39, 30, 21):
            entry = tables.u64((entry & ~0xFFF) + (address >> shift & 511) * 8)
            assert entry & 3 == 3, "present and writable"
        assert entry & 0x80
        return (entry & ~0x1FFFFF) + address % (2 * MIB)

    for address in (0, 0x1234, 0x100000, 0x1000000, memory - 1):
        assert walk(address) == address


def test_32_bit_protocol() -> None:
    cpu = load(bzimage(KERNEL_32), memory_bytes=64 * MIB).cpu
    assert cpu.rip == 0x1000040
    assert cpu.cr0 & 0x80000001 == 1 and cpu.efer == 0 and cpu.rflags == 2
    assert (cpu.cs.selector, cpu.cs.attributes) == (0x10, 0xC9B)
    assert [value for number, value in enumerate(cpu.gpr) if number != RSI] == [0] * 15


def test_virtual_entry_points_are_translated() -> None:
    kernel = elf64(0xFFFFFFFF81000010, [(0x1000000, TEXT, 0x20000)])
    assert load(kernel, memory_bytes=64 * MIB).cpu.rip == 0x1000010


def test_zero_page() -> None:
    image = load(bzimage(KERNEL_64), append="console=ttyS0 x=y", initrd=b"cpio" * 1000, memory_bytes=64 * MIB,
                 acpi_rsdp=0xE0010, extra_writes=[(0xE0010, b"RSD PTR ")])
    page = _zero_page(image)
    memory = Memory(image)
    assert page[:0x70] == bytes(0x70), "nothing of the boot sector gets in"
    assert struct.unpack_from("<Q", page, 0x70) == (0xE0010,)
    assert memory.read(0xE0010, 8) == b"RSD PTR "
    assert page[0x1FE:0x200] == b"\x55\xaa" and page[0x202:0x206] == b"HdrS"
    assert page[0x210] == 0xFF and page[0x211] & 1
    ramdisk, size = struct.unpack_from("<II", page, 0x218)
    assert memory.read(ramdisk, size) == b"cpio" * 1000
    assert ramdisk % 4096 == 0 and ramdisk + size > 63 * MIB
    assert memory.string(*struct.unpack_from("<I", page, 0x228)) == b"console=ttyS0 x=y"
    assert struct.unpack_from("<Q", page, 0x250) == (0,), "no setup_data"
    assert page[0x1E8] == 4
    assert struct.unpack_from("<QQI", page, 0x2D0) == (0, 0x9FC00, 1)
    assert struct.unpack_from("<QQI", page, 0x2D0 + 60) == (0x100000, 63 * MIB, 1)


def test_initrd_stays_below_what_the_kernel_can_reach() -> None:
    image = load(bzimage(KERNEL_64, initrd_addr_max=0x2FFFFFF), initrd=bytes(10000), memory_bytes=128 * MIB)
    ramdisk, size = struct.unpack_from("<II", _zero_page(image), 0x218)
    assert ramdisk + size <= 0x3000000
    image = load(KERNEL_64, initrd=bytes(10000), memory_bytes=3 << 30)
    assert struct.unpack_from("<I", _zero_page(image), 0x218)[0] < 1 << 31


def test_setup_sects_zero_means_four() -> None:
    assert load(bzimage(KERNEL_64, setup_sects=0), memory_bytes=64 * MIB).kind == "bzimage"


LZO = b"\x89LZO\0\r\n\x1a\n" + bytes(100)


@pytest.mark.parametrize("payload", [b"", LZO])
def test_what_cannot_be_unpacked_here_is_left_to_its_own_code(payload: bytes) -> None:
    file = bzimage(payload, code32_start=0x100010)
    image = load(file, initrd=b"i" * 5000, append="x", memory_bytes=64 * MIB)
    code = file[-64 - len(payload):]
    assert (image.kind, image.cpu.rip) == ("bzimage", 0x200010)
    assert image.cpu.cr0 & 0x80000001 == 1 and image.cpu.cs.attributes == 0xC9B
    assert Memory(image).read(0x200000, len(code)) == code
    page = _zero_page(image)
    assert struct.unpack_from("<I", page, 0x214) == (0x200010,)
    assert page[0x1E8] > 0 and struct.unpack_from("<I", page, 0x21C) == (5000,)
    assert unpack(file) is file


def test_nothing_lies_where_a_kernel_unpacks_itself() -> None:
    image = load(bzimage(LZO, init_size=62 * MIB - 8192), initrd=b"i" * 5000, memory_bytes=64 * MIB)
    assert struct.unpack_from("<I", _zero_page(image), 0x218) == (64 * MIB - 8192,)
    with pytest.raises(BootError, match="does not fit"):
        kernel = bzimage(LZO, pref_address=MIB, init_size=63 * MIB - 4096)
        load(kernel, initrd=b"i" * 5000, memory_bytes=64 * MIB)


def test_an_old_kernel_has_no_preferred_address() -> None:
    assert load(bzimage(LZO, version=0x209), memory_bytes=64 * MIB).cpu.rip == 0x100000


@pytest.mark.parametrize(("file", "words"), [
    (bzimage(KERNEL_64, version=0x207), "boot protocol 2.07"),
    (bzimage(KERNEL_64, length=1 << 31), "truncated or corrupt"),
    (bzimage(b"\x1f\x8b" + bytes(100)), "gzip payload is corrupt"),
    (bzimage(b"", code32_start=0xFFFFF), "entry point 0xfffff is outside"),
    (bzimage(b"", code32_start=0x100040), "entry point 0x100040 is outside"),
    (bzimage(b"", loadflags=0), "zImage"),
    (bzimage(b"", init_size=1 << 31), "has only 64 MiB"),
    (bzimage(b"", pref_address=1 << 40), "has only 64 MiB"),
    (bzimage(b"", pref_address=0x90000, init_size=0x20000), "hole"),
    (bzimage(bytes(1000), length=0)[:-100], "truncated: 964 bytes are left of 1072"),
    (bzimage(b"")[:-64], "truncated"),
    (bzimage(COMPRESSORS["xz"](KERNEL_64)[:-100]), "unpacks to .* MiB|payload is corrupt"),
    (bzimage(COMPRESSORS["zstd"](KERNEL_64)[:-4] + struct.pack("<I", 10)), "corrupt"),
    (bzimage(COMPRESSORS["gzip"](KERNEL_64)[:-4] + struct.pack("<I", 1 << 26)), "corrupt"),
    (bzimage(COMPRESSORS["lz4"](KERNEL_64)[:-4] + struct.pack("<I", 1 << 31)), "unpacks to 2048 MiB"),
    (bzimage(COMPRESSORS["bzip2"](b"not an ELF file")), "not an ELF"),
    (bzimage(KERNEL_64)[:700], "truncated or corrupt"),
    (KERNEL_64[:200], "truncated"),
    (KERNEL_64[:30], "truncated"),
    (KERNEL_64[:10], "ELF"),
    (elf32(0x100000, [(0x100000, TEXT, 10)]), "corrupt ELF"),
    (elf32(0x500000, [(0x100000, TEXT, len(TEXT))]), "entry point"),
    (elf32(0x100000, []), "entry point"),
    (elf32(0x100000, [(0x100000, TEXT, len(TEXT))], machine=40), "machine type 40"),
    (elf32(0x100000, [(0x100000, TEXT, len(TEXT))], kind=3), "executable"),
    (elf32(0x100000, [(0x100000, TEXT, len(TEXT)), (0x101000, TEXT, len(TEXT))]), "overlaps"),
    (elf64(0x100000, [(0x100000, TEXT, 1 << 40)]), "has only 64 MiB"),
    (elf64(1 << 63, [(1 << 63, TEXT, len(TEXT))]), "has only 64 MiB"),
])
def test_bad_kernels(file: bytes, words: str) -> None:
    with pytest.raises(BootError, match=words) as caught:
        load(file, memory_bytes=64 * MIB)
    assert "\n" not in str(caught.value)


def test_decompression_bombs_stop_at_the_memory() -> None:
    zeros = bytes(64 * MIB)
    for compression in ("gzip", "xz", "zstd"):
        with pytest.raises(BootError, match="unpacks to 64 MiB"):
            load(bzimage(COMPRESSORS[compression](zeros)), memory_bytes=16 * MIB)


@pytest.mark.parametrize("compression", sorted(set(COMPRESSORS) - {"none"}))
def test_bombs_that_lie_about_their_size(compression: str) -> None:
    bomb = COMPRESSORS[compression](bytes(16 * MIB))[:-4] + struct.pack("<I", 4096)
    with pytest.raises(BootError, match="payload is corrupt"):
        load(bzimage(bomb), memory_bytes=64 * MIB)


def test_initrd_larger_than_memory() -> None:
    with pytest.raises(BootError, match="initrd of 67108864 bytes does not fit"):
        load(KERNEL_64, initrd=bytes(64 * MIB), memory_bytes=64 * MIB)


def test_kernel_larger_than_memory() -> None:
    with pytest.raises(BootError, match=r"the kernel needs memory .* only 16 MiB"):
        load(KERNEL_64, memory_bytes=16 * MIB)


@pytest.mark.slow
def test_debian_kernel() -> None:
    try:
        debian = pull.build_debian()
    except pull.PullError as error:
        pytest.skip(f"no Debian kernel to be had: {error}")
    image = load(debian.kernel.read_bytes(), initrd=debian.initrd.read_bytes(), append=debian.append,
                 memory_bytes=128 * MIB)
    assert image.kind == "bzimage"
    assert image.cpu.rip == 0x1000000 and image.cpu.cs.attributes == 0xA9B
    assert Memory(image).read(image.cpu.rip, 4096) != bytes(4096)
