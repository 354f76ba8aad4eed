# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands for a VM's serial console: attach, read, type, wait for something on it."""

from __future__ import annotations

import sys

import click
import trio

from hostd.ctl.attach import Attachment
from hostd.ctl.client import vm_path
from hostd.ctl.session import Session, one_name, pass_session
from hostd.lifecycle import State


@click.command("console")
@one_name
@pass_session
def console_command(session: Session, name: str) -> None:
    """Attach this terminal to the console of a VM, also of one that went to another host; Ctrl-] leaves."""
    farewell = trio.run(Attachment(session.socket, name).run)
    if sys.stdin.isatty():
        click.echo(f"\r\n{farewell}", err=True)


@click.command("log")
@one_name
@click.option("--follow", "-f", is_flag=True, help="Go on with what the guest writes from now on.")
@pass_session
def log_command(session: Session, name: str, follow: bool) -> None:
    """Print what the guest wrote to its console."""
    with session.client.stream(vm_path(name, "log"), {"follow": "true"} if follow else None) as response:
        for chunk in response.iter_bytes():
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()


@click.command("send")
@one_name
@click.argument("text")
@click.option("--no-newline", "-n", is_flag=True, help="Do not press Enter after it.")
@pass_session
def send_command(session: Session, name: str, text: str, no_newline: bool) -> None:
    """Type TEXT on the console of a VM."""
    data = text.encode() + (b"" if no_newline else b"\n")
    session.client.call("POST", vm_path(name, "input"), content=data)


@click.command("wait")
@one_name
@click.option("--state", type=click.Choice([state.value for state in State]), help="Until it is in it.")
@click.option("--console", metavar="REGEX", help="Until this matches what it wrote since its start.")
@click.option("--timeout", type=click.FloatRange(0, 86400), metavar="S", help="Fail after so many seconds.")
@pass_session
def wait_command(
    session: Session, name: str, state: str | None, console: str | None, timeout: float | None
) -> None:
    """Wait until a VM is in a state (by default: running), or has written something to its console."""
    if console is None:
        state = state or State.RUNNING.value
    query = {"state": state, "console": console, "timeout": timeout}
    session.client.call("GET", vm_path(name, "wait"), query=query, patience=None)
