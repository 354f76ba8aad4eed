# SPDX-License-Identifier: GPL-2.0-or-later
"""A writer of `newc` cpio archives, the format of a Linux initramfs (early-userspace in its documentation).

Everything belongs to root and carries no time stamp, so the same content gives the same bytes; device nodes
need no privilege, since they are only names here.
"""

import stat

_TRAILER = "TRAILER!!!"


class CpioArchive:
    """Collects members in order; `finish` returns the archive. Parent directories are added by themselves."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()

    def directory(self, path: str) -> None:
        """Add a directory unless it is there already, its parents first."""
        path = path.strip("/")
        if path and path not in self._names:
            self._member(path, stat.S_IFDIR | 0o755)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._member(path.strip("/"), stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._member(path.strip("/"), stat.S_IFLNK | 0o777, target.encode())

    def device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a character device."""
        self._member(path.strip("/"), stat.S_IFCHR | mode, rdev=(major, minor))

    def finish(self) -> bytes:
        """Close the archive, padded to whole 512-byte blocks as cpio itself does."""
        whole = b"".join([*self._parts, _record(0, _TRAILER, 0, b"", (0, 0))])
        return whole + bytes(-len(whole) % 512)

    def _member(self, path: str, mode: int, data: bytes = b"", rdev: tuple[int, int] = (0, 0)) -> None:
        parent, _, _ = path.rpartition("/")
        self.directory(parent)
        if path in self._names:
            raise ValueError(f"{path} is in the archive already")
        self._names.add(path)
        self._parts.append(_record(len(self._names), path, mode, data, rdev))


def _record(inode: int, path: str, mode: int, data: bytes, rdev: tuple[int, int]) -> bytes:
    """One member: a header of 13 eight-digit hexadecimal fields, the name and the data, padded to 4."""
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, *rdev, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
