# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests out of files: restored from a snapshot.

A file is read as a whole before anything is made of it: what is damaged is refused, and nothing is half
there.  Pages are read when they are needed; a file stays open, whatever becomes of its name, for as long as a
page of a guest is in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import trio

from hostd.definition import Definition
from hostd.events import Events
from hostd.guests import Guests, Step
from hostd.inventory import Inventory
from hostd.lifecycle import Trigger
from hostd.memory import MachineMemory
from hostd.protocol import CloseStore
from hostd.saved import saved_in
from hostd.snapshot import Folder, Snapshot, Unusable
from hostd.vm import Vm
from vmm import loadable
from vmm.memory.records import PageStore
from vmm.state import StateError

if TYPE_CHECKING:
    from vmm.memory.block import VmBlock


class Opened:
    """A snapshot that was verified, with its bases."""

    def __init__(self, path: Path) -> None:
        """Takes its time: call it in a thread.  Raises NotFound, Unusable, Failed."""
        self._folder = Folder(path.parent)
        self.snapshot: Snapshot | None = None
        try:
            self.snapshot = self._folder.open(path.name)
            self.saved = saved_in(self.snapshot)
            self.snapshot.verify()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """What pages of guests are in stays open in Stores."""
        if self.snapshot is not None:
            self.snapshot.close()
        self._folder.close()


class Restorer:
    def __init__(self, guests: Guests, memory: MachineMemory, inventory: Inventory, events: Events) -> None:
        self._guests = guests
        self._memory = memory
        self._inventory = inventory
        self._events = events
        memory.books.stores.on_close = self._tell_workers

    def _tell_workers(self, number: int) -> None:
        for worker in self._guests.workers.alive:
            worker.send(CloseStore(number))

    async def open(self, path: Path) -> Opened:
        """Raises NotFound, Unusable, Failed."""
        return await trio.to_thread.run_sync(Opened, path)

    async def restore(self, opened: Opened, definition: Definition, step: Step) -> None:
        """Make a running VM out of a snapshot.  It is made, or nothing is."""
        step("writing the definition", 0.6)
        assert opened.snapshot is not None
        vm = Vm(definition, self._events)
        try:
            await trio.to_thread.run_sync(self._inventory.save, [definition])
            step("waiting for a worker", 0.7)
            await self._guests.workers.wait_ready()
            step("starting", 0.8)
            with self.opened_stores(opened.snapshot.stores) as numbers:
                vm.block = self._memory.books.new(definition.memory)
                self.refer(vm.block, opened.snapshot.index, numbers)
                opened.saved.mark_ballooned(vm.block)
            self._check_state(opened.snapshot, vm.block, definition)
            async with self._guests.changing(vm):   # nobody knows it yet: nobody is first
                self._guests.add(vm)
                vm.stopping = True                  # should it end at once, nobody restarts it
                vm.follow(Trigger.START)
                vm.begin_life()
                await self._guests.hand_over(vm, opened.snapshot.state, Trigger.LOADED)
            vm.stopping = False
        except BaseException:
            if vm.block is not None:
                block, vm.block = vm.block, None
                self._guests.free_copy(block)
            if vm.name in self._guests.vms:
                self._guests.forget(vm)
            self._inventory.remove(definition.name)
            raise

    def _check_state(self, snapshot: Snapshot, block: VmBlock, definition: Definition) -> None:
        try:
            loadable.check(snapshot.state, block, definition.vmm, self._guests.workers.tsc_khz)
        except StateError as error:
            raise Unusable(f"{snapshot.path} cannot be used: its state cannot be loaded: {error}") from None

    @contextmanager
    def opened_stores(self, files: Sequence[PageStore]) -> Iterator[list[int]]:
        """Have files among the stores, by number; those in which there is no page in the end are no more."""
        stores = self._memory.books.stores
        numbers: list[int] = []
        try:
            for file in files:
                numbers.append(stores.open(file))
            yield numbers
        finally:
            for number in numbers:
                stores.let_go(number)

    def refer(self, block: VmBlock, rows: np.ndarray, numbers: Sequence[int]) -> None:
        """The contents of these pages of the guest are in the stores of these numbers."""
        slots = np.array(numbers, dtype=np.uint64)[rows["base"]] << np.uint64(32) | rows["offset"]
        self._memory.books.stores.retain(slots)
        self._memory.books.refer(block, rows["page"].astype(np.int64), slots)
