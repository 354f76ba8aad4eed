# SPDX-License-Identifier: GPL-2.0-or-later
"""The source's end of a migration connection: it dials, says what for, and gives guests away."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import hostd
from hostd.migration.capabilities import CAPABILITIES, SPOKEN
from hostd.migration.messages import Bye, Cancel, Hello, Purpose, Said, reason_of
from hostd.migration.order import State
from hostd.migration.session import Session
from hostd.migration.wire import Spoken


class Outgoing(Session):
    """A session that the source has."""

    _end = "source"
    _other = "target"

    def __init__(self, purpose: Purpose, spoken: Spoken = SPOKEN) -> None:
        super().__init__(spoken)
        self._purpose = purpose

    def hello(self, capabilities: tuple[str, ...] = CAPABILITIES) -> bytes:
        """What to send when `version` is known."""
        return self.send(Hello(self._purpose, f"hostd {hostd.__version__}", list(capabilities)))

    def give_up(self, reason: str) -> bytes:
        """The source's last word, for the reason given: b"" where it has none, as between Commit and its
        answer."""
        farewell = _FAREWELLS.get(self.state)
        return self.send(farewell(reason_of(reason))) if farewell else b""


_FAREWELLS: Mapping[State, Callable[[str], Said]] = {
    "offer": Cancel, "offered": Cancel, "copying": Cancel, "round over": Cancel, "round done": Cancel,
    "final": Cancel, "ready": Cancel, "attach": Bye, "attached": Bye}
