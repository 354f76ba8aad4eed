# SPDX-License-Identifier: GPL-2.0-or-later
"""`hostctl bench spec`: processor-bound programs, as a ratio to the same code on the host."""

from __future__ import annotations

import click
import msgspec

from hostd.bench import facts
from hostd.bench.paper_engines import NAMES, NATIVE
from hostd.bench.spec import Blank, Figure, Settings, measure
from hostd.ctl.bench_paper import engine_option, gather_facts, json_option, runs_option, say, scale_option
from hostd.ctl.formatting import print_fields, print_json, print_table
from hostd.ctl.session import Session, format_option, pass_session
from vmm.silicon import tsc


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What --json prints."""

    machine: facts.Facts
    tsc_khz: int
    runs: int
    engines: list[str]
    figures: list[Figure]
    blanks: list[Blank]


@click.command("spec")
@json_option
@engine_option
@runs_option
@scale_option
@format_option
@pass_session
def spec_command(session: Session, as_json: bool, engines: tuple[str, ...], runs: int, scale: float) -> None:
    """Measure processor-bound programs: the same object code as guests and as a process of the host.

    Figures are times of the native run's; all results are compared.  Needs gcc for 32-bit code.
    """
    machine = gather_facts()
    chosen = tuple(name for name in NAMES if name == NATIVE or not engines or name in engines)
    settings = Settings(engines=chosen, runs=runs, scale=scale, say=say)
    figures, blanks = measure(settings)
    report = Report(machine=machine, tsc_khz=tsc.measure_khz(), runs=runs, engines=list(chosen),
                    figures=figures, blanks=blanks)
    if as_json or session.json:
        print_json(report)
    else:
        show(report)


def show(report: Report) -> None:
    """The report for people."""
    machine = report.machine
    print_fields([
        ("machine", f"{machine.cpu}, TSC {report.tsc_khz / 1e6:.2f} GHz, load {machine.load:.2f}"),
        ("figures", f"times of the native run's, medians of {report.runs} runs"),
    ])  # fmt: skip
    click.echo()
    others = [engine for engine in report.engines if engine != NATIVE]
    print_table(["NAME", ">NATIVE", *(f">{engine.upper()}" for engine in others), "WHAT"],
                [[figure.name, _seconds(figure.cycles.get(NATIVE), report.tsc_khz),
                  *(_times(figure.ratios.get(engine)) for engine in others), figure.about]
                 for figure in report.figures])
    programs: dict[tuple[str, str], list[str]] = {}
    for blank in report.blanks:
        programs.setdefault((blank.engine, blank.reason), []).append(blank.program)
    for (engine, reason), names in programs.items():
        click.echo(f"blank: {engine}, {', '.join(names)}: {reason}")


def _seconds(cycles: float | None, tsc_khz: int) -> str:
    return "" if cycles is None else f"{cycles / (tsc_khz * 1e3):.3f} s"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f} x"
