# SPDX-License-Identifier: GPL-2.0-or-later
"""The host: everything a user can ask of it, as methods.  The API and the metrics are views of this object.

Long work returns an `Operation` at once and goes on in the background; its errors are the operation's.  What
is plainly wrong (no such VM, a state in which it is not possible) is raised at once.
"""

from __future__ import annotations

from collections.abc import AsyncIterable

from hostd.config import Config
from hostd.console import Console
from hostd.events import Events
from hostd.model import (
    BlobView,
    CloneRequest,
    ExitRow,
    FrameCounts,
    HostView,
    ImageSpec,
    ImageView,
    StopRequest,
    VmCreate,
    VmPatch,
    VmView,
    WorkerView,
)
from hostd.operations import Operation, Operations


class Host:
    """All methods are for the trio thread of the daemon.  They raise hostd.errors.HostError only."""

    config: Config
    events: Events            # events.subscribe() -> context manager of an async iterator of model.Event
    operations: Operations    # .list(), .get(id), .cancel(id); Operation.view(), await .wait(timeout)

    # --- looking ---
    def host_view(self) -> HostView: ...
    def workers(self) -> list[WorkerView]: ...
    def frames(self) -> FrameCounts: ...
    def latency(self) -> tuple[list[int], float]:
        """Wake-up latency histogram of all workers: counts per bucket (hostd.scheduler's bounds; not
        cumulative, the last bucket is above the last bound) and the sum in seconds."""
    def views(self) -> list[VmView]: ...
    def get(self, name: str) -> VmView: ...
    def exits(self, name: str) -> list[ExitRow]: ...
    def console(self, name: str) -> Console:
        """Console: .scrollback() -> bytes, `with .listen() as reader:` async iterator of bytes."""
    async def wait(self, name: str, *, state: str | None = None, console: str | None = None,
                   timeout: float | None = None) -> VmView:
        """Until the VM is in `state` and its console, since its present boot, matches the regular expression.
        Raises TimedOut; Conflict when the VM came to rest and what is waited for cannot happen any more."""

    # --- changing ---
    async def create(self, request: VmCreate) -> VmView: ...
    async def update(self, name: str, patch: VmPatch) -> VmView: ...
    def start(self, name: str) -> Operation: ...
    def pause(self, name: str) -> Operation: ...
    def resume(self, name: str) -> Operation: ...
    def stop(self, name: str, request: StopRequest) -> Operation: ...
    def reset(self, name: str) -> Operation: ...
    def destroy(self, name: str, force: bool = False) -> Operation: ...
    def clone(self, name: str, request: CloneRequest) -> Operation: ...
    async def send_input(self, name: str, data: bytes) -> None: ...

    # --- images ---
    async def add_blob(self, chunks: AsyncIterable[bytes]) -> BlobView: ...
    def list_images(self) -> list[ImageView]: ...
    async def add_image(self, spec: ImageSpec) -> ImageView: ...
    async def remove_image(self, name: str) -> None: ...
