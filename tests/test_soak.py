# SPDX-License-Identifier: GPL-2.0-or-later
"""The soak: what it asks guests to do has the results it expects, and what goes wrong is seen."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hostd.bench import soak_work
from hostd.bench.soak_work import Witness


def lines(*texts: str) -> bytes:
    return "".join(text + "\r\n" for text in texts).encode()


@pytest.mark.parametrize("number", [1, 50, 1000])
def test_the_work_has_the_results_that_are_expected(tmp_path: Path, number: int) -> None:
    """A healthy machine, this one, says ok."""
    script = soak_work.script().rpartition(f" >{soak_work.PATH}; ")[0]
    (tmp_path / "script").write_text(
        subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
        .replace("/tmp/", f"{tmp_path}/").replace("while :;", "while [ $round = 0 ];")
        .replace("usleep", "true").replace("dmesg", "true"))
    command = soak_work.command(number).replace(soak_work.PATH, f"{tmp_path}/script")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"SOAK {number} 1 ok\n", "")


def test_rounds_are_counted_over_pieces_of_output() -> None:
    witness = Witness(7)
    data = lines("/ # sh /tmp/soak 7", "SOAK 7 1 ok", "SOAK 7 2 ok")
    for start in range(0, len(data), 5):
        witness.read(data[start:start + 5])
    assert (witness.rounds, witness.wrong, witness.complaints) == (2, [], [])


@pytest.mark.parametrize("line", [
    "SOAK 7 1 WRONG sum: 1 instead of 2", "SOAK 8 1 ok", "SOAK 7 2 ok", "SOAK 7 0 ok",
])
def test_wrong_results_are_seen(line: str) -> None:
    witness = Witness(7)
    witness.read(lines(line))
    assert len(witness.wrong) == 1


@pytest.mark.parametrize("line", [
    "[   12.3] BUG: unable to handle page fault for address: ffff",
    "[   12.3] Oops: 0002 [#1] PREEMPT", "[    1.0] Kernel panic - not syncing: Attempted to kill init!",
    "[   99.0] rcu: INFO: rcu_preempt self-detected stall on CPU", "sh[12]: segfault at 0 ip 0",
])
def test_complaints_of_the_kernel_are_seen(line: str) -> None:
    witness = Witness(7)
    witness.read(lines("SOAK 7 1 ok", line))
    assert witness.complaints == [line]
