# SPDX-License-Identifier: GPL-2.0-or-later
"""What all translated guests of a process share: a CPU for translated code, and its translation cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from vmm.bt.cache import Counters, TranslationCache
from vmm.bt.cpu import TranslationCpu
from vmm.bt.emulated.cpu import EmulatedCpu
from vmm.bt.native.cpu import NativeCpu
from vmm.bt.native.windows import MappingBudget
from vmm.bt.views import View
from vmm.memory.pool import Pool
from vmm.silicon.kick import Kicker

CpuKind = Literal["native", "unicorn"]
DEFAULT_CACHE = 32 << 20
#: bytes of translated code to an exit stub
BYTES_PER_STUB = 256
#: pages of a view's jump table
_TABLE_PAGES = 2048
CPUS: dict[CpuKind, Callable[[int, int], TranslationCpu]] = {"native": NativeCpu, "unicorn": EmulatedCpu}


class TranslationEngine:
    """Translated code on one CPU: "native", the host's own, or "unicorn", the emulated one.

    Stops of the silicon by `kicker` stop translated code, too.
    """

    def __init__(self, pool: Pool, cpu: CpuKind = "native", cache_bytes: int = DEFAULT_CACHE,
                 kicker: Kicker | None = None) -> None:
        self.pool = pool
        self.cpu: TranslationCpu = CPUS[cpu](cache_bytes, max(cache_bytes // BYTES_PER_STUB, 1024))
        self.cache = TranslationCache(self.cpu.arena)
        self.budget = MappingBudget()
        if kicker is not None:
            self.cpu.join(kicker)

    @property
    def counters(self) -> Counters:
        """What the cache did."""
        return self.cache.counters

    @property
    def used_bytes(self) -> int:
        """Host code of all units alive."""
        return self.cache.used_bytes

    def new_view(self) -> View:
        """An empty view for a guest."""
        return View(self.cpu, self.pool, self.budget, _TABLE_PAGES, self.cache.tables)

    def close(self) -> None:
        """Give the CPU back; all guests are closed."""
        self.cpu.close()
