# SPDX-License-Identifier: GPL-2.0-or-later
"""`hostctl bench migrate`: how guests fare that change hosts while they run, and QEMU's beside them."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click
import msgspec

from hostd.bench import facts, migrate_program
from hostd.bench.migrate_cases import CASES, Row, Settings, failures, measure
from hostd.bench.migrate_network import Unavailable
from hostd.ctl.bench_paper import json_option, runs_option, say
from hostd.ctl.demo import Template
from hostd.ctl.errors import CtlError
from hostd.ctl.formatting import dash, print_fields, print_json, print_table, size
from hostd.ctl.pull import RECIPES, PullError, build_debian
from hostd.ctl.session import Session, format_option, pass_session
from hostd.model import MONITORS, MonitorName

PARTS = tuple(CASES)
#: what is booted under each monitor
_DEBIAN: dict[MonitorName, str] = {"hw": "debian", "bt": "debian-i386"}
_MEMORY = 128 << 20
#: what the console shows when the guest is up
_PROMPT = "/ # "


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What --json prints."""

    machine: facts.Facts
    vmm: MonitorName
    runs: int
    rows: list[Row]
    #: parts that could not be had here, and why
    missing: dict[str, str]
    #: what of our guests came to harm
    failures: list[str]


@click.command("migrate")
@json_option
@click.option("--only", type=click.Choice(PARTS), multiple=True, metavar="PART",
              help=f"Measure only this ({', '.join(PARTS)}); may be given again.")
@click.option("--peer", type=click.Choice(["qemu"]), help="Measure that too, with the same guests.")
@click.option("--guests", type=click.IntRange(1, 60), default=50, show_default=True, metavar="N",
              help="How many guests are evacuated.")
@click.option("--vmm", type=click.Choice(MONITORS), default=MONITORS[0], show_default=True,
              help="The monitor that runs them.")
@click.option("--timeout", type=click.FloatRange(1), default=Settings.timeout, show_default=True, metavar="S",
              help="Give a migration up after so many seconds.")
@runs_option
@format_option
@pass_session
def migrate_bench_command(session: Session, as_json: bool, only: tuple[str, ...], peer: str | None,
                          guests: int, vmm: MonitorName, timeout: float, runs: int) -> None:
    """Measure live migration between two daemons on this machine.

    The guests write pages that they check, count, and look at their clocks.  Needs no daemon; fails if
    anything of theirs is wrong afterwards.
    """
    machine = facts.gather(with_qemu=peer is not None)
    settings = Settings(runs=runs, guests=guests, timeout=timeout, qemu=peer is not None, say=say)
    rows: list[Row] = []
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="hostctl-bench-") as directory:
        template = debian(Path(directory), vmm)
        for part in only or PARTS:
            try:
                rows.extend(measure(part, template, settings))
            except Unavailable as error:
                missing[part] = str(error)
    report = Report(machine=machine, vmm=vmm, runs=runs, rows=rows, missing=missing, failures=failures(rows))
    if as_json or session.json:
        print_json(report)
    else:
        show(report)
    _judge(report)


def debian(directory: Path, vmm: MonitorName) -> Template:
    """The Debian image for a monitor, with the load in its initramfs."""
    try:
        image = build_debian(progress=say, recipe=RECIPES[_DEBIAN[vmm]])
    except PullError as error:
        raise CtlError(f"this benchmark boots Debian: {error}") from None
    initrd = migrate_program.add_to(image.initrd, directory / "initrd")
    return Template(image.kernel, initrd, image.append, _MEMORY, _PROMPT, vmm)


def show(report: Report) -> None:
    """The report for people."""
    machine = report.machine
    print_fields([
        ("machine", f"{machine.cpu}, {machine.cores} of {machine.cores_online} cores, "
                    f"{size(machine.memory_bytes)}, load {machine.load:.2f}"),
        *([("peer", machine.qemu)] if machine.qemu else []),
        ("guests", f"Debian under {report.vmm}"),
        ("figures", f"medians of {report.runs} runs; STILL: as the guest sees it, USUAL: when left alone"),
        *(("networks", name) for name in dict.fromkeys(row.network for row in report.rows)),
        *((f"no {part}", why) for part, why in report.missing.items()),
    ])  # fmt: skip
    click.echo()
    print_table(
        ["CASE", "BY", ">MOVED", ">DOWNTIME", ">STILL", ">USUAL", ">CLOCK LOST", ">IN ALL", ">TOTAL",
         ">BYTES", ">WRITTEN/S", ">WRONG"],
        [[row.case, row.by, row.moved, _ms(row.downtime), _ms(row.still), _ms(row.usual), _ms(row.lost),
          _ms(row.drift),
          dash(None if row.total is None else f"{row.total:.2f} s"),
          dash(None if row.bytes is None else size(row.bytes)),
          dash(None if row.rate is None else f"{row.rate:.0f}"), len(row.findings) or "-"]
         for row in report.rows])
    for row in report.rows:
        for said in (row.stayed, *row.findings):
            if said:
                click.echo(f"  {row.case}, {row.by}: {said}")


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"


def _judge(report: Report) -> None:
    """Fail with all that went wrong, a sentence each."""
    for failure in report.failures:
        CtlError(failure).show(sys.stderr)
    if report.failures:
        raise CtlError(f"guests came to harm on their way: {len(report.failures)} findings")
