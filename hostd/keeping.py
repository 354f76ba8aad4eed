# SPDX-License-Identifier: GPL-2.0-or-later
"""Machine memory as a running host keeps it: the policy and page sharing, put together.

Imported once the host runs: with it comes numpy, which the daemon's first answer does not wait for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable

import numpy as np
import trio

from hostd.config import Config
from hostd.events import Events
from hostd.guests import Guests
from hostd.memory import MachineMemory
from hostd.memory_keeper import MemoryKeeper
from hostd.memory_state import HostMemoryState
from hostd.reclaiming import Reclaimer
from hostd.sharing import PageHash, Scanner, Sharing
from hostd.vm import Vm

#: how old a guest is before its pages are shared: what it writes while it starts it writes over again
SETTLED_S = 5.0


async def keep(config: Callable[[], Config], guests: Guests, memory: MachineMemory, events: Events,
               state: HostMemoryState) -> None:
    """Keep memory until cancelled."""
    reclaimer = Reclaimer(guests, memory)

    def worth_a_look() -> list[Vm]:
        return [vm for vm in guests.vms.values() if sharing.urgent or vm.age() >= SETTLED_S]

    def urgent(urgent: bool) -> None:
        sharing.urgent = urgent

    sharing: Sharing[Vm] = Sharing(_scanner(memory), reclaimer, memory.books, worth_a_look, _image,
                                   lambda: _rate(config()))

    state.sharing = sharing.view
    keeper = MemoryKeeper(guests, memory, reclaimer, events, state, urgent)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.run)
        nursery.start_soon(sharing.run)


def _scanner(memory: MachineMemory) -> Scanner:
    """Hashes with a key of this daemon alone: guests are not to know which pages collide."""
    key = np.random.default_rng(int.from_bytes(os.urandom(16)))
    return Scanner(PageHash(memory.pool, key), memory.pool.frames, key)


def _image(vm: Vm) -> Hashable:
    """What a VM was booted from: VMs with the same have much in common, and in the same places."""
    definition = vm.definition
    return definition.image, definition.kernel, definition.initrd, definition.memory


def _rate(config: Config) -> int:
    return config.sharing.pages_per_second if config.sharing.enabled else 0
