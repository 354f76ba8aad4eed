# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands about hostctl itself: versions, and completion for shells."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from hostd import __version__
from hostd.ctl.errors import CtlError
from hostd.ctl.formatting import print_json
from hostd.ctl.session import Session, format_option, pass_session


@click.command("version")
@format_option
@pass_session
def version_command(session: Session) -> None:
    """Show the versions of hostctl and of the daemon, if it runs."""
    try:
        daemon = session.client.host().version
    except CtlError:
        daemon = None
    if session.json:
        print_json({"hostctl": __version__, "hostd": daemon})
        return
    click.echo(f"hostctl {__version__}")
    click.echo(f"hostd {daemon or f'not running at {session.socket}'}")


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell: eval "$(hostctl completion bash)"."""
    script = get_completion_class(shell)
    assert script is not None
    root = ctx.find_root()
    click.echo(script(root.command, {}, "hostctl", "_HOSTCTL_COMPLETE").source())
