# SPDX-License-Identifier: GPL-2.0-or-later
"""Two real daemons with a bad line either way, a guest that goes to and fro, and a judge.

Whatever was done to them, in the end exactly one host has the guest, it goes on there where it can, its
console repeats and leaves out nothing, and neither host keeps a record, a frame or a file of what is over.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx
import msgspec

from hostd.migration.handover import Record
from tests.migration_guests import witness
from tests.migration_proxy import BadLine
from tests.obedient_guest import obedient
from tests.private_daemon import SOON, PrivateDaemon
from tests.test_bad_disk import with_disk
from tests.two_hosts import LOOPBACK, free_port
from vmm import guests

ROOT = Path(__file__).parent.parent
GUEST = "guest"
_OVER = frozenset({"done", "failed", "cancelled"})
#: states that a VM is in on the way to another
_PASSING = frozenset({"starting", "migrating"})
#: seconds that workers may take to come back, before a daemon is started anew
_WORKERS_S = 5.0
#: what is kept of a console
_SCROLLBACK = 64 << 10


class Unsound(AssertionError):
    """Something is wrong with the world."""


class Told(NamedTuple):
    """A guest that tells of its life in numbered lines: `line` is a pattern of one, of which the number, to
    `base`, is the first group; `resets`: it counts from 1 again, as often as it was reset."""

    kernel: Callable[[], bytes]
    append: str
    line: str
    base: int
    resets: bool = False

    def numbers(self, console: str) -> list[int]:
        """Those of the lines.  Raises Unsound unless they follow each other, and where a guest says that its
        memory is wrong."""
        if re.search(r"^B ", console, re.MULTILINE):
            raise Unsound(f"the witness found a bad page: {console[-300:]}")
        numbers = [int(number, self.base) for number in re.findall(self.line, console)]
        for before, after in itertools.pairwise(numbers):
            if after != before + 1 and not (self.resets and after == 1):
                raise Unsound(f"line {after} came after {before}")
        return numbers


Kind = Literal["witness", "idle", "obedient"]
KINDS: dict[Kind, Told] = {
    "witness": Told(lambda: witness(pages=400, words=100, period=50_000_000), "",
                    r"t \w{8} \w{8} (\w{8})\n", 16),
    "idle": Told(lambda: guests.read("idle"), "ms=20", r"tick (\d+)\r\n", 10),
    "obedient": Told(obedient, "", r"n (\w{8})\n", 16, resets=True)}


class Disk:
    """A file system of a daemon's own, which outlives it: in the mount namespace of a process that waits."""

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

    def __init__(self, directory: Path, config: str) -> None:
        directory.mkdir()
        self.directory = directory
        self.disk = Disk(directory / "state")
        self.address = (LOOPBACK, free_port())
        self._config = f'{config}[migration]\naddress = "{LOOPBACK}:{self.address[1]}"\n'
        self.start()
        self.daemon.worker_pids()

    def start(self) -> None:
        """As soon as this returns it answers; its workers may be on their way."""
        self.daemon = PrivateDaemon(
            self.directory, config=self._config, memory="64M", env={"PYTHONPATH": str(ROOT)},
            prefix=[*self.disk.prefix, sys.executable, "-m", "tests.hasty_daemon"])

    @property
    def up(self) -> bool:
        return self.daemon.process.poll() is None

    def refresh(self) -> None:
        """Workers that die one after the other come back later and later: a new daemon has new ones."""
        deadline = time.monotonic() + _WORKERS_S
        while not all(worker["ready"] for worker in self.daemon.get("/host")["workers"]):
            if time.monotonic() > deadline:
                self.kill()
                self.start()
                self.daemon.worker_pids()
                return
            time.sleep(0.02)

    def kill(self) -> None:
        self.daemon.kill()
        self.daemon.client.close()

    def close(self) -> None:
        with self.daemon:
            pass
        self.disk.close()

    def kill_workers(self) -> None:
        """Return when the daemon has noticed."""
        pids = self._worker_pids()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while pids & self._worker_pids():
            time.sleep(0.005)

    def _worker_pids(self) -> set[int]:
        return {worker["pid"] for worker in self.daemon.get("/host")["workers"] if worker["pid"]}

    def vm(self) -> Any:
        """The guest's view; None: it is not here, or nobody is."""
        try:
            response = self.daemon.client.get(f"/vms/{GUEST}")
        except (httpx.TransportError, RuntimeError):
            return None
        return response.json() if response.is_success else None

    def destroy(self) -> None:
        """The guest, whatever it does."""
        operation = self.daemon._answer(self.daemon.client.delete(f"/vms/{GUEST}", params={"force": "true"}))
        ended = self.daemon.get(f"/operations/{operation['id']}", wait=SOON)
        if ended["status"] != "done":
            raise Unsound(f"the guest cannot be destroyed: {ended['error']}")

    def records(self) -> list[Record]:
        directory = self.disk.path / "migrations"
        return [msgspec.json.decode(path.read_bytes(), type=Record) for path in directory.glob("*.json")]

    def under_way(self) -> str:
        """What is still to come; "" when all is over."""
        for operation in self.daemon.get("/operations"):
            if operation["status"] == "running":
                return f"operation {operation['kind']}: {operation['detail']}"
        for migration in self.daemon.get("/migrations"):
            if migration["phase"] not in _OVER:
                return f"migration {migration}"
        for record in self.records():
            if record.phase == "fenced":
                return f"record {record.token}"
        vm = self.vm()
        if vm is not None and vm["state"] in _PASSING:
            return f"VM {vm['state']}"
        files = {path.name for path in (self.disk.path / "vms").iterdir()}
        return "" if files == ({f"{GUEST}.json"} if vm is not None else set()) else f"files {files}"


