# SPDX-License-Identifier: GPL-2.0-or-later
"""The life of a VM: its states, one table of transitions, and what follows when a guest ends by itself."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from hostd.errors import Conflict


class State(StrEnum):
    #: known, never started or its start failed; owns no memory
    DEFINED = "defined"
    #: its memory is being filled
    STARTING = "starting"
    #: a worker runs it (a guest waiting in HLT is running, too)
    RUNNING = "running"
    #: no worker has it; its memory is in the pool and its registers are with the daemon
    PAUSED = "paused"
    #: it powered off, or its power was cut; owns no memory
    HALTED = "halted"
    #: it broke its machine, or its worker died; owns no memory
    CRASHED = "crashed"
    #: on its way from one worker to another, or to another host
    MIGRATING = "migrating"


class Trigger(StrEnum):
    START = "start"
    LOADED = "loaded"
    ABANDON = "abandon"
    PAUSE = "pause"
    RESUME = "resume"
    POWER_OFF = "power off"
    CRASH = "crash"
    RESET = "reset"
    MOVE = "move"
    MOVED = "moved"


class Policy(StrEnum):
    """What follows when a guest powers off or crashes."""

    STOP = "stop"
    RESTART = "restart"
    DESTROY = "destroy"


_S, _T = State, Trigger

#: (state, trigger) -> next state.  What is not here is refused.
TRANSITIONS: dict[tuple[State, Trigger], State] = {
    (_S.DEFINED, _T.START): _S.STARTING,
    (_S.HALTED, _T.START): _S.STARTING,
    (_S.CRASHED, _T.START): _S.STARTING,

    (_S.STARTING, _T.LOADED): _S.RUNNING,
    (_S.STARTING, _T.PAUSE): _S.PAUSED,
    (_S.STARTING, _T.ABANDON): _S.DEFINED,
    (_S.STARTING, _T.POWER_OFF): _S.HALTED,
    (_S.STARTING, _T.CRASH): _S.CRASHED,

    (_S.RUNNING, _T.PAUSE): _S.PAUSED,
    (_S.RUNNING, _T.MOVE): _S.MIGRATING,
    (_S.RUNNING, _T.POWER_OFF): _S.HALTED,
    (_S.RUNNING, _T.CRASH): _S.CRASHED,
    (_S.RUNNING, _T.RESET): _S.STARTING,

    (_S.PAUSED, _T.RESUME): _S.RUNNING,
    (_S.PAUSED, _T.MOVE): _S.MIGRATING,
    (_S.PAUSED, _T.POWER_OFF): _S.HALTED,
    (_S.PAUSED, _T.RESET): _S.STARTING,
    (_S.PAUSED, _T.CRASH): _S.CRASHED,

    (_S.MIGRATING, _T.MOVED): _S.RUNNING,
    (_S.MIGRATING, _T.PAUSE): _S.PAUSED,
    (_S.MIGRATING, _T.POWER_OFF): _S.HALTED,
    (_S.MIGRATING, _T.CRASH): _S.CRASHED,
    (_S.MIGRATING, _T.RESET): _S.STARTING,
}

#: states in which a VM owns machine memory
RESIDENT = frozenset({State.STARTING, State.RUNNING, State.PAUSED, State.MIGRATING})
#: states a VM can be destroyed in without force
AT_REST = frozenset({State.DEFINED, State.HALTED, State.CRASHED})


def follow(name: str, state: State, trigger: Trigger) -> State:
    """The state after `trigger`.  Raises Conflict where the table has no row."""
    try:
        return TRANSITIONS[state, trigger]
    except KeyError:
        raise Conflict(f"VM {name} is {state}: {trigger} is not possible now") from None


@dataclass
class Backoff:
    """How long to wait before a guest that ended by itself is restarted.

    The first restart is immediate.  A guest that ends again within `healthy_s` of its start waits 1, 2, 4 ...
    seconds, at most `limit_s`, so that a kernel that crashes at once costs the host almost nothing; one that
    lived longer starts from zero.
    """

    healthy_s: float = 10.0
    limit_s: float = 60.0
    failures: int = 0

    def delay(self, lived_s: float) -> float:
        """The pause before the next start, for a guest that lived `lived_s` seconds."""
        self.failures = 0 if lived_s >= self.healthy_s else self.failures + 1
        if self.failures <= 1:
            return 0.0
        return min(self.limit_s, 2.0 ** (min(self.failures, 30) - 2))
