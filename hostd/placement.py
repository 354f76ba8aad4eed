# SPDX-License-Identifier: GPL-2.0-or-later
"""Which worker gets a guest, and which guests should change workers: the balancer fed with the real VMs."""

from __future__ import annotations

import time
from collections.abc import Iterable

from hostd.lifecycle import State
from hostd.scheduler import Balancer, Load
from hostd.vm import Vm
from hostd.workers import Worker


class Placement:
    def __init__(self) -> None:
        self._balancer = Balancer()

    def place(self, workers: list[Worker], vms: Iterable[Vm]) -> Worker:
        """The worker for a guest that has none."""
        by_index = {worker.index: worker for worker in workers}
        index = self._balancer.place(list(by_index), _loads(vms).values())
        return by_index[index]

    def moves(self, workers: list[Worker], vms: Iterable[Vm]) -> list[tuple[str, Worker]]:
        """Guests to move now, by name, and where to."""
        by_index = {worker.index: worker for worker in workers}
        moves = self._balancer.update(time.monotonic_ns(), list(by_index), _loads(vms))
        return [(move.id, by_index[move.target]) for move in moves]


def _loads(vms: Iterable[Vm]) -> dict[str, Load]:
    loads = {}
    for vm in vms:
        if vm.worker is not None and vm.block is not None and vm.state != State.PAUSED:
            account = vm.block.accounting
            loads[vm.name] = Load(vm.worker.index, vm.definition.weight, vm.definition.cap,
                                  account.run_ns, account.wait_ns)
    return loads
