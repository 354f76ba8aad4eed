# SPDX-License-Identifier: GPL-2.0-or-later
"""`hostctl bench memory`: what sharing saves, what a page costs, and what overcommitting comes to."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import msgspec

from hostd.bench import (
    facts,
    memory_copies,
    memory_costs,
    memory_loss,
    memory_overcommit,
    memory_sharing,
    memory_suspend,
)
from hostd.bench.boot import debian
from hostd.bench.measures import Result, Settings, result
from hostd.bench.memory_overcommit import Load, Overcommit
from hostd.ctl.bench_paper import json_option, runs_option, say
from hostd.ctl.demo import Template
from hostd.ctl.errors import CtlError
from hostd.ctl.formatting import print_fields, print_json, print_table, size
from hostd.ctl.pull import RECIPES, PullError, Recipe, build_debian
from hostd.ctl.session import SIZE, Session, format_option, pass_session

PARTS = ("sharing", "loss", "costs", "copies", "suspend", "overcommit")
_PROMPT = "/ # "


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What --json prints.  What was not measured is None."""

    machine: facts.Facts
    sharing: list[memory_sharing.Row] | None = None
    loss: memory_loss.Loss | None = None
    costs: list[Result] | None = None
    copies: list[memory_copies.Row] | None = None
    suspend: list[memory_suspend.Suspended] | None = None
    overcommit: Overcommit | None = None


@click.command("memory")
@json_option
@click.option("--only", type=click.Choice(PARTS), multiple=True, metavar="PART",
              help=f"Measure only this ({', '.join(PARTS)}); may be given again.")
@click.option("--peer", type=click.Choice(["qemu"]), help="Measure QEMU with KSM, too (as root).")
@click.option("--guests", type=click.IntRange(1, 1000), default=50, show_default=True, metavar="N",
              help="How many guests make a fleet.")
@click.option("--pool", type=SIZE, metavar="SIZE",
              help="Machine memory of the fleets (default: 8G to share in, 1G to overcommit).")
@click.option("--seconds", type=click.FloatRange(1), default=300.0, show_default=True, metavar="S",
              help="How long to overcommit, and the longest to wait until a fleet is at rest.")
@click.option("--booted", is_flag=True, help="Overcommit with guests that were all booted, not cloned.")
@runs_option
@format_option
@pass_session
def memory_bench_command(session: Session, as_json: bool, only: tuple[str, ...], peer: str | None,
                         guests: int, pool: int | None, seconds: float, booted: bool, runs: int) -> None:
    """Measure machine memory: sharing, costs of a page, copies of guests, guests on disk, and far too little.

    Needs no daemon.  Fails if a guest comes to harm while memory is overcommitted, or the host restarted.
    """
    parts = only or PARTS
    machine = facts.gather(with_qemu=peer is not None)
    costs = _costs(runs) if "costs" in parts else None
    sharing = loss = copies = suspend = overcommit = None
    with tempfile.TemporaryDirectory(prefix="hostctl-bench-") as directory:
        if set(parts) - {"costs"}:
            template = debian(Path(directory), _PROMPT, say)
        if "overcommit" in parts:
            load = Load(guests=guests, pool=pool or Load.pool, seconds=seconds, booted=booted)
            overcommit = memory_overcommit.run(template, load, say)
        if "copies" in parts:
            # the 64-bit kernel of Debian does not start in 64 MiB
            small, cases = _i386(), memory_copies.CASES
            copies = memory_copies.measure(small or template, cases if small else cases[1:], runs, guests,
                                           say)
        if "suspend" in parts:
            translated = _i386(RECIPES["debian-i386"])
            suspend = [memory_suspend.measure(one, guests, say)
                       for one in (template, translated and replace(translated, vmm="bt")) if one]
        if "loss" in parts:
            loss = memory_loss.measure(template, runs, say)
        if "sharing" in parts:
            sharing = memory_sharing.measure(template, _i386(), guests, pool or 8 << 30, seconds, say)
            if peer is not None:
                sharing.append(memory_sharing.peer(template, guests, seconds, say))
    report = Report(machine=machine, sharing=sharing, loss=loss, costs=costs, copies=copies,
                    suspend=suspend, overcommit=overcommit)
    if as_json or session.json:
        print_json(report)
    else:
        show(report)
    _judge(suspend or [], overcommit)


def _i386(recipe: Recipe = RECIPES["debian-i386-pae"]) -> Template | None:
    """A 32-bit image; None, and said, where it cannot be had."""
    try:
        image = build_debian(progress=say, recipe=recipe)
    except PullError as error:
        say(f"no 32-bit guests: {error}")
        return None
    return Template(image.kernel, image.initrd, image.append, 128 << 20, _PROMPT)


def _costs(runs: int) -> list[Result]:
    settings = Settings(runs=runs, say=say)
    say("timing what is done to pages")
    figures = []
    for benchmark in memory_costs.TOUCHES, memory_costs.LOOKS:
        samples = benchmark.run(settings, frozenset(measure.name for measure in benchmark.measures))
        figures += [result(measure, samples[measure.name]) for measure in benchmark.measures]
    return figures


