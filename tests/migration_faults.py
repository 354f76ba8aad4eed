# SPDX-License-Identifier: GPL-2.0-or-later
"""Two real daemons, a bad line between them, and what goes wrong with all three at each word of a migration.

A `Case` is one migration with one fault.  Afterwards what was killed is started again, and the world is
judged: exactly one host has the guest, it goes on there where it can, its console repeats and leaves out
nothing, and neither host keeps a record, a frame or a file of what is over.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx
import msgspec

from hostd.migration.handover import Record
from hostd.migration.order import SOURCE_SAYS
from tests.migration_guests import witness
from tests.migration_proxy import PREAMBLE, BadLine, Connection, Trap
from tests.private_daemon import SOON, PrivateDaemon
from tests.test_bad_disk import with_disk
from tests.two_hosts import LOOPBACK, free_port
from vmm import guests

ROOT = Path(__file__).parent.parent
Kind = Literal["witness", "idle"]
GUEST = "guest"
#: what a killed or broken-off migration may leave: the target cannot know that the source heard its answer
PHASES_OVER = frozenset({"done", "failed", "cancelled"})


class Unsound(AssertionError):
    """Something is wrong with the world after a fault."""


class Disk:
    """A file system of a daemon's own, which outlives it: in the mount namespace of a process that sleeps."""

    def __init__(self, state: Path) -> None:
        command = [*with_disk(state, "size=1M"), sys.executable, "-c", "print(flush=True); input()"]
        self._keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._keeper.stdout is not None
        self._keeper.stdout.readline()
        self.path = Path(f"/proc/{self._keeper.pid}/root{state}")
        own = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        #: what runs a command there
        self.prefix = ["nsenter", "--target", str(self._keeper.pid), *own, "--mount", f"--wd={ROOT}"]

    def fill(self) -> None:
        """No byte is free."""
        with (self.path / "filling").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        (self.path / "filling").unlink(missing_ok=True)

    def close(self) -> None:
        self._keeper.kill()
        self._keeper.communicate()


class Side:
    """One host: a daemon that can be ended and started again, where others find it at the same address."""

    def __init__(self, directory: Path, config: str = "") -> None:
        directory.mkdir()
        self.directory = directory
        self.disk = Disk(directory / "state")
        self.address = (LOOPBACK, free_port())
        self._config = f'{config}[migration]\naddress = "{LOOPBACK}:{self.address[1]}"\n'
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        self.daemon = PrivateDaemon(
            self.directory, config=self._config, memory="64M", env={"PYTHONPATH": str(ROOT)},
            prefix=[*self.disk.prefix, sys.executable, "-m", "tests.hasty_daemon"])
        self.daemon.worker_pids()

    @property
    def up(self) -> bool:
        return self.daemon.process.poll() is None

    def kill(self) -> None:
        self.daemon.kill()
        self.daemon.client.close()

    def close(self) -> None:
        with self.daemon:
            pass
        self.disk.close()

    def vm(self) -> Any:
        """The guest's view; None: it is not here, or nobody is."""
        try:
            response = self.daemon.client.get(f"/vms/{GUEST}")
        except (httpx.TransportError, RuntimeError):
            return None
        return response.json() if response.is_success else None

    def records(self) -> list[Record]:
        directory = self.disk.path / "migrations"
        return [msgspec.json.decode(path.read_bytes(), type=Record) for path in directory.glob("*.json")]

    def kill_workers(self) -> None:
        for worker in self.daemon.get("/host")["workers"]:
            if worker["pid"]:
                with suppress(ProcessLookupError):
                    os.kill(worker["pid"], signal.SIGKILL)


class Fault(NamedTuple):
    """What happens at a word.  `fatal`: to whom it may happen that the guest's life ends."""

    act: Callable[[World, Connection], None]
    kills: frozenset[str] = frozenset()


class Case(NamedTuple):
    """`word`: before or after which; `mode` of the migration."""

    fault: str
    word: str
    when: Literal["before", "after"] = "before"
    nth: int = 1
    mode: str = "auto"
    byte: int | None = None

    def trap(self) -> Trap:
        if self.byte is not None:
            return Trap(byte=("to target" if self.word == "to target" else "to source", self.byte))
        return Trap(self.word, self.when, self.nth)

    def __str__(self) -> str:
        where = f"byte {self.byte} {self.word}" if self.byte is not None else (
            f"{self.when} {self.word}" + (f" {self.nth}" if self.nth > 1 else ""))
        return f"{self.mode}: {self.fault} {where}"


