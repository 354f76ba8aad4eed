# SPDX-License-Identifier: GPL-2.0-or-later
"""The monitor of a VM: chosen once, and kept through everything that happens to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from hostd.config import Config, parse
from hostd.errors import Conflict, Failed, NotFound
from hostd.host import Host
from hostd.model import TranslatorView
from tests.told_host import SOON, ToldHost


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


# --- translations ----------------------------------------------------------------------------------------


async def test_translations_come_from_the_guest_s_worker(told: ToldHost) -> None:
    await told.running("soft", vmm="bt")
    await told.tell("soft", "hello")
    everything = await told.host.translations("soft")
    assert (everything.text, everything.complete) == ("typed:hello", False)
    there = await told.host.translations("soft", 0x1000)
    assert (there.text, there.complete) == ("typed:hello", True)
    with pytest.raises(NotFound, match="nothing at 0x2000 is translated in VM soft: "):
        await told.host.translations("soft", 0x2000)


async def test_many_can_ask_at_once(told: ToldHost) -> None:
    await told.running("soft", vmm="bt")
    answers = []

    async def ask() -> None:
        answers.append(await told.host.translations("soft"))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(ask)
    assert [answer.text for answer in answers] == ["typed:"] * 5


async def test_who_has_no_translations_says_why(told: ToldHost) -> None:
    with pytest.raises(NotFound, match="no VM none"):
        await told.host.translations("none")
    await told.running("hard", vmm="hw")
    with pytest.raises(Conflict, match="the monitor of VM hard is hw: only guests of bt are translated"):
        await told.host.translations("hard")
    await told.create("soft", vmm="bt")
    with pytest.raises(Conflict, match="VM soft is defined: only a running one has translations"):
        await told.host.translations("soft")
    await told.host.start("soft").outcome()
    await told.tell("soft", "untranslatable")
    with pytest.raises(Failed, match="VM soft: its monitor is at a loss"):
        await told.host.translations("soft")
    await told.host.pause("soft").outcome()
    with pytest.raises(Conflict, match="VM soft is paused"):
        await told.host.translations("soft")


async def test_whoever_asks_a_guest_that_ends_is_told(told: ToldHost) -> None:
    await told.running("soft", vmm="bt")
    await told.tell("soft", "last words")
    with pytest.raises(Conflict, match="VM soft ended: powered off"):
        await told.host.translations("soft")
    assert told.host.get("soft").state == "halted"


async def test_what_translators_count_arrives(told: ToldHost) -> None:
    await told.ready_workers()
    with trio.fail_after(SOON):
        while [worker.translator for worker in told.host.overview.workers()] != [
                TranslatorView(units=5, used_bytes=80)] * 2:
            await trio.sleep(0.05)
