# SPDX-License-Identifier: GPL-2.0-or-later
"""`hostctl bench paper`: every engine runs the kernel; what is missing is said, never made up."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from click.testing import CliRunner

from hostd.bench import paper, paper_engines
from hostd.bench.paper import Figure, Settings, cycles_per_operation, measure
from hostd.bench.paper_chart import bar_chart
from hostd.bench.paper_engines import NATIVE, Guest, NoFigure, compile_program, output, run_guest
from hostd.bench.paper_reported import CYCLES
from hostd.cli import main
from hostd.ctl.bench_paper import Report, show
from hostd.loader import BootFiles
from tests.tools import needs
from vmm import guests

#: as little of everything as there can be
LITTLE = 0.0005
WORDS = " ".join(f"{name}=3" for name in paper.OPERATIONS if name != paper.LINUX)
OF_NANO = sorted(set(paper.OPERATIONS) - {paper.LINUX})
MIB = 1 << 20


@pytest.mark.parametrize("engine", ["hw", "bt", pytest.param("qemu", marks=needs("qemu-system-x86_64"))])
def test_nano_does_all_its_operations(engine: str) -> None:
    console = run_guest(engine, Guest(BootFiles(guests.read("nano"), None, WORDS), 16 * MIB, 60))
    assert sorted(cycles_per_operation(console)) == OF_NANO
    assert all(cycles > 0 for cycles in cycles_per_operation(console).values())
    assert console.endswith("nano: done\r\n")


def test_operations_can_be_left_out() -> None:
    words = WORDS.replace("=3", "=0").replace("callret=0", "callret=12")
    console = run_guest("hw", Guest(BootFiles(guests.read("nano"), None, words), 16 * MIB, 60))
    assert list(cycles_per_operation(console)) == ["callret"]


def test_lines_are_read_as_they_are_printed() -> None:
    console = "nano in 4 400\r\nnano linux-forkwait 2 30000000000\r\nnano: done\r\nnano x 1\r\n"
    assert cycles_per_operation(console) == {"in": 100.0, "linux-forkwait": 15e9}


def test_a_guest_that_ends_wrongly_gives_no_figures() -> None:
    with pytest.raises(NoFigure, match="ended wrongly"):
        run_guest("hw", Guest(BootFiles(guests.read("triple"), None, ""), 4 * MIB, 60))


def test_a_guest_that_does_not_end_is_given_up() -> None:
    with pytest.raises(NoFigure, match="did not end in 0 seconds"):
        run_guest("hw", Guest(BootFiles(guests.read("idle"), None, ""), 4 * MIB, 0.01))


@needs("gcc")
def test_the_host_does_what_a_process_can(tmp_path: Path) -> None:
    try:
        program = compile_program("nano_host.c", tmp_path)
        forkwait = compile_program("nano_forkwait.c", tmp_path)
    except NoFigure as error:
        pytest.skip(str(error))
    names = ["callret", "divzero", "pgfault", "syscall"]
    assert sorted(cycles_per_operation(output([str(program), *WORDS.split()]))) == names
    assert list(cycles_per_operation(output([str(forkwait), "3"]))) == [paper.LINUX]


def test_programs_that_fail_say_why() -> None:
    with pytest.raises(NoFigure, match="nothing-of-the-kind cannot be run"):
        output(["/nothing-of-the-kind"])
    with pytest.raises(NoFigure, match="sh failed: too bad"):
        output(["sh", "-c", "echo too bad >&2; exit 7"])
    with pytest.raises(NoFigure, match="did not end in 0 seconds"):
        output(["tail", "-f", "/dev/null"], timeout=0.01)


def test_what_fails_once_is_blank_and_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def fails(guest: Guest) -> str:
        ran.append(guest.files.append)
        raise NoFigure("no such processor")

    def works(guest: Guest) -> str:
        return "nano in 2 50\n"

    def no_linux(engine: object, name: object) -> None:
        raise NoFigure("no Debian here")

    monkeypatch.setitem(paper_engines.ENGINES, "bt", fails)
    monkeypatch.setitem(paper_engines.ENGINES, "hw", works)
    monkeypatch.setattr(paper._Linux, "under", no_linux)
    figures, blanks = measure(Settings(("bt", "hw"), runs=2, scale=LITTLE))
    assert [(blank.engine, blank.guest, blank.reason) for blank in blanks] == [
        ("bt", "linux-forkwait", "no Debian here"), ("hw", "linux-forkwait", "no Debian here"),
        ("bt", "nano", "no such processor")]
    assert len(ran) == 1
    found = {figure.name: figure.runs for figure in figures}
    assert found["in"] == {"hw": [25.0, 25.0]}
    assert found["syscall"] == {}
    assert list(found) == list(paper.OPERATIONS)


def test_linux_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(paper_engines.ENGINES, "hw", lambda guest: "nano in 1 1\n")
    monkeypatch.setattr(paper._Linux, "under",
                        lambda linux, engine: lambda: f"nano {paper.LINUX} 2 600\n")
    figures, blanks = measure(Settings(("hw",), runs=3, scale=LITTLE))
    found = {figure.name: figure.runs.get("hw", []) for figure in figures}
    assert (found["in"], found[paper.LINUX], blanks) == ([1.0] * 3, [300.0], [])


def test_ratios_need_both_sides() -> None:
    figure = Figure(name="in", operations=1, cycles={"bt": 30.0, "hw": 60.0}, runs={})
    assert figure.ratio("hw", "bt") == 2.0
    assert figure.ratio("bt", NATIVE) is None
    assert CYCLES["linux-forkwait"].ratio("bt", "native") == pytest.approx(36.9 / 6)
    assert CYCLES["linux-forkwait"].ratio("bt", "qemu") is None


def test_the_chart_has_a_bar_for_every_figure_and_tells_decades_apart() -> None:
    groups = {"in": {"bt": 10.0, "hw": 1000.0}, "out": {"hw": 100.0}}
    picture = bar_chart("A <chart>", "cycles", ["bt", "hw"], groups)
    root = ElementTree.fromstring(picture)
    svg = "{http://www.w3.org/2000/svg}"
    bars = {title.text: float(bar.attrib["height"]) for bar in root.iter(f"{svg}rect")
            if (title := bar.find(f"{svg}title")) is not None}
    assert list(bars) == ["in, bt: 10", "in, hw: 1,000", "out, hw: 100"]
    assert bars["out, hw: 100"] * 2 == pytest.approx(bars["in, hw: 1,000"], abs=0.2)
    assert bars["in, bt: 10"] == 0
    ElementTree.fromstring(bar_chart("empty", "cycles", ["bt"], {"in": {}}))


def test_a_report_as_json_as_a_table_and_as_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    def no_linux(engine: object, name: object) -> None:
        raise NoFigure("no Debian here")

    monkeypatch.setattr(paper._Linux, "under", no_linux)
    picture = tmp_path / "figure8.svg"
    done = CliRunner().invoke(main, ["bench", "paper", "--json", "--engine", "hw", "--runs", "1",
                                     "--scale", str(LITTLE), "--plot", str(picture)])
    assert done.exit_code == 0, done.output
    report = msgspec.json.decode(done.stdout, type=Report)
    assert report.engines == ["hw"]
    assert sorted(figure.name for figure in report.figures if figure.cycles) == OF_NANO
    ElementTree.parse(picture)
    show(report)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("pgfault") for line in lines)
    assert "the paper: native 6.0 s, bt 36.9 s, hw 106.4 s; here (from 20): none" in "\n".join(lines)
    assert lines[-1] == "blank: hw, linux-forkwait: no Debian here"