class World:
    """Two hosts, a line in either direction, and at most one guest."""

    def __init__(self, directory: Path, config: str = "") -> None:
        self.a = Side(directory / "a", config)
        self.b = Side(directory / "b", config)
        self.lines = {id(self.a): BadLine(self.a.address), id(self.b): BadLine(self.b.address)}
        self.source, self.target = self.a, self.b
        self.kind: Kind = "witness"
        self.vmm = "hw"
        #: the operation under way, and the console as it was when it began
        self.operation = ""
        self._before = ""
        #: cases whose word never came
        self.missed = 0
        #: what the operation said when it failed
        self.error: str | None = None

    @property
    def line(self) -> BadLine:
        """From source to target."""
        return self.lines[id(self.target)]

    def close(self) -> None:
        for line in self.lines.values():
            line.close()
        self.a.close()
        self.b.close()

    # --- a guest

    def ensure_guest(self) -> None:
        """One that runs, and `source` is where."""
        for side in self.a, self.b:
            vm = side.vm()
            if vm is not None:
                if vm["state"] == "running":
                    self.source, self.target = side, self.b if side is self.a else self.a
                    return
                self._destroy(side)
        kernel, append = _GUESTS[self.kind]
        self.source.daemon.create(GUEST, kernel(), memory=16 << 20, append=append, vmm=self.vmm, start=True)
        self.source.daemon.wait(GUEST, console=_LINE[self.kind])

    def _destroy(self, side: Side) -> None:
        daemon = side.daemon
        operation = daemon._answer(daemon.client.delete(f"/vms/{GUEST}", params={"force": "true"}))
        ended = daemon.get(f"/operations/{operation['id']}", wait=SOON)
        if ended["status"] != "done":
            raise Unsound(f"the guest cannot be destroyed: {ended['error']}")

    # --- a case

    def run(self, case: Case) -> str:
        """The case, and what came of the migration.  Raises Unsound."""
        self.ensure_guest()
        fault = FAULTS[case.fault]
        self._before = self.source.daemon.console(GUEST)
        trap = case.trap()
        self.line.arm(trap)
        self.operation = self.source.daemon.post(f"/vms/{GUEST}/migrate", to=self.line.address,
                                                 mode=case.mode)["id"]
        if self._reached(trap):
            assert trap.connection is not None
            fault.act(self, trap.connection)
            trap.release()
        else:
            self.missed += 1
        outcome = self._outcome(case.fault in SLOW)
        self.line.heal()
        self._restart()
        self.judge(fault.kills if trap.reached.is_set() else frozenset(), outcome)
        return outcome

    def _reached(self, trap: Trap) -> bool:
        """Whether the word comes before the migration is over."""
        deadline = time.monotonic() + SOON
        while not trap.reached.wait(0.01):
            if self.source.daemon.get(f"/operations/{self.operation}")["status"] != "running":
                return trap.reached.wait(0.05)
            if time.monotonic() > deadline:
                raise Unsound(f"the migration does not get on: {self.source.daemon.get('/migrations')[-1]}")
        return True

    def _outcome(self, fatal: bool) -> str:
        """How the operation ended: its status; "killed" if nobody knows, "running" if it has not."""
        if not self.source.up:
            return "killed"
        with suppress(httpx.TransportError, RuntimeError):
            ended = self.source.daemon.get(f"/operations/{self.operation}", wait=0.05 if fatal else 4)
            self.error = ended["error"]
            return str(ended["status"])
        return "killed"

    def _restart(self) -> None:
        for side in self.a, self.b:
            side.disk.free()
            if not side.up:
                side.daemon.client.close()
                side.start()

    # --- judgement

    def judge(self, killed: frozenset[str], outcome: str) -> None:
        """All of it."""
        owner, vm = self._settled()
        self._agrees(owner, outcome)
        if vm["state"] == "running":
            self._goes_on(owner)
        elif not killed:
            raise Unsound(f"the guest is {vm['state']} ({vm['reason']}), and nobody had killed it")
        elif vm["state"] not in ("defined", "halted", "crashed"):
            raise Unsound(f"the guest is {vm['state']} ({vm['reason']})")

    def _settled(self) -> tuple[Side, Any]:
        """Who has the guest, once nothing is under way any more."""
        deadline = time.monotonic() + SOON / 2
        while why := self._unsettled():
            if time.monotonic() > deadline:
                raise Unsound(f"it does not come to an end: {why}")
            time.sleep(0.02)
        having = [(side, vm) for side in (self.a, self.b) if (vm := side.vm()) is not None]
        if len(having) != 1:
            raise Unsound(f"{len(having)} hosts have the guest")
        side, vm = having[0]
        # a worker may have handed it to another one since
        return (side, vm) if vm["state"] not in _PASSING else self._settled()

    def _unsettled(self) -> str:
        """What is still to come; "" when all is over."""
        # Invariant: the target first, so that a guest which goes over meanwhile is not seen at both
        running = [side for side in (self.target, self.source)
                   if (vm := side.vm()) is not None and vm["state"] == "running"]
        if len(running) == 2:
            raise Unsound("it runs on both hosts")
        for side in self.a, self.b:
            for operation in side.daemon.get("/operations"):
                if operation["status"] == "running":
                    return f"operation {operation['kind']}: {operation['detail']}"
            for migration in side.daemon.get("/migrations"):
                if migration["phase"] not in PHASES_OVER:
                    return f"migration {migration}"
            for record in side.records():
                if record.phase == "fenced":
                    return f"record {record}, {side.vm()}"
            vm = side.vm()
            if vm is not None and vm["state"] in _PASSING:
                return f"VM {vm}"
            files = {path.name for path in (side.disk.path / "vms").iterdir()}
            if files != ({f"{GUEST}.json"} if vm is not None else set()):
                return f"files {files}"
        return ""

    def _agrees(self, owner: Side, outcome: str) -> None:
        """The user was told where the guest is."""
        expected = {"done": self.target, "failed": self.source, "cancelled": self.source}.get(outcome)
        if expected is not None and owner is not expected:
            raise Unsound(f"the migration is said to have {outcome}, and the guest is not there")

    def _goes_on(self, owner: Side) -> None:
        """The guest tells of one line after the other, from where it was."""
        daemon = owner.daemon
        seen = daemon.console(GUEST)
        if not seen.startswith(self._before[:len(seen)]) and len(seen) < _SCROLLBACK:
            raise Unsound("its console is not what it was")
        last = told(self.kind, seen)[-1]
        daemon.wait(GUEST, console=_PATTERN[self.kind](last + 2), timeout=8)
        told(self.kind, daemon.console(GUEST))

    def clear(self) -> None:
        """Destroy the guest: nothing is left of it, nor of its migrations."""
        for side in self.a, self.b:
            if side.vm() is not None:
                self._destroy(side)
        for side in self.a, self.b:
            frames = side.daemon.get("/host")["frames"]
            if (frames["private"], frames["shared"], frames["overhead"]) != (0, 0, 1):
                raise Unsound(f"frames are held by nobody: {frames}")
            wrong = side.daemon.get("/memory", check="true")["wrong"]
            if wrong:
                raise Unsound(f"the books are wrong: {wrong}")
            partial = [path.name for path in side.disk.path.rglob(".partial-*")]
            if partial:
                raise Unsound(f"half-made files: {partial}")
            if side.records():
                raise Unsound(f"records: {side.records()}")


