# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian guests with its own balloon driver under a real daemon, whose memory is changed and shown."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from hostd.cli import main
from tests.private_daemon import SOON, PrivateDaemon
from tests.test_boot_guests import debian

MIB = 1 << 20

pytestmark = pytest.mark.slow


def ctl(daemon: PrivateDaemon, *arguments: str) -> str:
    result = CliRunner().invoke(main, ["--socket", str(daemon.socket), *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def until(daemon: PrivateDaemon, name: str, true: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The VM's memory, once that is so."""
    deadline = time.monotonic() + 2 * SOON
    while not true(usage := daemon.get(f"/vms/{name}")["memory_usage"]):
        assert time.monotonic() < deadline, usage
        time.sleep(0.1)
    found: dict[str, Any] = usage
    return found


def test_a_running_guest_gives_memory_back_and_gets_it_again(daemon: PrivateDaemon) -> None:
    image = debian("debian")
    ctl(daemon, "create", "web", "--kernel", str(image.kernel), "--initrd", str(image.initrd), "--append",
        image.append, "--memory", "96M", "--start")
    ctl(daemon, "wait", "web", "--console", "INIT-UP", "--timeout", str(2 * SOON))
    ctl(daemon, "set", "web", "memory=64M", "reservation=8M")
    usage = until(daemon, "web", lambda usage: usage["ballooned"] == 32 * MIB)
    assert (usage["assigned"], usage["target"]) == (96 * MIB, 64 * MIB)
    assert usage["resident"] <= 64 * MIB
    vm = daemon.get("/vms/web")
    assert (vm["memory"], vm["memory_target"], vm["reservation"]) == (96 * MIB, 64 * MIB, 8 * MIB)
    row = ctl(daemon, "memory", "web").splitlines()[1].split()
    assert (row[0], row[1], row[5], row[8]) == ("web", "96.0M", "32.0M", "64.0M")

    ctl(daemon, "clone", "web", "--count", "2", "--start")
    host = json.loads(ctl(daemon, "memory", "--check", "--format", "json"))["host"]
    assert host["wrong"] == [] and host["saved"] > 2 * 16 * MIB

    ctl(daemon, "set", "web", "memory=96M")
    # the driver told how the guest's memory is doing while it was asked to take pages back
    usage = until(daemon, "web", lambda usage: usage["ballooned"] == 0 and usage["guest_free"])
    assert usage["target"] == 96 * MIB
    # available: free pages without those below the watermarks, and cache that could be dropped
    assert usage["guest_free"] // 2 < usage["guest_available"] <= usage["guest_total"] < 96 * MIB
    assert daemon.get("/vms/web")["memory_events"]["inflated"] == 32 * MIB >> 12
    metrics = httpx.get(daemon.get("/host")["metrics"]).text
    assert 'hostd_vm_memory_guest_bytes{kind="total",name="web"}' in metrics
    assert "the books are right" in ctl(daemon, "memory", "--check")
