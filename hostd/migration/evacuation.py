# SPDX-License-Identifier: GPL-2.0-or-later
"""All guests of a host go to another, some at a time.  One that cannot go does not hold up others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Sequence

import trio

from hostd.errors import HostError
from hostd.guests import Step
from hostd.migration.belongings import family
from hostd.migration.views import EvacuatedView, EvacuateRequest, MigrateRequest
from hostd.vm import Vm


def of_one(request: EvacuateRequest) -> MigrateRequest:
    """What is asked for each guest of an evacuation."""
    return MigrateRequest(to=request.to, mode=request.mode, downtime_ms=request.downtime_ms,
                          timeout=request.timeout, dry_run=request.dry_run)


async def evacuate(vms: Sequence[Vm], migrate: Callable[[Vm], Awaitable[None]], parallel: int,
                   step: Step) -> EvacuatedView:
    """Have all go, `parallel` at a time."""
    began = trio.current_time()
    moved: list[str] = []
    failed: dict[str, str] = {}
    turns = trio.Semaphore(parallel)

    async def one(vm: Vm) -> None:
        try:
            await migrate(vm)
            moved.append(vm.name)
        except HostError as error:
            failed[vm.name] = str(error)
        finally:
            turns.release()
        step(f"{len(moved)} of {len(vms)} guests are there", (len(moved) + len(failed)) / len(vms))

    for group in _leaders_first(vms):
        async with trio.open_nursery() as nursery:
            for vm in group:
                await turns.acquire()
                nursery.start_soon(one, vm, name=f"evacuate {vm.name}")
    return EvacuatedView(moved=moved, failed=failed, seconds=round(trio.current_time() - began, 3))


def _leaders_first(vms: Sequence[Vm]) -> tuple[list[Vm], list[Vm]]:
    """One of each family, and all others, whose memory the other host has for the most part by then."""
    leaders: dict[Hashable, Vm] = {}
    for vm in vms:
        leaders.setdefault(family(vm.definition), vm)
    first = list(leaders.values())
    return first, [vm for vm in vms if vm not in first]
