# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel files made up for tests: ELF executables and bzImages with any header and any compression."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from collections.abc import Callable, Sequence

import lz4.block
import zstandard

MAGIC = b"\x7fELF"


def elf32(
    entry: int, segments: Sequence[tuple[int, bytes, int]], *, machine: int = 3, kind: int = 2
) -> bytes:
    """`segments`: (physical address, data, size in memory); virtual addresses are 3 GiB higher."""
    offset = 52 + 32 * len(segments)
    headers, body = b"", b""
    for physical, data, size in segments:
        headers += struct.pack("<8I", 1, offset + len(body), physical + 0xC0000000 & 0xFFFFFFFF, physical,
                               len(data), size, 7, 4096)
        body += data
    ident = MAGIC + bytes([1, 1, 1]) + bytes(9)
    return ident + struct.pack("<HHIIIIIHHHHHH", kind, machine, 1, entry, 52, 0, 0, 52, 32, len(segments),
                               0, 0, 0) + headers + body


def elf64(entry: int, segments: Sequence[tuple[int, bytes, int]]) -> bytes:
    """The same for 64 bits; virtual addresses are where Linux has its kernel."""
    offset = 64 + 56 * len(segments)
    headers, body = b"", b""
    for physical, data, size in segments:
        virtual = physical + 0xFFFFFFFF80000000 & 0xFFFFFFFFFFFFFFFF
        headers += struct.pack("<IIQQQQQQ", 1, 7, offset + len(body), virtual, physical, len(data), size,
                               4096)
        body += data
    ident = MAGIC + bytes([2, 1, 1]) + bytes(9)
    return ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, len(segments),
                               0, 0, 0) + headers + body


def _lz4_legacy(data: bytes) -> bytes:
    out = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), 8 << 20):
        block = lz4.block.compress(data[at : at + (8 << 20)], store_size=False)
        out += struct.pack("<I", len(block)) + block
    return out


def _size(data: bytes) -> bytes:
    return struct.pack("<I", len(data))


#: as in Linux's scripts/Makefile.lib: compressed data, then the unpacked size unless the format ends in it
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "none": lambda data: data,
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "xz": lambda data: lzma.compress(data, lzma.FORMAT_XZ, check=lzma.CHECK_CRC32) + _size(data),
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE) + _size(data),
    "bzip2": lambda data: bz2.compress(data) + _size(data),
    "zstd": lambda data: zstandard.compress(data) + _size(data),
    "lz4": lambda data: _lz4_legacy(data) + _size(data),
}


def bzimage(payload: bytes, *, version: int = 0x20F, setup_sects: int = 2, cmdline_size: int = 2047,
            initrd_addr_max: int = 0x7FFFFFFF, length: int | None = None, loadflags: int = 1,
            code32_start: int = 0x100000, pref_address: int = 0x200000, init_size: int = 0x10000) -> bytes:
    """A bzImage whose unpacking code is 64 bytes of HLT."""
    code = b"\xf4" * 64
    setup = bytearray(((setup_sects or 4) + 1) * 512)
    setup[:0x1F1] = b"\xee" * 0x1F1
    setup[0x1F1] = setup_sects
    setup[0x1FE:0x202] = b"\x55\xaa\xeb\x6a"
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, version)
    struct.pack_into("<I", setup, 0x1F4, -(-(len(code) + len(payload)) // 16))
    setup[0x211] = loadflags
    struct.pack_into("<I", setup, 0x214, code32_start)
    struct.pack_into("<I", setup, 0x22C, initrd_addr_max)
    struct.pack_into("<I", setup, 0x238, cmdline_size)
    struct.pack_into("<II", setup, 0x248, len(code), len(payload) if length is None else length)
    struct.pack_into("<QQI", setup, 0x250, 0xBAD, pref_address, init_size)
    return bytes(setup) + code + payload


def multiboot_header(flags: int = 0, addresses: Sequence[int] = ()) -> bytes:
    """A Multiboot 1 header, with the five address fields if given."""
    magic = 0x1BADB002
    return struct.pack(f"<III{len(addresses)}I", magic, flags, -(magic + flags) & 0xFFFFFFFF, *addresses)
