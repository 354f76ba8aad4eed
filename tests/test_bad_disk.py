# SPDX-License-Identifier: GPL-2.0-or-later
"""A state directory that is full, damaged or not to be written: told in a sentence, and nothing is lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.private_daemon import DaemonFailed, PrivateDaemon
from vmm import guests

Start = Callable[..., PrivateDaemon]

_MOUNT = 'mkdir -p "$0" && mount -t tmpfs -o "$1" none "$0" && shift && exec "$@"'


def with_disk(state: Path, options: str) -> list[str]:
    """What runs a command with a disk of its own at `state`, which only it sees.

    Who is not root becomes the root of a user namespace for that.
    """
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    return [*unshare, "sh", "-c", _MOUNT, str(state), options]


class SmallDisk:
    """A daemon whose state directory has room for little, seen through /proc."""

    def __init__(self, daemon: PrivateDaemon) -> None:
        self.daemon = daemon
        self.path = Path(f"/proc/{daemon.process.pid}/root{daemon.directory}/state")

    def files(self) -> set[str]:
        return {str(path.relative_to(self.path)) for path in self.path.rglob("*") if path.is_file()}

    @contextmanager
    def full(self) -> Iterator[None]:
        """No byte is free."""
        filling = self.path / "filling"
        with filling.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))
        yield
        filling.unlink()


@pytest.fixture
def disk(start_daemon: Start, tmp_path: Path) -> SmallDisk:
    return SmallDisk(start_daemon(prefix=with_disk(tmp_path / "state", "size=256k")))


def refused(response: httpx.Response) -> str:
    assert response.status_code == 500, response.text
    answer: dict[str, Any] = response.json()
    assert set(answer) == {"error"}
    return str(answer["error"])


def test_a_full_disk(disk: SmallDisk) -> None:
    daemon = disk.daemon
    kernel = daemon.upload(guests.read("idle"))
    daemon.create("old", guests.read("idle"), start=True)
    daemon.wait("old", state="running")
    before = disk.files()
    with disk.full():
        client = daemon.client
        assert "no space left" in refused(client.put("/blobs", content=guests.read("mix")))
        assert "no space left" in refused(client.post("/vms", json={"name": "new", "kernel": kernel}))
        assert "no space left" in refused(client.patch("/vms/old", json={"weight": 7}))
        image = {"name": "image", "kernel": kernel}
        assert "no space left" in refused(client.post("/images", json=image))
        daemon.do("old", "pause")
        clone = daemon.post("/vms/old/clone", names=["clone"])
        clone = daemon.get(f"/operations/{clone['id']}", wait=30)
        assert clone["status"] == "failed" and "no space left" in clone["error"]
        vms = [(vm["name"], vm["state"], vm["weight"]) for vm in daemon.get("/vms")]
        assert vms == [("old", "paused", 100)]
        assert daemon.get("/images") == []
    assert disk.files() == before
    daemon.do("old", "resume")
    daemon.create("new", guests.read("mix"))


def test_destroying_a_vm_is_possible_on_a_full_disk(disk: SmallDisk) -> None:
    disk.daemon.create("vm", guests.read("idle"))
    with disk.full():
        operation = disk.daemon.client.delete("/vms/vm").json()
        operation = disk.daemon.get(f"/operations/{operation['id']}", wait=30)
        assert operation["status"] == "done"


def test_a_disk_that_is_full_from_the_start(start_daemon: Start, tmp_path: Path) -> None:
    with pytest.raises(DaemonFailed) as failure:
        start_daemon(prefix=with_disk(tmp_path / "state", "size=4k,nr_inodes=2"))
    assert failure.value.status == 1
    assert failure.value.said == f"hostd: no space left for vms in {tmp_path}/state"


def test_a_disk_that_is_read_only(start_daemon: Start, tmp_path: Path) -> None:
    with pytest.raises(DaemonFailed) as failure:
        start_daemon(prefix=with_disk(tmp_path / "state", "ro"))
    assert failure.value.said == f"hostd: cannot write {tmp_path}/state/lock: Read-only file system"


def test_a_state_directory_under_a_file(start_daemon: Start, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("precious")
    with pytest.raises(DaemonFailed) as failure:
        start_daemon()
    assert failure.value.said == f"hostd: cannot write {tmp_path}/state: File exists"
    assert (tmp_path / "state").read_text() == "precious"


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, b'{"name": "bad"}', b'{"name":'])
def test_one_damaged_file_does_not_stop_the_host(start_daemon: Start, tmp_path: Path, damage: bytes) -> None:
    first = start_daemon()
    first.create("good", guests.read("idle"))
    first.create("bad", guests.read("idle"))
    kernel = first.upload(guests.read("idle"))
    for name in "good", "bad":
        first.post("/images", name=name, kernel=kernel)
    assert first.stop() == 0
    for directory in "vms", "images":
        (tmp_path / "state" / directory / "bad.json").write_bytes(damage)
    second = start_daemon()
    for what in "vms", "images":
        assert [view["name"] for view in second.get(f"/{what}")] == ["good"]
        assert (tmp_path / "state" / what / "bad.broken").read_bytes() == damage
        assert f"file={tmp_path}/state/{what}/bad.json" in second.said()
    second.do("good", "start")


def test_an_image_whose_kernel_is_gone(start_daemon: Start, tmp_path: Path) -> None:
    first = start_daemon()
    kernel = first.upload(guests.read("idle"))
    first.post("/images", name="image", kernel=kernel)
    first.post("/vms", name="vm", image="image")
    assert first.stop() == 0
    (tmp_path / "state" / "blobs" / kernel).unlink()
    second = start_daemon()
    assert second.get("/images") == []
    operation = second.get(f"/operations/{second.post('/vms/vm/start')['id']}", wait=30)
    assert (operation["status"], operation["error"]) == ("failed", "no image image (there is: none)")
    assert second.get("/vms/vm")["state"] == "defined"
