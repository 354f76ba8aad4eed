# SPDX-License-Identifier: GPL-2.0-or-later
"""What each route does: a handler turns a checked call into calls of the host, and answers with a value.

The value is a view of `hostd.model` (or a list of them), an Operation for long work, bytes or an iterator of
bytes for streams, or None.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec

from hostd import __version__
from hostd.api.call import Call
from hostd.api.schema import API_VERSION, VersionView
from hostd.console import Console
from hostd.host import Host
from hostd.migration.views import MigrationView
from hostd.model import (
    BlobView,
    ExitRow,
    HostView,
    ImageView,
    MemoryView,
    OperationView,
    TranslationsView,
    VmView,
)
from hostd.operations import Operation

#: the daemon's own backlog for a serial line is no larger
MAX_INPUT = 64 << 10


async def version(host: Host, call: Call) -> VersionView:
    return VersionView(name="hostd", version=__version__, api=API_VERSION)


async def host_view(host: Host, call: Call) -> HostView:
    return host.overview.view()


async def show_memory(host: Host, call: Call) -> MemoryView:
    return await host.overview.checked_memory() if call.query.check else host.overview.memory()


async def list_vms(host: Host, call: Call) -> list[VmView]:
    return host.views()


async def create_vm(host: Host, call: Call) -> VmView:
    return await host.create(call.body)


async def show_vm(host: Host, call: Call) -> VmView:
    return host.get(call.name)


async def update_vm(host: Host, call: Call) -> VmView:
    return await host.update(call.name, call.body)


async def destroy_vm(host: Host, call: Call) -> Operation:
    return host.destroy(call.name, call.query.force)


async def start_vm(host: Host, call: Call) -> Operation:
    return host.start(call.name)


async def pause_vm(host: Host, call: Call) -> Operation:
    return host.pause(call.name)


async def resume_vm(host: Host, call: Call) -> Operation:
    return host.resume(call.name)


async def stop_vm(host: Host, call: Call) -> Operation:
    return host.stop(call.name, call.body)


async def reset_vm(host: Host, call: Call) -> Operation:
    return host.reset(call.name)


async def clone_vm(host: Host, call: Call) -> Operation:
    return host.clone(call.name, call.body)


async def switch_vm(host: Host, call: Call) -> Operation:
    return host.switch(call.name, call.body)


async def snapshot_vm(host: Host, call: Call) -> Operation:
    return host.snapshot(call.name, call.body)


async def restore_vm(host: Host, call: Call) -> Operation:
    return host.restore(call.body)


async def migrate_vm(host: Host, call: Call) -> Operation:
    return host.migrations.migrate(call.name, call.body)


async def recover_vm(host: Host, call: Call) -> VmView:
    return await host.migrations.recover(call.name)


async def evacuate(host: Host, call: Call) -> Operation:
    return host.migrations.evacuate(call.body)


async def list_migrations(host: Host, call: Call) -> list[MigrationView]:
    return host.migrations.list()


async def vm_exits(host: Host, call: Call) -> list[ExitRow]:
    return host.exits(call.name)


async def vm_translations(host: Host, call: Call) -> TranslationsView:
    address = call.query.address
    return await host.translations(call.name, None if address is None else int(address, 16))


async def wait_for_vm(host: Host, call: Call) -> VmView:
    query = call.query
    return await call.while_connected(
        lambda: host.wait(call.name, state=query.state, console=query.console, timeout=query.timeout)
    )


async def send_input(host: Host, call: Call) -> None:
    host.get(call.name)
    await host.send_input(call.name, await call.read(MAX_INPUT))


async def vm_log(host: Host, call: Call) -> bytes | AsyncIterator[bytes]:
    console = host.console(call.name)
    since = call.query.since or 0
    return await _begun(_follow(console, since)) if call.query.follow else console.scrollback(since)


async def _follow(console: Console, since: int) -> AsyncIterator[bytes]:
    with console.listen() as reader:
        past = console.scrollback(since)
        yield b""
        yield past
        while data := await reader.receive():
            yield data


async def events(host: Host, call: Call) -> AsyncIterator[bytes]:
    return await _begun(_event_lines(host))


async def _begun(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Have the stream listen before the headers go out: a client that has them misses nothing."""
    await anext(stream)
    return stream


async def _event_lines(host: Host) -> AsyncIterator[bytes]:
    with host.events.subscribe() as reader:
        yield b""
        async for event in reader:
            yield msgspec.json.encode(event) + b"\n"


async def list_operations(host: Host, call: Call) -> list[OperationView]:
    return [operation.view() for operation in host.operations.list()]


async def show_operation(host: Host, call: Call) -> OperationView:
    operation = host.operations.get(call.path["id"])
    if call.query.wait:
        await call.while_connected(lambda: operation.wait(call.query.wait))
    return operation.view()


async def cancel_operation(host: Host, call: Call) -> OperationView:
    return host.operations.cancel(call.path["id"]).view()


async def put_blob(host: Host, call: Call) -> BlobView:
    return await host.add_blob(call.chunks())


async def list_images(host: Host, call: Call) -> list[ImageView]:
    return host.list_images()


async def add_image(host: Host, call: Call) -> ImageView:
    return await host.add_image(call.body)


async def remove_image(host: Host, call: Call) -> None:
    await host.remove_image(call.name)


def location(value: Any) -> str | None:
    """Where a new thing is found: the Location header of 201 and 202."""
    match value:
        case Operation():
            return f"/operations/{value.id}"
        case VmView():
            return f"/vms/{value.name}"
    return None