_SCROLLBACK = 64 << 10
#: states that a VM is in on the way to another
_PASSING = ("starting", "migrating")
_GUESTS: dict[Kind, tuple[Callable[[], bytes], str]] = {
    "witness": (lambda: witness(pages=400, words=100, period=100_000_000), ""),
    "idle": (lambda: guests.read("idle"), "ms=20")}
_LINE: dict[Kind, str] = {"witness": "t .*00000003\n", "idle": "tick 3\n"}
_PATTERN: dict[Kind, Callable[[int], str]] = {
    "witness": lambda number: rf"t \w+ \w+ {number:08x}\n", "idle": lambda number: rf"tick {number}\n"}


def told(kind: Kind, console: str) -> list[int]:
    """The numbers of the lines on a console.  Raises Unsound unless they follow each other, and where a
    guest finds its memory wrong."""
    if "B" in console:
        raise Unsound(f"the witness found a bad page: {console[-300:]}")
    pattern, base = (r"t \w{8} \w{8} (\w{8})\n", 16) if kind == "witness" else (r"tick (\d+)\n", 10)
    numbers = [int(number, base) for number in re.findall(pattern, console)]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise Unsound(f"lines {numbers}")
    return numbers


# --- faults

def _swallow(*directions: str) -> Callable[[World, Connection], None]:
    """Words are lost, and nobody is told, for longer than it is waited for an answer; then it breaks."""
    def act(world: World, connection: Connection) -> None:
        connection.swallowed.update(directions)        # type: ignore[arg-type]
        world.line.trap.release()                       # type: ignore[union-attr]
        time.sleep(1)
        world.line.heal()
    return act


