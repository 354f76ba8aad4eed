# SPDX-License-Identifier: GPL-2.0-or-later
"""Large files that are written in pieces, and have no name before they are whole.

Should the daemon die on the way, nothing is left of one: it has no name at all (open(2), O_TMPFILE).  Where
the file system does not know such files, it has a name that says that it is half-made.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from hostd import storage
from hostd.errors import Conflict


def check_free(path: Path) -> None:
    """Raise Conflict if there is something of that name, Failed for a name that cannot be."""
    with storage.told_plainly(path), suppress(FileNotFoundError):
        path.lstat()
        raise _taken(path)


def _taken(path: Path) -> Conflict:
    return Conflict(f"{path} exists already: choose another name")


class NewFile:
    """A file on its way to `path`: write to `file`, then `commit`.  Raises Conflict if there is something of
    that name, and Failed where it cannot be made."""

    def __init__(self, path: Path) -> None:
        check_free(path)
        self.path = path
        #: its name meanwhile, if it has one
        self._partial: Path | None = None
        with storage.told_plainly(path):
            try:
                fd = os.open(path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            except OSError:                         # what is wrong beside O_TMPFILE, the other way tells
                fd, name = tempfile.mkstemp(prefix=storage.PARTIAL, dir=path.parent)
                self._partial = Path(name)
        self.file = os.fdopen(fd, "wb", buffering=0)

    def commit(self) -> None:
        """Give it its name, durably; what is in it must be on the disk.  Raises Conflict if there is a file
        of that name, and Failed; then there is none of ours."""
        with storage.told_plainly(self.path):
            try:
                self._take_name()
            except FileExistsError:
                raise _taken(self.path) from None
            try:
                storage.sync_directory(self.path.parent)
            except BaseException:
                with suppress(OSError):
                    self.path.unlink()
                raise

    def _take_name(self) -> None:
        """Raises FileExistsError: nobody's file is replaced, whoever comes at the same moment."""
        if self._partial is not None:
            # not every file system that comes here knows hard links
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
            try:
                os.rename(self._partial, self.path)
            except OSError:
                self.path.unlink()
                raise
            return
        directory = os.open(self.path.parent, os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # a directory by descriptor makes it linkat(2), which follows the link in /proc as it must here
            os.link(f"/proc/self/fd/{self.file.fileno()}", self.path.name, dst_dir_fd=directory)
        finally:
            os.close(directory)

    def close(self) -> None:
        """No more writing.  What was not committed is gone."""
        with suppress(OSError):
            self.file.close()
        if self._partial is not None:
            with suppress(OSError):
                self._partial.unlink()
