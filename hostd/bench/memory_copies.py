# SPDX-License-Identifier: GPL-2.0-or-later
"""What it takes to clone a running guest, to save it, and to go on from the file, by the guest's size.

Some of its memory is full of random bytes, which no two pages share and nobody can compress.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from hostd.bench.memory_guests import await_console, boot
from hostd.ctl.client import Client, vm_path
from hostd.ctl.demo import Template
from hostd.ctl.private import private_daemon
from hostd.model import CloneRequest, ClonesView, RestoreRequest, SnapshotRequest, SnapshotView

#: MiB of the guest, and how many of them are random: an eighth, and all that Debian leaves of 128
CASES = tuple((memory << 20, random << 20)
              for memory, random in ((64, 8), (128, 16), (256, 32), (512, 64), (128, 56)))
_SOURCE = "source"

Say = Callable[[str], None]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A guest of `memory` bytes; medians of seconds, and bytes."""

    memory: int
    random: int
    resident: int
    #: how long the guest stood still, and how long it took until the clones ran
    clone_pause_s: float
    clone_s: float
    clones: int
    snapshot_pause_s: float
    snapshot_s: float
    file_bytes: int
    #: from the request until the restored guest is on a CPU, and until it answers what is typed
    restore_s: float
    answer_s: float


def _finish(client: Client, method: str, path: str, body: Any) -> tuple[Any, float]:
    began = time.monotonic()
    result = client.finish(client.begin(method, path, body))
    return result, time.monotonic() - began


def _answer(client: Client, name: str, word: str) -> None:
    """Have the guest's shell say something that is not what is typed."""
    client.call("POST", vm_path(name, "input"), content=f"echo '{word[:1]}''{word[1:]}'\n".encode())
    await_console(client, name, word)


def _destroy(client: Client, *names: str) -> None:
    for name in names:
        client.finish(client.begin("DELETE", vm_path(name), query={"force": "true"}))


def measure_one(template: Template, random: int, runs: int, clones: int, directory: Path, say: Say) -> Row:
    """A guest of the template's size, with so many random bytes."""
    say(f"a guest of {template.memory >> 20} MiB, {random >> 20} of them random, cloned, saved and restored")
    with private_daemon() as daemon:
        client = daemon.client
        boot(client, {_SOURCE: template}, say)
        client.call("POST", vm_path(_SOURCE, "input"), content=(
            "mkdir -p /fill; mount -t tmpfs -o size=100% none /fill; "
            f"head -c {random >> 10}k /dev/urandom >/fill/random; echo 'FILLE''D'\n").encode())
        await_console(client, _SOURCE, "FILLED")
        cloned, saved, restored, answers = [], [], [], []
        for run in range(runs):
            names = [f"clone-{number}" for number in range(clones)]
            result, seconds = _finish(client, "POST", vm_path(_SOURCE, "clone"),
                                      CloneRequest(names=names, start=True))
            cloned.append((msgspec.convert(result, ClonesView).pause_s, seconds))
            _destroy(client, *names)
            file = directory / f"{template.memory}-{run}.snap"
            result, seconds = _finish(client, "POST", vm_path(_SOURCE, "snapshot"),
                                      SnapshotRequest(to=str(file)))
            view = msgspec.convert(result, SnapshotView)
            saved.append((view.pause_s, seconds, view.size))
            began = time.monotonic()
            _, seconds = _finish(client, "POST", "/restore", RestoreRequest(file=str(file), name="restored"))
            _answer(client, "restored", f"ANSWER-{run}")
            restored.append(seconds)
            answers.append(time.monotonic() - began)
            _destroy(client, "restored")
            file.unlink()
        resident = client.vm(_SOURCE).memory_usage.resident
    return Row(
        memory=template.memory, random=random, resident=resident, clones=clones,
        clone_pause_s=median(pause for pause, _ in cloned), clone_s=median(all_ for _, all_ in cloned),
        snapshot_pause_s=median(pause for pause, _, _ in saved),
        snapshot_s=median(seconds for _, seconds, _ in saved), file_bytes=saved[-1][2],
        restore_s=median(restored), answer_s=median(answers))


def measure(template: Template, cases: Sequence[tuple[int, int]], runs: int, clones: int,
            say: Say) -> list[Row]:
    """A row for each of the cases."""
    with tempfile.TemporaryDirectory(prefix="hostctl-bench-") as directory:
        return [measure_one(replace(template, memory=memory), random, runs, clones, Path(directory), say)
                for memory, random in cases]
