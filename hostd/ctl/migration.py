# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands that move running VMs to other hosts, and look after that."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click
import msgspec

from hostd.ctl.client import vm_path
from hostd.ctl.errors import CtlError
from hostd.ctl.formatting import dash, duration, print_json, print_table, size
from hostd.ctl.progress import milliseconds, over, shown
from hostd.ctl.session import SIZE, VM_NAME, Session, format_option, one_name, pass_session
from hostd.migration.views import EvacuatedView, EvacuateRequest, MigrateRequest, MigrationView
from hostd.model import MONITORS, PAGE, OperationView, VmView


def _how(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of all migrations."""
    options = (
        click.option("--auto", "mode", flag_value="auto",
                     help="Move memory first, and go over to --postcopy if that does not end (default)."),
        click.option("--precopy", "mode", flag_value="precopy", help="Move all memory, then the guest."),
        click.option("--postcopy", "mode", flag_value="postcopy",
                     help="Move the guest, then its memory, what it needs first."),
        click.option("--downtime", "downtime_ms", type=click.FloatRange(1, 60_000), metavar="MS",
                     help="The longest it may stand still (default: the daemon's)."),
        click.option("--bandwidth", type=SIZE, metavar="SIZE", help="At most so much a second, like 100M."),
        click.option("--timeout", type=click.FloatRange(0), metavar="S",
                     help="Give up what was not handed over after so many seconds."),
        click.option("--dry-run", is_flag=True, help="Ask the other host only; nothing moves."),
        click.option("--wait/--no-wait", default=True, show_default=True, help="Wait for the end of it."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command("migrate")
@click.argument("words", metavar="NAME... HOST[:PORT]", type=VM_NAME, nargs=-1, required=True)
@_how
@click.option("--connections", type=click.IntRange(1, 16), metavar="N",
              help="Send over so many connections (default: the daemon's).")
@click.option("--vmm", type=click.Choice(MONITORS),
              help="The monitor that is to run it there (default: as here).")
@format_option
@pass_session
def migrate_command(session: Session, words: tuple[str, ...], wait: bool, **options: Any) -> None:
    """Move running or paused VMs to the hostd on HOST, one after the other.

    Whoever interrupts the waiting cancels the migration: the guest goes on here.
    """
    *patterns, host = words
    if not patterns:
        raise click.UsageError("name the VMs to move, and then the host to move them to")
    request = MigrateRequest(to=host, **_given(options))
    names = session.expand(tuple(patterns))
    failures: list[CtlError] = []
    ended: list[Any] = []
    for name in names:
        try:
            operation = session.client.begin("POST", vm_path(name, "migrate"), request)
            ended.append(_follow(session, operation, request) if wait else operation)
        except CtlError as error:
            failures.append(error)
    if session.json:
        print_json(ended)
    elif not wait:
        for operation in ended:
            click.echo(operation.id)
    _fail(failures)


def _follow(session: Session, operation: OperationView, request: MigrateRequest) -> MigrationView:
    """Wait for the end of a migration, and say what it came to."""
    with shown() as look:
        result = session.client.finish(operation, look)
    view = msgspec.convert(result, MigrationView)
    if not session.json:
        click.echo(f"{view.vm}: {request.to} would take it" if request.dry_run else over(view))
    return view


@click.command("evacuate")
@click.argument("host", metavar="HOST[:PORT]")
@_how
@click.option("--parallel", type=click.IntRange(1, 64), default=4, show_default=True, metavar="N",
              help="Move so many at a time.")
@format_option
@pass_session
def evacuate_command(session: Session, host: str, wait: bool, **options: Any) -> None:
    """Move all VMs that run or are paused to the hostd on HOST.

    The bandwidth is of all of them together.  Those that cannot be moved stay here and go on.
    """
    request = EvacuateRequest(to=host, **_given(options))
    operation = session.client.begin("POST", "/evacuate", request)
    if not wait:
        if session.json:
            print_json(operation)
        else:
            click.echo(operation.id)
        return
    with shown() as look:
        result = session.client.finish(operation, look)
    view = msgspec.convert(result, EvacuatedView)
    if session.json:
        print_json(view)
    else:
        what = f"{host} would take" if request.dry_run else "moved"
        click.echo(f"{what} {len(view.moved)} of {len(view.moved) + len(view.failed)} guests, "
                   f"total {duration(view.seconds)}")
    _fail([CtlError(f"VM {name} stays: {why}") for name, why in view.failed.items()])


@click.command("recover")
@one_name
@pass_session
def recover_command(session: Session, name: str) -> None:
    """Make a VM this host's again whose new host is gone for good.

    It was being handed over, and this host cannot find out whether the other one has it.  If the other one
    does, and comes back, the VM will be there twice.
    """
    session.client.call("POST", vm_path(name, "recover"), VmView)


@click.command("migrations")
@format_option
@pass_session
def migrations_command(session: Session) -> None:
    """Show migrations: under way, and the last that are over."""
    migrations = session.client.migrations()
    if session.json:
        print_json(migrations)
        return
    print_table(
        ("NAME", "WAY", "PEER", "PHASE", ">ROUND", ">LEFT", ">DIRTY/S", ">RATE/S", ">DOWNTIME", ">TOTAL",
         ">BYTES", "REASON"),
        [
            (row.vm, row.direction, row.peer, row.phase, row.round, size(row.remaining_pages * PAGE),
             f"{row.dirty_rate:.0f}", size(row.throughput),
             dash(None if row.downtime is None else milliseconds(row.downtime)), duration(row.elapsed),
             size(sum(row.bytes.values())), row.reason)
            for row in migrations
        ],
    )  # fmt: skip


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """What was not given is the daemon's to choose."""
    return {option: value for option, value in options.items() if value is not None}


def _fail(failures: list[CtlError]) -> None:
    """Tell each failure; the first decides."""
    for error in failures[1:]:
        error.show(sys.stderr)
    if failures:
        raise failures[0]
