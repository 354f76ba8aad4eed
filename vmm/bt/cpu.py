# SPDX-License-Identifier: GPL-2.0-or-later
"""What a CPU for translated code offers to the monitor; there are two.

    vmm.bt.native     the host's own processor: units run in this process, at its speed
    vmm.bt.emulated   the same units at CPL 3 of an emulated processor: the reference, and the way elsewhere

Addresses (of units, stubs, windows, tables) are those translated code sees; on the host's processor alone
they are addresses of this process too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from vmm.bt.native.block import Block
from vmm.bt.native.windows import MappingBudget
from vmm.memory.pool import Pool
from vmm.silicon.kick import Kicker


class Arena(Protocol):
    """The memory of the translation cache: `stub_count` exit stubs, then `units_bytes` of units."""

    @property
    def size(self) -> int: ...
    @property
    def stub_count(self) -> int: ...
    @property
    def base(self) -> int: ...
    @property
    def stubs(self) -> int: ...
    @property
    def origin(self) -> int: ...
    @property
    def units(self) -> int: ...
    @property
    def units_bytes(self) -> int: ...

    def stub(self, number: int) -> int:
        """Address of an exit stub."""

    def write(self, address: int, code: bytes) -> None:
        """Put verified code at `address`; ValueError when that is not among the units."""

    def read(self, address: int, length: int) -> bytes:
        """Bytes of the arena."""

    def close(self) -> None:
        """Give the memory back."""


class Timer(Protocol):
    """Kicks, by time and by input."""

    def at(self, when_ns: int) -> None:
        """Kick at CLOCK_MONOTONIC `when_ns`, and every millisecond from then until set again."""

    def rest(self) -> None:
        """No kicks by time any more."""

    def on_readable(self, descriptor: int) -> None:
        """Kick whenever input arrives on `descriptor` (a socket)."""

    def close(self) -> None:
        """No kicks at all any more."""


class Window(Protocol):
    """4 GiB of guest linear memory; what is not mapped faults.  Pages and frames are numbers of 4 KiB ones.

    `map`, `protect` and `unmap` raise ValueError for pages beyond 4 GiB, OSError when nothing can be evicted
    to stay within the budget.
    """

    @property
    def base(self) -> int: ...
    @property
    def pages(self) -> Mapping[int, int]:
        """What is mapped: page number -> frame << 1 | writable, the page mapped longest first."""
    @property
    def mappings(self) -> int:
        """What it takes of the budget."""
    @property
    def evictions(self) -> int:
        """Pages unmapped to stay within the budget."""

    def map(self, page: int, frame: int, count: int = 1, writable: bool = False) -> None:
        """Map `count` pages to consecutive frames, in place of what is there."""

    def map_pages(self, page: int, frames: Iterable[int], writable: bool = False) -> None:
        """Map consecutive pages to `frames`."""

    def protect(self, page: int, count: int, writable: bool) -> None:
        """Change whether mapped pages may be written."""

    def unmap(self, page: int, count: int = 1) -> None:
        """Pages fault again."""

    def clear(self) -> None:
        """Nothing is mapped any more."""

    def evict(self) -> None:
        """Unmap the older quarter of the pages."""

    def close(self) -> None:
        """Give the address space back."""


class JumpTable(Protocol):
    """The address of the unit for each guest linear address; 0, a miss, where there is none."""

    @property
    def base(self) -> int: ...
    @property
    def flushes(self) -> int:
        """How often it was emptied because it had grown to its limit."""
    @property
    def resident_bytes(self) -> int: ...

    def set(self, guest: int, host: int) -> None:
        """From now on a jump to `guest` goes to `host`."""

    def get(self, guest: int) -> int:
        """Where a jump to `guest` goes; 0 when it misses."""

    def drop(self, guest: int) -> None:
        """A jump to `guest` misses from now on."""

    def drop_page(self, number: int) -> None:
        """Jumps into a page of guest code miss from now on, and those to what ends in it."""

    def clear(self) -> None:
        """Every jump misses from now on."""

    def close(self) -> None:
        """Give the address space back."""


class TranslationCpu(Protocol):
    """Runs units.  What a monitor may rely on after `enter` is in `vmm.bt.native.cpu`."""

    @property
    def arena(self) -> Arena: ...
    @property
    def timer(self) -> Timer: ...

    def new_block(self) -> Block:
        """A state block for guests whose units are in this CPU's arena."""

    def new_window(self, pool: Pool, budget: MappingBudget,
                   evicted: Callable[[list[int]], None] = ...) -> Window:
        """An empty window over frames of `pool`; `evicted` hears of pages unmapped for the budget's sake."""

    def new_table(self, limit: int = ...) -> JumpTable:
        """An empty jump table of at most `limit` pages."""

    def prepare(self) -> None:
        """Before a slice."""

    def enter(self, block: Block, address: int) -> int:
        """Run the guest from `address`; the number of the stub it left by, or FAULT, MISS, PREEMPTED."""

    def step(self, block: Block, address: int) -> int:
        """Run one host instruction of the guest, then FAULT with vector 1 (#DB); or as `enter`."""

    def kick(self) -> None:
        """Make the next entry give up."""

    def join(self, kicker: Kicker) -> None:
        """What stops the emulated silicon is a kick for this CPU, too."""

    def close(self) -> None:
        """Give the arena and the timer back."""