class World:
    """Two hosts, a line in either direction, and at most one guest, of a `kind` and under a monitor."""

    def __init__(self, directory: Path, config: str = "") -> None:
        with ThreadPoolExecutor() as starting:
            self.a, self.b = starting.map(lambda name: Side(directory / name, config), "ab")
        self._lines = {side.address: BadLine(side.address) for side in (self.a, self.b)}
        #: of the next migration, or the present one
        self.source, self.target = self.a, self.b
        self.kind: Kind = "witness"
        self.vmm = "hw"
        #: the migration that was begun last, and what was said when it failed
        self.operation = ""
        self.error: str | None = None
        #: a key was typed by which the guest ends, or is reset
        self.must_end = False
        #: the console as it was when it began, and how often the guest had been started
        self._before, self._boots = "", 0

    @property
    def line(self) -> BadLine:
        """From source to target."""
        return self._lines[self.target.address]

    def close(self) -> None:
        for line in self._lines.values():
            line.close()
        self.a.close()
        self.b.close()

    # --- a guest

    def ensure_guest(self, **fields: Any) -> None:
        """One that runs, and `source` is where it does."""
        for side in self.a, self.b:
            if side.up:
                side.refresh()
            vm = side.vm()
            if vm is not None and vm["state"] in ("running", "migrating"):
                self.source, self.target = side, self.b if side is self.a else self.a
                return
            if vm is not None:
                side.destroy()
        told, daemon = KINDS[self.kind], self.source.daemon
        daemon.create(GUEST, told.kernel(), append=told.append, vmm=self.vmm, start=True, **fields)
        daemon.wait(GUEST, console=told.line)
        self.new_life()

    def new_life(self) -> None:
        """What its console said before is of another."""
        self._before = ""

    def begin(self, **request: Any) -> None:
        """A migration over the line."""
        self._before, self._boots = self.source.daemon.console(GUEST), self.source.vm()["boots"]
        self.error, self.must_end = None, False
        self.operation = self.source.daemon.post(f"/vms/{GUEST}/migrate", to=self.line.address,
                                                 **request)["id"]

    def outcome(self, wait: float) -> str:
        """How it ended: the operation's status, or "killed" if nobody knows."""
        with suppress(httpx.TransportError, RuntimeError):
            ended = self.source.daemon.get(f"/operations/{self.operation}", wait=wait)
            self.error = ended["error"]
            return str(ended["status"])
        return "killed"

    def restart(self) -> None:
        """All is well again, for those who come through it."""
        self.line.heal()
        for side in self.a, self.b:
            side.disk.free()
            if not side.up:
                side.daemon.client.close()
                side.start()

    # --- judgement

    def judge(self, outcome: str, may_end: bool) -> str:
        """Wait until all is over, and see whether it is well; the guest's state.  `may_end`: its life may
        have ended, or there may be nobody to run it.  Raises Unsound."""
        owner, vm = self._settled()
        expected = {"done": self.target, "failed": self.source, "cancelled": self.source}.get(outcome)
        if expected not in (None, owner):
            raise Unsound(f"the migration is said to be {outcome}, and the guest is not there")
        deadline = time.monotonic() + SOON / 2
        while self.must_end and KINDS[self.kind].resets and vm["state"] == "running" and (
                vm["boots"] == self._boots):
            if time.monotonic() > deadline:
                raise Unsound("a key was taken, and the guest did not get it")
            time.sleep(0.01)
            owner, vm = self._settled()
        state = str(vm["state"])
        if state == "running":
            self._goes_on(owner)
        elif not may_end or state not in ("defined", "halted", "crashed", "paused"):
            raise Unsound(f"the guest is {state} ({vm['reason']})")
        return state

    def _settled(self) -> tuple[Side, Any]:
        """Who has the guest, once nothing is under way any more."""
        deadline = time.monotonic() + SOON
        while why := self._under_way():
            if time.monotonic() > deadline:
                raise Unsound(f"it does not come to an end: {why}")
            time.sleep(0.02)
        having = [(side, vm) for side in (self.a, self.b) if (vm := side.vm()) is not None]
        if len(having) != 1:
            raise Unsound(f"{len(having)} hosts have the guest")
        # a worker may have handed it to another one since
        return having[0] if having[0][1]["state"] not in _PASSING else self._settled()

    def _under_way(self) -> str:
        # Invariant: the target first, so that a guest which goes over meanwhile is not seen at both
        states = [vm["state"] for side in (self.target, self.source) if (vm := side.vm()) is not None]
        if states == ["running", "running"]:
            raise Unsound("it runs on both hosts")
        return self.a.under_way() or self.b.under_way()

    def _goes_on(self, owner: Side) -> None:
        """The guest tells of one line after the other, from where it was."""
        told, daemon = KINDS[self.kind], owner.daemon
        seen = daemon.console(GUEST)
        if len(seen) < _SCROLLBACK and not seen.startswith(self._before):
            raise Unsound("its console is not what it was")
        count = len(told.numbers(seen))
        deadline = time.monotonic() + SOON / 2
        while len(told.numbers(seen)) < count + 2 and len(seen) < _SCROLLBACK:
            if time.monotonic() > deadline:
                raise Unsound("the guest does not get on")
            time.sleep(0.005)
            seen = daemon.console(GUEST)

    def clear(self, forgotten: bool = True) -> None:
        """Destroy the guest: nothing is left of it, nor of its migrations.  `forgotten`: no daemon was ended
        which another one still had to say Forget to, or which had to say it."""
        for side in self.a, self.b:
            if side.vm() is not None:
                side.destroy()
        for side in self.a, self.b:
            side.daemon.clear()
            wrong = side.daemon.get("/memory", check="true")["wrong"]
            if wrong:
                raise Unsound(f"the books are wrong: {wrong}")
            partial = [path.name for path in side.disk.path.rglob(".partial-*")]
            if partial:
                raise Unsound(f"half-made files: {partial}")
            deadline = time.monotonic() + SOON / 2
            while left := [record for record in side.records() if forgotten or record.definition is not None]:
                if time.monotonic() > deadline:
                    raise Unsound(f"records: {left}")
                time.sleep(0.02)


@contextmanager
def world_in(directory: Path, config: str = "") -> Iterator[World]:
    """Its state is in the directory; `config` is more text for the [host] section of both."""
    world = World(directory, config)
    try:
        yield world
    finally:
        world.close()
