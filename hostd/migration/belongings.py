# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VM boots from, when it goes to another host: its kernel and its initrd by content.

The name of an image means something on its own host only.  So a definition travels with the contents it
stands for, and becomes one of an image again where an image of that name has the same.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import ExitStack
from typing import NamedTuple

import msgspec
import trio

from hostd.definition import Definition
from hostd.errors import Failed, HostError
from hostd.images import Images, Upload
from hostd.migration.messages import BlobPiece


class Portable(NamedTuple):
    """A definition without an image, and the name of the image it had."""

    definition: Definition
    image: str | None


def family(definition: Definition) -> Hashable:
    """Guests with the same were booted from the same files, and have much in common."""
    return definition.image, definition.kernel, definition.initrd


def pack(definition: Definition, images: Images) -> Portable:
    """The definition as another host understands it.  An image that is gone leaves a VM without a kernel:
    raises NotFound, as a start would."""
    if definition.image is None:
        return Portable(definition, None)
    image = images.get(definition.image)
    append = image.append if definition.append is None else definition.append
    return Portable(msgspec.structs.replace(definition, image=None, kernel=image.kernel, initrd=image.initrd,
                                            append=append), definition.image)


def blobs_of(definition: Definition) -> list[str]:
    """The contents a packed definition names, as SHA-256."""
    return [sha256 for sha256 in (definition.kernel, definition.initrd) if sha256]


def unpack(portable: Portable, images: Images) -> Definition:
    """The definition as this host keeps it."""
    definition, name = portable
    if name is None:
        return definition
    try:
        image = images.get(name)
    except HostError:
        return definition
    if (image.kernel, image.initrd) != (definition.kernel, definition.initrd):
        return definition
    append = None if definition.append == image.append else definition.append
    return msgspec.structs.replace(definition, image=name, kernel=None, initrd=None, append=append)


class IncomingBlobs:
    """Blobs of these sizes, by SHA-256, of which pieces come; `uploads` is left when no more can."""

    def __init__(self, images: Images, sizes: dict[str, int], uploads: ExitStack) -> None:
        self._images = images
        self._sizes = sizes
        self._uploads = uploads
        self._open: dict[str, Upload] = {}

    async def take(self, piece: BlobPiece) -> None:
        """Keep the piece; with the last one the blob is there.  Raises Failed for a blob that is another than
        was named, or a full disk."""
        sha256, size = piece.sha256, self._sizes[piece.sha256]
        if sha256 not in self._open:
            self._open[sha256] = self._uploads.enter_context(self._images.upload(size))
        upload = self._open[sha256]
        await trio.to_thread.run_sync(upload.write, piece.data)
        if piece.offset + len(piece.data) == size:
            view = await trio.to_thread.run_sync(upload.commit)
            if view.sha256 != sha256:
                self._images.discard(view.sha256)
                raise Failed(f"a blob came that is not {sha256}")
