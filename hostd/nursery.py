# SPDX-License-Identifier: GPL-2.0-or-later
"""A nursery for tasks that do one thing together: the error a user is told of comes out of it as itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import trio

from hostd.errors import HostError


@asynccontextmanager
async def open_team() -> AsyncIterator[trio.Nursery]:
    """As trio.open_nursery.  Where tasks failed with HostErrors only, the first of these is raised; whoever
    was cancelled for its sake is not worth telling of."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        errors = [error for error in _leaves(group) if not isinstance(error, trio.Cancelled)]
        if errors and all(isinstance(error, HostError) for error in errors):
            raise errors[0] from None
        raise


def _leaves(group: BaseExceptionGroup) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
