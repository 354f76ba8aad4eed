# SPDX-License-Identifier: GPL-2.0-or-later
"""What all commands share: the connection to the daemon, the output format, and argument types."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from hostd.ctl.client import Client
from hostd.ctl.errors import NOT_FOUND, CtlError

DEFAULT_SOCKET = Path("/run/hostd/hostd.sock")
FORMATS = ("table", "json")

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Session:
    """One invocation of hostctl."""

    socket: Path
    format: str = "table"

    @cached_property
    def client(self) -> Client:
        return Client(self.socket)

    @property
    def json(self) -> bool:
        return self.format == "json"

    def close(self) -> None:
        if "client" in self.__dict__:
            self.client.close()

    def expand(self, patterns: tuple[str, ...]) -> list[str]:
        """The names that `patterns` stand for, each once; a plain name stands for itself."""
        names: dict[str, None] = {}
        for pattern in patterns:
            if not re.search(r"[*?\[]", pattern):
                names[pattern] = None
                continue
            found = [vm.name for vm in self.client.vms() if fnmatchcase(vm.name, pattern)]
            if not found:
                raise CtlError(f"no VM matches {pattern!r}", NOT_FOUND)
            names.update(dict.fromkeys(found))
        return list(names)


pass_session = click.make_pass_decorator(Session)


def format_option(command: F) -> F:
    """`--format` after the command, where people type it, as well as before."""

    def remember(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
        if value is not None:
            ctx.ensure_object(Session).format = value

    option = click.option("--format", type=click.Choice(FORMATS), expose_value=False, callback=remember,
                          help="How to print it.")
    return option(command)


class _VmName(click.ParamType):
    """The name of a VM, or a pattern; completed from the daemon's list."""

    name = "name"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        root = ctx.find_root()
        socket = root.params.get("socket") or DEFAULT_SOCKET
        try:
            with Client(Path(socket)) as client:
                return [CompletionItem(vm.name) for vm in client.vms() if vm.name.startswith(incomplete)]
        except CtlError:
            return []


class _Size(click.ParamType):
    """A number of bytes: 128M, 1G, 1.5GiB, 134217728.  Units are powers of 1024."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([kmgt]?)(?:i?b)?", str(value).strip().lower())
        if match is None:
            self.fail(f"{value!r} is no size: write it like 128M or 1G", param, ctx)
        return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))


VM_NAME = _VmName()
SIZE = _Size()

one_name = click.argument("name", type=VM_NAME)
many_names = click.argument("names", metavar="NAME...", type=VM_NAME, nargs=-1, required=True)
