# SPDX-License-Identifier: GPL-2.0-or-later
"""The frames a VM costs beside its own memory: VMCB, statistics, nested tables, in one contiguous run.

    frame 0   the VMCB (vmm/vmcb.py); its address is the VMCB pointer of the paper, section 4.3
    frame 1   exit counts and times (vmm/stats.py)
    frame 2   accounting (vmm/stats.py)
    frame 3.. nested page tables, whose leaf level is the P2M (vmm/memory/p2m.py)

Daemon and workers find everything about a VM's memory from `first` and `memory_bytes` alone.
"""

from __future__ import annotations

import numpy as np

from vmm.memory.frames import FrameAllocator
from vmm.memory.p2m import MAX_MEMORY, P2M
from vmm.memory.p2mbits import KIND_MASK, KIND_SHIFT, LOGGED, STORED, Kind
from vmm.memory.pool import PAGE, PAGE_SHIFT, Pool
from vmm.memory.reclaim import freeze
from vmm.stats import Accounting, ExitStats

_TABLES_AT = 3
_BALLOONED = np.uint64(Kind.BALLOONED << KIND_SHIFT)


def check_memory_size(memory_bytes: int) -> None:
    """Raises ValueError, in one sentence, for a size no guest can have."""
    if memory_bytes <= 0:
        raise ValueError(f"memory of {memory_bytes} bytes: a guest needs at least 1 MiB")
    if memory_bytes < 1 << 20:
        raise ValueError(f"memory of {memory_bytes} bytes is too small: a guest needs at least 1 MiB")
    if memory_bytes > MAX_MEMORY:
        raise ValueError(f"memory of {memory_bytes} bytes is too large: a guest can have at most 3 GiB")
    if memory_bytes % PAGE:
        raise ValueError(f"memory of {memory_bytes} bytes is not a whole number of 4 KiB pages")


class VmBlock:
    """The block at frame `first` of the pool, for a guest of `memory_bytes`."""

    def __init__(self, pool: Pool, first: int, memory_bytes: int) -> None:
        check_memory_size(memory_bytes)
        self.pool = pool
        self.first = first
        self.memory_bytes = memory_bytes
        self.pages = memory_bytes >> PAGE_SHIFT
        self.vmcb_pa = first << PAGE_SHIFT
        self.vmcb_page = pool.page(first)
        self.exit_stats = ExitStats(pool.page(first + 1))
        self.accounting = Accounting(pool.page(first + 2))
        self.p2m = P2M(pool, first + _TABLES_AT, self.pages)

    @staticmethod
    def frames_for(memory_bytes: int) -> int:
        """How many frames the block of such a guest takes."""
        check_memory_size(memory_bytes)
        return _TABLES_AT + P2M.table_frames(memory_bytes >> PAGE_SHIFT)

    def leaf(self) -> np.ndarray:
        """The P2M array (one uint64 a guest page), for work on many pages at once."""
        return np.frombuffer(self.p2m.leaf, dtype=np.uint64)

    def ballooned(self) -> np.ndarray:
        """The pages that the guest has given back (vmm/devices/virtio/balloon.py), ascending."""
        return np.flatnonzero((self.leaf() & np.uint64(KIND_MASK)) == _BALLOONED)

    def mark_ballooned(self, pages: np.ndarray) -> None:
        """The guest had given these pages back; those that have contents it must have taken again."""
        leaf = self.leaf()
        leaf[pages[leaf[pages] == 0]] = _BALLOONED

    def memory_counts(self) -> dict[str, int]:
        """Pages of the guest by kind: assigned, resident (private or shared), ballooned, stored in a file."""
        leaf = self.leaf()
        kinds = (leaf & np.uint64(KIND_MASK)) >> np.uint64(KIND_SHIFT)
        private, shared, ballooned = (int(np.count_nonzero(kinds == np.uint64(kind)))
                                      for kind in (Kind.PRIVATE, Kind.SHARED, Kind.BALLOONED))
        return {"assigned": self.pages, "resident": private + shared, "private": private, "shared": shared,
                "ballooned": ballooned, "stored": int(np.count_nonzero(leaf & np.uint64(STORED)))}


def new_block(allocator: FrameAllocator, memory_bytes: int) -> VmBlock:
    """A block with nothing in it, every page of the guest absent.  Raises OutOfFrames, ValueError."""
    first = allocator.alloc_run(VmBlock.frames_for(memory_bytes))
    return VmBlock(allocator.pool, first, memory_bytes)


def clone_block(allocator: FrameAllocator, source: VmBlock) -> VmBlock:
    """A second guest with the memory of `source`, every frame shared until either writes.

    `source` must not be running; whoever runs it next must enter it by `vmrun`, which flushes its TLB.
    Raises OutOfFrames.
    """
    block = new_block(allocator, source.memory_bytes)
    leaf = source.leaf()
    allocator.adopt_shared(freeze(source.p2m, np.flatnonzero(
        (leaf & np.uint64(KIND_MASK)) == np.uint64(Kind.PRIVATE << KIND_SHIFT)))[1])
    block.leaf()[:] = leaf & ~np.uint64(LOGGED)
    allocator.share(leaf)
    return block


def free_block(allocator: FrameAllocator, block: VmBlock) -> None:
    """A guest is gone: every frame of it is free or has an owner less."""
    allocator.free_leaf(block.leaf())
    allocator.free_run(block.first, VmBlock.frames_for(block.memory_bytes))
