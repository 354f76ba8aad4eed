# SPDX-License-Identifier: GPL-2.0-or-later
"""What goes wrong at each word of a migration between two hosts (migration_world.py), case by case."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, Literal, NamedTuple, get_args

from tests.migration_proxy import PREAMBLE, Connection, Direction, Trap
from tests.migration_world import GUEST, Side, Unsound, World
from tests.private_daemon import SOON

#: for longer than a hasty daemon waits for an answer
_LONG_S = 1.0
When = Literal["before", "after"]
Act = Callable[[World, Connection], None]


class Fault(NamedTuple):
    """What is done while the line is held at a word.  `may_end`: the guest's life may end by it;
    `restarts`: a daemon has to be started again."""

    act: Act
    may_end: bool = False
    restarts: bool = False


class Case(NamedTuple):
    """One migration with one fault, before or after the `nth` of a word; or, of a direction, at a byte."""

    fault: str
    word: str
    when: When = "before"
    nth: int = 1
    mode: str = "auto"
    byte: int | None = None
    connections: int = 1

    def trap(self) -> Trap:
        for direction in get_args(Direction):
            if direction == self.word:
                return Trap(byte=(direction, self.byte or 0))
        return Trap(self.word, self.when, self.nth)


def run(world: World, case: Case) -> str:
    """Have it happen, make good what was damaged, and judge; how the migration ended, and the guest's state.
    Raises Unsound."""
    fault, trap = FAULTS[case.fault], case.trap()
    world.ensure_guest()
    world.line.arm(trap)
    world.begin(mode=case.mode, connections=case.connections)
    met = _meets(world, trap)
    if met:
        assert trap.connection is not None
        fault.act(world, trap.connection)
        trap.release()
    outcome = world.outcome(0.05 if fault.restarts else 4)
    world.restart()
    state = world.judge(outcome, met and fault.may_end)
    return f"{outcome}, {state}" if met else f"not met: {outcome}, {state}"


def _meets(world: World, trap: Trap) -> bool:
    """Whether the line comes to the word before the migration is over."""
    deadline = time.monotonic() + SOON
    while not trap.reached.wait(0.01):
        if world.outcome(0) != "running":
            return trap.reached.wait(0.05)
        if time.monotonic() > deadline:
            raise Unsound(f"the migration does not get on: {world.source.daemon.get('/migrations')[-1]}")
    return True


# --- faults

def _release(world: World) -> None:
    """Have the line go on while something is done."""
    if world.line.trap is not None:
        world.line.trap.release()


def _lose(*directions: Direction) -> Act:
    """What is said is lost, and nobody is told, for a while; then the connection breaks."""
    def act(world: World, connection: Connection) -> None:
        connection.swallowed.update(directions)
        _release(world)
        time.sleep(_LONG_S)
        world.line.heal()
    return act


def _dark(world: World, connection: Connection) -> None:
    """So is all that is said on any connection."""
    world.line.dark = True
    _release(world)
    time.sleep(_LONG_S)
    world.line.heal()


def _down(world: World, connection: Connection) -> None:
    """All connections break, and none can be made for a while."""
    world.line.down = True
    world.line.cut()
    time.sleep(0.4)
    world.line.down = False


def _cancel(world: World, connection: Connection) -> None:
    world.source.daemon.client.delete(f"/operations/{world.operation}")


def _second(world: World, connection: Connection) -> None:
    """Another migration of the same guest is asked for."""
    answer = world.source.daemon.client.post(f"/vms/{GUEST}/migrate", json={"to": world.line.address})
    if answer.status_code not in (404, 409):
        raise Unsound(f"another migration of the same guest: {answer.text}")


def _type(key: str) -> Act:
    def act(world: World, connection: Connection) -> None:
        answer = world.source.daemon.client.post(f"/vms/{GUEST}/input", content=key.encode())
        world.must_end = answer.is_success              # it may be refused by now
        time.sleep(0.05)
    return act


def _kill_both(world: World, connection: Connection) -> None:
    world.source.kill()
    world.target.kill()


def _end(side: Callable[[World], Side]) -> Act:
    """The daemon is asked to end, and does."""
    def act(world: World, connection: Connection) -> None:
        process = side(world).daemon.process
        process.terminate()
        with suppress(subprocess.TimeoutExpired):       # the word that is held may be what it waits for
            process.wait(0.3)
        _release(world)
        try:
            process.wait(SOON / 2)
        except subprocess.TimeoutExpired:
            raise Unsound("the daemon does not end") from None
    return act


FAULTS: dict[str, Fault] = {
    "nothing": Fault(lambda world, connection: None),
    "delay": Fault(lambda world, connection: time.sleep(0.3)),
    "cut": Fault(lambda world, connection: connection.cut()),
    "down": Fault(_down),
    "lose source": Fault(_lose("to target")),
    "lose target": Fault(_lose("to source")),
    "lose both": Fault(_lose("to target", "to source")),
    "dark": Fault(_dark),
    "cancel": Fault(_cancel),
    "second": Fault(_second),
    "full source": Fault(lambda world, connection: world.source.disk.fill()),
    "full target": Fault(lambda world, connection: world.target.disk.fill()),
    "power off": Fault(_type("q"), may_end=True),
    "reset": Fault(_type("r"), may_end=True),
    "crash": Fault(_type("c"), may_end=True),
    "worker source": Fault(lambda world, connection: world.source.kill_workers(), may_end=True),
    "worker target": Fault(lambda world, connection: world.target.kill_workers(), may_end=True),
    "kill source": Fault(lambda world, connection: world.source.kill(), may_end=True, restarts=True),
    "kill target": Fault(lambda world, connection: world.target.kill(), may_end=True, restarts=True),
    "kill both": Fault(_kill_both, may_end=True, restarts=True),
    "end source": Fault(_end(lambda world: world.source), may_end=True, restarts=True),
    "end target": Fault(_end(lambda world: world.target), may_end=True, restarts=True),
}

#: what is said in a migration of each mode, in about this order
WORDS: dict[str, tuple[str, ...]] = {
    "auto": (PREAMBLE, "Hello", "Welcome", "Offer", "Accept", "Pages", "RoundEnd", "RoundDone", "Final",
             "Ready", "Commit", "Committed", "Forget"),
    "postcopy": (PREAMBLE, "Accept", "RoundEnd", "Final", "Ready", "Commit", "Committed", "Pages", "Want",
                 "Complete", "Forget"),
}


def cases(faults: Iterable[str], modes: Iterable[str] = tuple(WORDS), **fields: Any) -> Iterator[Case]:
    """Each fault before and after every word."""
    for mode in modes:
        for word in WORDS[mode]:
            for when in get_args(When):
                for fault in faults:
                    yield Case(fault, word, when, mode=mode, **fields)
