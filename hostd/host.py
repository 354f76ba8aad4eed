# SPDX-License-Identifier: GPL-2.0-or-later
"""The host: everything a user can ask of it, as methods.  The API and the metrics are views of this object.

Long work returns an `Operation` at once and goes on in the background; its errors are the operation's.  What
is plainly wrong (no such VM, a state in which it is not possible) is raised at once.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from hostd import sockets, storage, waiting
from hostd.admission import Admission
from hostd.claims import changed, grows
from hostd.cloning import Cloner
from hostd.config import Config
from hostd.console import Console
from hostd.errors import Conflict, NotFound
from hostd.events import Events
from hostd.guests import Guests
from hostd.image_keeper import ImageKeeper
from hostd.images import Images
from hostd.importing import load_module
from hostd.inventory import Inventory
from hostd.lifecycle import AT_REST, State, Trigger
from hostd.memory import MachineMemory
from hostd.migration.departures import Departures
from hostd.model import (
    BlobView,
    CloneRequest,
    ClonesView,
    ExitRow,
    ImageSpec,
    ImageView,
    RestoredView,
    RestoreRequest,
    SnapshotRequest,
    StopRequest,
    TranslationsView,
    VmCreate,
    VmPatch,
    VmView,
)
from hostd.operations import Operation, Operations
from hostd.overview import Overview
from hostd.powering import Powering
from hostd.protocol import MAX_CHUNK
from hostd.vm import Vm
from hostd.workers import WORKER_COMMAND, Workers

if TYPE_CHECKING:
    from hostd.migration.service import Migrations
    from hostd.migration.views import SwitchRequest
    from hostd.restoring import Restorer
    from hostd.resuming import Resumer
    from hostd.saving import Saver
    from hostd.suspending import Suspender
    from hostd.switching import Switcher

#: how long a guest may take to power off, when the user does not say
STOP_TIMEOUT_S = 30.0

#: states in which a VM can be cloned and saved, and its monitor be changed; a move between workers is over
#: before any of that begins
_COPIED = frozenset({State.RUNNING, State.PAUSED, State.MIGRATING})


class Host:
    """All methods are for the trio thread of the daemon.  They raise hostd.errors.HostError only."""

    def __init__(self, config: Config, nursery: trio.Nursery,
                 worker_command: Sequence[str] = WORKER_COMMAND) -> None:
        """Take the state directory and map the pool.  Raises HostError if that cannot be."""
        self.config = config
        self.events = Events()
        self.operations = Operations(nursery, self.events)
        self._inventory = Inventory(config.state_dir)
        images = Images(config.state_dir)
        self._memory = MachineMemory(config.pool_bytes, config.state_dir / "swap",
                                     config.memory.swap.bytes, config.memory.overcommit_ratio,
                                     config.worker_count)
        self._guests = Guests(nursery, self._memory, images, self._inventory, self.events)
        self._cloner = Cloner(self._guests, self._memory, self._inventory, self.events)
        options = [config.log.level, config.log.format, str(round(config.scheduler.slice_ms * 1e6)),
                   config.bt.cpu, str(config.bt.cache.bytes), str(self._memory.refill)]
        self._workers = self._guests.workers = Workers(
            config.worker_count, self._memory.pool.fd, self._memory.pool.size, self._guests.leases, options,
            worker_command)
        #: the host as a whole, to be looked at
        self.overview = Overview(self.config_now, self._guests, self._memory, self._workers)
        self._images = ImageKeeper(images, self._guests)
        self._admission = Admission(self.config_now, self._guests, self._memory)
        self._departures = Departures()
        bind = config.migration.bind()
        self._listener = None if bind is None else sockets.tcp_listener(*bind, use="migration")
        for definition in self._inventory.load():
            self._guests.add(Vm(definition, self.events))
        storage.make_directory(config.state_dir / "migrations")
        if any((config.state_dir / "migrations").glob("*.json")):
            # Invariant: a guest that an earlier daemon may have given away is nobody's to start, from the
            # first moment on; who has no such guest need not wait for what `migrations` imports
            _ = self.migrations
        self._powering = Powering(self.config_now, self._guests, self._inventory, lambda: self._suspender,
                                  lambda: self._resumer, lambda vm: self.start(vm.name))

    # --- the life of the host -----------------------------------------------------------------------

    async def run(self) -> None:
        """Keep workers and housekeeping going until `shut_down`."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._prepare_books)
            nursery.start_soon(self._balance)
            nursery.start_soon(self._images.collect)
            nursery.start_soon(self._keep_memory)
            nursery.start_soon(self._come_up, nursery)
            await self._workers.run()
            nursery.cancel_scope.cancel()

    async def _come_up(self, nursery: trio.Nursery) -> None:
        """Find out which guests an earlier daemon gave away, and have those run that are to run."""
        await load_module("hostd.migration.service")
        nursery.start_soon(self.migrations.run)
        await self._powering.come_up()

    async def shut_down(self, alive: Callable[[], None] = lambda: None) -> None:
        """Stop or suspend all guests as the configuration says, then stop all workers.  What takes long calls
        `alive`, in any thread, for as long as it gets on."""
        self._guests.closing = True
        await self.migrations.go_down()
        await self._powering.go_down(alive)
        self._workers.quit()
        self.events.close()
        for vm in self._guests.vms.values():
            vm.console.close()

    def close(self) -> None:
        """Let go of the state directory."""
        self._inventory.close()

    def reload(self, config: Config) -> None:
        """Take over what a running host can change."""
        self.config = config
        self.events.publish("config")

    def healthy(self) -> bool:
        """The workers answer.  (That somebody can ask shows that the main loop runs.)"""
        return self._workers.healthy()

    async def _prepare_books(self) -> None:
        """Load in the background what the first guest needs and the first answer did not."""
        for module in "hostd.books", "hostd.restoring":
            await load_module(module)

    async def _keep_memory(self) -> None:
        """Carry out the memory policy, and share pages."""
        keeping = await load_module("hostd.keeping")
        await keeping.keep(self.config_now, self._guests, self._memory, self.events,
                           self.overview.memory_state)

    def config_now(self) -> Config:
        """The configuration as it is at the moment."""
        return self.config

    async def _balance(self) -> None:
        while True:
            await trio.sleep(self.config.scheduler.balance_interval)
            moves = self._guests.placement.moves(self._workers.ready, self._guests.vms.values())
            async with trio.open_nursery() as nursery:
                for name, worker in moves:
                    nursery.start_soon(self._guests.try_move, self._guests.vms[name], worker)

    # --- looking --------------------------------------------------------------------------------------

    def views(self) -> list[VmView]:
        return [vm.view() for _, vm in sorted(self._guests.vms.items())]

    def get(self, name: str) -> VmView:
        return self._vm(name).view()

    def exits(self, name: str) -> list[ExitRow]:
        vm = self._vm(name)
        return vm.ledger.exits(vm.block)

    async def translations(self, name: str, address: int | None = None) -> TranslationsView:
        return await self._guests.translations(self._vm(name), address)

    def console(self, name: str) -> Console:
        return self._vm(name).console

    async def wait(self, name: str, *, state: str | None = None, console: str | None = None,
                   timeout: float | None = None) -> VmView:
        """Until the console, since the present boot, matches the regular expression, and then until the VM is
        in `state`.  Raises TimedOut; Conflict when the VM ends so that it cannot happen any more."""
        return await waiting.wait(self._vm(name), self.events, state, console, timeout)

    # --- changing -------------------------------------------------------------------------------------

    async def create(self, request: VmCreate) -> VmView:
        definition = self._admission.define(request)
        with self._admission.reserve([definition.name]), self._admission.promise([definition]):
            await self._images.check_bootable(definition)
            await trio.to_thread.run_sync(self._inventory.save, [definition])
            self._guests.add(Vm(definition, self.events))
        if request.start:
            self.start(definition.name)
        return self.get(definition.name)

    async def update(self, name: str, patch: VmPatch) -> VmView:
        vm = self._vm(name)
        async with self._guests.changing(vm):
            definition = changed(vm.definition, patch, vm.state in AT_REST)
            self._admission.check_memory(definition)
            with self._admission.promise([definition] if grows(vm.definition, definition) else []):
                if definition.memory != vm.definition.memory:
                    await self._images.check_bootable(definition)
                await trio.to_thread.run_sync(self._inventory.save, [definition])
                vm.definition = definition
            self._guests.tell_share(vm)
        return vm.view()

    def start(self, name: str) -> Operation:
        vm = self._vm(name)
        vm.check(Trigger.START)
        return self._begin("start", vm, lambda operation: self._guests.start(vm, operation.step))

    def pause(self, name: str) -> Operation:
        vm = self._vm(name)
        vm.check(Trigger.PAUSE)
        return self._begin("pause", vm, lambda operation: self._guests.pause(vm))

    def resume(self, name: str) -> Operation:
        vm = self._vm(name)
        vm.check(Trigger.RESUME)
        return self._begin("resume", vm, lambda operation: self._guests.resume(vm))

    def stop(self, name: str, request: StopRequest) -> Operation:
        """Power the guest off; also calls off a start or a restart that is under way or due."""
        vm = self._vm(name)
        if vm.starting is None:
            vm.check(Trigger.POWER_OFF)
        timeout = STOP_TIMEOUT_S if request.timeout is None else request.timeout
        return self._begin("stop", vm, lambda operation: self._guests.stop(vm, request.force, timeout))

    def reset(self, name: str) -> Operation:
        vm = self._vm(name)
        vm.check(Trigger.RESET)
        return self._begin("reset", vm, lambda operation: self._guests.reset(vm, operation.step))

    def destroy(self, name: str, force: bool = False) -> Operation:
        vm = self._vm(name)
        if vm.state not in AT_REST and not force:
            raise Conflict(f"VM {name} is {vm.state}: stop it first, or destroy it by force")
        return self._begin("destroy", vm, lambda operation: self._guests.destroy(vm, force))

    def clone(self, name: str, request: CloneRequest) -> Operation:
        vm = self._vm(name)
        if vm.state not in _COPIED:
            raise Conflict(f"VM {name} is {vm.state}: it must be paused or running to be cloned")
        self._admission.check_names(request.names)
        clones = [msgspec.structs.replace(vm.definition, name=new) for new in request.names]
        self._admission.check_clones(clones)

        async def work(operation: Operation) -> ClonesView:
            with self._admission.reserve(request.names), self._admission.promise_clones(clones):
                return await self._cloner.clone(vm, request.names, request.start, operation.step)

        return self._begin("clone", vm, work)

    def switch(self, name: str, request: SwitchRequest) -> Operation:
        """Have another monitor run the guest on; the result is a SwitchedView."""
        vm = self._vm(name)
        if vm.state not in _COPIED:
            raise Conflict(f"VM {name} is {vm.state}: it must be running or paused to change its monitor")
        return self._begin("switch", vm,
                           lambda operation: self._switcher.switch(vm, request.vmm, operation.step))

    def snapshot(self, name: str, request: SnapshotRequest) -> Operation:
        vm = self._vm(name)
        if vm.state not in _COPIED:
            raise Conflict(f"VM {name} is {vm.state}: it must be paused or running to be saved")
        to, base = (None if path is None else Path(path) for path in (request.to, request.base))
        return self._begin("snapshot", vm,
                           lambda operation: self._saver.snapshot(vm, to, base, operation.step))

    def restore(self, request: RestoreRequest) -> Operation:
        """Make a VM of a snapshot, which goes on where it stood."""
        if request.name is not None:
            self._admission.check_names([request.name])

        async def work(operation: Operation) -> RestoredView:
            operation.step("reading the snapshot", 0.1)
            opened = await self._restorer.open(Path(request.file))
            try:
                saved = opened.saved.definition
                definition = msgspec.structs.replace(saved, name=request.name or saved.name)
                self._admission.check_memory(definition)
                with self._admission.reserve([definition.name]), self._admission.promise([definition]):
                    await self._restorer.restore(opened, definition, operation.step)
            finally:
                opened.close()
            return RestoredView(name=definition.name)

        self._admission.check_open()
        return self.operations.start("restore", request.name or Path(request.file).name, work)

    @cached_property
    def _switcher(self) -> Switcher:
        from hostd.switching import Switcher

        return Switcher(self._guests, self._inventory)

    @cached_property
    def _saver(self) -> Saver:
        from hostd.saving import Saver

        return Saver(self._guests, self._memory, self._inventory.snapshots)

    @cached_property
    def _restorer(self) -> Restorer:
        from hostd.restoring import Restorer

        return Restorer(self._guests, self._memory, self._inventory, self.events)

    @cached_property
    def _suspender(self) -> Suspender:
        from hostd.suspending import Suspender

        return Suspender(self._guests, self.config.state_dir)

    @cached_property
    def _resumer(self) -> Resumer:
        from hostd.resuming import Resumer

        return Resumer(self._restorer, self._guests, self._memory, self.config.state_dir)

    @cached_property
    def migrations(self) -> Migrations:
        """Of guests from and to other hosts."""
        from hostd.migration.here import Here
        from hostd.migration.relay import serve_console
        from hostd.migration.service import Migrations

        here = Here(self._guests, self._memory, self._inventory, self._images.images, self._admission,
                    self.config.state_dir, self._departures, self.events, self.config_now,
                    lambda: self._workers.tsc_khz)
        return Migrations(here, self.operations, self._listener, lambda talk: serve_console(talk, self),
                          lambda vm: self.start(vm.name))

    async def send_input(self, name: str, data: bytes) -> None:
        """Type at the guest's console."""
        vm = self._vm(name)
        for start in range(0, len(data), MAX_CHUNK):
            await self._guests.type(vm, data[start:start + MAX_CHUNK])

    # --- images ---------------------------------------------------------------------------------------

    async def add_blob(self, chunks: AsyncIterable[bytes]) -> BlobView:
        return await self._images.add_blob(chunks, self.config.api.max_upload.bytes)

    def list_images(self) -> list[ImageView]:
        return self._images.list()

    async def add_image(self, spec: ImageSpec) -> ImageView:
        return await self._images.add(spec)

    async def remove_image(self, name: str) -> None:
        await self._images.remove(name)

    # --- common to all of them -------------------------------------------------------------------------

    def _vm(self, name: str) -> Vm:
        try:
            return self._guests.vms[name]
        except KeyError:
            gone = self._departures.get(name)
            where = f": it went to {gone.peer}" if gone is not None else ""
            raise NotFound(f"no VM {name[:64]}{where}") from None

    def _begin(self, kind: str, vm: Vm, work: Callable[[Operation], Awaitable[Any]]) -> Operation:
        self._admission.check_open()
        return self.operations.start(kind, vm.name, work)
