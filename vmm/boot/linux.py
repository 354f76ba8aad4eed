# SPDX-License-Identifier: GPL-2.0-or-later
"""Linux kernels: bzImage and vmlinux, by the 32-bit and 64-bit protocols of Documentation/arch/x86/boot.rst.

The code of a bzImage that would unpack the kernel inside the guest is not used: the payload, an ELF file, is
unpacked here, laid out at its own addresses and entered directly, with the machine state of the protocol.
Which protocol that is, the ELF file's class decides.

A bzImage without a payload (memtest86+ is one), or with one packed in a way unknown here (LZO), is loaded as
it is and entered by the 32-bit protocol, as any boot loader does it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmm.boot import elf, entry, payload
from vmm.boot.errors import BootError
from vmm.boot.layout import Data, Layout
from vmm.state import CpuState

#: the setup header begins here, in the file and in the zero page alike
_HEADER = 0x1F1
#: where the zero page has the next thing after the header, edd_mbr_sig_buffer
_HEADER_END = 0x290
_SECTOR = 512

#: protocol 2.08 (Linux 2.6.26) was the first to say where the payload is
_VERSION_MIN = 0x208
_LOADED_HIGH = 1 << 0
_LOADER_UNDEFINED = 0xFF
_VIDEO_NORMAL = 0xFFFF
#: with 2.10 (Linux 2.6.31) came a preferred address, and the memory wanted there
_VERSION_PREFERENCES = 0x20A
#: where everything else is loaded
_LOAD_ADDRESS = 0x100000

_E820_ENTRY = struct.Struct("<QQI")
# struct setup_data: next, type, length; then the data
_SETUP_RECORD = struct.Struct("<QII")
_SETUP_RNG_SEED = 9

#: no kernel unpacks to more, whatever the machine has: the host's memory is at stake
_UNPACKED_MAX = 512 << 20


@dataclass(frozen=True, slots=True)
class _Field:
    """A field of struct boot_params: its offset, which is also its offset in a bzImage for the header's."""

    offset: int
    format: str

    def get(self, page: Data | bytearray) -> int:
        value: int = struct.unpack_from(self.format, page, self.offset)[0]
        return value

    def set(self, page: bytearray, value: int) -> None:
        struct.pack_into(self.format, page, self.offset, value)


_ACPI_RSDP = _Field(0x070, "<Q")
_E820_ENTRIES = _Field(0x1E8, "<B")
_E820_TABLE = 0x2D0
_SETUP_SECTS = _Field(0x1F1, "<B")
_SYSSIZE = _Field(0x1F4, "<I")
_VID_MODE = _Field(0x1FA, "<H")
_BOOT_FLAG = _Field(0x1FE, "<H")
_JUMP_LENGTH = _Field(0x201, "<B")
_MAGIC = _Field(0x202, "<I")
_VERSION = _Field(0x206, "<H")
_TYPE_OF_LOADER = _Field(0x210, "<B")
_LOADFLAGS = _Field(0x211, "<B")
_CODE32_START = _Field(0x214, "<I")
_RAMDISK_IMAGE = _Field(0x218, "<I")
_RAMDISK_SIZE = _Field(0x21C, "<I")
_CMD_LINE_PTR = _Field(0x228, "<I")
_INITRD_ADDR_MAX = _Field(0x22C, "<I")
_KERNEL_ALIGNMENT = _Field(0x230, "<I")
_CMDLINE_SIZE = _Field(0x238, "<I")
_PAYLOAD_OFFSET = _Field(0x248, "<I")
_PAYLOAD_LENGTH = _Field(0x24C, "<I")
_SETUP_DATA = _Field(0x250, "<Q")
_PREF_ADDRESS = _Field(0x258, "<Q")
_INIT_SIZE = _Field(0x260, "<I")

_BOOT_FLAG_VALUE = 0xAA55
_MAGIC_VALUE = 0x53726448  # "HdrS"


def is_bzimage(file: bytes) -> bool:
    """Whether `file` has a Linux setup header."""
    marks = ((_BOOT_FLAG, _BOOT_FLAG_VALUE), (_MAGIC, _MAGIC_VALUE))
    return len(file) >= _HEADER_END and all(field.get(file) == value for field, value in marks)


def is_vmlinux(file: bytes) -> bool:
    """Whether `file` can be an unpacked kernel."""
    return file.startswith(elf.MAGIC)


def _packed(file: bytes) -> memoryview | None:
    """The payload of a bzImage; None if there is none that can be unpacked here."""
    version = _VERSION.get(file)
    if version < _VERSION_MIN:
        raise BootError(f"the kernel speaks boot protocol {version >> 8}.{version & 0xFF:02}; "
                        "2.08 (Linux 2.6.26) is the oldest known here")
    start = _setup_bytes(file) + _PAYLOAD_OFFSET.get(file)
    length = _PAYLOAD_LENGTH.get(file)
    if start + length > len(file):
        raise BootError(f"the kernel is truncated or corrupt: its payload should be bytes {start} to "
                        f"{start + length} of a file of {len(file)}")
    packed = memoryview(file)[start : start + length]
    return packed if payload.is_known(packed) else None


def _setup_bytes(file: bytes) -> int:
    """Length of the real-mode part, the boot sector included."""
    return ((_SETUP_SECTS.get(file) or 4) + 1) * _SECTOR


