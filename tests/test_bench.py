# SPDX-License-Identifier: GPL-2.0-or-later
"""`hostctl bench`: that it measures and what it prints; what the figures are is not for tests to say."""

from __future__ import annotations

import re
from pathlib import Path

import capstone
import msgspec
import pytest
from click.testing import CliRunner

from hostd.bench import boot, fleet, programs, table
from hostd.bench.measures import Measure, Samples, Settings, result
from hostd.cli import main
from hostd.ctl.bench import Report, show
from hostd.ctl.demo import Template
from hostd.ctl.errors import USAGE
from hostd.ctl.private import private_daemon
from tests.tools import needs
from vmm import guests

#: as little of everything as there can be
LITTLE = Settings(runs=2, guests=2, operations=20, rounds=1, settle=0, watch=0.1, qemu_guests=1)
IDLE = Template(guests.path("idle"), None, "ms=50", 8 << 20, "idle: tick")

_SYNONYMS = {"jz": "je", "jnz": "jne"}


def test_the_comments_on_machine_code_are_true() -> None:
    engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    source = Path(programs.__file__).read_text()
    lines = re.findall(r'b"((?:\\x\w\w)+)" *# +(?:\w+: +)?(\w+) *([^\n;]*)', source)
    assert len(lines) > 50
    for code, mnemonic, operands in lines:
        found = list(engine.disasm(bytes.fromhex(code.replace("\\x", "")), 0))
        assert [one.mnemonic for one in found] == [_SYNONYMS.get(mnemonic, mnemonic)], code
        if not mnemonic.startswith("j"):
            said = found[0].op_str.replace(" ptr", "").replace(" ", "")
            wanted = operands.replace(" ", "")
            assert wanted in (said, re.sub(r"(qword|dword|byte)(?=\[)", "", said)), code


def test_jumps_of_the_programs_hit_instructions() -> None:
    engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    for program in programs.PRIMES, programs.MEMORY, programs.repeat(programs.CPUID):
        found = list(engine.disasm(program, 0))
        assert sum(one.size for one in found) == len(program)
        starts = {one.address for one in found}
        targets = {int(one.op_str, 16) for one in found if one.mnemonic.startswith("j")}
        assert targets <= starts
        assert found[-1].size == programs.STAY


def test_what_needs_no_daemon_and_no_debian_is_measured() -> None:
    wanted = table.matching(["exit-*", "world-switch", "cpu-*", "translate"])
    results = list(table.run(LITTLE, wanted))
    assert {one.name for one in results} == wanted
    assert all(len(one.runs) == 2 for one in results)
    assert [one.name for one in results] == [name for name in table.MEASURES if name in wanted]


def test_boots_are_timed() -> None:
    assert boot.warm_seconds(IDLE) > 0
    assert boot.cold_seconds(boot.run_command(IDLE), IDLE.ready) > 0


def test_a_fleet_is_timed_and_weighed() -> None:
    with private_daemon(workers=1) as daemon:
        figures = fleet.fleet(daemon, IDLE, LITTLE)
        assert [vm.name for vm in daemon.client.vms()] == ["guest-01", "guest-02", "template"]
    assert {name: len(runs) for name, runs in figures.items()} == {
        "fleet-start": 2, "fleet-start-each": 2, "fleet-memory": 1, "fleet-idle-cpu": 1}
    assert figures["fleet-memory"][0] > 1 << 20


@needs("qemu-system-x86_64")
def test_qemu_machines_are_scaled_to_a_fleet() -> None:
    figures = fleet.qemu_fleet(IDLE, LITTLE)
    assert figures["fleet-start"] == [2 * figures["fleet-start-each"][0]]
    assert figures["fleet-memory"][0] > 1 << 20


def test_a_report_as_json_and_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--json", "--runs", "1", "--only", "exit-in", "--only", "cpu-p*"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    report = msgspec.json.decode(done.stdout, type=Report)
    assert [(one.name, one.unit, one.reach, one.reach_of) for one in report.results] == [
        ("exit-in", "us", 1.0, "value"), ("cpu-primes", "x", 0.95, "value")]
    assert report.machine.cores >= 1
    assert report.machine.qemu is None
    show(report)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("machine ")
    assert any(re.match(r"exit-in +[\d.]+ us +<= 1.00 us +IN from", line) for line in lines)


def test_unknown_benchmarks_are_refused() -> None:
    done = CliRunner().invoke(main, ["bench", "--only", "speed"])
    assert done.exit_code == USAGE
    assert "'speed' is no benchmark" in done.stderr
    assert done.stderr.count("\n") == 1


def test_medians_and_ratios() -> None:
    measure = Measure("boot", "", "s", 1.5, reach_is_ratio=True)
    # side by side: the median of the ratios, not the ratio of the medians
    paired = result(measure, Samples([1.0, 2.0, 9.0], [1.0, 1.0, 5.0]))
    assert (paired.value, paired.peer, paired.ratio, paired.reached) == (2.0, 1.0, 1.8, False)
    assert result(measure, Samples([3.0], [2.0, 4.0])).ratio == 1.0
    alone = result(measure, Samples([3.0]))
    assert (alone.peer, alone.ratio, alone.reached) == (None, None, None)
    speed = Measure("cpu", "", "x", 0.95, at_least=True)
    assert [result(speed, Samples([x])).reached for x in (0.9, 0.95, 1.0)] == [False, True, True]
