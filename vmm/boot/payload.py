# SPDX-License-Identifier: GPL-2.0-or-later
"""The compressed payloads of bzImages, unpacked by the host's libraries.

Linux ends each payload with its unpacked size in four bytes (gzip's own trailer is just that), so a payload
never unpacks to more than it declares, and what it declares is checked first.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable

import lz4.block
import zstandard

from vmm.boot import elf
from vmm.boot.errors import BootError
from vmm.boot.layout import Data

#: what a decompressor may use for its dictionary; `xz -9` and `zstd -22` of kernel builds stay below
_WINDOW_BYTES = 256 << 20
#: lz4's legacy frames have blocks of this much unpacked data
_LZ4_BLOCK = 8 << 20

#: what the libraries raise on data they cannot read
_UNREADABLE = (zlib.error, lzma.LZMAError, zstandard.ZstdError, lz4.block.LZ4BlockError, OSError, ValueError)


def _gzip(data: Data, size: int) -> bytes:
    return zlib.decompressobj(wbits=31).decompress(data, size)


def _xz(data: Data, size: int) -> bytes:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_WINDOW_BYTES).decompress(data, size)


def _lzma(data: Data, size: int) -> bytes:
    return lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_WINDOW_BYTES).decompress(data, size)


def _bzip2(data: Data, size: int) -> bytes:
    return bz2.BZ2Decompressor().decompress(data, size)


def _zstd(data: Data, size: int) -> bytes:
    decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
    with decompressor.stream_reader(data) as reader:
        return reader.read(size)


def _lz4(data: Data, size: int) -> bytes:
    """The legacy frame of `lz4 -l`: a magic number, then blocks, each after its packed size."""
    blocks: list[bytes] = []
    at, left = 4, size
    while left > 0 and at + 4 < len(data):
        packed = int.from_bytes(data[at : at + 4], "little")
        block = lz4.block.decompress(data[at + 4 : at + 4 + packed], uncompressed_size=min(_LZ4_BLOCK, left))
        blocks.append(block)
        at, left = at + 4 + packed, left - len(block)
    return b"".join(blocks)


#: magic bytes -> name, decompressor of at most that many bytes
_FORMATS: dict[bytes, tuple[str, Callable[[Data, int], bytes]]] = {
    b"\x1f\x8b": ("gzip", _gzip),
    b"\xfd7zXZ\0": ("xz", _xz),
    b"\x5d\0\0": ("lzma", _lzma),
    b"BZh": ("bzip2", _bzip2),
    b"\x28\xb5\x2f\xfd": ("zstd", _zstd),
    b"\x02\x21\x4c\x18": ("lz4", _lz4),
}


def is_known(data: memoryview) -> bool:
    """Whether a payload begins like one that `unpack` takes."""
    return any(bytes(data[: len(magic)]) == magic for magic in (elf.MAGIC, *_FORMATS))


def unpack(data: memoryview, limit: int) -> Data:
    """The kernel proper, an ELF file of at most `limit` bytes, from a payload that `is_known`."""
    if bytes(data[:4]) == elf.MAGIC:
        return data
    name, decompress = next(form for magic, form in _FORMATS.items() if bytes(data[: len(magic)]) == magic)
    return _checked(name, decompress, data, limit)


def _checked(name: str, decompress: Callable[[Data, int], bytes], data: memoryview, limit: int) -> bytes:
    size = int.from_bytes(data[-4:], "little")
    if size > limit:
        raise BootError(f"the kernel unpacks to {size >> 20} MiB, and may have {limit >> 20} MiB at most")
    try:
        # One byte more than declared shows a lie, and is never 0, which zlib takes for "no limit".
        unpacked = decompress(data, size + 1)
    except _UNREADABLE as error:
        raise BootError(f"the kernel's {name} payload is corrupt: {error}") from None
    if len(unpacked) != size:
        raise BootError(f"the kernel's {name} payload is corrupt: it declares {size} bytes and "
                        f"unpacks to {'more' if len(unpacked) > size else len(unpacked)}")
    return unpacked
