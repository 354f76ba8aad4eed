# SPDX-License-Identifier: GPL-2.0-or-later
"""Which file it is, and how it was."""

from __future__ import annotations

import os
from typing import NamedTuple


class Stamp(NamedTuple):
    """Two looks at open files that give the same stamp were at the same contents."""

    device: int
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, fd: int) -> Stamp:
        """Raises OSError."""
        status = os.fstat(fd)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
