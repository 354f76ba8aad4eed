# SPDX-License-Identifier: GPL-2.0-or-later
"""This host, as far as migrations need it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from hostd.config import Config
from hostd.events import Events
from hostd.guests import Guests
from hostd.images import Images
from hostd.inventory import Inventory
from hostd.memory import MachineMemory
from hostd.migration.departures import Departures
from hostd.migration.farewells import Farewells
from hostd.migration.handover import Handovers

if TYPE_CHECKING:
    from hostd.admission import Admission


@dataclass(frozen=True)
class Here:
    """What both ends of a migration work with; `config` gives the configuration as it is at the moment."""

    guests: Guests
    memory: MachineMemory
    inventory: Inventory
    images: Images
    admission: Admission
    state_dir: Path
    departures: Departures
    events: Events
    config: Callable[[], Config]
    #: the host's measured TSC frequency
    tsc_khz: Callable[[], int]

    @cached_property
    def farewells(self) -> Farewells:
        """What is still to be said of those that are over."""
        return Farewells()

    @cached_property
    def handovers(self) -> Handovers:
        """The records of those that are not over."""
        return Handovers(self.state_dir)
