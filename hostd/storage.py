# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that are either there, whole and on the disk, or not there at all."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from hostd.errors import Failed

log = logging.getLogger(__name__)

#: names that begin so are half-made files; whatever a dead daemon left of them is removed at start
PARTIAL = ".partial-"
#: files that are synced at a time
_SYNCS = 16

Kept = TypeVar("Kept", bound=msgspec.Struct)


@contextmanager
def told_plainly(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into the one sentence a user needs."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Failed(f"no space left for {path.name} in {path.parent}") from None
        raise Failed(f"cannot write {path}: {error.strerror}") from None


def write(path: Path, data: bytes) -> None:
    """Make `path` hold `data`, atomically and durably.  On failure it is as it was before."""
    write_all([(path, data)])


def write_all(files: Sequence[tuple[Path, bytes]]) -> None:
    """Make several files of one directory hold what they are given, each atomically, and all durably.

    They are synced side by side, so that the file system's journal is written for several at once.
    """
    partials = [path.with_name(PARTIAL + path.name) for path, _ in files]
    try:
        for (path, data), partial in zip(files, partials):
            with told_plainly(path):
                partial.write_bytes(data)
        with ThreadPoolExecutor(_SYNCS) as pool:
            list(pool.map(_sync, partials, [path for path, _ in files]))
        for (path, _), partial in zip(files, partials):
            with told_plainly(path):
                os.rename(partial, path)
        for directory in {path.parent for path, _ in files}:
            with told_plainly(directory):
                sync_directory(directory)
    except BaseException:
        for partial in partials:
            with suppress(OSError):
                partial.unlink()
        raise


def _sync(partial: Path, path: Path) -> None:
    """Put the contents of a file, which is to be `path`, on the disk."""
    with told_plainly(path), open(partial, "rb") as file:
        os.fsync(file.fileno())


class Prepared:
    """A new file whose contents are on the disk already, so that it takes little to have it there.

    The methods raise Failed, and then there is no such file.
    """

    def __init__(self, path: Path, data: bytes) -> None:
        self._path = path
        self._partial = path.with_name(PARTIAL + path.name)
        try:
            with told_plainly(path):
                self._partial.write_bytes(data)
            _sync(self._partial, path)
        except BaseException:
            self.discard()
            raise

    def commit(self) -> None:
        """Have it there, durably."""
        try:
            with told_plainly(self._path):
                os.rename(self._partial, self._path)
                sync_directory(self._path.parent)
        except BaseException:
            self.discard()
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
            raise

    def discard(self) -> None:
        """It is not wanted any more."""
        with suppress(OSError):
            self._partial.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove `path`, durably."""
    with told_plainly(path):
        path.unlink(missing_ok=True)
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames and removals in the directory durable (fsync(2): the file's own sync does not)."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """Make the directory, private to the daemon, and clear it of half-made files."""
    with told_plainly(path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for partial in path.glob(PARTIAL + "*"):
            partial.unlink()


def load_all(directory: Path, kind: type[Kept], check: Callable[[Kept, str], None]) -> list[Kept]:
    """What the JSON files of the directory hold, in the order of their names.

    A file that cannot be read as a `kind`, or of which `check(value, stem of its name)` raises ValueError, is
    set aside and told in the log: one bad file does not stop the host.
    """
    values = []
    for path in sorted(directory.glob("*.json")):
        try:
            value = msgspec.json.decode(path.read_bytes(), type=kind)
            check(value, path.stem)
        except (OSError, ValueError) as error:          # msgspec's errors are ValueErrors
            log.error("file set aside", extra={"file": str(path), "why": str(error)})
            with suppress(OSError):
                path.rename(path.with_suffix(".broken"))
        else:
            values.append(value)
    return values
