# SPDX-License-Identifier: GPL-2.0-or-later
"""Blobs by content, images by name."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from hostd.errors import Conflict, Failed, Invalid, NotFound, TooLarge
from hostd.images import GRACE_S, Images, NotAKernel
from hostd.model import ImageSpec
from vmm import guests

KERNEL = guests.read("idle")
SHA256 = hashlib.sha256(KERNEL).hexdigest()


@pytest.fixture
def images(tmp_path: Path) -> Images:
    return Images(tmp_path)


def put(images: Images, data: bytes) -> str:
    with images.upload(limit=1 << 20) as upload:
        upload.write(data)
        return upload.commit().sha256


def files(tmp_path: Path) -> set[str]:
    return {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}


def test_a_blob_is_named_by_its_content(images: Images, tmp_path: Path) -> None:
    with images.upload(limit=1 << 20) as upload:
        upload.write(KERNEL[:100])
        upload.write(KERNEL[100:])
        blob = upload.commit()
    assert (blob.sha256, blob.size) == (SHA256, len(KERNEL))
    assert put(images, KERNEL) == SHA256
    assert files(tmp_path) == {f"blobs/{SHA256}"}


def test_an_upload_that_is_given_up_leaves_nothing(images: Images, tmp_path: Path) -> None:
    with pytest.raises(KeyError), images.upload(limit=1 << 20) as upload:
        upload.write(KERNEL)
        raise KeyError
    assert files(tmp_path) == set()


def test_an_upload_has_a_limit(images: Images, tmp_path: Path) -> None:
    with pytest.raises(TooLarge, match="larger than 10 bytes"), images.upload(limit=10) as upload:
        upload.write(b"12345678901")
    assert files(tmp_path) == set()


def test_an_empty_upload_is_refused(images: Images, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="empty"), images.upload(limit=10) as upload:
        upload.commit()
    assert files(tmp_path) == set()


def test_a_full_disk_leaves_nothing(images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Failed, match="no space left"):
        put(images, KERNEL)
    assert files(tmp_path) == set()


def test_images_survive(images: Images, tmp_path: Path) -> None:
    put(images, KERNEL)
    image = images.add(ImageSpec(name="idle", kernel=SHA256, append="ticks=3"))
    assert (image.kind, image.size, image.append) == ("multiboot", len(KERNEL), "ticks=3")
    assert Images(tmp_path).list() == [image]


def test_adding_an_image_unpacks_its_kernel(images: Images, tmp_path: Path) -> None:
    put(images, KERNEL)
    images.add(ImageSpec(name="idle", kernel=SHA256))
    assert f"unpacked/{SHA256}" in files(tmp_path)
    assert images.read_kernel(SHA256) == KERNEL


def test_a_name_is_given_once(images: Images) -> None:
    put(images, KERNEL)
    images.add(ImageSpec(name="idle", kernel=SHA256))
    with pytest.raises(Conflict, match="image idle exists already"):
        images.add(ImageSpec(name="idle", kernel=SHA256))


def test_an_image_of_a_blob_that_is_not_there(images: Images) -> None:
    with pytest.raises(NotFound, match=r"no blob .* for the kernel"):
        images.add(ImageSpec(name="idle", kernel=SHA256))


def test_an_image_of_something_that_is_no_kernel(images: Images, tmp_path: Path) -> None:
    text = put(images, b"#!/bin/sh\n" * 100)
    with pytest.raises(NotAKernel, match="no kind known here"):
        images.add(ImageSpec(name="script", kernel=text))
    images.discard(text)
    assert files(tmp_path) == set()


def test_an_unknown_image_is_told_with_the_known_ones(images: Images) -> None:
    with pytest.raises(NotFound, match=r"no image debian \(there is: none\)"):
        images.get("debian")


def test_a_removed_image_is_gone(images: Images, tmp_path: Path) -> None:
    put(images, KERNEL)
    images.add(ImageSpec(name="idle", kernel=SHA256))
    images.remove("idle")
    assert images.list() == [] and Images(tmp_path).list() == []


def test_only_blobs_that_nobody_wants_any_more_are_collected(images: Images, tmp_path: Path) -> None:
    named, used, fresh, stale = KERNEL, b"used", b"fresh", b"stale"
    blobs = {data: put(images, data) for data in (named, used, fresh, stale)}
    images.add(ImageSpec(name="idle", kernel=blobs[named]))
    for data in named, used, stale:
        path = tmp_path / "blobs" / blobs[data]
        os.utime(path, (0, path.stat().st_mtime - GRACE_S - 1))
    images.collect(used={blobs[used]})
    assert set(os.listdir(tmp_path / "blobs")) == {blobs[named], blobs[used], blobs[fresh]}
