# SPDX-License-Identifier: GPL-2.0-or-later
"""`hostctl bench paper`: the tables of the paper's chapter 5.1.1, beside what was reported of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import click
import msgspec

from hostd.bench import facts
from hostd.bench.paper import LINUX, Blank, Figure, Settings, measure
from hostd.bench.paper_chart import bar_chart
from hostd.bench.paper_engines import NAMES, NATIVE
from hostd.bench.paper_reported import AHEAD, CYCLES, FORKWAIT_PROCESSES, FORKWAIT_SECONDS, Reported
from hostd.bench.qemu import PROGRAM as QEMU
from hostd.ctl.formatting import print_fields, print_json, print_table
from hostd.ctl.session import Session, format_option, pass_session
from vmm.silicon import tsc

#: whose cycles are divided by whose
_RATIOS = (("bt", NATIVE), ("hw", NATIVE), ("hw", "bt"))
_NO_ONE = Reported()


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What --json prints."""

    machine: facts.Facts
    tsc_khz: int
    runs: int
    engines: list[str]
    figures: list[Figure]
    blanks: list[Blank]
    #: benchmark -> native, bt, hw of Adams and Agesen, in cycles
    reported: dict[str, Reported]


engine_option = click.option(
    "--engine", "engines", type=click.Choice(NAMES), multiple=True,
    help="Measure this only; may be given again.  Without: all.",
)
scale_option = click.option(
    "--scale", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True, metavar="X",
    help="How much of everything: 0.01 is a hundredth.",
)
runs_option = click.option(
    "--runs", type=click.IntRange(1, 1000), default=3, show_default=True, metavar="N",
    help="How often to measure, all in turn; medians are shown.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="The same as --format json.")


def gather_facts() -> facts.Facts:
    """The machine, with QEMU where there is one."""
    return facts.gather(with_qemu=shutil.which(QEMU) is not None)


def say(text: str) -> None:
    """Progress, beside the results."""
    click.echo(text, err=True)


@click.command("paper")
@json_option
@click.option("--plot", type=click.Path(dir_okay=False, writable=True, path_type=Path), metavar="FILE",
              help="Draw the paper's figure 8, logarithmic bars, as SVG.")
@engine_option
@runs_option
@scale_option
@format_option
@pass_session
def paper_command(session: Session, as_json: bool, plot: Path | None, engines: tuple[str, ...], runs: int,
                  scale: float) -> None:
    """Measure single operations that virtualization makes dear, natively, under both monitors and QEMU.

    Cycles of the time-stamp counter for one operation.  What an engine cannot do is left blank, and said.
    All of the paper's 40,000 processes, everywhere, take an hour; --scale 0.1 takes some minutes.
    """
    machine = gather_facts()
    settings = Settings(engines=engines or NAMES, runs=runs, scale=scale, say=say)
    figures, blanks = measure(settings)
    report = Report(machine=machine, tsc_khz=tsc.measure_khz(), runs=runs, engines=list(settings.engines),
                    figures=figures, blanks=blanks, reported=CYCLES)
    if plot is not None:
        plot.write_text(chart(report))
    if as_json or session.json:
        print_json(report)
    else:
        show(report)


def show(report: Report) -> None:
    """The report for people: cycles, ratios, the seconds of forkwait, what is missing."""
    machine = report.machine
    print_fields([
        ("machine", f"{machine.cpu}, TSC {report.tsc_khz / 1e6:.2f} GHz, load {machine.load:.2f}"),
        ("figures", f"cycles for one operation, medians of {report.runs} runs"),
        ("AA", "Adams and Agesen, ASPLOS 2006, Pentium 4"),
    ])  # fmt: skip
    click.echo()
    print_table(
        ["NAME", *(f">{engine.upper()}" for engine in report.engines), ">AA NATIVE", ">AA BT", ">AA HW"],
        [[figure.name, *(_cycles(figure.cycles.get(engine)) for engine in report.engines),
          *(_cycles(value) for value in CYCLES.get(figure.name, _NO_ONE))] for figure in report.figures])
    click.echo()
    pairs = [f"{one.upper()}/{other.upper()}" for one, other in _RATIOS]
    print_table(["RATIO", *(f">{pair}" for pair in pairs), *(f">AA {pair}" for pair in pairs),
                 "AHEAD", "FIGURE 8"], [_ratios(figure) for figure in report.figures])
    click.echo()
    click.echo(_forkwait(report))
    for blank in report.blanks:
        click.echo(f"blank: {blank.engine}, {blank.guest}: {blank.reason}")


def _ratios(figure: Figure) -> list[str]:
    reported = CYCLES.get(figure.name, _NO_ONE)
    hw = figure.ratio("hw", "bt")
    ahead = "" if hw is None else "bt" if hw > 1 else "hw"
    return [figure.name, *(_times(figure.ratio(*pair)) for pair in _RATIOS),
            *(_times(reported.ratio(*pair)) for pair in _RATIOS), ahead, AHEAD.get(figure.name, "")]


def _forkwait(report: Report) -> str:
    """The seconds of the paper's program, theirs and ours."""
    measured = next(figure for figure in report.figures if figure.name == LINUX)
    reported = ", ".join(f"{name} {value} s" for name, value in FORKWAIT_SECONDS._asdict().items())
    ours = ", ".join(f"{engine} {each * FORKWAIT_PROCESSES / (report.tsc_khz * 1e3):.1f} s"
                     for engine, each in measured.cycles.items())
    share = "" if measured.operations == FORKWAIT_PROCESSES else f" (from {measured.operations:,})"
    return (f"{FORKWAIT_PROCESSES:,} processes in Linux: the paper: {reported}; "
            f"here{share}: {ours or 'none'}")


def chart(report: Report) -> str:
    """The paper's figure 8 with our figures."""
    return bar_chart("Nanobenchmarks, cycles for one operation", "cycles", report.engines,
                     {figure.name: figure.cycles for figure in report.figures})


def _cycles(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
