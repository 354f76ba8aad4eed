# SPDX-License-Identifier: GPL-2.0-or-later
"""The contract both monitors keep with the machine that uses them."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, Protocol

from vmm.state import CpuState


class StopReason(Enum):
    """Why a guest is not running any more for the moment, or for good."""

    SLICE = "slice"              # its deadline came
    HALTED = "halted"            # it waits for an interrupt
    KICKED = "kicked"            # somebody wants the worker's attention
    NO_FRAMES = "no frames"      # it needs a machine frame and none is in stock
    POWEROFF = "poweroff"
    RESET = "reset"
    CRASHED = "crashed"
    EXIT = "exit"                # it wrote to the debug-exit port

    @property
    def final(self) -> bool:
        """Whether the guest cannot simply be run again."""
        return self in _FINAL


_FINAL = frozenset({StopReason.POWEROFF, StopReason.RESET, StopReason.CRASHED, StopReason.EXIT})


class Stop(NamedTuple):
    """Why `run` returned: a reason, a sentence where there is one to say, an exit status for EXIT."""

    reason: StopReason
    detail: str = ""
    status: int | None = None


class VirtualCpu(Protocol):
    """One guest's processor under a monitor."""

    def run(self, deadline_ns: int) -> Stop:
        """Run until CLOCK_MONOTONIC `deadline_ns` at the latest."""
        ...

    def capture(self) -> CpuState:
        """The processor's state; the guest is off the CPU afterwards."""
        ...

    def evict(self) -> None:
        """Get the guest off the CPU, its state complete in VMCB and context."""
        ...