def show(report: Report) -> None:
    """The report for people."""
    machine = report.machine
    print_fields([
        ("machine", f"{machine.cpu}, {machine.cores} of {machine.cores_online} cores, "
                    f"{size(machine.memory_bytes)}, load {machine.load:.2f}"),
        *([("peer", machine.qemu)] if machine.qemu else []),
    ])  # fmt: skip
    if report.costs is not None:
        click.echo()
        print_table(["COST", ">VALUE", "WHAT"],
                    [[one.name, f"{one.value:.2f} us", one.about] for one in report.costs])
    if report.copies is not None:
        click.echo()
        print_table(
            ["MEMORY", ">RANDOM", ">RESIDENT", ">CLONE PAUSE", ">CLONES", ">ALL RUN AFTER", ">SAVE PAUSE",
             ">SAVED AFTER", ">FILE", ">RESTORED AFTER", ">ANSWERS AFTER"],
            [[size(row.memory), size(row.random), size(row.resident), _ms(row.clone_pause_s), row.clones,
              _ms(row.clone_s), _ms(row.snapshot_pause_s), _ms(row.snapshot_s), size(row.file_bytes),
              _ms(row.restore_s), _ms(row.answer_s)] for row in report.copies])
    if report.suspend is not None:
        click.echo()
        print_table(
            ["MONITOR", ">GUESTS", ">MEMORY", ">SUSPENDED AFTER", ">RESUMED AFTER", ">ALL COUNT AFTER",
             ">FILES", "COUNTS"],
            [[row.vmm, row.guests, size(row.memory), f"{row.suspend_s:.2f} s", f"{row.resume_s:.2f} s",
              f"{row.counting_s:.2f} s", size(row.file_bytes), "wrong" if row.failures else "right"]
             for row in report.suspend])
    if report.sharing is not None:
        click.echo()
        print_table(
            ["FLEET", ">GUESTS", "BALLOON", ">PRIVATE AT FIRST", ">PRIVATE", ">SHARED", ">SAVED",
             ">STEADY AFTER", ">CPU"],
            [[row.fleet, row.guests, "half" if row.balloon else "-", size(row.private_first),
              size(row.private), size(row.shared), size(row.saved),
              f"{'more than ' if row.restless else ''}{row.steady_s:.0f} s", f"{row.cpu:.1%}"]
             for row in report.sharing])
    if report.loss is not None:
        loss = report.loss
        click.echo()
        print_fields([("sharing takes", f"{loss.lost_ratio:.1%} of the CPU time of {loss.guests} busy guests "
                       f"with nothing in common: they had {loss.with_sharing:.3f} CPUs, {loss.without:.3f} "
                       f"without it; {loss.scanned_per_second:.0f} pages scanned a second")])
    if report.overcommit is not None:
        click.echo()
        _show_overcommit(report.overcommit)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _show_overcommit(one: Overcommit) -> None:
    states = ", ".join(f"{name} {count / one.looks:.0%}" for name, count in one.states.items())
    events = one.events
    print_fields([
        ("overcommit", f"{one.guests} guests in {size(one.pool)}: {one.assigned_ratio:g} times the pool "
                       f"assigned, {one.files_ratio:g} times in files; {one.seconds:.0f} s"),
        ("rounds", f"{one.rounds} ({one.rounds_least} to {one.rounds_most} a guest), the longest took "
                   f"{one.longest_round_s:.0f} s; {one.full} guests have all files"),
        ("harm", f"{one.bad} wrong checksums, {one.killed} processes killed, {one.crashed} guests ended, "
                 f"{one.complaints} complaints of kernels"),
        ("memory was", f"{states}; workers waited at {one.stalled} of {one.looks} looks"),
        ("pages", f"{events.swapped_out} swapped out, {events.swapped_in} in, {events.inflated} ballooned, "
                  f"{events.merged} merged, {events.zeroed} zeroed, {events.broken} broken"),
        ("most at once", f"{size(one.swapped_most)} swapped to {size(one.compressed_most)}, "
                         f"{size(one.ballooned_most)} ballooned, {size(one.saved_most)} saved by sharing"),
        ("CPUs in use", f"{one.cpus:.2f}"),
        ("verdict", "failed" if one.failures else "all well"),
    ])  # fmt: skip
    for line in one.log if one.failures else ():
        click.echo(f"  {line}")


def _judge(suspended: Sequence[memory_suspend.Suspended], overcommit: Overcommit | None) -> None:
    """Fail with all that went wrong, a sentence each."""
    failures = [failure for one in suspended for failure in one.failures]
    failures += overcommit.failures if overcommit is not None else []
    for failure in failures:
        CtlError(failure).show(sys.stderr)
    if failures:
        raise CtlError(f"guests came to harm: {len(failures)} findings")
