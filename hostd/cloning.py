# SPDX-License-Identifier: GPL-2.0-or-later
"""Clones of a guest: the same machine many times, sharing every frame until one of them writes it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import trio

from hostd.errors import Conflict, HostError
from hostd.events import Events
from hostd.guests import Guests, Step
from hostd.inventory import Inventory
from hostd.lifecycle import State, Trigger
from hostd.memory import MachineMemory
from hostd.vm import Vm


class Cloner:
    def __init__(self, guests: Guests, memory: MachineMemory, inventory: Inventory, events: Events) -> None:
        self._guests = guests
        self._memory = memory
        self._inventory = inventory
        self._events = events

    async def clone(self, source: Vm, names: Sequence[str], start: bool, step: Step) -> None:
        """Make VMs `names` out of `source`, paused or running, as it is at this moment; a running one stands
        still for that.  All of them are made, or none."""
        async with self._guests.changing(source):
            if source.state not in (State.RUNNING, State.PAUSED):
                raise Conflict(f"VM {source.name} is {source.state}: only paused or running it can be cloned")
            running = source.state == State.RUNNING
            if running:
                await self._guests.park(source)
            state = source.parked
            try:
                clones = await self._make(source, names, step)
            finally:
                if running:
                    with trio.CancelScope(shield=True):
                        await self._guests.unpark(source)
        for clone in clones:
            self._guests.add(clone)
        await self._launch(clones, state, start, step)

    async def _make(self, source: Vm, names: Sequence[str], step: Step) -> list[Vm]:
        """Definitions and memory of the clones."""
        common = msgspec.structs.replace(source.definition, template=source.name, created=time.time(),
                                         autostart=False)
        definitions = [msgspec.structs.replace(common, name=name) for name in names]
        clones: list[Vm] = []
        step("writing definitions", 0.1)
        await trio.to_thread.run_sync(self._inventory.save, definitions)
        try:
            assert source.block is not None
            for definition in definitions:
                step(f"sharing memory with {definition.name}", 0.3 + 0.4 * len(clones) / len(names))
                clone = Vm(definition, self._events)
                clone.block = self._memory.books.clone(source.block)
                clones.append(clone)
                await trio.lowlevel.checkpoint()
        except BaseException:
            for clone in clones:
                assert clone.block is not None
                self._memory.books.free(clone.block)
            for name in names:
                self._inventory.remove(name)
            raise
        return clones

    async def _launch(self, clones: list[Vm], state: bytes, start: bool, step: Step) -> None:
        """Have the clones run, or wait as paused.  Beyond this point each has a life of its own: what fails
        here is that clone's crash, and the others go on."""
        failures: list[HostError] = []

        async def launch(clone: Vm) -> None:
            try:
                async with self._guests.changing(clone):
                    clone.follow(Trigger.START)
                    await self._guests.launch_clone(clone, state)
            except HostError as error:
                failures.append(error)

        step("starting", 0.8)
        if start:
            async with trio.open_nursery() as nursery:
                for clone in clones:
                    nursery.start_soon(launch, clone)
        else:
            for clone in clones:
                clone.follow(Trigger.START)
                clone.begin_life()
                clone.parked = state
                clone.follow(Trigger.PAUSE)
        if failures:
            raise failures[0]
