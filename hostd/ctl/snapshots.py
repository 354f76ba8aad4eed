# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands that save VMs in files, and make VMs of them."""

from __future__ import annotations

from pathlib import Path

import click

from hostd.ctl.client import vm_path
from hostd.ctl.formatting import print_json
from hostd.ctl.session import Session, format_option, one_name, pass_session
from hostd.model import RestoreRequest, SnapshotRequest

_FILE = click.Path(dir_okay=False, path_type=Path)


def _absolute(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """The daemon reads or writes the file, and works in a directory of its own."""
    return None if path is None else path.absolute()


@click.command("snapshot")
@one_name
@click.option("--to", type=_FILE, callback=_absolute, metavar="FILE",
              help="Where to, if the daemon may write there; as a service it may in its state directory only "
                   "(default: snapshots/ in that).")
@click.option("--base", type=_FILE, callback=_absolute, metavar="FILE",
              help="An earlier snapshot, to lie beside FILE: what is in it is not written again.")
@format_option
@pass_session
def snapshot_command(session: Session, name: str, to: Path | None, base: Path | None) -> None:
    """Save the VM NAME in a file while it goes on; print the file's name.

    The daemon writes the file, as its own user.  A snapshot with a base is of no use without it.
    """
    request = SnapshotRequest(to=str(to) if to else None, base=str(base) if base else None)
    result = session.client.finish(session.client.begin("POST", vm_path(name, "snapshot"), request))
    if session.json:
        print_json(result)
    else:
        click.echo(result["file"])


@click.command("restore")
@click.argument("file", type=_FILE, callback=_absolute)
@click.option("--name", metavar="NAME", help="What to call the VM (default: as it was called).")
@format_option
@pass_session
def restore_command(session: Session, file: Path, name: str | None) -> None:
    """Make a VM of a snapshot, which goes on where it stood; print its name.

    Its memory is read as it is needed, so FILE, and its bases, must stay as they are, or be removed: it
    crashes when it needs a page of a file that was changed.
    """
    request = RestoreRequest(file=str(file), name=name)
    result = session.client.finish(session.client.begin("POST", "/restore", request))
    if session.json:
        print_json(result)
    else:
        click.echo(result["name"])
