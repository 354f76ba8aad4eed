# SPDX-License-Identifier: GPL-2.0-or-later
"""A Debian guest moves between two real daemons with its balloon, and its clones after it by name."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.private_daemon import SOON
from tests.test_boot_guests import debian
from tests.two_hosts import MigratingDaemon, TwoHosts, two_hosts

pytestmark = pytest.mark.slow

MIB = 1 << 20


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """`a` has a guest `web`, which has booted."""
    image = debian("debian")
    with two_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        hosts.a.create("web", image.kernel.read_bytes(), initrd=hosts.a.upload(image.initrd.read_bytes()),
                       append=image.append, memory=96 * MIB, start=True)
        hosts.a.wait("web", console="/ # ", timeout=2 * SOON)
        yield hosts
        hosts.clear()


def ask(daemon: MigratingDaemon, name: str, command: str) -> str:
    """What a command prints in the guest, at its shell."""
    begin = len(daemon.console(name))
    daemon.send(name, f"echo 'answer' 'begins'; {command}; echo 'answer' 'ends'\n")
    found = until(lambda: re.search(r"answer begins\s+(.*?)\s+answer ends", daemon.console(name)[begin:],
                                    re.DOTALL))
    return str(found[1])


def until(true: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 2 * SOON
    while not (found := true()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def usage(daemon: MigratingDaemon, name: str = "web") -> dict[str, Any]:
    found: dict[str, Any] = daemon.get(f"/vms/{name}")["memory_usage"]
    return found


def inflated(daemon: MigratingDaemon) -> int:
    """Bytes ever taken into its balloon, as far as the daemon was told."""
    return 4096 * int(daemon.get("/vms/web")["memory_events"]["inflated"])


def set_memory(daemon: MigratingDaemon, size: int) -> None:
    response = daemon.client.patch("/vms/web", json={"memory": size})
    assert response.is_success, response.text


def test_what_a_guest_gave_back_stays_given_back(hosts: TwoHosts) -> None:
    hashed = ask(hosts.a, "web", "sha256sum /bin/busybox")
    set_memory(hosts.a, 64 * MIB)
    until(lambda: usage(hosts.a)["ballooned"] == 32 * MIB)
    for daemon in hosts.b, hosts.a:
        hosts.there("web")
        now = usage(daemon)
        assert (now["ballooned"], now["assigned"]) == (32 * MIB, 96 * MIB)
        assert now["resident"] <= 64 * MIB
        vm = daemon.get("/vms/web")
        assert vm["memory_target"] == 64 * MIB
        assert ask(daemon, "web", "sha256sum /bin/busybox") == hashed
        until(lambda daemon=daemon: usage(daemon)["target"] == 64 * MIB)
        assert usage(daemon)["ballooned"] == 32 * MIB
        assert inflated(daemon) <= 32 * MIB
    hosts.there("web")
    # the driver is asked by a host at which it gave nothing in this life
    set_memory(hosts.b, 96 * MIB)
    until(lambda: usage(hosts.b)["ballooned"] == 0)
    assert inflated(hosts.b) == 32 * MIB            # it was told when it asked
    assert ask(hosts.b, "web", "sha256sum /bin/busybox") == hashed
    hosts.there("web")
    assert hosts.a.is_balanced() and hosts.b.is_balanced()


def test_clones_go_by_name_where_their_template_is(hosts: TwoHosts) -> None:
    hashed = ask(hosts.a, "web", "sha256sum /bin/busybox /init")
    hosts.a.do("web", "pause")
    hosts.a.do("web", "clone", names=["one", "two"], start=True)
    for name in "one", "two":
        assert ask(hosts.a, name, f"echo {name} > /tmp/name; cat /tmp/name") == name
    whole = sum(hosts.there("web")["bytes"].values())
    assert whole > 4 * MIB
    alone = hosts.b.get("/memory")
    for name in "one", "two":
        view = hosts.there(name)
        pages = view["pages"]
        assert pages["deduplicated"] > 0.8 * sum(pages.values()), pages
        assert sum(view["bytes"].values()) < whole / 5, view["bytes"]
    together = hosts.b.get("/memory", check="true")
    assert together["wrong"] == []
    # what they have in common is there once
    assert together["shared"] > 0.8 * (alone["private"] + alone["shared"])
    assert together["private"] + together["shared"] < 1.5 * (alone["private"] + alone["shared"])
    for name in "one", "two":
        assert usage(hosts.b, name)["shared"] > 0.7 * usage(hosts.b, name)["resident"]
        assert ask(hosts.b, name, "cat /tmp/name") == name
        assert ask(hosts.b, name, "sha256sum /bin/busybox /init") == hashed
    hosts.b.do("web", "resume")
    assert ask(hosts.b, "web", "sha256sum /bin/busybox /init") == hashed
    assert hosts.a.get("/host")["frames"]["private"] == 0
