# SPDX-License-Identifier: GPL-2.0-or-later
"""The monitor of a VM: chosen once, and kept through everything that happens to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from hostd.config import Config, parse
from hostd.host import Host
from tests.told_host import ToldHost


@pytest.fixture(params=["hw", "bt"])
def default(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def host_config(tmp_path: Path, default: str) -> Config:
    return parse(f'[host]\nstate_dir = "{tmp_path}/state"\nmemory = "64M"\nworkers = 2\n'
                 f'[defaults]\nvmm = "{default}"')


async def test_the_monitor_is_the_configuration_s_unless_the_owner_says(told: ToldHost, default: str) -> None:
    assert (await told.create("any")).vmm == default
    assert (await told.create("soft", vmm="bt")).vmm == "bt"
    assert (await told.create("hard", vmm="hw")).vmm == "hw"


async def test_a_worker_is_told_the_monitor_at_every_boot(told: ToldHost) -> None:
    for name, monitor in ("soft", "bt"), ("hard", "hw"):
        await told.running(name, vmm=monitor)
        await told.prints(name, f"to be run by {monitor}")
        await told.host.reset(name).outcome()
        await told.prints(name, f"to be run by {monitor}")


async def test_a_clone_keeps_its_template_s_monitor(told: ToldHost) -> None:
    await told.running("template", vmm="bt")
    await told.clone("template", "copy")
    assert told.host.get("copy").vmm == "bt"
    await told.stop("copy")
    await told.host.start("copy").outcome()
    await told.prints("copy", "to be run by bt")


async def test_the_monitor_survives_the_daemon(told: ToldHost, nursery: trio.Nursery) -> None:
    await told.create("soft", vmm="bt")
    told.host.close()
    heir = Host(told.host.config, nursery)
    assert heir.get("soft").vmm == "bt"
    told.host._inventory = heir._inventory
