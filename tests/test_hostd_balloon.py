# SPDX-License-Identifier: GPL-2.0-or-later
"""What balloon drivers do and say, as the daemon comes to know it from real workers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from hostd.model import MONITORS
from hostd.protocol import BalloonView, SetBalloon
from hostd.vm import Vm
from tests.balloon_guests import PAGES, generous_kernel, rude_kernel, talkative_kernel
from tests.told_host import SOON, ToldHost, real_host


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[ToldHost]:
    async with real_host(tmp_path, "[sharing]\nenabled = false\n") as told:
        yield told


async def hears(vm: Vm, true: Callable[[BalloonView], bool]) -> None:
    """Wait until what is known of the guest's balloon is so."""
    with trio.fail_after(SOON):
        while vm.balloon is None or not true(vm.balloon):
            await trio.sleep(0.01)


@pytest.mark.parametrize("monitor", MONITORS)
async def test_what_a_guest_is_asked_is_known_when_it_has_said_it(host: ToldHost, monitor: str) -> None:
    """And not only when it is asked the next time."""
    await host.running("vm", kernel=await host.blob(talkative_kernel()), vmm=monitor)
    vm = host.host._guests.vms["vm"]
    await hears(vm, lambda said: said.driver and said.statistics == {"free": 1})
    assert vm.worker is not None
    vm.worker.send(SetBalloon(vm.lease, 0, statistics=True))
    await hears(vm, lambda said: said.statistics == {"free": 2})


@pytest.mark.parametrize("monitor", MONITORS)
async def test_pages_given_back_are_neither_written_nor_swapped_in(host: ToldHost, monitor: str) -> None:
    await host.running("vm", kernel=await host.blob(generous_kernel()), vmm=monitor)
    await host.prints("vm", r"\.")
    await host.clone("vm", "clone")
    await host.tell("clone", "x")
    vm = host.host._guests.vms["clone"]
    with trio.fail_after(SOON):
        while (events := vm.view().memory_events).reported < PAGES:
            await trio.sleep(0.01)
    assert events.broken < PAGES and events.swapped_in == 0


@pytest.mark.parametrize("monitor", MONITORS)
async def test_what_a_driver_said_goes_when_it_breaks_the_rules(host: ToldHost, monitor: str) -> None:
    await host.running("vm", kernel=await host.blob(rude_kernel()), vmm=monitor)
    vm = host.host._guests.vms["vm"]
    await hears(vm, lambda said: said.driver and said.statistics == {"free": 1})
    await host.tell("vm", "x")
    await hears(vm, lambda said: not said.driver and not said.statistics)