def decompress_bzimage(file: bytes) -> Data:
    """The kernel proper inside of a bzImage: an ELF file."""
    packed = _packed(file)
    if packed is None:
        raise BootError("the kernel has no payload, or one packed in a way unknown here")
    return payload.unpack(packed, _UNPACKED_MAX)


def unpack(file: bytes) -> bytes:
    """An equivalent of the bzImage `file` that boots here without the work of decompression.

    It is a bzImage again, with the same setup header and the plain ELF file as its payload; only its own
    unpacking code is gone, which nobody here would run.  Without a known payload, it is `file` itself.
    """
    if _packed(file) is None:
        return file
    kernel = decompress_bzimage(file)
    setup = bytearray(file[: _setup_bytes(file)])
    _PAYLOAD_OFFSET.set(setup, 0)
    _PAYLOAD_LENGTH.set(setup, len(kernel))
    _SYSSIZE.set(setup, -(-len(kernel) // 16))
    return bytes(setup) + kernel


def load(layout: Layout, file: bytes, initrd: bytes | None, append: bytes, acpi_rsdp: int,
         seed: bytes = b"") -> CpuState:
    """Lay out kernel, initrd, command line and zero page; the state at the kernel's entry.

    `seed` starts the kernel's random number generator (kernels from 6.0 on take one): without it an idle
    guest wakes up again and again to look for entropy.
    """
    page = bytearray(4096)
    kernel: Data | None = file
    if is_bzimage(file):
        header_end = min(_MAGIC.offset + _JUMP_LENGTH.get(file), _HEADER_END)
        page[_HEADER:header_end] = file[_HEADER:header_end]
        kernel = packed = _packed(file)
        if packed is not None:
            kernel = payload.unpack(packed, min(layout.memory_bytes, _UNPACKED_MAX))
    else:
        _default_header(page)
    if len(append) > _CMDLINE_SIZE.get(page):
        raise BootError(f"the kernel command line has {len(append)} bytes; this kernel takes at most "
                        f"{_CMDLINE_SIZE.get(page)}")
    if kernel is None:
        bits, start = 32, _load_whole(layout, file, page)
    else:
        image = elf.parse(kernel)
        image.load(layout)
        bits, start = image.bits, image.entry

    _VID_MODE.set(page, _VIDEO_NORMAL)
    _TYPE_OF_LOADER.set(page, _LOADER_UNDEFINED)
    _LOADFLAGS.set(page, _LOADED_HIGH)
    if seed:
        record = _SETUP_RECORD.pack(0, _SETUP_RNG_SEED, len(seed)) + seed
        _SETUP_DATA.set(page, layout.place_low(record, "the random seed"))
    else:
        _SETUP_DATA.set(page, 0)
    _ACPI_RSDP.set(page, acpi_rsdp)
    _CMD_LINE_PTR.set(page, layout.place_low(append + b"\0", "the command line"))
    if initrd is not None:
        _RAMDISK_IMAGE.set(page, layout.place_high(initrd, "the initrd", _INITRD_ADDR_MAX.get(page) + 1))
        _RAMDISK_SIZE.set(page, len(initrd))
    _E820_ENTRIES.set(page, len(layout.regions))
    for i, region in enumerate(layout.regions):
        _E820_ENTRY.pack_into(page, _E820_TABLE + i * _E820_ENTRY.size, *region)
    zero_page = layout.place_low(bytes(page), "the zero page", align=4096)
    enter = entry.linux_64 if bits == 64 else entry.linux_32
    return enter(layout, start, zero_page)


def _load_whole(layout: Layout, file: bytes, page: bytearray) -> int:
    """Lay out the protected-mode part of a bzImage; its 32-bit entry point, which the header gets too."""
    code = memoryview(file)[_setup_bytes(file) :]
    if not len(code) or len(code) < (_SYSSIZE.get(file) - 1) * 16:
        raise BootError(f"the kernel is truncated: {len(code)} bytes are left of {_SYSSIZE.get(file) * 16}")
    if not _LOADFLAGS.get(file) & _LOADED_HIGH:
        raise BootError("the kernel is a zImage, made for loading below 1 MiB; a bzImage can be booted")
    start, size = _LOAD_ADDRESS, 0
    if _VERSION.get(file) >= _VERSION_PREFERENCES:
        start, size = _PREF_ADDRESS.get(file), _INIT_SIZE.get(file)
    entry_point = _CODE32_START.get(file)
    offset = entry_point - _LOAD_ADDRESS
    if not 0 <= offset < len(code):
        raise BootError(f"the kernel is corrupt: its entry point {entry_point:#x} is outside of it")
    layout.put_usable(start, code, "the kernel", size)
    _CODE32_START.set(page, start + offset)
    return start + offset


def _default_header(page: bytearray) -> None:
    """A setup header for a vmlinux, which has none: what the kernels of the last fifteen years say."""
    _BOOT_FLAG.set(page, _BOOT_FLAG_VALUE)
    _MAGIC.set(page, _MAGIC_VALUE)
    _VERSION.set(page, 0x20F)
    _INITRD_ADDR_MAX.set(page, 0x7FFFFFFF)
    _KERNEL_ALIGNMENT.set(page, 0x200000)
    _CMDLINE_SIZE.set(page, 2047)
