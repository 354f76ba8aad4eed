# SPDX-License-Identifier: GPL-2.0-or-later
"""Clones of a guest: the same machine many times, sharing every frame until one of them writes it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import trio

from hostd.copies import copy_guest
from hostd.errors import HostError
from hostd.events import Events
from hostd.guests import Guests, Step
from hostd.inventory import Inventory
from hostd.lifecycle import Trigger
from hostd.memory import MachineMemory
from hostd.model import ClonesView
from hostd.vm import Vm

if TYPE_CHECKING:
    from vmm.memory.block import VmBlock

log = logging.getLogger(__name__)


class Cloner:
    def __init__(self, guests: Guests, memory: MachineMemory, inventory: Inventory, events: Events) -> None:
        self._guests = guests
        self._memory = memory
        self._inventory = inventory
        self._events = events

    async def clone(self, source: Vm, names: Sequence[str], start: bool, step: Step) -> ClonesView:
        """Make VMs `names` out of `source`, paused or running, as it is at this moment; a running one stands
        still while its memory is copied once, by sharing.  All of them are made, or none: none, either, when
        this is called off while they start."""
        step("writing definitions", 0.1)
        async with self._guests.changing(source):
            common = msgspec.structs.replace(source.definition, template=source.name, created=time.time(),
                                             autostart=False)
            definitions = [msgspec.structs.replace(common, name=name) for name in names]
            await trio.to_thread.run_sync(self._inventory.save, definitions)
            try:
                step("copying memory", 0.3)
                copy = await copy_guest(self._guests, self._memory, source)
                blocks = await self._multiply(copy.block, len(names))
            except BaseException:
                for name in names:
                    self._inventory.remove(name)
                raise
        clones = [Vm(definition, self._events) for definition in definitions]
        for clone, block in zip(clones, blocks):
            # Invariant: it has memory, so it is STARTING: all that others can do before its turn is to end it
            clone.block = block
            self._guests.add(clone)
            clone.follow(Trigger.START)
            clone.begin_life()
        step("starting", 0.8)
        try:
            await self._launch(clones, copy.state, start)
        except HostError:
            raise
        except BaseException:
            await self._unmake(clones)
            raise
        return ClonesView(names=list(names), pause_s=copy.pause_s)

    async def _multiply(self, block: VmBlock, count: int) -> list[VmBlock]:
        """`block`, which nobody runs, and clones of it: `count` in all, or none, and `block` is freed."""
        blocks = [block]
        try:
            while len(blocks) < count:
                blocks.append(self._memory.books.clone(block))
                await trio.lowlevel.checkpoint()
        except BaseException:
            for block in blocks:
                self._guests.free_copy(block)
            raise
        return blocks

    async def _launch(self, clones: list[Vm], state: bytes, start: bool) -> None:
        """Have the clones run, or wait as paused.  Each has a life of its own from here on: one that no
        worker takes is paused, one that a worker refuses has crashed, and the others go on."""
        failures: list[HostError] = []

        async def launch(clone: Vm, block: VmBlock | None) -> None:
            try:
                async with self._guests.changing(clone):
                    if clone.block is block:        # nobody has ended it
                        await self._guests.launch(clone, state)
            except HostError as error:
                failures.append(error)

        if start:
            async with trio.open_nursery() as nursery:
                for clone in clones:
                    nursery.start_soon(launch, clone, clone.block)
        else:
            for clone in clones:
                clone.parked = state
                clone.follow(Trigger.PAUSE)
        if failures:
            raise failures[0]

    async def _unmake(self, clones: list[Vm]) -> None:
        """They are not wanted after all, whatever has become of each."""
        async def unmake(clone: Vm) -> None:
            try:
                await self._guests.destroy(clone, force=True)
            except HostError as error:
                log.warning("clone not removed", extra={"vm": clone.name, "why": str(error)})

        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for clone in clones:
                    if not clone.destroyed:
                        nursery.start_soon(unmake, clone)
