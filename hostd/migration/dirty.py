# SPDX-License-Identifier: GPL-2.0-or-later
"""The log of the pages that a guest writes, and devices for it, whoever has the guest at the moment.

A running guest's worker keeps it (hostd/leases.py); a paused guest's memory is the daemon's own.  The log
goes on when the guest goes from one to the other.
"""

from __future__ import annotations

import numpy as np

from hostd.errors import Conflict, HostError
from hostd.guests import Guests
from hostd.protocol import Logging
from hostd.vm import Vm

_NONE = np.zeros(0, dtype=np.int64)


class DirtyLog:
    """The log of one life of a VM that runs or is paused.  Whoever uses it holds the VM's lock from `start`
    until after `stop`.

    A page that was written is told of wherever it is by then: it may be absent, if the guest gave it back.
    Pages the guest read for the first time may be told of, too.
    """

    def __init__(self, guests: Guests, vm: Vm) -> None:
        self._guests = guests
        self._vm = vm
        self._block = vm.block

    async def start(self) -> None:
        """Log from now on.  Raises Conflict if the guest is not to be had, Failed if its worker dies."""
        await self._carry_out("start")

    async def collect(self) -> np.ndarray:
        """Numbers of the pages (int64, ascending) written since the start, or the last call.  Raises as
        `start` does."""
        return await self._carry_out("collect")

    async def stop(self) -> None:
        """Log nothing any more.  Where the guest has ended there is nothing to stop."""
        if self._vm.block is not self._block:
            return
        try:
            await self._carry_out("stop")
        except HostError:
            if self._vm.block is self._block:
                raise

    async def _carry_out(self, what: Logging) -> np.ndarray:
        vm = self._vm
        if vm.block is None or vm.block is not self._block:
            raise Conflict(f"VM {vm.name} is {vm.state}: what was to be logged has ended")
        if vm.worker is None:
            return vm.block.p2m.log(what)
        answer = await self._guests.leases.dirty_log(vm, what)
        return np.frombuffer(answer.pages, dtype=np.int64)
