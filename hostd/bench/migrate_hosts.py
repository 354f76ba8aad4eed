# SPDX-License-Identifier: GPL-2.0-or-later
"""Two daemons of our own that send guests to each other, as a user has them do it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import msgspec

from hostd.bench.memory_guests import await_console, boot, names
from hostd.bench.migrate_network import Network, Site
from hostd.bench.migrate_sides import Limits, Moved, NotMoved
from hostd.bench.migrate_watch import Watch
from hostd.ctl import demo
from hostd.ctl.client import Client, vm_path
from hostd.ctl.demo import Template
from hostd.ctl.errors import CtlError
from hostd.ctl.private import private_daemon
from hostd.lifecycle import State
from hostd.migration.views import EvacuatedView, EvacuateRequest, MigrateRequest, MigrationView

_GUEST = "guest"
_TABLES = """\
[memory]
overcommit_ratio = 1000
[migration]
address = "{address}"
allow_plain = true
"""


class Host(NamedTuple):
    """A daemon, and where guests of others come in."""

    client: Client
    address: str


@dataclass
class Hosts:
    """The two; the guests are at `here`, and go to `there`."""

    here: Host
    there: Host

    def turn(self) -> None:
        """The guests are at the other one now."""
        self.here, self.there = self.there, self.here


@contextmanager
def two_hosts(network: Network) -> Iterator[Hosts]:
    """A daemon at each site."""
    with ExitStack() as daemons:
        first, second = (daemons.enter_context(_host(site)) for site in network.sites)
        yield Hosts(first, second)


@contextmanager
def _host(site: Site) -> Iterator[Host]:
    address = f"{site.address}:{site.free_port()}"
    with ExitStack() as daemons:
        with site.inside():
            tables = _TABLES.format(address=address)
            daemon = daemons.enter_context(private_daemon(tables=tables))
        yield Host(daemon.client, address)


class HostSide:
    """A guest of one of the two hosts, and a user who stays at its console."""

    def __init__(self, guest: Template, hosts: Hosts) -> None:
        self.watch = Watch()
        self._hosts = hosts
        client = hosts.here.client
        boot(client, {_GUEST: guest}, lambda text: None)
        self._session = subprocess.Popen(
            [sys.executable, "-c", "from hostd.cli import main; main()", "--socket", str(client.socket),
             "console", _GUEST],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.watch.follow(self._session)

    def hop(self, limits: Limits) -> Moved:
        """Send the guest to the other host.  Raises NotMoved if it stays."""
        view = migrate(self._hosts, _GUEST, limits)
        self._hosts.turn()
        return Moved(view.downtime or 0.0, view.elapsed, sum(view.bytes.values()))

    def close(self) -> None:
        self._session.kill()
        self._session.wait()
        self.watch.close()


@contextmanager
def side(guest: Template, network: Network) -> Iterator[HostSide]:
    """A guest that is up."""
    with two_hosts(network) as hosts:
        made = HostSide(guest, hosts)
        try:
            yield made
        finally:
            made.close()


def migrate(hosts: Hosts, name: str, limits: Limits) -> MigrationView:
    """Have a guest go there.  Raises NotMoved if it stays."""
    client = hosts.here.client
    request = MigrateRequest(to=hosts.there.address, downtime_ms=limits.downtime_ms,
                             bandwidth=limits.bandwidth, timeout=limits.timeout)
    try:
        view = msgspec.convert(client.finish(client.begin("POST", vm_path(name, "migrate"), request)),
                               MigrationView)
    except CtlError as error:
        raise NotMoved(str(error)) from None
    state = hosts.there.client.vm(name).state
    if state not in (State.RUNNING, State.PAUSED):
        raise CtlError(f"VM {name} arrived and is {state}")
    return view


class Fleet:
    """Idle clones of one guest, at one of two hosts."""

    def __init__(self, guest: Template, hosts: Hosts, count: int, keep_template: bool) -> None:
        """`keep_template`: it stays beside the clones, and goes ahead of them, so that it is there when they
        come; else it is gone once they are made."""
        self._hosts = hosts
        self._names = names(count)
        self._ahead = keep_template
        client = hosts.here.client
        demo.boot(client, guest)
        demo.clone(client, count)
        if not keep_template:
            client.finish(client.begin("DELETE", vm_path(demo.TEMPLATE), query={"force": "true"}))

    def evacuate(self, limits: Limits) -> Moved:
        """Send all of them to the other host; the downtime is the median of theirs.  Raises CtlError if one
        of them stays."""
        if self._ahead:
            migrate(self._hosts, demo.TEMPLATE, Limits())
        client, target = self._hosts.here.client, self._hosts.there
        before = {view.token for view in client.migrations()}
        request = EvacuateRequest(to=target.address, downtime_ms=limits.downtime_ms,
                                  bandwidth=limits.bandwidth)
        began = time.monotonic()
        view = msgspec.convert(client.finish(client.begin("POST", "/evacuate", request)), EvacuatedView)
        total = time.monotonic() - began
        for name, why in view.failed.items():
            raise CtlError(f"VM {name} stayed: {why}")
        views = [one for one in client.migrations() if one.token not in before]
        self._hosts.turn()
        return Moved(median(one.downtime or 0.0 for one in views), total,
                     sum(sum(one.bytes.values()) for one in views))

    def answer(self, word: str) -> None:
        """Have every one of them say something.  Raises CtlError if one does not."""
        client = self._hosts.here.client
        for name in self._names:
            client.call("POST", vm_path(name, "input"), content=f"echo '{word[:1]}'{word[1:]}\n".encode())
            await_console(client, name, word)