def _dark(world: World, connection: Connection) -> None:
    world.line.dark = True
    assert world.line.trap is not None
    world.line.trap.release()
    time.sleep(1)
    world.line.heal()


def _down(world: World, connection: Connection) -> None:
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


def _kill_both(world: World, connection: Connection) -> None:
    world.source.kill()
    world.target.kill()


def _terminate(side: Callable[[World], Side]) -> Callable[[World, Connection], None]:
    def act(world: World, connection: Connection) -> None:
        process = side(world).daemon.process
        process.terminate()
        with suppress(subprocess.TimeoutExpired):       # the word that is held may be what it waits for
            process.wait(0.3)
        assert world.line.trap is not None
        world.line.trap.release()
        try:
            process.wait(SOON / 3)
        except subprocess.TimeoutExpired:
            raise Unsound("the daemon does not end") from None
    return act


_SOURCE, _TARGET = frozenset({"source"}), frozenset({"target"})
FAULTS: dict[str, Fault] = {
    "nothing": Fault(lambda world, connection: None),
    "cut": Fault(lambda world, connection: connection.cut()),
    "lose source": Fault(_swallow("to target")),
    "lose target": Fault(_swallow("to source")),
    "lose both": Fault(_swallow("to target", "to source")),
    "dark": Fault(_dark),
    "down": Fault(_down),
    "delay": Fault(lambda world, connection: time.sleep(0.3)),
    "cancel": Fault(_cancel),
    "second": Fault(_second),
    "full source": Fault(lambda world, connection: world.source.disk.fill()),
    "full target": Fault(lambda world, connection: world.target.disk.fill()),
    "worker source": Fault(lambda world, connection: world.source.kill_workers(), _SOURCE),
    "worker target": Fault(lambda world, connection: world.target.kill_workers(), _TARGET),
    "kill source": Fault(lambda world, connection: world.source.kill(), _SOURCE),
    "kill target": Fault(lambda world, connection: world.target.kill(), _TARGET),
    "kill both": Fault(_kill_both, _SOURCE | _TARGET),
    "end source": Fault(_terminate(lambda world: world.source), _SOURCE),
    "end target": Fault(_terminate(lambda world: world.target), _TARGET),
}
#: those after which a daemon has to be started again
SLOW = frozenset(name for name, fault in FAULTS.items() if name.startswith(("kill", "end")))

#: what is said in a migration of each mode, in about this order
WORDS: dict[str, tuple[str, ...]] = {
    "auto": (PREAMBLE, "Hello", "Welcome", "Offer", "Accept", "Pages", "RoundEnd", "RoundDone", "Final",
             "Ready", "Commit", "Committed", "Forget"),
    "postcopy": (PREAMBLE, "Accept", "RoundEnd", "Final", "Ready", "Commit", "Committed", "Pages", "Want",
                 "Complete", "Forget"),
}


def says(word: str) -> str:
    """Which end says it."""
    return "source" if word in {kind.__name__ for kind in SOURCE_SAYS} else "target"


def cases(faults: list[str], modes: tuple[str, ...] = ("auto", "postcopy")) -> Iterator[Case]:
    """Every word, before and after."""
    for mode in modes:
        for word in WORDS[mode]:
            for when in ("before", "after"):
                for fault in faults:
                    yield Case(fault, word, when, mode=mode)    # type: ignore[arg-type]


@contextmanager
def world_in(directory: Path, config: str = "") -> Iterator[World]:
    world = World(directory, config)
    try:
        yield world
    finally:
        world.close()
