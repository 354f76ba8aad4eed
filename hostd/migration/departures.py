# SPDX-License-Identifier: GPL-2.0-or-later
"""Where guests went that were here: for those who still look for them here, as consoles do."""

from __future__ import annotations

from typing import NamedTuple

#: so many are remembered, the last ones, while the daemon runs
_MOST = 4096


class Departed(NamedTuple):
    """A guest that went to another host, by this token."""

    peer: str
    token: str


class Departures:
    """By name."""

    def __init__(self) -> None:
        self._gone: dict[str, Departed] = {}

    def add(self, name: str, peer: str, token: str) -> None:
        """The guest has gone."""
        self._gone.pop(name, None)
        self._gone[name] = Departed(peer, token)
        while len(self._gone) > _MOST:
            del self._gone[next(iter(self._gone))]

    def get(self, name: str) -> Departed | None:
        """Where it went."""
        return self._gone.get(name)

    def forget(self, name: str) -> None:
        """There is a guest of that name here."""
        self._gone.pop(name, None)
