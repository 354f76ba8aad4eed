# SPDX-License-Identifier: GPL-2.0-or-later
"""How values are shown: tables for people, JSON for programs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hostd.lifecycle import State

_COLOURS = {
    State.RUNNING: "green", State.PAUSED: "yellow", State.STARTING: "cyan", State.MIGRATING: "cyan",
    State.CRASHED: "bold red", State.HALTED: "dim", State.DEFINED: "dim",
}
#: nobody wraps lines for a program that reads them
_PIPE_WIDTH = 250


def console() -> Console:
    """Standard output, as wide as the terminal, or as wide as needed when it is none."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def print_json(value: Any) -> None:
    """One JSON document, indented."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A plain table; a heading that begins with `>` aligns its column to the right."""
    result = Table(box=None, pad_edge=False, header_style="bold", show_header=any(headings))
    for heading in headings:
        right = heading.startswith(">")
        result.add_column(heading.removeprefix(">"), justify="right" if right else "left", no_wrap=True)
    for row in rows:
        result.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return result


def print_table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    screen = console()
    with screen.capture() as captured:
        screen.print(table(headings, rows))
    # rich fills every line up to the width of the table
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def print_fields(fields: Iterable[tuple[str, Any]]) -> None:
    """One thing, a line for each of its properties."""
    print_table(("", ""), [(Text(name, style="bold"), value) for name, value in fields])


def state(value: State) -> Text:
    return Text(str(value), style=_COLOURS.get(value, ""))


def size(count: float) -> str:
    """Bytes as people read them: 12.5M, 1.0G."""
    for unit in ("", "K", "M", "G"):
        if count < 1024 or unit == "G":
            break
        count /= 1024
    return f"{count:.0f}{unit}" if unit in ("", "K") else f"{count:.1f}{unit}"


def duration(seconds: float) -> str:
    """Seconds as people read them: 4.2s, 3m07s, 2h15m, 5d03h."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    whole = int(seconds)
    for unit, length, lower, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= length:
            return f"{whole // length}{unit}{whole % length // part:02d}{lower}"
    return f"{whole}s"


def clock(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp).strftime("%H:%M:%S")


def dash(value: Any) -> Any:
    """A dash for what is not there."""
    return "-" if value is None or value == "" else value
