# SPDX-License-Identifier: GPL-2.0-or-later
"""The definitions of the VMs on disk, one JSON file each, and the lock that keeps other daemons away."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from hostd import storage
from hostd.definition import Definition
from hostd.errors import Failed

#: directories of the guests of a suspended host, and of one that is about to be (hostd/suspending.py)
SUSPENDED, SUSPENDING = "suspended", "suspending"
#: what is left of the first when the guests go on (hostd/resuming.py)
RESUMED = "suspended.resumed"
#: the directory of snapshots, and how their names end
SNAPSHOTS = "snapshots"
SUFFIX = ".snap"


class Inventory:
    """The state directory's `vms/`.

    Invariant: between `__init__` and `close` this process holds the lock on `lock`, so no second daemon reads
    or writes the directory; the kernel lets it go when the process dies, however it dies.
    """

    def __init__(self, state_dir: Path) -> None:
        storage.make_directory(state_dir)
        self._directory = state_dir / "vms"
        self._lock = _lock(state_dir / "lock")
        storage.make_directory(self._directory)
        self.snapshots = state_dir / SNAPSHOTS
        storage.make_directory(self.snapshots)
        self._suspended, self._resumed = state_dir / SUSPENDED, state_dir / RESUMED
        shutil.rmtree(state_dir / SUSPENDING, ignore_errors=True)

    def close(self) -> None:
        os.close(self._lock)

    def load(self) -> list[Definition]:
        """All definitions that can be read."""
        return storage.load_all(self._directory, Definition, _check_name)

    def suspended(self) -> set[str] | None:
        """Names of the VMs that were suspended with the host; None: it was not."""
        return _members(self._suspended)

    def lost(self) -> set[str]:
        """Names of the VMs that went on, or were about to, when a daemon that resumed its host was killed.
        Told once: what is left of their files is removed."""
        lost = _members(self._resumed)
        shutil.rmtree(self._resumed, ignore_errors=True)
        return lost or set()

    def save(self, definitions: Sequence[Definition]) -> None:
        """Keep the definitions, new or changed.  If one cannot be written, none of the new ones stays."""
        files = [(self._path(definition.name), _encode(definition)) for definition in definitions]
        new = [path for path, _ in files if not path.exists()]
        try:
            storage.write_all(files)
        except BaseException:
            for path in new:
                path.unlink(missing_ok=True)
            raise

    def prepare(self, definition: Definition) -> storage.Prepared:
        """A new definition that is on the disk already, and is kept once it is committed.  Raises Failed."""
        return storage.Prepared(self._path(definition.name), _encode(definition))

    def has(self, name: str) -> bool:
        """Whether a definition of that name is kept."""
        return self._path(name).exists()

    def remove(self, name: str) -> None:
        storage.remove(self._path(name))

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.json"


def _members(directory: Path) -> set[str] | None:
    if not directory.is_dir():
        return None
    return {path.name.removesuffix(SUFFIX) for path in directory.glob("*" + SUFFIX)}


def _encode(definition: Definition) -> bytes:
    return msgspec.json.format(msgspec.json.encode(definition)) + b"\n"


def _lock(path: Path) -> int:
    """Take the state directory's lock for the life of this process, or say who has it."""
    with storage.told_plainly(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise Failed(f"another hostd (process {owner}) uses the state directory {path.parent}") from None
    with suppress(OSError):                     # a full disk: only the message above is the poorer for it
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _check_name(definition: Definition, stem: str) -> None:
    if definition.name != stem:
        raise ValueError(f"it defines a VM named {definition.name}")
