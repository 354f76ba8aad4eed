# SPDX-License-Identifier: GPL-2.0-or-later
"""Machine memory: one memfd, mapped by the daemon and every worker, divided into 4 KiB frames.

A machine-physical address is an offset into the pool.  The memfd is sparse: a frame costs the host
nothing until it is touched, and nothing again after `release`, which also is what zeroes it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

PAGE = 4096
PAGE_SHIFT = 12


class Pool:
    """`size` bytes of machine memory (rounded up to whole frames).

    With `fd` the pool of another process is mapped; without, a new one is made.  Raises OSError where the
    host refuses the mapping.
    """

    def __init__(self, size: int, fd: int | None = None) -> None:
        if size <= 0:
            raise ValueError(f"a pool of {size} bytes: it must be larger than 0")
        self.size = -(-size // PAGE) * PAGE
        self.frames = self.size >> PAGE_SHIFT
        self.fd = os.memfd_create("hostd-machine-memory", os.MFD_CLOEXEC) if fd is None else fd
        if fd is None:
            weakref.finalize(self, os.close, self.fd).atexit = False
            os.ftruncate(self.fd, self.size)
        self._map = mmap.mmap(self.fd, self.size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self.view = memoryview(self._map)
        self.q = self.view.cast("Q")
        #: address of the mapping in this process, for the silicon
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def page(self, frame: int) -> memoryview:
        """The bytes of one frame."""
        return self.view[frame << PAGE_SHIFT:(frame + 1) << PAGE_SHIFT]

    def release(self, first: int, count: int) -> None:
        """Give the memory of `count` frames back to the host; they read as zero from now on."""
        self._map.madvise(mmap.MADV_REMOVE, first << PAGE_SHIFT, count << PAGE_SHIFT)

    def resident_bytes(self) -> int:
        """Host memory the pool occupies now."""
        return os.fstat(self.fd).st_blocks * 512
