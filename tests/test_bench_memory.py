# SPDX-License-Identifier: GPL-2.0-or-later
"""`hostctl bench memory`: that it measures, and notices harm; figures are not for tests to say."""

from __future__ import annotations

import os
from pathlib import Path

import capstone
import msgspec
import pytest
from click.testing import CliRunner

from hostd.bench import memory_copies, memory_costs, memory_sharing, memory_suspend
from hostd.bench.boot import debian
from hostd.bench.measures import Settings
from hostd.bench.memory_guests import names
from hostd.bench.memory_load import Witness, command
from hostd.bench.memory_overcommit import Load, run
from hostd.bench.memory_sharing import Look, steady_after, until_steady
from hostd.cli import main
from hostd.ctl.bench_memory import Report, show
from hostd.ctl.demo import Template
from hostd.ctl.errors import CtlError
from hostd.model import MAX_MEMORY
from tests.tools import needs
from vmm import guests

IDLE = Template(guests.path("idle"), None, "ms=50", 8 << 20, "idle: tick")


def quiet(text: str) -> None:
    """Nobody is to be told."""


@pytest.fixture
def few_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_costs, "PAGES", 256)


@pytest.mark.parametrize(("code", "store"), [(memory_costs._READ_EACH, "mov al, byte ptr [edi]"),
                                             (memory_costs._WRITE_EACH, "mov byte ptr [edi], al")])
def test_the_comments_on_machine_code_are_true(code: bytes, store: str) -> None:
    found = list(capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_32).disasm(code, 0))
    assert [f"{one.mnemonic} {one.op_str}" for one in found] == [
        "mov ecx, ebx", "mov edi, esi", store, "add edi, 0x1000", "sub ecx, 1", "jne 4"]


@pytest.mark.usefixtures("few_pages")
@pytest.mark.parametrize("benchmark", [memory_costs.TOUCHES, memory_costs.LOOKS])
def test_every_cost_of_a_page_is_measured(benchmark: memory_costs.Benchmark) -> None:
    wanted = frozenset(measure.name for measure in benchmark.measures)
    samples = benchmark.run(Settings(runs=2), wanted)
    assert samples.keys() == wanted
    assert {len(one.ours) for one in samples.values()} == {2}


@pytest.mark.usefixtures("few_pages")
def test_costs_as_json_and_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    done = CliRunner().invoke(main, ["bench", "memory", "--json", "--runs", "1", "--only", "costs"])
    assert done.exit_code == 0, done.output
    report = msgspec.json.decode(done.stdout, type=Report)
    assert report.costs is not None and report.sharing is None and report.overcommit is None
    show(report)
    assert "cow-break-hw" in capsys.readouterr().out


def test_a_witness_reads_a_console() -> None:
    witness = Witness(7)
    witness.read(b"/ # sh /tmp/load 7 2 8\r\nLOAD 7 1 ok\r\nLOAD 7 2 ")
    assert (witness.rounds, witness.full) == (1, False)
    witness.read(b"ok\r\nLOAD-FULL 7\r\n[  9.1] Out of memory: Killed process 9 (sh)\r\n"
                 b"[ 10.0] rcu: INFO: rcu_preempt self-detected stall on CPU\r\n"
                 b"LOAD 7 3 BAD 1: a instead of b\r\n")
    assert (witness.rounds, witness.full) == (2, True)
    assert witness.bad == ["LOAD 7 3 BAD 1: a instead of b"]
    assert (len(witness.killed), len(witness.complaints)) == (1, 1)


def test_what_is_typed_is_no_line_of_its_output() -> None:
    witness = Witness(1)
    witness.read(command(1, 4, 64).encode())
    assert witness == Witness(1, _rest=witness._rest)


def test_when_a_fleet_is_steady() -> None:
    looks = [Look(second, private, 0, 0) for second, private in enumerate([200, 150, 106, 104, 97, 100])]
    assert steady_after(looks) == 3
    assert steady_after(looks[-1:]) == 5
    assert until_steady(lambda: looks[0], 0) == (looks[:1], True)
    late = Look(60, 100, 0, 0)
    assert until_steady(lambda: late, 100) == ([late], False)
    said = [False, True]
    assert until_steady(lambda: late, 100, lambda: said.pop(0)) == ([late, late], False)


def test_clones_and_booted_guests_share() -> None:
    for fleet in IDLE, dict.fromkeys(names(2), IDLE):
        rows = memory_sharing.fleet("some", fleet, 2, 256 << 20, 0, quiet)
        assert [(row.guests, row.balloon) for row in rows] == [(2, False), (2, True)]
        assert all(row.private >= 0 for row in rows)


@needs("qemu-system-x86_64")
def test_ksm_leaves_the_kernel_as_it_was() -> None:
    files = [Path("/sys/kernel/mm/ksm", name) for name in memory_sharing._KSM_SETTINGS]
    before = [file.read_text() for file in files if file.exists()]
    if os.access(files[0], os.W_OK):
        assert memory_sharing.peer(IDLE, 1, 0, quiet).private > 1 << 20
    else:
        with pytest.raises(CtlError, match="KSM can be measured by root"):
            memory_sharing.peer(IDLE, 1, 0, quiet)
    assert [file.read_text() for file in files if file.exists()] == before


@pytest.mark.slow
def test_guests_at_work_in_too_little_memory(tmp_path: Path) -> None:
    load = Load(guests=2, pool=160 << 20, seconds=8, files=2, kib=16)
    done = run(debian(tmp_path, "/ # ", quiet), load, quiet)
    assert done.failures == [], done.log
    assert done.assigned_ratio == 1.6
    assert done.full == 2 and done.rounds_least >= 2
    assert sum(done.states.values()) == done.looks


@pytest.mark.slow
def test_a_guest_is_cloned_saved_and_restored(tmp_path: Path) -> None:
    template = debian(tmp_path, "/ # ", quiet)
    row = memory_copies.measure_one(template, 16 << 20, 1, 2, tmp_path, quiet)
    assert 0 < row.clone_pause_s <= row.clone_s
    assert 0 < row.snapshot_pause_s <= row.snapshot_s
    assert 0 < row.restore_s <= row.answer_s
    assert row.random < row.file_bytes < MAX_MEMORY


@pytest.mark.slow
def test_guests_count_on_when_the_host_is_restarted(tmp_path: Path) -> None:
    done = memory_suspend.measure(debian(tmp_path, "/ # ", quiet), 2, quiet)
    assert done.failures == []
    assert done.suspend_s > 0 and done.resume_s > 0
    assert 1 << 20 < done.file_bytes < MAX_MEMORY


@pytest.mark.parametrize(("before", "after", "sentence"), [
    ([], [1, 2], "it had not begun to count"),
    ([1, 2], [1, 2, 4], "it lost count: 1, 2, 4"),
    ([1, 2], [1, 2, 2, 3], "it lost count: 1, 2, 2, 3"),
])
def test_a_guest_that_noticed_is_told(before: list[int], after: list[int], sentence: str) -> None:
    assert memory_suspend.judge(before, after) == [sentence]


def test_unknown_parts_are_refused() -> None:
    done = CliRunner().invoke(main, ["bench", "memory", "--only", "speed"])
    assert done.exit_code == 2
    assert "'speed' is not one of" in done.stderr
