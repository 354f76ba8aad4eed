# SPDX-License-Identifier: GPL-2.0-or-later
"""`hostctl`: the command line of the daemon, and of a few things that need none.

Exit status: 0 done, 1 failed, 2 wrong usage, 3 no such thing, 4 timeout.  Every failure is one sentence on
standard error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from click.exceptions import NoArgsIsHelpError

from hostd.ctl.errors import USAGE, CtlError
from hostd.ctl.session import DEFAULT_SOCKET, FORMATS, Session

#: command -> module of hostd.ctl it lives in; imported when used, so that no command pays for the others
COMMANDS = {
    "create": "lifecycle", "list": "lifecycle", "show": "lifecycle", "start": "lifecycle",
    "pause": "lifecycle", "resume": "lifecycle", "stop": "lifecycle", "reset": "lifecycle",
    "destroy": "lifecycle", "clone": "lifecycle", "set": "lifecycle", "switch": "lifecycle",
    "snapshot": "snapshots", "restore": "snapshots",
    "migrate": "migration", "evacuate": "migration", "recover": "migration", "migrations": "migration",
    "console": "terminal", "log": "terminal", "send": "terminal", "wait": "terminal",
    "exits": "watch", "tc": "watch", "top": "watch", "events": "watch", "operations": "watch",
    "host": "watch", "memory": "memory",
    "image": "images",
    "run": "run", "demo": "demo", "bench": "bench", "soak": "soak",
    "version": "about", "completion": "about",
}  # fmt: skip


class _Commands(click.Group):
    """The table above as a click group: commands in its order, each loaded on its first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"hostd.ctl.{COMMANDS[name]}"), f"{name}_command")
        return command

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _usage_in_a_sentence():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _usage_in_a_sentence():
            return super().invoke(ctx)


@contextmanager
def _usage_in_a_sentence() -> Iterator[None]:
    """click's complaints about the command line, in the form of all others, and one line instead of four."""
    try:
        yield
    except NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "hostctl"
        sentence = error.format_message().rstrip(".")
        raise CtlError(f"{sentence} (see {where} --help)", USAGE) from None


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--socket", type=click.Path(path_type=Path), envvar="HOSTD_SOCKET", default=DEFAULT_SOCKET,
              show_default=True, show_envvar=True, help="Where the daemon listens.")
@click.option("--format", type=click.Choice(FORMATS), default="table", show_default=True,
              help="How to print what is asked for.")
@click.pass_context
def main(ctx: click.Context, socket: Path, format: str) -> None:
    """Run and watch the virtual machines of this host.

    NAME arguments of commands that take several may be patterns: hostctl stop 'web-*'.
    """
    ctx.obj = Session(socket, format)
    ctx.call_on_close(ctx.obj.close)
