# SPDX-License-Identifier: GPL-2.0-or-later
"""The sockets the daemon listens on: made here, or handed over by the service manager."""

from __future__ import annotations

import grp
import os
import socket
from collections.abc import Iterable
from pathlib import Path

from hostd.errors import Failed

BACKLOG = 128


def unix_listener(path: Path, mode: int, group: str = "") -> socket.socket:
    """A listening socket at `path`.  A socket file that nobody listens on any more is replaced.

    Raises Failed if somebody does listen, or the path cannot be used.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_socket():
            if _answers(path):
                raise Failed(f"another daemon is listening on {path}")
            path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # bind(2) gives the file the mode that the umask leaves: it is never more open than it should be
            umask = os.umask(~mode & 0o777)
            try:
                listener.bind(os.fsencode(path))
            finally:
                os.umask(umask)
            if group:
                os.chown(path, -1, _group_id(group))
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise Failed(f"cannot listen on {path}: {error.strerror}") from None
    return listener


def tcp_listener(host: str, port: int, use: str = "metrics") -> socket.socket:
    """A listening socket at host:port; `use` is what a failure says it was for.  Raises Failed."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise Failed(f"cannot listen on {host}:{port} for {use}: {error.strerror}") from None
    return listener


def adopt(fds: Iterable[int]) -> tuple[socket.socket | None, socket.socket | None]:
    """The API's and the metrics' sockets among those handed over: the Unix one, and the TCP one."""
    api: socket.socket | None = None
    metrics: socket.socket | None = None
    for fd in fds:
        listener = socket.socket(fileno=fd)
        if listener.family == socket.AF_UNIX:
            api = listener
        else:
            metrics = listener
    return api, metrics


def url(listener: socket.socket) -> str:
    """The http:// address of a TCP listener."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fsencode(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        return True


def _group_id(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise Failed(f"api.group: there is no group {name}") from None
