# SPDX-License-Identifier: GPL-2.0-or-later
"""A migration in one line: while it is under way, redrawn in place on a terminal, and when it is over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
from rich.live import Live
from rich.text import Text

from hostd.ctl.formatting import console, duration, size
from hostd.migration.views import MigrationView
from hostd.model import OperationView

#: shown an operation as it stands, every now and then
Look = Callable[[OperationView], None]


def migration_of(operation: OperationView) -> MigrationView | None:
    """What the operation tells of its migration; None for other work, and before there is anything."""
    if operation.kind != "migrate" or operation.detail is None:
        return None
    return msgspec.convert(operation.detail, MigrationView)


def milliseconds(seconds: float) -> str:
    """Short times as people read them: 38ms, 1250ms."""
    return f"{seconds * 1000:.0f}ms"


def under_way(view: MigrationView) -> str:
    """Phase and figures of a migration; those that are not known yet are left out."""
    parts: list[str] = [view.phase]
    if view.round:
        parts.append(f"round {view.round}")
    if view.remaining_pages:
        parts.append(f"{view.remaining_pages} pages left")
    if view.dirty_rate:
        parts.append(f"{view.dirty_rate:.0f} dirtied/s")
    if view.throughput:
        parts.append(f"{size(view.throughput)}/s")
    if view.expected_downtime is not None:
        parts.append(f"downtime {milliseconds(view.expected_downtime)} expected")
    if view.throttle is not None:
        parts.append(f"held to {view.throttle}% of a CPU")
    return ", ".join(parts)


def over(view: MigrationView) -> str:
    """What a migration that is done came to."""
    downtime = "-" if view.downtime is None else milliseconds(view.downtime)
    total = f"{view.elapsed:.2f}s" if view.elapsed < 60 else duration(view.elapsed)
    return f"{view.vm}: downtime {downtime}, total {total}, {size(sum(view.bytes.values()))}"


@contextmanager
def shown() -> Iterator[Look]:
    """A line that follows operations, gone at the end of the `with`; nothing where there is no terminal."""
    screen = console()
    if not screen.is_terminal:
        yield lambda operation: None
        return
    with Live(console=screen, auto_refresh=False, transient=True) as live:
        def look(operation: OperationView) -> None:
            view = migration_of(operation)
            text = operation.phase if view is None else under_way(view)
            live.update(Text(f"{operation.target}: {text}", no_wrap=True, overflow="ellipsis"), refresh=True)

        yield look
