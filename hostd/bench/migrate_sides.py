# SPDX-License-Identifier: GPL-2.0-or-later
"""What the cases of the migration benchmark know of those that migrate guests: this host, and QEMU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from hostd.bench.migrate_watch import Watch
from hostd.ctl.errors import CtlError


@dataclass(frozen=True)
class Limits:
    """What a migration is held to; None: what there is without being told."""

    downtime_ms: float | None = None
    #: bytes a second
    bandwidth: int | None = None
    #: seconds after which it is given up, and the guest stays where it is
    timeout: float = 30.0


class Moved(NamedTuple):
    """What those who migrated a guest report: seconds, and bytes on the wire."""

    downtime: float
    total: float
    bytes: int


class NotMoved(CtlError):
    """The guest stayed where it was; the sentence says why."""


class Side(Protocol):
    """A guest that is up, at work, and can be sent to the other of two places and back."""

    watch: Watch

    def hop(self, limits: Limits) -> Moved:
        """Send it to where it is not.  Raises NotMoved if it stays."""
