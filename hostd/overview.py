# SPDX-License-Identifier: GPL-2.0-or-later
"""The host as a whole: what there is of memory, workers and guests, and whether the books are right."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from hostd import __version__
from hostd.config import Config
from hostd.guests import Guests
from hostd.lifecycle import State
from hostd.memory import MachineMemory
from hostd.memory_state import HostMemoryState
from hostd.model import FrameCounts, HostView, MemoryView, VmView, WorkerView
from hostd.workers import Workers


class Overview:
    """Changes nothing."""

    def __init__(self, config: Callable[[], Config], guests: Guests, memory: MachineMemory,
                 workers: Workers) -> None:
        #: what the memory policy says of the host
        self.memory_state = HostMemoryState()
        #: where the metrics are served, once they are
        self.metrics_url: str | None = None
        self._config = config
        self._guests = guests
        self._memory = memory
        self._workers = workers
        self._started = time.monotonic()

    def view(self) -> HostView:
        config = self._config()
        return HostView(
            version=__version__, pid=os.getpid(), uptime_s=round(time.monotonic() - self._started, 3),
            state_dir=str(config.state_dir), socket=str(config.socket), metrics=self.metrics_url,
            memory=self._memory.pool.size, frames=self.frames(), workers=self.workers(),
            vms={state: count for state, count in self.vm_counts().items() if count})

    def summary(self) -> str:
        """The host in a few words."""
        ready = len(self._workers.ready)
        return (f"{self.vm_counts()[State.RUNNING]} of {len(self._guests.vms)} guests running, "
                f"{ready} of {len(self._workers.all)} workers ready")

    def vm_counts(self) -> dict[State, int]:
        """VMs by state."""
        counts = Counter(vm.state for vm in self._guests.vms.values())
        return {state: counts[state] for state in State}

    def workers(self) -> list[WorkerView]:
        held = Counter(vm.worker for vm in self._guests.vms.values())
        return [worker.view(held[worker]) for worker in self._workers.all]

    def latency(self) -> tuple[list[int], float]:
        """Wake-up latency histogram of all workers: counts per bucket of hostd.scheduler.LATENCY_BOUNDS_NS
        (not cumulative; one more bucket is for what is longer), and the sum in seconds."""
        return self._workers.latency()

    # --- machine memory

    def frames(self) -> FrameCounts:
        return self._memory.books.counts()

    def memory(self, vms: Sequence[VmView] | None = None) -> MemoryView:
        """Machine memory of the whole host; `vms` spares a caller who has the views of all a second look."""
        views = [vm.view() for vm in self._guests.vms.values()] if vms is None else vms
        references = sum(vm.memory_usage.shared for vm in views)
        swap = self._memory.books.stores.swap
        return self.memory_state.view(self.frames(), references, None if swap is None else swap.stats())

    def check_memory(self) -> list[str]:
        """Every disagreement in the books of machine memory, a sentence each; what workers have not reported
        yet is one, too."""
        return self._memory.books.check()

    async def checked_memory(self) -> MemoryView:
        """The same view with `wrong`: what the books have wrong before and after all workers have told what
        they had to tell, and workers that have other frames than were lent to them."""
        wrong = self.check_memory()
        await self._workers.hear(self._memory.books.given)
        if wrong:
            still = set(self.check_memory())
            wrong = [sentence for sentence in wrong if sentence in still]
        wrong += self._guests.leases.miscounts()
        return msgspec.structs.replace(self.memory(), wrong=wrong)
