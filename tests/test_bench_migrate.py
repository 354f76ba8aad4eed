# SPDX-License-Identifier: GPL-2.0-or-later
"""`hostctl bench migrate`: that its load notices harm, its reader understands it, and guests get across."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE, Popen

import capstone
import pytest
from click.testing import CliRunner

from hostd.bench import migrate_hosts, migrate_program, migrate_qemu
from hostd.bench.facts import Facts
from hostd.bench.migrate_cases import Case, Make, Row, Settings, failures, hops, qemu_ways
from hostd.bench.migrate_network import LOOPBACK
from hostd.bench.migrate_program import CODE, IDLE, VARIABLES, Load, executable
from hostd.bench.migrate_watch import Hop, Line, Watch, Witness, await_lines, await_steps, drift, hop
from hostd.cli import main
from hostd.ctl.bench_migrate import Report, debian, show
from hostd.ctl.errors import CtlError
from tests.tools import needs

#: where the load's pages begin (the comment above migrate_program.VARIABLES)
PAGES = migrate_program._DATA + migrate_program.PAGE
LOAD = Load(pages=64, rate=400)


def test_the_comments_on_machine_code_are_true() -> None:
    text = Path(migrate_program.__file__).read_text()
    lines = re.findall(r'^ +(b"[^"]+") +# (?:(\w+):)? +(.+)$', text, re.M)
    said = [instruction.split(maxsplit=1) for _, _, instruction in lines]
    lengths = [len(re.findall(r"\\x", code)) for code, _, _ in lines]
    labels = {sum(lengths[:number]): label for number, (_, label, _) in enumerate(lines) if label}
    found = []
    for one in capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_32).disasm(CODE, 0):
        operands = re.sub(r"\[ebp(?: \+ (\w+))?\]", _variable, one.op_str.replace("dword ptr ", ""))
        if one.mnemonic[0] == "j" or one.mnemonic == "call":
            operands = labels[int(operands, 0)]
        found.append([one.mnemonic, *([operands] if operands else [])])
    assert found == said


def _variable(match: re.Match[str]) -> str:
    offset = int(match[1] or "0", 0)
    last = 4 * (len(VARIABLES) - 1)
    if offset > last + 4:
        return match[0]
    return f"[{VARIABLES[-1]} + 4]" if offset > last else f"[{VARIABLES[offset // 4]}]"


@contextmanager
def at_work(tmp_path: Path, load: Load) -> Iterator[tuple[Watch, Popen[bytes]]]:
    """The load as a process of this host."""
    program = tmp_path / "load"
    program.write_bytes(executable())
    program.chmod(0o755)
    arguments = load.command().split()[1:-1]
    try:
        process = subprocess.Popen([program, *arguments], stdin=PIPE, stdout=PIPE)
    except OSError:
        pytest.skip("this host does not run 32-bit programs")
    watch = Watch()
    try:
        watch.follow(process)
        yield watch, process
    finally:
        process.kill()
        process.wait()
        watch.close()


def test_the_load_counts_and_keeps_its_rate(tmp_path: Path) -> None:
    with at_work(tmp_path, LOAD) as (watch, _):
        await_lines(watch, 3, 20)
        await_steps(watch, LOAD.pages, 20)
        lines = watch.lines()
    assert watch.findings() == []
    assert [line.number for line in lines] == list(range(1, len(lines) + 1))
    # what it is late by it catches up with, but for a stop of more than a tenth of a second
    assert lines[-1].steps <= LOAD.rate * (lines[-1].clock - lines[0].clock) + 1


@pytest.mark.parametrize(("at", "said"), [
    (3 * 4096 + 400, r"\d+ 3 \d+ \d+ 3"),       # a word somewhere in page 3
    (5 * 4096, r"\d+ 77 \d+ \d+ 5"),            # the number of page 5
    (6 * 4096 + 4, r"\d+ 6 77 \d+ 6"),          # the generation of page 6
])
def test_the_load_notices_wrong_pages(tmp_path: Path, at: int, said: str) -> None:
    with at_work(tmp_path, LOAD) as (watch, process):
        await_lines(watch, 1, 20)
        with open(f"/proc/{process.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(PAGES + at)
            memory.write((77).to_bytes(4, "little"))
        watch.wait(lambda witness: bool(witness.findings), 20, "noticed nothing")
        await_steps(watch, 2 * LOAD.pages, 20)
        finding, = watch.findings()     # it mends the page: once is enough
    assert re.search(rf": {said}$", finding)


def test_a_page_of_another_time_is_noticed(tmp_path: Path) -> None:
    with at_work(tmp_path, LOAD) as (watch, process):
        await_lines(watch, 1, 20)
        with open(f"/proc/{process.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(PAGES + 9 * 4096)
            old = memory.read(4096)
            await_steps(watch, 2 * LOAD.pages, 20)
            memory.seek(PAGES + 9 * 4096)
            memory.write(old)
        watch.wait(lambda witness: bool(witness.findings), 20, "noticed nothing")
        assert re.search(r": 0 9 \d+ \d+ 9$", watch.findings()[0])     # its sum is right


def test_a_witness_reads_a_console() -> None:
    witness = Witness()
    witness.read(b"/ # /bin/load 16 20 64 0 10000000 &\r\n/ # \x1b[6nc 1 0 25 4294900000\r\nc 2 5 ", 10.0)
    assert [line.number for line in witness.lines] == [1]
    witness.read(b"10304 182704e\r\nchoc 3 10 5000 432704\r\n", 10.5)
    assert witness.findings == []
    assert [(line.arrived, line.steps, line.gap) for line in witness.lines[1:]] == [
        (10.5, 5, 0.010304), (10.5, 10, 0.005)]
    # the clock has gone once round
    assert round(witness.lines[-1].clock - witness.lines[0].clock, 6) == 0.5
    witness.read(b"[   18.3] Code: 4c 89 47 20 48 4b 78 08 75 13 48\r\n", 11.0)
    assert len(witness.lines) == 3 and witness.findings == []


@pytest.mark.parametrize(("text", "found"), [
    (b"c 7 5 1 1000\nc 7 6 1 2000\n", "its counter goes from 7 to 7"),
    (b"c 7 5 1 1000\nc 9 6 1 2000\n", "its counter goes from 7 to 9"),
    (b"c 7 5 1 9000\nc 8 6 1 2000\n", "its clock goes back by 0.007 s"),
    (b"b 0 224 5 4 224\n", "a page is not what was written (sum, number, generation, generation wanted, "
                           "place): 0 224 5 4 224"),
    (b"[ 18.3] Oops: 0000 [#1] PREEMPT\n", "its kernel complained: [ 18.3] Oops: 0000 [#1] PREEMPT"),
])
def test_a_witness_notices_harm(text: bytes, found: str) -> None:
    witness = Witness()
    witness.read(text, 1.0)
    assert witness.findings == [found]


def line(number: int, late: float = 0.0, gap: float = 0.01, lost: float = 0.0) -> Line:
    """One of four lines a second, that is read `late` and whose clock has lost some time."""
    return Line(number / 4 + late, number, number, gap, number / 4 - lost)


def test_what_is_seen_of_a_migration() -> None:
    before = [line(number, late=0.001 * (number % 3)) for number in range(12)]
    kept_time = [line(12, gap=0.06), *(line(number, late=0.002) for number in range(13, 24))]
    seen = hop([*before, *kept_time], began=2.8, ended=3.01)
    assert seen == pytest.approx(Hop(still=0.062, usual=0.01, lost=0.002))
    stopped = [line(number, lost=0.05) for number in range(12, 24)]
    assert hop([*before, *stopped], 2.8, 2.9) == pytest.approx(Hop(still=0.06, usual=0.01, lost=0.05))


def test_what_a_clock_drifts_by() -> None:
    drifted, allowed = drift([line(number) for number in range(48)], hops=3)
    assert (drifted, allowed) == pytest.approx((0.0, 4 * 0.005 + 500e-6 * 47 / 4))
    drifted, allowed = drift([line(number, lost=0.05 * (number // 12)) for number in range(48)], hops=3)
    assert drifted == pytest.approx(0.15) and drifted > allowed


def test_a_guest_that_changes_processes_is_read_in_order() -> None:
    watch = Watch()
    older, younger = (Popen(["cat"], stdin=PIPE, stdout=PIPE) for _ in range(2))

    def said(text: bytes) -> None:
        watch.wait(lambda witness: witness.said.endswith(text), 20, "was not heard")

    try:
        watch.follow(older)
        watch.type("c 1 0 0 0\nc 2 0 ")
        said(b"c 2 0 ")
        watch.follow(younger)
        watch.type("0 0\n")
        said(b"0 0\n")
        older.kill()
        watch.type("c 3 0 0 0\n")
        said(b"c 3 0 0 0\n")
        assert [one.number for one in watch.lines()] == [1, 2, 3]
        assert watch.findings() == []
    finally:
        for process in (older, younger):
            process.kill()
            process.wait()
    with pytest.raises(CtlError, match="session with the guest's console is lost"):
        watch.type("echo\n")
    watch.close()


def row(by: str = "hostd", findings: tuple[str, ...] = (), stayed: str = "", drifted: float = 0.0) -> Row:
    return Row(case="some", by=by, network="loopback", moved=1, downtime=0.02, total=0.5, bytes=1 << 20,
               drift=drifted, allowed=0.01, stayed=stayed, findings=list(findings))


def test_what_fails_the_benchmark() -> None:
    assert failures([row(), row("QEMU", ("a page",), "not done", 1.0)]) == []
    assert failures([row(findings=("a page",)), row(stayed="not done"), row(drifted=-0.02)]) == [
        "some: a page", "some: the guest stayed where it was: not done",
        "some: the guest's clock drifted by -20.0 ms over 1 migrations, where 10.0 ms can be imprecision"]


def test_the_report_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    machine = Facts(cpu="a CPU", cores=2, cores_online=2, memory_bytes=1 << 30, kernel="Linux", load=0.0,
                    python_loop_ns=1.0, python="3", hostd="0", unicorn="2", qemu=None)
    show(Report(machine=machine, vmm="hw", runs=1, rows=[row(), row("QEMU", ("a page",))],
                missing={"netem": "no namespaces"}, failures=[]))
    shown = capsys.readouterr().out
    assert "no netem  no namespaces" in shown
    assert re.search(r"some +hostd +1 +20\.0 ms", shown)
    assert "some, QEMU: a page" in shown


def test_unknown_parts_are_refused() -> None:
    done = CliRunner().invoke(main, ["bench", "migrate", "--only", "speed"])
    assert done.exit_code == 2
    assert "'speed' is not one of" in done.stderr


def moved(make: Make, tmp_path: Path, by: str) -> Row:
    """A quiet guest that goes once."""
    case = Case("tiny", IDLE, rest=2)
    settings = Settings(runs=1)
    way, *_ = qemu_ways(None, settings)
    only, = hops(make, debian(tmp_path, "hw"), LOOPBACK, case, [replace(way, by=by)], settings)
    return only


@pytest.mark.slow
def test_a_guest_goes_to_another_host(tmp_path: Path) -> None:
    came = moved(migrate_hosts.side, tmp_path, "hostd")
    assert (came.moved, came.stayed, came.findings) == (1, "", [])
    assert came.downtime and came.total and came.bytes and came.downtime < came.total


@pytest.mark.slow
@needs("qemu-system-x86_64")
def test_a_guest_goes_to_another_qemu(tmp_path: Path) -> None:
    came = moved(migrate_qemu.side, tmp_path, "QEMU")
    assert (came.moved, came.stayed) == (1, "")
    assert came.total and came.bytes and came.bytes > 1 << 20
