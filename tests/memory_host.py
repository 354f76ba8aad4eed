# SPDX-License-Identifier: GPL-2.0-or-later
"""A host without machines: the real types, states, operations, events and consoles, and guests that echo."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import AsyncIterable, Sequence
from dataclasses import dataclass, field

import msgspec
import trio

from hostd.console import Console
from hostd.errors import Conflict, Invalid, NotFound, TimedOut, TooLarge
from hostd.events import Events
from hostd.host import Host
from hostd.lifecycle import AT_REST, Policy, State, Trigger, follow
from hostd.model import (
    BlobView,
    CloneRequest,
    CpuTimes,
    ExitRow,
    FrameCounts,
    HostView,
    ImageSpec,
    ImageView,
    MemoryEvents,
    MemoryUsage,
    MemoryView,
    RestoredView,
    RestoreRequest,
    SnapshotRequest,
    SnapshotView,
    StopRequest,
    SwapUsage,
    TranslationsView,
    VmCreate,
    VmPatch,
    VmView,
    WorkerView,
)
from hostd.operations import Operation, Operations
from hostd.overview import Overview
from tests.memory_migrations import MemoryMigrations

MAX_BLOB = 64 << 20


@dataclass
class Guest:
    spec: VmCreate
    state: State = State.DEFINED
    template: str | None = None
    console: Console = field(default_factory=Console)


class MemoryOverview(Overview):
    """Of a host with these guests."""

    def __init__(self, guests: dict[str, Guest]) -> None:
        self._vms = guests
        #: what its books of memory have wrong
        self.faults: list[str] = []

    def view(self) -> HostView:
        return HostView(
            version="0.1.0", pid=1, uptime_s=1.0, state_dir="/state", socket="/socket", memory=1 << 30,
            metrics="http://127.0.0.1:9/metrics", frames=self.frames(), workers=self.workers(), vms={})

    def workers(self) -> list[WorkerView]:
        return [WorkerView(index=0, pid=2, ready=True, vms=len(self._vms), silicon="none", tsc_khz=1,
                           restarts=0)]

    def frames(self) -> FrameCounts:
        return FrameCounts(total=9, free=9, granted=0, private=0, shared=0, overhead=0)

    def memory(self, vms: Sequence[VmView] | None = None) -> MemoryView:
        mib = 1 << 20
        return MemoryView(
            pool=1024 * mib, free=512 * mib, lent=8 * mib, private=256 * mib, shared=240 * mib,
            overhead=8 * mib, saved=2048 * mib,
            swap=SwapUsage(used=64 * mib, compressed=16 * mib, limit=4096 * mib),
            state="soft", waiting=2, scan_rate=5000.0, scanned=123456)

    def check_memory(self) -> list[str]:
        return self.faults

    async def checked_memory(self) -> MemoryView:
        return msgspec.structs.replace(self.memory(), wrong=self.faults)


class MemoryHost(Host):
    """Everything the API asks of a host, done at once and in memory."""

    def __init__(self, nursery: trio.Nursery | None) -> None:
        self.events = Events()
        self.operations = Operations(nursery, self.events)  # type: ignore[arg-type]
        self.guests: dict[str, Guest] = {}
        self.overview = MemoryOverview(self.guests)
        self.blobs: set[str] = set()
        self.images: dict[str, ImageView] = {}
        self.snapshots: dict[str, Guest] = {}
        #: guests that stand still for memory
        self.waiting: set[str] = set()
        self.migrations = MemoryMigrations(self.get, self._leave)
        self.migrations.start = self.operations.start

    # --- looking ---
    def views(self) -> list[VmView]:
        return [self.get(name) for name in self.guests]

    def get(self, name: str) -> VmView:
        guest = self._guest(name)
        spec = guest.spec
        return VmView(
            name=name, state=guest.state, reason="", vmm=spec.vmm or "hw", memory=spec.memory or 128 << 20,
            memory_target=None, reservation=spec.reservation or 0,
            limit=spec.limit or spec.memory or 128 << 20, shares=spec.shares or 1280,
            weight=spec.weight or 100, cap=spec.cap or 0, on_crash=spec.on_crash or Policy.STOP,
            on_poweroff=spec.on_poweroff or Policy.STOP, autostart=spec.autostart, image=spec.image,
            kernel=spec.kernel, initrd=spec.initrd, append=spec.append, template=guest.template, worker=0,
            uptime_s=61.0, exit_status=None, cpu=CpuTimes(run=1.5),
            memory_usage=MemoryUsage(private=1 << 20, target=96 << 20),
            memory_waiting=name in self.waiting, memory_events=MemoryEvents(merged=5), exits=7, interrupts=1,
            world_switches=3, boots=1, crashes=0)

    def exits(self, name: str) -> list[ExitRow]:
        self._guest(name)
        return [ExitRow(code=0x78, name="HLT", count=4, seconds=0.002),
                ExitRow(code=0x72, name="CPUID", count=3, seconds=0.001)]

    async def translations(self, name: str, address: int | None = None) -> TranslationsView:
        if self._guest(name).state != State.RUNNING:
            raise Conflict(f"VM {name} does not run")
        return TranslationsView(text="" if address is None else f"{address:08x}  nop\n",
                                complete=address is not None)

    def console(self, name: str) -> Console:
        return self._guest(name).console

    async def wait(self, name: str, *, state: str | None = None, console: str | None = None,
                   timeout: float | None = None) -> VmView:
        guest = self._guest(name)
        try:
            pattern = re.compile((console or "").encode())
        except re.error as error:
            raise Invalid(f"console: {error}") from None
        with trio.move_on_after(float("inf") if timeout is None else timeout):
            while (state and guest.state != state) or not pattern.search(guest.console.scrollback()):
                await trio.sleep(0.001)
            return self.get(name)
        raise TimedOut(f"VM {name} did not get there within {timeout} s")

    # --- changing ---
    async def create(self, request: VmCreate) -> VmView:
        if request.name in self.guests:
            raise Conflict(f"there is a VM {request.name} already")
        if request.image is not None and request.image not in self.images:
            raise NotFound(f"no image {request.image}")
        self.guests[request.name] = Guest(request, State.RUNNING if request.start else State.DEFINED)
        return self.get(request.name)

    async def update(self, name: str, patch: VmPatch) -> VmView:
        spec = self._guest(name).spec
        for key, value in msgspec.structs.asdict(patch).items():
            if value is not None:
                setattr(spec, key, value)
        return self.get(name)

    def start(self, name: str) -> Operation:
        return self._change("start", name, Trigger.START, Trigger.LOADED)

    def pause(self, name: str) -> Operation:
        return self._change("pause", name, Trigger.PAUSE)

    def resume(self, name: str) -> Operation:
        return self._change("resume", name, Trigger.RESUME)

    def stop(self, name: str, request: StopRequest) -> Operation:
        return self._change("stop", name, Trigger.POWER_OFF)

    def reset(self, name: str) -> Operation:
        return self._change("reset", name, Trigger.RESET, Trigger.LOADED)

    def destroy(self, name: str, force: bool = False) -> Operation:
        if self._guest(name).state not in AT_REST and not force:
            raise Conflict(f"VM {name} is {self._guest(name).state}")

        async def work(operation: Operation) -> None:
            self.guests.pop(name).console.close()
            self.events.publish("vm.destroyed", name)

        return self.operations.start("destroy", name, work)

    def clone(self, name: str, request: CloneRequest) -> Operation:
        guest = self._guest(name)
        if guest.state != State.PAUSED:
            raise Conflict(f"VM {name} is {guest.state}: pause it first")
        for taken in set(request.names) & set(self.guests):
            raise Conflict(f"there is a VM {taken} already")

        async def work(operation: Operation) -> None:
            state = State.RUNNING if request.start else State.PAUSED
            for new in request.names:
                self.guests[new] = Guest(guest.spec, state, name)

        return self.operations.start("clone", name, work)

    def snapshot(self, name: str, request: SnapshotRequest) -> Operation:
        guest = self._guest(name)
        file = request.to or f"/state/snapshots/{name}.snap"

        async def work(operation: Operation) -> SnapshotView:
            self.snapshots[file] = guest
            return SnapshotView(file=file, size=4096, pause_s=0.001)

        return self.operations.start("snapshot", name, work)

    def restore(self, request: RestoreRequest) -> Operation:
        if request.file not in self.snapshots:
            raise NotFound(f"there is no snapshot {request.file}")
        saved = self.snapshots[request.file]
        name = request.name or saved.spec.name

        async def work(operation: Operation) -> RestoredView:
            self.guests[name] = Guest(saved.spec, State.RUNNING)
            return RestoredView(name=name)

        return self.operations.start("restore", name, work)

    async def send_input(self, name: str, data: bytes) -> None:
        guest = self._guest(name)
        if guest.state != State.RUNNING:
            raise Conflict(f"VM {name} is {guest.state}")
        guest.console.write(data)

    # --- images ---
    async def add_blob(self, chunks: AsyncIterable[bytes]) -> BlobView:
        data = b""
        async for chunk in chunks:
            data += chunk
            if len(data) > MAX_BLOB:
                raise TooLarge(f"a blob may have {MAX_BLOB} bytes")
        digest = hashlib.sha256(data).hexdigest()
        self.blobs.add(digest)
        return BlobView(sha256=digest, size=len(data))

    def list_images(self) -> list[ImageView]:
        return list(self.images.values())

    async def add_image(self, spec: ImageSpec) -> ImageView:
        if spec.kernel not in self.blobs:
            raise NotFound(f"no blob {spec.kernel}")
        self.images[spec.name] = ImageView(
            name=spec.name, kernel=spec.kernel, initrd=spec.initrd, append=spec.append, kind="linux", size=1,
            created=time.time())
        return self.images[spec.name]

    async def remove_image(self, name: str) -> None:
        if name not in self.images:
            raise NotFound(f"no image {name}")
        del self.images[name]

    def _guest(self, name: str) -> Guest:
        if name not in self.guests:
            raise NotFound(f"no VM {name[:64]!r}")
        return self.guests[name]

    def _leave(self, name: str) -> None:
        self.guests.pop(name).console.close()

    def _change(self, kind: str, name: str, *triggers: Trigger) -> Operation:
        guest = self._guest(name)
        after = guest.state
        for trigger in triggers:
            after = follow(name, after, trigger)

        async def work(operation: Operation) -> None:
            guest.state = after
            self.events.publish("vm.state", name, state=str(after))

        return self.operations.start(kind, name, work)
