# SPDX-License-Identifier: GPL-2.0-or-later
"""What the state directory keeps, and what it must never keep: halves."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from hostd import storage
from hostd.definition import Definition
from hostd.errors import Failed
from hostd.inventory import Inventory
from hostd.lifecycle import Policy


def definition(name: str, **changes: object) -> Definition:
    whole = Definition(name=name, memory=16 << 20, weight=100, cap=0, on_crash=Policy.STOP,
                       on_poweroff=Policy.RESTART, image="debian", append="quiet \"quoted\" é")
    return msgspec.structs.replace(whole, **changes)


@pytest.fixture
def inventory(tmp_path: Path) -> Iterator[Inventory]:
    inventory = Inventory(tmp_path)
    yield inventory
    inventory.close()


def fail_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From then on the disk is full."""
    real, left = os.fsync, [calls]

    def fsync(fd: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)


def test_definitions_survive(tmp_path: Path) -> None:
    saved = [definition("a"), definition("b", kernel="0" * 64, image=None),
             definition("c.d-e", autostart=True)]
    first = Inventory(tmp_path)
    first.save(saved)
    first.close()
    second = Inventory(tmp_path)
    assert second.load() == saved
    second.remove("b")
    assert [kept.name for kept in second.load()] == ["a", "c.d-e"]
    second.close()


def test_a_changed_definition_replaces_the_old_one(inventory: Inventory) -> None:
    inventory.save([definition("a")])
    inventory.save([definition("a", weight=7)])
    assert inventory.load() == [definition("a", weight=7)]


def test_a_second_daemon_is_refused_by_the_first_one_s_number(inventory: Inventory, tmp_path: Path) -> None:
    with pytest.raises(Failed, match=rf"another hostd \(process {os.getpid()}\) uses the state directory"):
        Inventory(tmp_path)


def test_the_lock_goes_with_its_owner(tmp_path: Path) -> None:
    Inventory(tmp_path).close()
    Inventory(tmp_path).close()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"name": "bad"}', b"\xff", b'{"name": "other"}'])
def test_a_broken_file_is_set_aside(tmp_path: Path, inventory: Inventory, content: bytes) -> None:
    inventory.save([definition("good")])
    (tmp_path / "vms" / "bad.json").write_bytes(content)
    assert inventory.load() == [definition("good")]
    assert (tmp_path / "vms" / "bad.broken").read_bytes() == content
    assert inventory.load() == [definition("good")]


def test_a_definition_under_a_wrong_name_is_set_aside(tmp_path: Path, inventory: Inventory) -> None:
    inventory.save([definition("a")])
    os.rename(tmp_path / "vms" / "a.json", tmp_path / "vms" / "b.json")
    assert inventory.load() == []


def test_a_full_disk_leaves_nothing_half_made(
        tmp_path: Path, inventory: Inventory, monkeypatch: pytest.MonkeyPatch) -> None:
    inventory.save([definition("old")])
    fail_after(2, monkeypatch)
    with pytest.raises(Failed, match="no space left for"):
        inventory.save([definition("first"), definition("second")])
    assert os.listdir(tmp_path / "vms") == ["old.json"]
    monkeypatch.undo()
    assert inventory.load() == [definition("old")]


def test_a_full_disk_leaves_the_old_definition(inventory: Inventory, monkeypatch: pytest.MonkeyPatch) -> None:
    inventory.save([definition("a")])
    fail_after(0, monkeypatch)
    with pytest.raises(Failed):
        inventory.save([definition("a", weight=7)])
    monkeypatch.undo()
    assert inventory.load() == [definition("a")]


def test_what_a_dead_daemon_left_half_made_is_cleared(tmp_path: Path) -> None:
    for directory, kept in ("vms", "web.json"), ("snapshots", "web.snap"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / f"{storage.PARTIAL}x").write_text("half")
        (tmp_path / directory / kept).write_text("whole")
    Inventory(tmp_path).close()
    assert os.listdir(tmp_path / "vms") == ["web.json"] and os.listdir(tmp_path / "snapshots") == ["web.snap"]


def test_a_state_directory_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Failed, match=r"cannot write .*/file/state: Not a directory"):
        Inventory(tmp_path / "file" / "state")
