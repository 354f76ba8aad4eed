# SPDX-License-Identifier: GPL-2.0-or-later
"""`hostctl soak`: a private daemon with many Linux guests at mixed work, watched for whatever goes wrong."""

from __future__ import annotations

import sys

import click

from hostd.bench.soak import Verdict, soak
from hostd.ctl.errors import CtlError
from hostd.ctl.formatting import print_fields, print_json, size
from hostd.ctl.private import private_daemon
from hostd.ctl.pull import PullError, build_debian
from hostd.ctl.session import Session, format_option, pass_session


@click.command("soak")
@click.option("--guests", type=click.IntRange(1, 1000), default=50, show_default=True, metavar="N",
              help="How many guests to run.")
@click.option("--seconds", type=click.FloatRange(10), default=600.0, show_default=True, metavar="S",
              help="For how long.")
@format_option
@pass_session
def soak_command(session: Session, guests: int, seconds: float) -> None:
    """Run Linux guests at mixed work (loops, checksums, processes, sleeps) for long, and judge.

    Needs no daemon: it runs its own with temporary state.  Fails if a guest crashes, complains, computes
    something wrong or gets stuck, if a worker dies, if memory is lost, or if the daemon grows by 5%.
    """
    try:
        image = build_debian(progress=_say)
    except PullError as error:
        raise CtlError(str(error)) from None
    with private_daemon() as daemon:
        try:
            verdict = soak(daemon, image, guests, seconds, _say)
        except KeyboardInterrupt:
            raise CtlError("interrupted, cleaning up") from None
    if session.json:
        print_json(verdict)
    else:
        _show(verdict)
    for failure in verdict.failures:
        CtlError(failure).show(sys.stderr)
    if verdict.failures:
        raise CtlError(f"the soak failed: {len(verdict.failures)} findings")


def _show(verdict: Verdict) -> None:
    daemon, workers = [f"{size(first)} to {size(last)}" for first, last in
                       (verdict.daemon_bytes, verdict.workers_bytes)]
    print_fields([
        ("guests", verdict.guests),
        ("time", f"{verdict.seconds:.0f}s"),
        ("rounds of work", f"{verdict.rounds} ({verdict.rounds_least} to {verdict.rounds_most} a guest)"),
        ("daemon, without guests' memory", f"{daemon} ({verdict.daemon_growth:+.1%})"),
        ("workers, without guests' memory", workers),
        ("memory per guest, all in (PSS)", size(verdict.bytes_per_guest)),
        ("CPUs in use", f"{verdict.cpus:.2f}"),
        ("verdict", "failed" if verdict.failures else "all well"),
    ])


def _say(text: str) -> None:
    """Progress, beside the results."""
    click.echo(text, err=True)
