# SPDX-License-Identifier: GPL-2.0-or-later
"""What a snapshot says of a VM beside its machine: the definition, and for one that was suspended with the
host the life it is in the middle of.  It is the snapshot's definition part, as JSON (docs/SNAPSHOT.md)."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import trio

from hostd.definition import Definition
from hostd.memory_state import MemoryState
from hostd.protocol import MAX_STATE
from hostd.snapshot import Snapshot, Unusable
from hostd.vm import Vm
from vmm.memory.pool import PAGE
from vmm.state import decode

if TYPE_CHECKING:
    from vmm.memory.block import VmBlock


class Life(msgspec.Struct, kw_only=True, frozen=True):
    """What a VM has come to since it was defined, and would lose with the daemon."""

    paused: bool
    boots: int
    crashes: int
    age_s: float
    #: the scrollback, and where in all that was ever written it ends and the present boot began
    console: bytes
    console_end: int
    console_boot: int
    #: totals: accounting fields by name, exits as code -> count, seconds
    accounts: dict[str, int]
    exits: dict[int, tuple[int, float]]
    #: counters of hostd.memory_state.MemoryState
    memory: dict[str, int]

    @classmethod
    def of(cls, vm: Vm, paused: bool) -> Life:
        """The life of a VM that no worker has."""
        accounts, exits = vm.ledger.totals(vm.block)
        memory = {name: count for name, count in asdict(vm.memory_state).items() if name in _COUNTERS}
        return cls(paused=paused, boots=vm.boots, crashes=vm.crashes, age_s=vm.age(),
                   console=vm.console.scrollback(), console_end=vm.console.written,
                   console_boot=vm.console.boot, accounts=accounts, exits=exits, memory=memory)

    def give_to(self, vm: Vm) -> None:
        """Have a VM that has none yet go on with this life."""
        vm.boots, vm.crashes, vm.born = self.boots, self.crashes, trio.current_time() - self.age_s
        vm.begin_ration()
        vm.console.load(self.console, self.console_end, self.console_boot)
        vm.ledger.load(self.accounts, self.exits)
        vm.memory_state = MemoryState(
            **{name: count for name, count in self.memory.items() if name in _COUNTERS})


#: what MemoryState counts; the rest of it is of the moment
_COUNTERS = (frozenset(field.name for field in fields(MemoryState))
             - {"balloon_target", "working_set", "looked", "waits"})


class SavedVm(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    definition: Definition
    life: Life | None = None
    #: a bit for each page, lowest first: whether the guest's balloon driver has given it back; empty: none
    ballooned: bytes = b""

    @classmethod
    def of(cls, definition: Definition, block: VmBlock, life: Life | None = None) -> SavedVm:
        """A VM whose memory, in `block`, nobody writes."""
        given = np.zeros(block.pages, dtype=bool)
        given[block.ballooned()] = True
        return cls(definition=definition, life=life,
                   ballooned=np.packbits(given, bitorder="little").tobytes() if given.any() else b"")

    def mark_ballooned(self, block: VmBlock) -> None:
        """Have the pages count as given back, once those with contents are in `block`: its device goes on
        with as many."""
        if self.ballooned:                          # numpy unpacks garbage out of nothing
            bits = np.frombuffer(self.ballooned, dtype=np.uint8)
            block.mark_ballooned(np.flatnonzero(np.unpackbits(bits, count=block.pages, bitorder="little")))


def encode_saved(saved: SavedVm) -> bytes:
    return msgspec.json.encode(saved)


def saved_in(snapshot: Snapshot) -> SavedVm:
    """The VM in an open snapshot, whose machine state fits it.  Raises Unusable."""
    with _about(snapshot.path):
        return _check(snapshot)


def _check(snapshot: Snapshot) -> SavedVm:
    if not snapshot.state:
        raise ValueError("it holds pages only, and no VM")
    if len(snapshot.state) > MAX_STATE:
        raise ValueError(f"its state has {len(snapshot.state)} bytes, and a worker takes {MAX_STATE} at most")
    saved = msgspec.json.decode(snapshot.definition, type=SavedVm)
    state = decode(snapshot.state)
    definition = saved.definition
    if not definition.memory == snapshot.memory_bytes == state.memory_bytes:
        raise ValueError(f"memory of {definition.memory} bytes is defined, and {state.memory_bytes} bytes "
                         f"are in its state, {snapshot.memory_bytes} in its pages")
    if len(saved.ballooned) not in (0, -(-definition.memory // (8 * PAGE))):
        raise ValueError(f"{len(saved.ballooned)} bytes say which pages are in its balloon")
    if state.monitor != definition.vmm:
        raise ValueError(f"its state is of monitor {state.monitor}, and {definition.vmm} is defined")
    return saved


class _about:
    """Turn what is wrong with a file's contents into the sentence about the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError):
            raise Unusable(f"{self._path} cannot be used: {error}") from None
