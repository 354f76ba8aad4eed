# SPDX-License-Identifier: GPL-2.0-or-later
"""Machine memory as the daemon holds it: the pool, and the books about it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from hostd.errors import Failed
from vmm.memory.pool import Pool

if TYPE_CHECKING:
    from hostd.books import Books


class MachineMemory:
    """The pool is there at once, for the workers to map; the books are opened with their first use, because
    numpy, in which they are kept, would be a fifth of the daemon's start."""

    def __init__(self, size: int, swap_path: Path | None = None, swap_bytes: int = 0) -> None:
        self._swap = swap_path, swap_bytes
        try:
            self.pool = Pool(size)
        except OSError as error:
            raise Failed(f"cannot map a pool of {size} bytes: {error.strerror}") from None

    @cached_property
    def books(self) -> Books:
        from hostd.books import Books
        from hostd.stores import Stores
        from hostd.swapfile import SwapFile

        path, limit = self._swap
        return Books(self.pool, Stores(SwapFile(path, limit) if path is not None and limit else None))
