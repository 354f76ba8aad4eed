# SPDX-License-Identifier: GPL-2.0-or-later
"""`mmap` at chosen addresses, which Python's own module does not offer."""

from __future__ import annotations

import ctypes
import mmap
import os

PAGE = 4096

NONE, READ, WRITE, EXEC = 0, mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x1, 0x2, 0x10, 0x20, 0x4000
_ANONYMOUS = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE
_FAILED = (1 << 64) - 1
MADV_DONTNEED, MADV_NOHUGEPAGE = 4, 15

# the interpreter's lock is kept: these calls are short, and giving it up costs as much as they do
_libc = ctypes.PyDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_uint64
_mmap.argtypes = (ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_munmap, _mprotect, _madvise = _libc.munmap, _libc.mprotect, _libc.madvise
_munmap.argtypes = (ctypes.c_uint64, ctypes.c_size_t)
_mprotect.argtypes = _madvise.argtypes = (ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int)


def _fail(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


def reserve(length: int, prot: int = NONE) -> int:
    """Address of `length` bytes of zeros that cost nothing until they are written."""
    address: int = _mmap(0, length, prot, _ANONYMOUS, -1, 0)
    if address == _FAILED:
        raise _fail(f"cannot reserve {length:#x} bytes of address space")
    return address


def blank(address: int, length: int) -> None:
    """Make `length` bytes at `address` inaccessible; whatever was mapped there is gone."""
    if _mmap(address, length, NONE, _ANONYMOUS | _MAP_FIXED, -1, 0) != address:
        raise _fail(f"cannot unmap {length:#x} bytes")


def map_shared(address: int, length: int, prot: int, fd: int, offset: int) -> int:
    """Map a file at `address`, in place of what is there, or anywhere when `address` is 0."""
    fixed = _MAP_FIXED if address else 0
    got: int = _mmap(address, length, prot, _MAP_SHARED | fixed, fd, offset)
    if got == _FAILED:
        raise _fail(f"cannot map {length:#x} bytes")
    return got


def protect(address: int, length: int, prot: int) -> None:
    """Change what may be done with mapped pages."""
    if _mprotect(address, length, prot):
        raise _fail(f"cannot protect {length:#x} bytes")


def advise(address: int, length: int, advice: int) -> None:
    """Tell the kernel about a range (MADV_...)."""
    if _madvise(address, length, advice):
        raise _fail(f"cannot advise on {length:#x} bytes")


def unmap(address: int, length: int) -> None:
    """Give address space back."""
    if _munmap(address, length):
        raise _fail(f"cannot unmap {length:#x} bytes")


def view(address: int, length: int) -> memoryview:
    """The bytes at `address`, which the caller keeps mapped for as long as the view is used."""
    return memoryview((ctypes.c_char * length).from_address(address)).cast("B")
