# SPDX-License-Identifier: GPL-2.0-or-later
"""When a CPU must forget what it translated: memory changes as guests and frames come and go."""

from __future__ import annotations

import numpy as np

from vmm.memory.frames import FrameAllocator
from vmm.silicon.cpu import Cpu

#: frames between two that are forgotten too: translating them again costs less than leaving them out
_GAP = 8


class Translations:
    """Keeps the CPU of this worker coherent with what the daemon and other workers write.

    Frames that are lent were somebody else's before; the private frames of a guest that is adopted may have
    been written by the loader or on another CPU.  Shared frames cannot have changed since they were first
    shared: those of one snapshot are announced once, and all clones of a template share one translation.
    """

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self._snapshots: set[int] = set()

    def forget_frames(self, first: int, count: int) -> None:
        self._cpu.invalidate(first, count)

    def forget_guest(self, leaf: np.ndarray, snapshot: int, unchanged: bool = False) -> None:
        """A guest arrives with the P2M `leaf`, its shared frames as they were at `snapshot` (0: none); or it
        is back, and all of its memory is as it was here."""
        if not unchanged:
            private, shared = FrameAllocator.split(leaf)
            self._forget(private)
            if snapshot not in self._snapshots:
                self._forget(shared)
        if snapshot:
            self._snapshots.add(snapshot)

    def forget_others(self, frames: bytes) -> None:
        """A guest is about to have frames (u64) that others wrote."""
        self._forget(np.unique(np.frombuffer(frames, dtype=np.int64)))

    def _forget(self, frames: np.ndarray) -> None:
        if not len(frames):
            return
        frames = np.sort(frames)
        ends = np.flatnonzero(np.diff(frames) > _GAP)
        firsts, lasts = frames[np.append(0, ends + 1)], frames[np.append(ends, len(frames) - 1)]
        for first, last in zip(firsts.tolist(), lasts.tolist()):
            self._cpu.invalidate(first, last - first + 1)
