# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of all routes.  The application is built from it, and so is the OpenAPI document."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from hostd.api import handlers as do
from hostd.api.call import Call
from hostd.api.schema import (
    ConsoleQuery,
    DestroyQuery,
    LogQuery,
    MemoryQuery,
    Nothing,
    OperationQuery,
    TranslationsQuery,
    VersionView,
    WaitQuery,
)
from hostd.host import Host
from hostd.migration.views import EvacuateRequest, MigrateRequest, MigrationView, SwitchRequest
from hostd.model import (
    BlobView,
    CloneRequest,
    Event,
    ExitRow,
    HostView,
    ImageSpec,
    ImageView,
    MemoryView,
    OperationView,
    RestoreRequest,
    SnapshotRequest,
    StopRequest,
    TranslationsView,
    VmCreate,
    VmPatch,
    VmView,
)

JSON = "application/json"
LINES = "application/x-ndjson"
TEXT = "text/plain; charset=utf-8"
BYTES = "application/octet-stream"

Handler = Callable[[Host, Call], Awaitable[object]]


@dataclass(frozen=True)
class Route:
    """One method of one path.  `body` and `query` are msgspec types; `answer` is one, too, or None for none.

    `upload`: the body is raw bytes.  `media`: what kind of answer it is.  `errors`: the statuses of refusals
    besides 400, which every route knows.  A route without a handler is the console's WebSocket.
    """

    method: str
    path: str
    summary: str
    handler: Handler | None
    answer: Any = None
    status: int = 200
    body: type | None = None
    query: type | None = None
    upload: bool = False
    media: str = JSON
    errors: tuple[int, ...] = ()


def _action(verb: str, summary: str, handler: Handler, body: type = Nothing) -> Route:
    """Long work on a VM, answered by the operation that does it."""
    return Route("POST", f"/vms/{{name}}/{verb}", summary, handler, OperationView, 202, body,
                 errors=(404, 409, 413))


ROUTES: tuple[Route, ...] = (
    Route("GET", "/version", "Versions of the daemon and of this API", do.version, VersionView),
    Route("GET", "/host", "The host: memory, workers, addresses", do.host_view, HostView),
    Route("GET", "/memory", "Machine memory: who has it, and whether the books are right", do.show_memory,
          MemoryView, query=MemoryQuery),
    Route("GET", "/events", "Everything that happens from now on, one JSON object a line", do.events, Event,
          media=LINES),

    Route("GET", "/vms", "All VMs", do.list_vms, list[VmView]),
    Route("POST", "/vms", "Define a VM", do.create_vm, VmView, 201, VmCreate, errors=(404, 409, 413)),
    Route("GET", "/vms/{name}", "One VM", do.show_vm, VmView, errors=(404,)),
    Route("PATCH", "/vms/{name}", "Change the memory, the shares or the policies of a VM", do.update_vm,
          VmView, body=VmPatch, errors=(404, 409, 413)),
    Route("DELETE", "/vms/{name}", "Destroy a VM", do.destroy_vm, OperationView, 202, query=DestroyQuery,
          errors=(404, 409)),

    _action("start", "Power a VM on", do.start_vm),
    _action("pause", "Take a VM off its CPU", do.pause_vm),
    _action("resume", "Let a paused VM go on", do.resume_vm),
    _action("stop", "Press the power button, and cut the power when nothing follows", do.stop_vm,
            StopRequest),
    _action("reset", "Start a VM anew", do.reset_vm),
    _action("clone", "Make VMs that share this paused one's memory until they write to it", do.clone_vm,
            CloneRequest),
    _action("switch", "Have another monitor run a VM on; the result is a SwitchedView", do.switch_vm,
            SwitchRequest),
    _action("snapshot", "Save a VM in a file while it runs; the result is a SnapshotView", do.snapshot_vm,
            SnapshotRequest),
    Route("POST", "/restore", "Make a VM of a snapshot, which goes on where it stood", do.restore_vm,
          OperationView, 202, RestoreRequest, errors=(409, 413)),

    _action("migrate", "Move a VM that runs or is paused to another host; the result is a MigrationView",
            do.migrate_vm, MigrateRequest),
    Route("POST", "/vms/{name}/recover", "Make a VM this host's again whose new host is gone for good",
          do.recover_vm, VmView, body=Nothing, errors=(404, 409, 413)),
    Route("POST", "/evacuate", "Move all VMs to another host; the result is an EvacuatedView", do.evacuate,
          OperationView, 202, EvacuateRequest, errors=(409, 413)),
    Route("GET", "/migrations", "Migrations under way, and the last that are over", do.list_migrations,
          list[MigrationView]),

    Route("GET", "/vms/{name}/exits", "Exits of a VM by reason", do.vm_exits, list[ExitRow], errors=(404,)),
    Route("GET", "/vms/{name}/translations", "Code of a VM beside what binary translation made of it",
          do.vm_translations, TranslationsView, query=TranslationsQuery, errors=(404, 409)),
    Route("GET", "/vms/{name}/wait", "Answer when the VM is in a state or has written something",
          do.wait_for_vm, VmView, query=WaitQuery, errors=(404, 408, 409)),
    Route("GET", "/vms/{name}/log", "What the guest wrote to its console", do.vm_log, bytes, query=LogQuery,
          media=TEXT, errors=(404,)),
    Route("POST", "/vms/{name}/input", "Type on a VM's console", do.send_input, None, 204, upload=True,
          errors=(404, 409, 413)),
    Route("GET", "/vms/{name}/console", "A VM's console as a WebSocket: binary messages both ways", None,
          None, 101, query=ConsoleQuery, errors=(404, 426)),

    Route("GET", "/operations", "Running operations and the last finished ones", do.list_operations,
          list[OperationView]),
    Route("GET", "/operations/{id}", "One operation", do.show_operation, OperationView, query=OperationQuery,
          errors=(404,)),
    Route("DELETE", "/operations/{id}", "Cancel an operation", do.cancel_operation, OperationView,
          errors=(404,)),

    Route("PUT", "/blobs", "Upload a kernel or an initrd", do.put_blob, BlobView, 201, upload=True,
          errors=(413,)),
    Route("GET", "/images", "All images", do.list_images, list[ImageView]),
    Route("POST", "/images", "Name a kernel, its initrd and its command line", do.add_image, ImageView, 201,
          ImageSpec, errors=(404, 409, 413)),
    Route("DELETE", "/images/{name}", "Forget an image", do.remove_image, None, 204, errors=(404, 409)),
)
