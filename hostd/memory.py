# SPDX-License-Identifier: GPL-2.0-or-later
"""Machine memory as the daemon holds it: the pool, and the books about it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from hostd.errors import Failed
from hostd.policy import stock
from hostd.policy.admission import Kept
from vmm.memory.pool import PAGE, Pool

if TYPE_CHECKING:
    from hostd.books import Books

#: how long a guest about to start waits for others to give up memory
ROOM_S = 20.0
#: one of so many frames, at most, is kept for the overhead of guests
MOST_RESERVED = 32


class MachineMemory:
    """The pool is there at once, for the workers to map; the books are opened with their first use, because
    numpy, in which they are kept, would be a fifth of the daemon's start."""

    def __init__(self, size: int, swap_path: Path | None = None, swap_bytes: int = 0,
                 overcommit: float = 1.0, workers: int = 1) -> None:
        self._swap = swap_path, swap_bytes
        #: frames that guests about to start wait for
        self.wanted = 0
        #: called when there are not enough
        self.on_want: Callable[[], None] = lambda: None
        #: called when frames came free: workers that wait for some come first
        self.on_freed: Callable[[], None] = lambda: None
        self._freed = trio.Event()
        frames = size // PAGE
        #: frames that each of the workers asks for at once
        self.refill = stock.refill(frames, workers)
        # a P2M takes a 512th of its guest's memory, the rest of its block hardly more than a quarter of that
        self.kept = Kept(workers * stock.most(self.refill),
                         min(frames // MOST_RESERVED, int(frames * overcommit) // 384))
        try:
            self.pool = Pool(size)
        except OSError as error:
            raise Failed(f"cannot map a pool of {size} bytes: {error.strerror}") from None

    async def room_for(self, frames: int) -> None:
        """Wait until so many frames are free, and have others give some up for that.  They may be gone again
        by the time they are asked for.  Raises Failed when they do not come in time."""
        if self.books.free_frames() >= frames:
            return
        self.wanted += frames
        try:
            with trio.move_on_after(ROOM_S):
                while self.books.free_frames() < frames:
                    self.on_want()
                    await self._freed.wait()
                return
        finally:
            self.wanted -= frames
        raise Failed(f"not enough machine memory: {frames} frames wanted, {self.books.free_frames()} of "
                     f"{self.pool.frames} are free, and other guests did not give up more in time")

    def _tell_freed(self) -> None:
        """Frames came free: whoever waits looks again."""
        self.on_freed()
        self._freed.set()
        self._freed = trio.Event()

    @cached_property
    def books(self) -> Books:
        from hostd.books import Books
        from hostd.stores import Stores
        from hostd.swapfile import SwapFile

        path, limit = self._swap
        swap = SwapFile(path, limit) if path is not None and limit else None
        return Books(self.pool, Stores(swap), self.kept.overhead, self._tell_freed)
