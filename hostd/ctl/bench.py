# SPDX-License-Identifier: GPL-2.0-or-later
"""`hostctl bench`: what this host costs on this machine, beside what it is to reach."""

from __future__ import annotations

from collections.abc import Callable

import click
import msgspec
from click.shell_completion import CompletionItem
from rich.text import Text

from hostd.bench import facts, table
from hostd.bench.measures import Result, Settings
from hostd.ctl.bench_memory import memory_bench_command
from hostd.ctl.bench_migrate import migrate_bench_command
from hostd.ctl.bench_paper import paper_command
from hostd.ctl.bench_spec import spec_command
from hostd.ctl.formatting import print_fields, print_json, print_table, size
from hostd.ctl.session import Session, format_option, pass_session

_FORMATS: dict[str, Callable[[float], str]] = {
    "s": lambda value: f"{value:.3f} s",
    "us": lambda value: f"{value:.2f} us",
    "B": size,
    "core": lambda value: f"{value:.1%} core",
    "x": lambda value: f"{value:.2f} x",
}
_BOUNDS = {False: "<=", True: ">="}
_COLOURS = {True: "green", False: "red", None: ""}


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What --json prints."""

    machine: facts.Facts
    peer: str | None
    runs: int
    guests: int
    results: list[Result]


class _MeasureName(click.ParamType):
    """The name of a measure, or a pattern."""

    name = "name"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            table.matching([value])
        except KeyError:
            self.fail(f"{value!r} is no benchmark; there are {', '.join(table.MEASURES)}", param, ctx)
        return value

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(name) for name in table.MEASURES if name.startswith(incomplete)]


@click.group("bench", invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option("--peer", type=click.Choice(["qemu"]), help="Measure that too, side by side.")
@click.option("--guests", type=click.IntRange(1, 1000), default=50, show_default=True, metavar="N",
              help="How many guests make a fleet.")
@click.option("--runs", type=click.IntRange(1, 1000), default=5, show_default=True, metavar="N",
              help="How often to measure; medians are shown.")
@click.option("--only", type=_MeasureName(), multiple=True, metavar="NAME",
              help="Measure only this; may be a pattern, may be given again.")
@format_option
@pass_session
@click.pass_context
def bench_command(
    context: click.Context, session: Session, as_json: bool, peer: str | None, guests: int, runs: int,
    only: tuple[str, ...],
) -> None:
    """Measure what this host costs: boots, exits, world switches, and a fleet of idle Linux guests.

    Needs no daemon.  Quiet machines give quiet figures; the whole takes some minutes.  The commands below
    measure other things instead.
    """
    if context.invoked_subcommand is not None:
        return
    machine = facts.gather(with_qemu=peer is not None)
    settings = Settings(runs=runs, guests=guests, qemu=peer is not None, say=_say)
    results = list(table.run(settings, table.matching(only or ["*"])))
    report = Report(machine=machine, peer=peer, runs=runs, guests=guests, results=results)
    if as_json or session.json:
        print_json(report)
    else:
        show(report)


bench_command.add_command(memory_bench_command)
bench_command.add_command(migrate_bench_command)
bench_command.add_command(paper_command)
bench_command.add_command(spec_command)


def show(report: Report) -> None:
    """The report for people."""
    machine = report.machine
    print_fields([
        ("machine", f"{machine.cpu}, {machine.cores} of {machine.cores_online} cores, "
                    f"{size(machine.memory_bytes)}, load {machine.load:.2f}, "
                    f"{machine.python_loop_ns:.1f} ns for an empty loop in Python"),
        ("software", f"hostd {machine.hostd}, Unicorn {machine.unicorn}, Python {machine.python}, "
                     f"{machine.kernel}"),
        *([("peer", machine.qemu)] if machine.qemu else []),
        ("figures", f"medians of {report.runs} runs, fleets of {report.guests} guests"),
    ])  # fmt: skip
    click.echo()
    headings = ["NAME", ">VALUE", ">REACH", *([">PEER", ">RATIO"] if report.peer else []), "WHAT"]
    print_table(headings, [row(result, report.peer is not None) for result in report.results])


def row(result: Result, with_peer: bool) -> list[Text | str]:
    """One line of the table."""
    show = _FORMATS[result.unit]
    reach = ""
    if result.reach is not None:
        figure = f"{result.reach:g} x peer" if result.reach_of == "ratio" else show(result.reach)
        reach = f"{_BOUNDS[result.at_least]} {figure}"
    peer = [
        show(result.peer) if result.peer is not None else "",
        f"{result.ratio:.2f}" if result.ratio is not None else "",
    ]
    value = Text(show(result.value), style=_COLOURS[result.reached])
    return [result.name, value, reach, *(peer if with_peer else []), result.about]


def _say(text: str) -> None:
    """Progress, beside the results."""
    click.echo(text, err=True)
