# SPDX-License-Identifier: GPL-2.0-or-later
"""The target's end of a migration connection: it is dialled, and takes guests or refuses them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import hostd
from hostd.migration.capabilities import CAPABILITIES
from hostd.migration.messages import Aborted, Bye, Refuse, Said, Welcome, reason_of
from hostd.migration.order import State
from hostd.migration.session import Session


class Incoming(Session):
    """A session that the target has."""

    _end = "target"
    _other = "source"

    def welcome(self, capabilities: tuple[str, ...] = CAPABILITIES) -> bytes:
        """The answer to Hello."""
        return self.send(Welcome(f"hostd {hostd.__version__}", list(capabilities)))

    def give_up(self, reason: str) -> bytes:
        """The target's last word, for the reason given: b"" where it has none."""
        farewell = _FAREWELLS.get(self.state)
        return self.send(farewell(self.facts.token or "", reason_of(reason))) if farewell else b""


def _refuse(_token: str, reason: str) -> Refuse:
    return Refuse(reason)


def _bye(_token: str, reason: str) -> Bye:
    return Bye(reason)


#: "committing" is here since a target that has not written its record may say no to Commit
_FAREWELLS: Mapping[State, Callable[[str, str], Said]] = {
    "welcome": _refuse, "offered": _refuse, "joining": _refuse, "resuming": _refuse,
    "copying": Aborted, "round over": Aborted, "round done": Aborted, "final": Aborted, "ready": Aborted,
    "committing": Aborted,
    "attach": _bye, "attached": _bye}
