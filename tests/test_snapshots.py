# SPDX-License-Identifier: GPL-2.0-or-later
"""Real guests saved in files while they run, and restored from them, under either monitor."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hostd.protocol import MAX_STATE
from hostd.saved import SavedVm, encode_saved, saved_in
from hostd.snapshot import Folder, Snapshot, SnapshotWriter
from hostd.snapshot.layout import HEADER
from tests.private_daemon import PrivateDaemon
from tests.test_foreign_states import changed
from vmm import guests

MONITORS = ("hw", "bt")


@pytest.fixture(autouse=True)
def clean(daemon: PrivateDaemon) -> Iterator[None]:
    """Every test leaves the daemon without VMs, with all frames free, and no file open that it opened."""
    yield
    daemon.clear()
    assert daemon.get("/memory", check="true")["wrong"] == []
    assert opened(daemon) == []


def opened(daemon: PrivateDaemon) -> list[str]:
    """The snapshots that it has open."""
    targets = [str(link.readlink()) for link in Path(f"/proc/{daemon.process.pid}/fd").iterdir()]
    return [target for target in targets if ".snap" in target]


@pytest.fixture
def counting(daemon: PrivateDaemon) -> str:
    """A guest that tells of round after round, and is in the middle of it."""
    daemon.create("vm", guests.read("primes"), append="loop limit=5000", start=True)
    daemon.wait("vm", console="round 2:")
    return "vm"


def rounds(console: str) -> list[int]:
    """The rounds that were told of, all of them with the right count; one after the other."""
    told = re.findall(r"round (\d+): (\d+) below 5000", console)
    assert {count for _, count in told} == {"669"}
    numbers = [int(number) for number, _ in told]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return numbers


def goes_on(daemon: PrivateDaemon, name: str, after: int) -> None:
    """The guest tells of the rounds that follow `after`, leaving none out."""
    daemon.wait(name, console=rf"round {after + 3}: .*\n")
    first = rounds(daemon.console(name))[0]
    assert first <= after + 2


def paused(daemon: PrivateDaemon, name: str) -> int:
    """Pause the guest once it has told of a round, and say which was the last."""
    daemon.wait(name, console=r"round .*\n")
    daemon.do(name, "pause")
    return rounds(daemon.console(name))[-1]


def operation(daemon: PrivateDaemon, path: str, **body: Any) -> Any:
    """Its end, whatever that is."""
    return daemon.get(f"/operations/{daemon.post(path, **body)['id']}", wait=30)


def save(daemon: PrivateDaemon, name: str, **body: Any) -> Path:
    result = daemon.do(name, "snapshot", **body)
    assert result["pause_s"] >= 0 and result["size"] == Path(result["file"]).stat().st_size
    return Path(result["file"])


def restore(daemon: PrivateDaemon, file: Path, name: str) -> None:
    ended = operation(daemon, "/restore", file=str(file), name=name)
    assert ended["status"] == "done" and ended["result"] == {"name": name}, ended


def refused(daemon: PrivateDaemon, file: Path, sentence: str, name: str = "new") -> None:
    """Nothing is made of the file."""
    before = [vm["name"] for vm in daemon.get("/vms")]
    ended = operation(daemon, "/restore", file=str(file), name=name)
    assert ended["status"] == "failed" and re.search(sentence, ended["error"]), ended
    assert [vm["name"] for vm in daemon.get("/vms")] == before
    assert not (daemon.directory / "state" / "vms" / f"{name}.json").exists()


def test_a_clone_tells_how_long_its_template_stood_still(daemon: PrivateDaemon, counting: str) -> None:
    result = daemon.do("vm", "clone", names=["a", "b", "c"], start=True)
    after = rounds(daemon.console("vm"))[-1]
    assert result["names"] == ["a", "b", "c"] and result["pause_s"] > 0
    for name in "a", "b", "c", "vm":
        goes_on(daemon, name, after)
    daemon.do("vm", "pause")
    assert daemon.do("vm", "clone", names=["d"])["pause_s"] == 0


def test_a_guest_is_saved_while_it_counts_and_restored_twice(daemon: PrivateDaemon, counting: str) -> None:
    file = save(daemon, "vm")
    assert file.parent == daemon.directory / "state" / "snapshots"
    after = rounds(daemon.console("vm"))[-1]
    for name in "first", "second":
        restore(daemon, file, name)
    assert opened(daemon) == [str(file)]
    for name in "first", "second", "vm":
        goes_on(daemon, name, after)
        view = daemon.get(f"/vms/{name}")
        assert (view["state"], view["memory"], view["boots"]) == ("running", 16 << 20, 1)
    assert rounds(daemon.console("vm"))[0] == 1


def test_a_file_may_be_removed_once_it_is_restored(daemon: PrivateDaemon, counting: str) -> None:
    file = save(daemon, "vm")
    restore(daemon, file, "new")
    file.unlink()
    after = paused(daemon, "new")
    daemon.do("new", "clone", names=["copy"], start=True)
    daemon.do("new", "resume")
    goes_on(daemon, "new", after)
    goes_on(daemon, "copy", after)


def test_a_paused_guest_is_saved_and_a_restored_one_saved_again(daemon: PrivateDaemon, counting: str) -> None:
    daemon.do("vm", "pause")
    restore(daemon, save(daemon, "vm"), "new")
    assert daemon.get("/vms/vm")["state"] == "paused"
    after = paused(daemon, "new")
    again = save(daemon, "new")
    daemon.client.delete("/vms/new", params={"force": "true"})
    restore(daemon, again, "newer")
    goes_on(daemon, "newer", after)


def test_a_snapshot_on_a_base_holds_what_is_new(daemon: PrivateDaemon, counting: str) -> None:
    directory = daemon.directory / "state" / "snapshots"
    base = save(daemon, "vm")
    file = save(daemon, "vm", base=str(base), to=str(directory / "second.snap"))
    third = save(daemon, "vm", base=str(file))
    folder = Folder(directory)
    with_base = folder.open(third.name)
    assert {file.name for file in with_base.bases} <= {base.name, "second.snap"} and with_base.bases
    assert with_base.data_bytes < folder.open(base.name).data_bytes
    folder.close()
    after = rounds(daemon.console("vm"))[-1]
    restore(daemon, third, "new")
    goes_on(daemon, "new", after)
    base.rename(directory / "elsewhere")
    refused(daemon, third, "its base is missing", "newest")


def test_names_places_and_files_that_cannot_be(daemon: PrivateDaemon, counting: str, tmp_path: Path) -> None:
    file = save(daemon, "vm", to=str(tmp_path / "vm.snap"))
    before = file.read_bytes()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("nothing")
    for body, sentence in (
            ({"to": str(file)}, f"{file} exists already: choose another name"),
            ({"to": str(tmp_path)}, f"{tmp_path} exists already"),
            ({"to": "/dev/null"}, "/dev/null exists already"),
            ({"to": str(tmp_path / "none" / "vm.snap")}, "No such file or directory"),
            ({"to": str(file / "vm.snap")}, f"cannot write {file}/vm.snap: Not a directory"),
            ({"to": str(tmp_path / ("n" * 256))}, "n: File name too long"),
            ({"to": str(tmp_path / "dangling")}, f"{tmp_path}/dangling exists already"),
            ({"to": str(tmp_path / "fifo")}, f"{tmp_path}/fifo exists already"),
            ({"base": str(tmp_path / "none")}, "there is no snapshot"),
            ({"to": str(daemon.directory / "x.snap"), "base": str(file)}, "lies beside its base")):
        ended = operation(daemon, "/vms/vm/snapshot", **body)
        assert ended["status"] == "failed" and sentence in ended["error"]
    assert daemon.client.post("/vms/vm/snapshot", json={"to": "vm.snap"}).status_code == 400
    assert daemon.client.post("/restore", json={"file": str(file), "name": "vm"}).status_code == 409
    assert "VM vm exists already" in operation(daemon, "/restore", file=str(file))["error"]
    refused(daemon, tmp_path / "nothing", "there is no snapshot")
    refused(daemon, tmp_path / ("n" * 256), "cannot open .*: File name too long")
    for path in tmp_path, Path("/dev/null"), tmp_path / "fifo":
        refused(daemon, path, f"{path} cannot be used: it is not a regular file")
    (tmp_path / "fifo").unlink()
    (tmp_path / "dangling").unlink()
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == before
    goes_on(daemon, "vm", rounds(daemon.console("vm"))[-1])


def test_a_torn_or_damaged_file_is_refused(daemon: PrivateDaemon, counting: str, tmp_path: Path) -> None:
    good = save(daemon, "vm").read_bytes()
    bad = tmp_path / "bad.snap"
    for damaged, sentence in (
            (good[:-1], "torn"), (good[:100], "torn"), (b"", "does not begin as a snapshot"),
            (good[:HEADER + 9] + bytes([good[HEADER + 9] ^ 1]) + good[HEADER + 10:], "damaged"),
            (good[:-9] + b"x" + good[-8:], "damaged"), (good[:8] + b"\2" + good[9:], "version 2"),
            (good + b"\0", "damaged")):
        bad.write_bytes(damaged)
        refused(daemon, bad, sentence)


def test_a_file_whose_parts_do_not_fit_each_other(daemon: PrivateDaemon, counting: str,
                                                  tmp_path: Path) -> None:
    good = Snapshot.open(save(daemon, "vm"))
    definition = saved_in(good).definition
    saved = encode_saved(SavedVm(definition=definition))
    state = msgspec.msgpack.decode(good.state)
    selector = changed(state, ("cpu", "cs", "selector"), 0x12345)
    cr0 = changed(state, ("cpu", "cr0"), 1 << 40)
    workers = [worker["pid"] for worker in daemon.get("/host")["workers"]]
    for memory, state, said, sentence in (
            (good.memory_bytes, b"", saved, "pages only"),
            (good.memory_bytes, b"nonsense", saved, "not a machine state"),
            (good.memory_bytes, good.state, encode_saved(SavedVm(definition=definition, ballooned=b"x")),
             "1 bytes say which pages are in its balloon"),
            (good.memory_bytes, good.state, b"{}", "missing required field `definition`"),
            (good.memory_bytes, selector, saved, "Expected `int` <= 65535"),
            (good.memory_bytes, cr0, saved, "a CPU that cannot run"),
            (good.memory_bytes, good.state + bytes(MAX_STATE), saved, "a worker takes"),
            (good.memory_bytes + 4096, good.state, saved, "bytes are in its state")):
        bad = tmp_path / "bad.snap"
        bad.unlink(missing_ok=True)
        with SnapshotWriter(bad, memory, state=state, definition=said) as writer:
            writer.finish()
        refused(daemon, bad, sentence)
    good.close()
    assert [worker["pid"] for worker in daemon.get("/host")["workers"]] == workers
    goes_on(daemon, "vm", rounds(daemon.console("vm"))[-1])


def test_a_restored_vm_without_its_kernel_says_so_at_its_next_start(daemon: PrivateDaemon,
                                                                    counting: str) -> None:
    restore(daemon, save(daemon, "vm"), "new")
    daemon.do("new", "stop", force=True)
    for where in "blobs", "unpacked":
        for blob in (daemon.directory / "state" / where).iterdir():
            blob.unlink()
    ended = operation(daemon, "/vms/new/start")
    assert ended["status"] == "failed" and "upload it again to boot from it" in ended["error"], ended


def overwritten(file: Path, other: Path) -> None:
    """As cp(1) does it."""
    with file.open("r+b") as target:
        target.write(other.read_bytes())
        target.truncate()


@pytest.mark.parametrize("harm", [
    overwritten, lambda file, _: os.truncate(file, 1000), lambda file, _: file.write_bytes(b"")])
def test_a_guest_whose_file_is_changed_is_lost_and_says_so(
        daemon: PrivateDaemon, counting: str, harm: Callable[[Path, Path], object]) -> None:
    file, other = save(daemon, "vm"), save(daemon, "vm")
    restore(daemon, file, "new")
    restore(daemon, other, "newer")
    after = paused(daemon, "newer")
    daemon.do("new", "pause")
    harm(file, other)
    daemon.do("new", "resume")
    # it may go on with what it has read; what it has not, and its next snapshot needs, is lost
    operation(daemon, "/vms/new/pause")
    if daemon.get("/vms/new")["state"] == "paused":
        ended = operation(daemon, "/vms/new/snapshot")
        assert ended["status"] == "failed" and f"{file} was changed" in ended["error"], ended
    else:
        assert f"{file} was changed" in daemon.get("/vms/new")["reason"]
    daemon.do("newer", "resume")
    goes_on(daemon, "newer", after)
