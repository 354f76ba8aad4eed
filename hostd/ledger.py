# SPDX-License-Identifier: GPL-2.0-or-later
"""The counters of a VM over all its lives.

While a guest has memory its counters are in the pool, where its worker adds to them (vmm/stats.py).  They go
with the memory; what they had come to is kept here, so that a VM's totals never go back.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from hostd.model import CpuTimes, ExitRow
from vmm.exitcodes import exit_name

if TYPE_CHECKING:
    from vmm.memory.block import VmBlock


class Ledger:
    """Totals of the lives a VM has behind it; together with the block of its present one, of all."""

    def __init__(self) -> None:
        self._accounts: Counter[str] = Counter()
        self._exits: dict[int, tuple[int, float]] = {}

    def fold(self, block: VmBlock) -> None:
        """The life in `block` is over."""
        self._accounts = self.accounts(block)
        self._exits = self._all_exits(block)

    def accounts(self, block: VmBlock | None) -> Counter[str]:
        """Accounting fields by name (vmm.stats.Accounting)."""
        accounts = self._accounts.copy()
        if block is not None:
            accounts.update(block.accounting.as_dict())
        return accounts

    def totals(self, block: VmBlock | None) -> tuple[dict[str, int], dict[int, tuple[int, float]]]:
        """All there is, for `load`: accounting fields by name, and count and seconds by exit code."""
        return dict(self.accounts(block)), self._all_exits(block)

    def load(self, accounts: dict[str, int], exits: dict[int, tuple[int, float]]) -> None:
        """Go on from the totals that another daemon had come to."""
        self._accounts, self._exits = Counter(accounts), dict(exits)

    def exits(self, block: VmBlock | None) -> list[ExitRow]:
        """Exit statistics, the most frequent first."""
        rows = [ExitRow(code=code, name=exit_name(code & (1 << 64) - 1), count=count, seconds=seconds)
                for code, (count, seconds) in self._all_exits(block).items()]
        return sorted(rows, key=lambda row: -row.count)

    def exit_total(self, block: VmBlock | None) -> int:
        """Exits of every kind together."""
        past = sum(count for count, _ in self._exits.values())
        return past + (block.exit_stats.total() if block is not None else 0)

    def _all_exits(self, block: VmBlock | None) -> dict[int, tuple[int, float]]:
        exits = dict(self._exits)
        for code, count, seconds in block.exit_stats.rows() if block is not None else ():
            before, spent = exits.get(code, (0, 0.0))
            exits[code] = before + count, spent + seconds
        return exits


def cpu_times(accounts: Counter[str]) -> CpuTimes:
    """Where the time of the VM went."""
    return CpuTimes(run=accounts["run_ns"] / 1e9, wait=accounts["wait_ns"] / 1e9,
                    sleep=accounts["sleep_ns"] / 1e9)
