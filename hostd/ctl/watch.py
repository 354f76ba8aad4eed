# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands that look on: exit statistics, the live table, events, operations, the host."""

from __future__ import annotations

import time
from contextlib import suppress
from itertools import islice

import click
import msgspec

from hostd.ctl.formatting import clock, duration, print_fields, print_json, print_table, size
from hostd.ctl.live import Activity, Screen
from hostd.ctl.progress import migration_of, over, under_way
from hostd.ctl.session import Session, format_option, one_name, pass_session
from hostd.model import OperationView, WorkerView


@click.command("exits")
@one_name
@format_option
@pass_session
def exits_command(session: Session, name: str) -> None:
    """Show why and how often a VM left guest mode, and what handling it cost."""
    rows = sorted(session.client.exits(name), key=lambda row: -row.seconds)
    if session.json:
        print_json(rows)
        return
    total = sum(row.seconds for row in rows) or 1.0
    print_table(
        ("EXIT", ">CODE", ">COUNT", ">SECONDS", ">SHARE", ">EACH"),
        [
            (row.name, f"{row.code:#x}", row.count, f"{row.seconds:.3f}", f"{row.seconds / total:.1%}",
             f"{row.seconds / max(row.count, 1) * 1e6:.1f}us")
            for row in rows if row.count
        ],
    )  # fmt: skip


@click.command("tc")
@one_name
@click.option("--address", metavar="HEX", help="Only units with this linear address of the guest in them.")
@format_option
@pass_session
def tc_command(session: Session, name: str, address: str | None) -> None:
    """Show code of a VM beside what binary translation (--vmm bt) made of it."""
    listing = session.client.translations(name, address)
    if session.json:
        print_json(listing)
        return
    click.echo(listing.text or "nothing is translated yet\n", nl=False, err=not listing.text)
    if not listing.complete:
        click.echo("there is more: ask for a part of it with --address", err=True)


@click.command("top")
@click.option("--interval", type=click.FloatRange(0.1), default=1.0, show_default=True, metavar="S",
              help="Seconds between two looks.")
@click.option("--count", type=click.IntRange(1), metavar="N", help="Look so often, then leave.")
@click.option("--rows", type=click.IntRange(1), metavar="N", help="Show the N busiest only.")
@pass_session
def top_command(session: Session, interval: float, count: int | None, rows: int | None) -> None:
    """Watch all VMs, the busiest first; Ctrl-C leaves."""
    activity = Activity(session.client)
    activity.look()
    looks = 0
    with suppress(KeyboardInterrupt), Screen() as screen:
        while count is None or looks < count:
            time.sleep(interval)
            activity.look()
            looks += 1
            screen.show(activity.table(rows or screen.rows))


@click.command("events")
@click.option("--count", type=click.IntRange(1), metavar="N", help="Leave after so many.")
@format_option
@pass_session
def events_command(session: Session, count: int | None) -> None:
    """Print what happens on the host, as it happens; Ctrl-C leaves."""
    with suppress(KeyboardInterrupt):
        for event in islice(session.client.events(), count):
            if session.json:
                click.echo(msgspec.json.encode(event))
            else:
                data = " ".join(f"{key}={value}" for key, value in event.data.items())
                click.echo(f"{clock(event.time)} {event.type:<14} {event.vm or '-':<20} {data}".rstrip())


@click.command("operations")
@click.option("--cancel", metavar="ID", help="Cancel this one.")
@format_option
@pass_session
def operations_command(session: Session, cancel: str | None) -> None:
    """Show long work: running, and lately finished."""
    if cancel is not None:
        session.client.call("DELETE", f"/operations/{cancel}")
        return
    operations = session.client.operations()
    if session.json:
        print_json(operations)
        return
    print_table(
        ("ID", "KIND", "TARGET", "STATUS", ">DONE", "STARTED", "PHASE"),
        [
            (row.id, row.kind, row.target, row.status, f"{row.progress:.0%}", clock(row.created),
             _standing(row))
            for row in operations
        ],
    )  # fmt: skip


def _standing(operation: OperationView) -> str:
    """Where an operation is; of a migration its figures, too."""
    migration = migration_of(operation)
    if operation.error or migration is None:
        return operation.error or operation.phase
    return over(migration) if operation.status == "done" else under_way(migration)


def _describe(worker: WorkerView) -> str:
    ready = "ready" if worker.ready else "starting"
    return f"pid {worker.pid}, {ready}, {worker.vms} VMs, {worker.silicon}, {worker.restarts} restarts"


@click.command("host")
@format_option
@pass_session
def host_command(session: Session) -> None:
    """Show the host: its memory, its workers, its addresses."""
    host = session.client.host()
    if session.json:
        print_json(host)
        return
    frames = host.frames
    print_fields(
        [
            ("version", host.version),
            ("pid", host.pid),
            ("uptime", duration(host.uptime_s)),
            ("state directory", host.state_dir),
            ("metrics", host.metrics or "none"),
            ("machine memory", size(host.memory)),
            ("frames", " ".join(f"{key}={value}" for key, value in msgspec.to_builtins(frames).items())),
            ("VMs", " ".join(f"{key}={value}" for key, value in host.vms.items()) or "none"),
            *((f"worker {worker.index}", _describe(worker)) for worker in host.workers),
        ]
    )  # fmt: skip
