# SPDX-License-Identifier: GPL-2.0-or-later
"""The Debian image: the archive it is booted from, and what happens when apt cannot help."""

from __future__ import annotations

import lzma
import shutil
from pathlib import Path

import pytest

from hostd.ctl import pull
from hostd.ctl.cpio import CpioArchive
from hostd.ctl.initramfs import InitramfsError, build
from hostd.ctl.pull import RECIPES, PullError, build_debian


def members(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Path -> (mode, data), read by the format's own description (cpio(5), `newc`)."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert archive[at:at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * index:at + 14 + 8 * index], 16) for index in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110:at + 110 + name_size - 1].decode()
        data_at = -(-(at + 110 + name_size) // 4) * 4
        if name == "TRAILER!!!":
            return found
        found[name] = (mode, archive[data_at:data_at + size])
        at = -(-(data_at + size) // 4) * 4


def test_an_archive_holds_what_was_put_in() -> None:
    archive = CpioArchive()
    archive.file("a/b/c", b"12345", 0o755)
    archive.symlink("a/link", "b/c")
    archive.device("dev/console", 5, 1)
    data = archive.finish()
    assert len(data) % 512 == 0
    assert members(data) == {
        "a": (0o040755, b""), "a/b": (0o040755, b""), "a/b/c": (0o100755, b"12345"),
        "a/link": (0o120777, b"b/c"), "dev": (0o040755, b""), "dev/console": (0o020600, b""),
    }


def test_a_path_is_there_once() -> None:
    archive = CpioArchive()
    archive.file("a", b"")
    with pytest.raises(ValueError, match="already"):
        archive.file("a", b"")


@pytest.fixture
def busybox(tmp_path: Path) -> Path:
    path = tmp_path / "busybox"
    path.write_text("#!/bin/sh\nprintf '%s\\n' busybox sh init mount\n")
    path.chmod(0o755)
    return path


def module(tree: Path, name: str, depends: str, packed: bool = False) -> None:
    data = b"\x7fELF...\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"
    path = tree / "lib/modules/6.1/kernel" / (name + (".ko.xz" if packed else ".ko"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(data) if packed else data)


def test_the_initramfs_has_init_applets_and_modules_in_order(busybox: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    module(tree, "virtio_ring", "")
    module(tree, "virtio", "virtio_ring")
    module(tree, "virtio_mmio", "virtio,virtio_ring", packed=True)
    module(tree, "virtio-rng", "virtio,virtio_ring")
    module(tree, "unrelated", "")
    found = members(build(busybox, tree))
    assert found["init"][0] == 0o100755
    assert b"INIT-UP" in found["init"][1]
    assert found["bin/mount"] == (0o120777, b"busybox")
    assert found["lib/modules/virtio_mmio.order"][1] == b"virtio_ring.ko\nvirtio.ko\nvirtio_mmio.ko\n"
    assert found["lib/modules/virtio_rng.order"][1] == b"virtio_ring.ko\nvirtio.ko\nvirtio_rng.ko\n"
    assert found["lib/modules/virtio_mmio.ko"][1].startswith(b"\x7fELF")
    assert not any("unrelated" in name for name in found)


def test_a_busybox_without_a_shell_is_refused(tmp_path: Path) -> None:
    busybox = tmp_path / "busybox"
    busybox.write_text("#!/bin/sh\necho cat\n")
    busybox.chmod(0o755)
    with pytest.raises(InitramfsError, match="no sh"):
        build(busybox, tmp_path)


SHOWN = """\
Package: linux-image-cloud-amd64
Version: 6.1.9-1
Depends: linux-image-6.1.0-9-cloud-amd64 (= 6.1.9-1)

Package: busybox-static
Version: 1:1.35.0-4
"""


@pytest.fixture
def apt(tmp_path: Path, busybox: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Debian's tools, played: the commands they were called with."""
    commands: list[list[str]] = []

    def run(command: list[str], cwd: Path | None = None, check: bool = True) -> str:
        commands.append(command)
        if command[0] == "apt-cache":
            return SHOWN
        if command[0] == "apt-get":
            assert cwd is not None
            (cwd / "both.deb").touch()
        if command[0] == "dpkg-deb":
            tree = Path(command[3])
            (tree / "boot").mkdir(parents=True)
            (tree / "boot/vmlinuz-6.1").write_bytes(b"kernel")
            (tree / "bin").mkdir()
            shutil.copy(busybox, tree / "bin/busybox")
        return ""

    monkeypatch.setattr(pull, "_run", run)
    return commands


def test_the_image_is_built_of_the_packages_apt_would_install(apt: list[list[str]], tmp_path: Path) -> None:
    image = build_debian(tmp_path / "cache")
    assert image.kernel.read_bytes() == b"kernel"
    assert "init" in members(image.initrd.read_bytes())
    assert "console=ttyS0" in image.append
    assert apt[1][-2:] == ["linux-image-6.1.0-9-cloud-amd64=6.1.9-1", "busybox-static=1:1.35.0-4"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [image.kernel.parent.name]


def test_the_same_versions_are_built_once(apt: list[list[str]], tmp_path: Path) -> None:
    first = build_debian(tmp_path / "cache")
    del apt[:]
    assert build_debian(tmp_path / "cache") == first
    assert [command[0] for command in apt] == ["apt-cache"]


def test_without_apt_an_image_of_the_cache_does(
    apt: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = build_debian(tmp_path / "cache")
    monkeypatch.setattr(pull, "_run", lambda command, check: "")
    assert build_debian(tmp_path / "cache") == image


def test_missing_package_lists_are_told_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pull, "_run", lambda command, check: "")
    with pytest.raises(PullError, match="run 'apt-get update' as root first"):
        build_debian(tmp_path)


I386_SHOWN = """\
Package: linux-image-686
Version: 6.1.8-1
Architecture: i386
Depends: linux-image-6.1.0-8-686 (= 6.1.8-1)

Package: busybox-static
Version: 1:1.35.0-4
"""


def test_an_image_of_another_architecture_names_it_to_apt(
    apt: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = pull._run

    def run(command: list[str], cwd: Path | None = None, check: bool = True) -> str:
        answer = played(command, cwd, check)
        return I386_SHOWN if command[0] == "apt-cache" else answer

    monkeypatch.setattr(pull, "_run", run)
    image = build_debian(tmp_path / "cache", recipe=RECIPES["debian-i386"])
    assert image.version.startswith("6.1.8-1+busybox-1.35.0-4")
    assert apt[0][-2:] == ["linux-image-686:i386", "busybox-static:i386"]
    assert apt[1][-2:] == ["linux-image-6.1.0-8-686:i386=6.1.8-1", "busybox-static:i386=1:1.35.0-4"]


def test_images_in_the_cache_are_not_taken_for_one_another(
    apt: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = build_debian(tmp_path)
    image.kernel.parent.rename(tmp_path / "debian-i386-pae-6.1.9-1")
    monkeypatch.setattr(pull, "_run", lambda command, check: "")
    assert build_debian(tmp_path, recipe=RECIPES["debian-i386-pae"]).version == "6.1.9-1"
    for name in ("debian", "debian-i386"):
        with pytest.raises(PullError):
            build_debian(tmp_path, recipe=RECIPES[name])


def test_an_architecture_apt_does_not_know_is_told_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pull, "_run", lambda command, check: "")
    cure = "linux-image-686:i386: run 'dpkg --add-architecture i386 && apt-get update' as root first"
    with pytest.raises(PullError, match=cure):
        build_debian(tmp_path, recipe=RECIPES["debian-i386"])


def test_a_tool_that_fails_or_is_missing_is_told_in_a_sentence() -> None:
    with pytest.raises(PullError, match=r"^sh failed: it broke$"):
        pull._run(["sh", "-c", "echo noise >&2; echo E: it broke >&2; echo more >&2; exit 1"])
    with pytest.raises(PullError, match="needs Debian's no-such-tool, which is not installed"):
        pull._run(["no-such-tool"])
