# SPDX-License-Identifier: GPL-2.0-or-later
"""The network between two places: this machine's own, or a slow one between two network namespaces."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from hostd.ctl.errors import CtlError

_CLONE_NEWNET = 0x40000000
#: documentation's own addresses (RFC 5737): nobody else has them
_ADDRESSES = ("192.0.2.1", "192.0.2.2")
#: one way each, so that 20 ms are the way there and back; the first that the kernel has
_SHAPES = (
    ("1 Gbit/s, 20 ms, 1 % loss",
     ("netem", "rate", "1gbit", "delay", "10ms", "loss", "1%", "limit", "20000")),
    ("1 Gbit/s (this kernel has no netem, so neither delay nor loss)",
     ("tbf", "rate", "1gbit", "burst", "256kb", "latency", "50ms")),
)


class Unavailable(CtlError):
    """This machine cannot have such a network; the sentence says why."""


@dataclass(frozen=True)
class Site:
    """A place to run processes: an address, and the network namespace that has it."""

    address: str = "127.0.0.1"
    namespace: str | None = None

    @contextmanager
    def inside(self) -> Iterator[None]:
        """What this thread starts in the `with` lives there, and what it binds is bound there."""
        if self.namespace is None:
            yield
            return
        with ExitStack() as files:
            here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
            files.callback(os.close, here)
            there = os.open(f"/run/netns/{self.namespace}", os.O_RDONLY)
            files.callback(os.close, there)
            _enter(there)
            try:
                yield
            finally:
                _enter(here)

    def free_port(self) -> int:
        """A port nobody listens at."""
        with self.inside(), socket.socket() as probe:
            probe.bind((self.address, 0))
            port: int = probe.getsockname()[1]
            return port


@dataclass(frozen=True)
class Network:
    """Two sites, and what lies between them."""

    about: str
    sites: tuple[Site, Site]


LOOPBACK = Network("loopback", (Site(), Site()))


@contextmanager
def slow_network() -> Iterator[Network]:
    """Two namespaces with a slow line between them.  Raises Unavailable."""
    if os.geteuid() != 0:
        raise Unavailable("network namespaces can be made by root only")
    first, second = namespaces = [f"hostd-bench-{os.getpid()}-{end}" for end in "ab"]
    with ExitStack() as made:
        for namespace in namespaces:
            _ip("netns", "add", namespace)
            made.callback(_ip, "netns", "del", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("link", "add", "wire", "netns", first, "type", "veth", "peer", "name", "wire", "netns", second)
        for namespace, address in zip(namespaces, _ADDRESSES, strict=True):
            _ip("-n", namespace, "address", "add", f"{address}/24", "dev", "wire")
            _ip("-n", namespace, "link", "set", "wire", "up")
        about, _ = map(_shape, namespaces)
        yield Network(about, (Site(_ADDRESSES[0], first), Site(_ADDRESSES[1], second)))


def _shape(namespace: str) -> str:
    """Make what leaves it slow; how slow."""
    for about, discipline in _SHAPES:
        done = subprocess.run(["tc", "-n", namespace, "qdisc", "add", "dev", "wire", "root", *discipline],
                              capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return about
    raise Unavailable(f"this kernel cannot make a network slow: {done.stderr.strip()}")


def _ip(*arguments: str) -> None:
    try:
        subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise Unavailable("network namespaces need Debian's iproute2, which is not installed here") from None
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"ip {' '.join(arguments)} failed: {error.stderr.strip()}") from None


def _enter(namespace: int) -> None:
    """setns(2): Python has it from 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET) != 0:
        raise CtlError(f"cannot enter a network namespace: {os.strerror(ctypes.get_errno())}")
