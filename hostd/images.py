# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels and initrds by content, and images: a name for a kernel, an initrd and a command line.

    blobs/SHA256        what was uploaded
    unpacked/SHA256     the same kernel in the form that boots without decompression
    images/NAME.json

A blob that nothing names any more is collected an hour later: time enough between an upload and the
definition that uses it.  The methods that touch much data are meant to be called in a thread.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import msgspec

from hostd import storage
from hostd.definition import Definition
from hostd.errors import Conflict, Failed, Invalid, NotFound, TooLarge
from hostd.loader import BootFiles
from hostd.model import MAX_MEMORY, BlobView, ImageSpec, ImageView

GRACE_S = 3600.0


class NotAKernel(Invalid):
    """The blob is not a kernel that boots here."""


class StoredImage(ImageSpec):
    """An image as its file holds it."""

    kind: str = ""
    created: float = 0.0


class Upload:
    """A blob on its way in: `write` pieces, then `commit`; leaving the `with` without it leaves nothing."""

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory = directory
        self._limit = limit
        self._hash = hashlib.sha256()
        self._size = 0
        with storage.told_plainly(directory / "an upload"):
            fd, name = tempfile.mkstemp(prefix=storage.PARTIAL, dir=directory)
        self._partial = Path(name)
        self._file: BinaryIO = os.fdopen(fd, "wb")

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *_: object) -> None:
        # closing writes out what is buffered; it fails for the same reason a write did
        with suppress(OSError):
            self._file.close()
        self._partial.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self._limit:
            raise TooLarge(f"the upload is larger than {self._limit} bytes (api.max_upload)")
        self._hash.update(data)
        with storage.told_plainly(self._directory / "an upload"):
            self._file.write(data)

    def commit(self) -> BlobView:
        if not self._size:
            raise Invalid("the upload is empty")
        sha256 = self._hash.hexdigest()
        with storage.told_plainly(self._directory / sha256):
            self._file.flush()
            os.fsync(self._file.fileno())
            os.rename(self._partial, self._directory / sha256)
            storage.sync_directory(self._directory)
        return BlobView(sha256=sha256, size=self._size)


class Images:
    """The state directory's blobs and images."""

    def __init__(self, state_dir: Path) -> None:
        self._blobs = state_dir / "blobs"
        self._unpacked = state_dir / "unpacked"
        self._directory = state_dir / "images"
        for directory in self._blobs, self._unpacked, self._directory:
            storage.make_directory(directory)
        self._images = {image.name: image for image in
                        storage.load_all(self._directory, StoredImage, self._check_whole)}

    # --- blobs

    def upload(self, limit: int) -> Upload:
        return Upload(self._blobs, limit)

    def check_blob(self, sha256: str, what: str) -> None:
        """Raise NotFound unless the blob is here; renew its hour of grace."""
        try:
            os.utime(self._blobs / sha256)
        except OSError:
            raise NotFound(f"no blob {sha256} for the {what}: upload it first") from None

    def has_blob(self, sha256: str) -> bool:
        """Whether the blob is here; renews its hour of grace."""
        try:
            self.check_blob(sha256, "VM")
        except NotFound:
            return False
        return True

    def blob_size(self, sha256: str) -> int:
        """Bytes of a blob.  Raises NotFound."""
        self.check_blob(sha256, "VM")
        return (self._blobs / sha256).stat().st_size

    def read_blob(self, sha256: str) -> bytes:
        return _read(self._blobs / sha256)

    def prepare_kernel(self, sha256: str) -> str:
        """Check that the blob is a kernel and cache its unpacked form; the answer is the kind of kernel."""
        from vmm.boot.image import BootError, load, unpack

        path = self._unpacked / sha256
        try:
            unpacked = _read(path) if path.exists() else unpack(self.read_blob(sha256))
            kind = load(unpacked, memory_bytes=MAX_MEMORY).kind
        except BootError as error:
            raise NotAKernel(str(error)) from None
        if not path.exists():
            storage.write(path, unpacked)
        return kind

    def read_kernel(self, sha256: str) -> bytes:
        """The kernel, unpacked."""
        if not (self._unpacked / sha256).exists():
            self.prepare_kernel(sha256)
        return _read(self._unpacked / sha256)

    def discard(self, sha256: str) -> None:
        """Remove a blob that is good for nothing, unless an image names it."""
        if not any(sha256 in (image.kernel, image.initrd) for image in self._images.values()):
            (self._blobs / sha256).unlink(missing_ok=True)

    def boot_files(self, definition: Definition) -> BootFiles:
        """What a VM boots from: its own kernel, or its image's."""
        if definition.image is not None:
            image = self.get(definition.image)
            kernel, initrd, append = image.kernel, image.initrd, image.append
        else:
            assert definition.kernel is not None
            kernel, initrd, append = definition.kernel, definition.initrd, ""
        if definition.append is not None:
            append = definition.append
        return BootFiles(self.read_kernel(kernel), self.read_blob(initrd) if initrd else None, append)

    def collect(self, used: Collection[str]) -> None:
        """Remove blobs that no image and none of `used` names, and that nobody asked for in the last hour."""
        keep = set(used)
        for image in self._images.values():
            keep.update(sha256 for sha256 in (image.kernel, image.initrd) if sha256)
        oldest = time.time() - GRACE_S
        with storage.told_plainly(self._blobs):
            for path in self._blobs.iterdir():
                if path.name not in keep and path.stat().st_mtime < oldest:
                    path.unlink(missing_ok=True)
                    (self._unpacked / path.name).unlink(missing_ok=True)

    # --- images

    def list(self) -> list[ImageView]:
        return [self._view(image) for image in self._images.values()]

    def get(self, name: str) -> StoredImage:
        try:
            return self._images[name]
        except KeyError:
            known = ", ".join(sorted(self._images)) or "none"
            raise NotFound(f"no image {name} (there is: {known})") from None

    def add(self, spec: ImageSpec) -> ImageView:
        """Name a kernel.  Raises Conflict for a name in use, NotFound for a missing blob, Invalid for a
        blob that is not a kernel."""
        if spec.name in self._images:
            raise Conflict(f"image {spec.name} exists already")
        self.check_blob(spec.kernel, "kernel")
        if spec.initrd is not None:
            self.check_blob(spec.initrd, "initrd")
        image = StoredImage(name=spec.name, kernel=spec.kernel, initrd=spec.initrd, append=spec.append,
                            kind=self.prepare_kernel(spec.kernel), created=time.time())
        storage.write(self._path(spec.name), msgspec.json.format(msgspec.json.encode(image)) + b"\n")
        self._images[spec.name] = image
        return self._view(image)

    def remove(self, name: str) -> None:
        self.get(name)
        storage.remove(self._path(name))
        del self._images[name]

    def _check_whole(self, image: StoredImage, stem: str) -> None:
        """Raise ValueError for an image that is not what its file's name says, or that lacks its parts."""
        if image.name != stem:
            raise ValueError(f"it defines an image named {image.name}")
        for sha256 in (image.kernel, image.initrd):
            if sha256 and not (self._blobs / sha256).is_file():
                raise ValueError(f"its blob {sha256} is gone")

    def _view(self, image: StoredImage) -> ImageView:
        size = sum((self._blobs / sha256).stat().st_size for sha256 in (image.kernel, image.initrd) if sha256)
        return ImageView(name=image.name, kernel=image.kernel, initrd=image.initrd, append=image.append,
                         kind=image.kind, size=size, created=image.created)

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.json"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"{path.name} is not in {path.parent}: upload it again to boot from it") from None
    except OSError as error:
        raise Failed(f"cannot read {path}: {error.strerror}") from None
