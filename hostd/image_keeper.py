# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels and images as a running host takes them in, checks them for its VMs, and lets go of them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterable, Iterator
from contextlib import contextmanager

import trio

from hostd.definition import Definition
from hostd.errors import Conflict, HostError
from hostd.guests import Guests
from hostd.images import Images, NotAKernel
from hostd.loader import lay_out
from hostd.model import BlobView, ImageSpec, ImageView

log = logging.getLogger(__name__)

COLLECT_INTERVAL_S = 600.0


class ImageKeeper:
    """The disk is touched in threads; what needs all images as they are holds the lock."""

    def __init__(self, images: Images, guests: Guests) -> None:
        self.images = images
        self._guests = guests
        self._lock = trio.Lock()

    async def collect(self) -> None:
        """Collect now and then what nothing names any more, until cancelled."""
        while True:
            try:
                async with self._lock:
                    await trio.to_thread.run_sync(self.images.collect, self._blobs_in_use())
            except HostError as error:
                log.warning("blobs not collected", extra={"why": str(error)})
            await trio.sleep(COLLECT_INTERVAL_S)

    async def add_blob(self, chunks: AsyncIterable[bytes], limit: int) -> BlobView:
        """Keep an upload of at most `limit` bytes.  Raises TooLarge, Invalid for an empty one, Failed for a
        full disk."""
        with self.images.upload(limit) as upload:
            async for chunk in chunks:
                await trio.to_thread.run_sync(upload.write, chunk)
            return await trio.to_thread.run_sync(upload.commit)

    def list(self) -> list[ImageView]:
        return self.images.list()

    async def add(self, spec: ImageSpec) -> ImageView:
        async with self._lock:
            with self._discarding(spec.kernel):
                return await trio.to_thread.run_sync(self.images.add, spec)

    async def remove(self, name: str) -> None:
        """Raises NotFound, Conflict for an image that a VM uses."""
        self.images.get(name)
        users = [vm.name for vm in self._guests.vms.values() if vm.definition.image == name]
        if users:
            raise Conflict(f"image {name} is used by VM {users[0]}" +
                           (f" and {len(users) - 1} more" if len(users) > 1 else ""))
        async with self._lock:
            await trio.to_thread.run_sync(self.images.remove, name)

    async def check_bootable(self, definition: Definition) -> None:
        """Raise what a start would raise, before the definition is written."""
        if definition.kernel is not None:
            self.images.check_blob(definition.kernel, "kernel")
        if definition.initrd is not None:
            self.images.check_blob(definition.initrd, "initrd")
        with self._discarding(definition.kernel):
            files = await trio.to_thread.run_sync(self.images.boot_files, definition)
        await trio.to_thread.run_sync(lay_out, files, definition.memory)

    @contextmanager
    def _discarding(self, kernel: str | None) -> Iterator[None]:
        """A blob that turns out not to be the kernel it was uploaded as is not kept."""
        try:
            yield
        except NotAKernel:
            if kernel is not None and kernel not in self._blobs_in_use():
                self.images.discard(kernel)
            raise

    def _blobs_in_use(self) -> set[str]:
        definitions = [vm.definition for vm in self._guests.vms.values()]
        return {sha256 for definition in definitions
                for sha256 in (definition.kernel, definition.initrd) if sha256}
