# SPDX-License-Identifier: GPL-2.0-or-later
"""The host: everything a user can ask of it, as methods.  The API and the metrics are views of this object.

Long work returns an `Operation` at once and goes on in the background; its errors are the operation's.  What
is plainly wrong (no such VM, a state in which it is not possible) is raised at once.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from hostd import __version__, waiting
from hostd.claims import changed, check_admission, check_claim, grows
from hostd.cloning import Cloner
from hostd.config import Config
from hostd.console import Console
from hostd.errors import Conflict, HostError, Invalid, NotFound, TimedOut
from hostd.events import Events
from hostd.guests import Guests
from hostd.images import Images, NotAKernel
from hostd.inventory import Inventory
from hostd.lifecycle import AT_REST, State, Trigger
from hostd.loader import lay_out
from hostd.memory import MachineMemory
from hostd.memory_state import HostMemoryState
from hostd.model import (
    BlobView,
    CloneRequest,
    ClonesView,
    Definition,
    ExitRow,
    FrameCounts,
    HostView,
    ImageSpec,
    ImageView,
    MemoryView,
    RestoredView,
    RestoreRequest,
    SnapshotRequest,
    StopRequest,
    TranslationsView,
    VmCreate,
    VmPatch,
    VmView,
    WorkerView,
)
from hostd.operations import Operation, Operations
from hostd.protocol import MAX_CHUNK, Input, SetShare
from hostd.vm import Vm
from hostd.workers import WORKER_COMMAND, Workers

if TYPE_CHECKING:
    from hostd.restoring import Restorer
    from hostd.saving import Saver

log = logging.getLogger(__name__)

#: how long a guest may take to power off, when the user does not say
STOP_TIMEOUT_S = 30.0
COLLECT_INTERVAL_S = 600.0

#: states in which a VM can be cloned and saved; a move between workers is over before either begins
_COPIED = frozenset({State.RUNNING, State.PAUSED, State.MIGRATING})


class Host:
    """All methods are for the trio thread of the daemon.  They raise hostd.errors.HostError only."""

    def __init__(self, config: Config, nursery: trio.Nursery,
                 worker_command: Sequence[str] = WORKER_COMMAND) -> None:
        """Take the state directory and map the pool.  Raises HostError if that cannot be."""
        self.config = config
        self.events = Events()
        self.operations = Operations(nursery, self.events)
        #: where the metrics are served, once they are
        self.metrics_url: str | None = None
        self._inventory = Inventory(config.state_dir)
        self._images = Images(config.state_dir)
        self._memory = MachineMemory(config.pool_bytes, config.state_dir / "swap",
                                     config.memory.swap.bytes, config.memory.overcommit_ratio)
        self._guests = Guests(nursery, self._memory, self._images, self._inventory, self.events)
        self._cloner = Cloner(self._guests, self._memory, self._inventory, self.events)
        options = [config.log.level, config.log.format, str(round(config.scheduler.slice_ms * 1e6)),
                   config.bt.cpu, str(config.bt.cache.bytes)]
        self._workers = self._guests.workers = Workers(
            config.worker_count, self._memory.pool.fd, self._memory.pool.size, self._guests.leases, options,
            worker_command)
        #: what the memory policy says of the host
        self.memory_state = HostMemoryState()
        self._images_lock = trio.Lock()
        #: names of VMs in the making
        self._reserved: set[str] = set()
        #: definitions that were admitted and are not in force yet, by name
        self._promised: dict[str, Definition] = {}
        self._started = time.monotonic()
        for definition in self._inventory.load():
            self._guests.add(Vm(definition, self.events))
        suspended = self._inventory.suspended()
        #: VMs that were suspended with the host, which nobody else is to start; None: it was not
        self._suspended = None if suspended is None else [
            vm for name, vm in self._guests.vms.items() if name in suspended]
        for vm in self._suspended or ():
            vm.follow(Trigger.START, "the host was suspended")
        #: they are back, or will not come
        self._resumed = trio.Event()

    # --- the life of the host -----------------------------------------------------------------------

    async def run(self) -> None:
        """Keep workers and housekeeping going until `shut_down`."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._prepare_books)
            nursery.start_soon(self._balance)
            nursery.start_soon(self._collect)
            nursery.start_soon(self._keep_memory)
            nursery.start_soon(self._bring_back)
            await self._workers.run()
            nursery.cancel_scope.cancel()

    async def _bring_back(self) -> None:
        """Have those guests run that are to run when the host does."""
        try:
            if self._suspended is not None:
                await self._restorer.resume(self._suspended)
        finally:
            self._resumed.set()
        for vm in list(self._guests.vms.values()):
            if vm.definition.autostart and vm.state in AT_REST and not self._guests.closing:
                self.start(vm.name)

    async def shut_down(self) -> None:
        """Stop all guests, by the power button as long as host.shutdown_timeout allows, or suspend them if
        host.on_shutdown says so; then stop all workers."""
        self._guests.closing = True
        timeout = self.config.host.shutdown_timeout
        suspended: set[str] = set()
        if self.config.host.on_shutdown == "suspend":
            await self._resumed.wait()
            for vm in self._guests.vms.values():
                self._guests.give_up_start(vm)
            suspended = await self._saver.suspend()
        async with trio.open_nursery() as nursery:
            for vm in list(self._guests.vms.values()):
                self._guests.give_up_start(vm)
                if vm.state not in AT_REST and vm.name not in suspended:
                    nursery.start_soon(self._stop_for_good, vm, timeout)
        self._workers.quit()
        self.events.close()
        for vm in self._guests.vms.values():
            vm.console.close()

    async def _stop_for_good(self, vm: Vm, timeout: float) -> None:
        try:
            await self._guests.stop(vm, force=False, timeout=timeout)
        except HostError as error:
            log.warning("guest not stopped", extra={"vm": vm.name, "why": str(error)})

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
            await trio.to_thread.run_sync(import_module, module)

    async def _keep_memory(self) -> None:
        """Carry out the memory policy, and share pages."""
        from hostd.keeping import keep

        await keep(self.config_now, self._guests, self._memory, self.events, self.memory_state)

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

    async def _collect(self) -> None:
        while True:
            try:
                async with self._images_lock:
                    await trio.to_thread.run_sync(self._images.collect, self._blobs_in_use())
            except HostError as error:
                log.warning("blobs not collected", extra={"why": str(error)})
            await trio.sleep(COLLECT_INTERVAL_S)

    def _blobs_in_use(self) -> set[str]:
        definitions = [vm.definition for vm in self._guests.vms.values()]
        return {sha256 for definition in definitions
                for sha256 in (definition.kernel, definition.initrd) if sha256}

    # --- looking --------------------------------------------------------------------------------------

    def host_view(self) -> HostView:
        return HostView(
            version=__version__, pid=os.getpid(), uptime_s=round(time.monotonic() - self._started, 3),
            state_dir=str(self.config.state_dir), socket=str(self.config.socket), metrics=self.metrics_url,
            memory=self._memory.pool.size, frames=self.frames(), workers=self.workers(),
            vms={state: count for state, count in self.vm_counts().items() if count})

    def vm_counts(self) -> dict[State, int]:
        """VMs by state."""
        counts = Counter(vm.state for vm in self._guests.vms.values())
        return {state: counts[state] for state in State}

    def summary(self) -> str:
        """The host in a few words."""
        ready = len(self._workers.ready)
        return (f"{self.vm_counts()[State.RUNNING]} of {len(self._guests.vms)} guests running, "
                f"{ready} of {len(self._workers.all)} workers ready")

    def workers(self) -> list[WorkerView]:
        held = Counter(vm.worker for vm in self._guests.vms.values())
        return [worker.view(held[worker]) for worker in self._workers.all]

    def frames(self) -> FrameCounts:
        return self._memory.books.counts()

    def memory(self, vms: Sequence[VmView] | None = None) -> MemoryView:
        """Machine memory of the whole host; `vms` spares a caller who has the `views` a second look."""
        references = sum(vm.memory_usage.shared for vm in (self.views() if vms is None else vms))
        swap = self._memory.books.stores.swap
        return self.memory_state.view(self.frames(), references, None if swap is None else swap.stats())

    def check_memory(self) -> list[str]:
        """Every disagreement in the books of machine memory, a sentence each; what workers have not reported
        yet is one, too."""
        return self._memory.books.check()

    async def checked_memory(self) -> MemoryView:
        """The same view with `wrong`: what the books have wrong before and after all workers have told what
        they had to tell."""
        wrong = self.check_memory()
        if wrong:
            await self._workers.hear()
            still = set(self.check_memory())
            wrong = [sentence for sentence in wrong if sentence in still]
        return msgspec.structs.replace(self.memory(), wrong=wrong)

    def latency(self) -> tuple[list[int], float]:
        """Wake-up latency histogram of all workers: counts per bucket of hostd.scheduler.LATENCY_BOUNDS_NS
        (not cumulative; one more bucket is for what is longer), and the sum in seconds."""
        return self._workers.latency()

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
        vm = self._vm(name)
        pattern = waiting.compile_pattern(console) if console is not None else None
        wanted = waiting.parse_state(state) if state is not None else None
        with trio.move_on_after(float("inf") if timeout is None else timeout) as scope:
            if pattern is not None:
                await waiting.for_console(vm, pattern)
            if wanted is not None:
                await waiting.for_state(vm, wanted, self.events)
        if scope.cancelled_caught:
            what = f"did not become {state}" if state else "did not print what was waited for"
            raise TimedOut(f"VM {name} {what} within {timeout:g} seconds; it is {vm.state}")
        return vm.view()

    # --- changing -------------------------------------------------------------------------------------

    async def create(self, request: VmCreate) -> VmView:
        definition = self._define(request)
        with self._reserve([definition.name]), self._promise([definition]):
            await self._check_bootable(definition)
            await trio.to_thread.run_sync(self._inventory.save, [definition])
            self._guests.add(Vm(definition, self.events))
        if request.start:
            self.start(definition.name)
        return self.get(definition.name)

    async def update(self, name: str, patch: VmPatch) -> VmView:
        vm = self._vm(name)
        async with self._guests.changing(vm):
            definition = changed(vm.definition, patch, vm.state in AT_REST)
            self._check_memory_of(definition)
            with self._promise([definition] if grows(vm.definition, definition) else []):
                if definition.memory != vm.definition.memory:
                    await self._check_bootable(definition)
                await trio.to_thread.run_sync(self._inventory.save, [definition])
                vm.definition = definition
            if vm.worker is not None:
                vm.worker.send(SetShare(vm.lease, definition.weight, definition.cap))
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
        self._check_names(request.names)
        clones = [msgspec.structs.replace(vm.definition, name=new) for new in request.names]
        # they share most of what their memory comes to, but each has a reservation of its own
        self._admit(clones, math.inf)

        async def work(operation: Operation) -> ClonesView:
            with self._reserve(request.names), self._promise(clones, math.inf):
                return await self._cloner.clone(vm, request.names, request.start, operation.step)

        return self._begin("clone", vm, work)

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
            self._check_names([request.name])

        async def work(operation: Operation) -> RestoredView:
            operation.step("reading the snapshot", 0.1)
            opened = await self._restorer.open(Path(request.file))
            try:
                saved = opened.saved.definition
                definition = msgspec.structs.replace(saved, name=request.name or saved.name)
                self._check_memory_of(definition)
                with self._reserve([definition.name]), self._promise([definition]):
                    await self._restorer.restore(opened, definition, operation.step)
            except BaseException:
                opened.close()
                raise
            return RestoredView(name=definition.name)

        if self._guests.closing:
            raise Conflict("the host is shutting down")
        return self.operations.start("restore", request.name or Path(request.file).name, work)

    @cached_property
    def _saver(self) -> Saver:
        from hostd.saving import Saver

        return Saver(self._guests, self._memory, self.config.state_dir)

    @cached_property
    def _restorer(self) -> Restorer:
        from hostd.restoring import Restorer

        return Restorer(self._guests, self._memory, self._inventory, self.events, self.config.state_dir)

    async def send_input(self, name: str, data: bytes) -> None:
        """Type at the guest's console."""
        vm = self._vm(name)
        for start in range(0, len(data), MAX_CHUNK):
            if vm.state not in (State.RUNNING, State.MIGRATING):
                raise Conflict(f"VM {name} is {vm.state}: nothing reads its console")
            # the lock waits for a move or a clone to end: what is typed meanwhile would be lost
            async with self._guests.changing(vm):
                if vm.worker is not None:
                    await vm.worker.room()
                    vm.worker.send(Input(vm.lease, data[start:start + MAX_CHUNK]))

    # --- images ---------------------------------------------------------------------------------------

    async def add_blob(self, chunks: AsyncIterable[bytes]) -> BlobView:
        """Keep an upload.  Raises TooLarge, Invalid for an empty one, Failed for a full disk."""
        with self._images.upload(self.config.api.max_upload.bytes) as upload:
            async for chunk in chunks:
                await trio.to_thread.run_sync(upload.write, chunk)
            return await trio.to_thread.run_sync(upload.commit)

    def list_images(self) -> list[ImageView]:
        return self._images.list()

    async def add_image(self, spec: ImageSpec) -> ImageView:
        async with self._images_lock:
            with self._discarding(spec.kernel):
                return await trio.to_thread.run_sync(self._images.add, spec)

    async def remove_image(self, name: str) -> None:
        self._images.get(name)
        users = [vm.name for vm in self._guests.vms.values() if vm.definition.image == name]
        if users:
            raise Conflict(f"image {name} is used by VM {users[0]}" +
                           (f" and {len(users) - 1} more" if len(users) > 1 else ""))
        async with self._images_lock:
            await trio.to_thread.run_sync(self._images.remove, name)

    # --- checks ---------------------------------------------------------------------------------------

    def _vm(self, name: str) -> Vm:
        try:
            return self._guests.vms[name]
        except KeyError:
            raise NotFound(f"no VM {name[:64]}") from None

    def _check_names(self, names: Sequence[str]) -> None:
        if self._guests.closing:
            raise Conflict("the host is shutting down")
        for name in names:
            if name in self._guests.vms or name in self._reserved:
                raise Conflict(f"VM {name} exists already")
        if len(set(names)) < len(names):
            raise Invalid("a name is given twice")

    @contextmanager
    def _reserve(self, names: Sequence[str]) -> Iterator[None]:
        """Keep names for VMs in the making."""
        self._check_names(names)
        self._reserved.update(names)
        try:
            yield
        finally:
            self._reserved.difference_update(names)

    def _begin(self, kind: str, vm: Vm, work: Callable[[Operation], Awaitable[Any]]) -> Operation:
        if self._guests.closing:
            raise Conflict("the host is shutting down")
        return self.operations.start(kind, vm.name, work)

    def _define(self, request: VmCreate) -> Definition:
        """The request with every default filled in.  Raises Invalid where it does not fit together."""
        if (request.image is None) == (request.kernel is None):
            raise Invalid("a VM needs an image or a kernel, and not both")
        if request.image is not None and request.initrd is not None:
            raise Invalid("an initrd goes with a kernel; an image has its own")
        defaults = self.config.defaults
        definition = Definition(
            name=request.name, memory=defaults.memory.bytes if request.memory is None else request.memory,
            reservation=request.reservation or 0, limit=request.limit, shares=request.shares,
            vmm=request.vmm or defaults.vmm, autostart=request.autostart,
            image=request.image, kernel=request.kernel, initrd=request.initrd, append=request.append,
            weight=defaults.weight if request.weight is None else request.weight,
            cap=defaults.cap if request.cap is None else request.cap,
            on_crash=defaults.on_crash if request.on_crash is None else request.on_crash,
            on_poweroff=defaults.on_poweroff if request.on_poweroff is None else request.on_poweroff,
            created=time.time())
        self._check_memory_of(definition)
        return definition

    def _check_memory_of(self, definition: Definition) -> None:
        """Raise Invalid for memory that contradicts itself, or that no host of this size could give."""
        check_claim(definition)
        self._memory.books.check_size(definition.memory)

    def _admit(self, definitions: Sequence[Definition], ratio: float) -> None:
        """Raise Conflict unless the host can promise these VMs their memory beside all others."""
        others = {vm.name: vm.definition for vm in self._guests.vms.values()} | self._promised
        for definition in definitions:
            others.pop(definition.name, None)
        check_admission(self._memory.pool.size, ratio, others.values(), definitions)

    @contextmanager
    def _promise(self, definitions: Sequence[Definition], ratio: float | None = None) -> Iterator[None]:
        """The same by the configuration's ratio, and count them until they are in force."""
        self._admit(definitions, self.config.memory.overcommit_ratio if ratio is None else ratio)
        promised = {definition.name: definition for definition in definitions}
        self._promised |= promised
        try:
            yield
        finally:
            for name in promised:
                del self._promised[name]

    async def _check_bootable(self, definition: Definition) -> None:
        """Raise what a start would raise, before the definition is written."""
        if definition.kernel is not None:
            self._images.check_blob(definition.kernel, "kernel")
        if definition.initrd is not None:
            self._images.check_blob(definition.initrd, "initrd")
        with self._discarding(definition.kernel):
            files = await trio.to_thread.run_sync(self._images.boot_files, definition)
        await trio.to_thread.run_sync(lay_out, files, definition.memory)

    @contextmanager
    def _discarding(self, kernel: str | None) -> Iterator[None]:
        """A blob that turns out not to be the kernel it was uploaded as is not kept."""
        try:
            yield
        except NotAKernel:
            if kernel is not None and kernel not in self._blobs_in_use():
                self._images.discard(kernel)
            raise
