# SPDX-License-Identifier: GPL-2.0-or-later
"""One VM as the daemon holds it while it lives."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from hostd import lifecycle
from hostd.console import Console
from hostd.definition import Definition
from hostd.errors import Conflict
from hostd.events import Events
from hostd.ledger import Ledger, cpu_times
from hostd.lifecycle import Backoff, State, Trigger
from hostd.memory_state import MemoryState
from hostd.model import PAGE, VmView
from hostd.protocol import BalloonView, Most
from hostd.workers import Worker

if TYPE_CHECKING:
    from vmm.memory.block import VmBlock


class Signal:
    """Something happened; whoever waits looks again.  Look and wait without an await between."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def notify(self) -> None:
        self._event.set()
        self._event = trio.Event()

    async def wait(self) -> None:
        await self._event.wait()


class Vm:
    """A VM.

    Invariant: `worker` and `lease` are set from the moment an Adopt is sent until the worker's Stopped,
    Released or Refused is received, or the worker is dead.  While they are, the worker alone writes to the
    memory.
    Invariant: `block` is set only in the states of lifecycle.RESIDENT; `parked` exactly in PAUSED.
    """

    def __init__(self, definition: Definition, events: Events) -> None:
        self.definition = definition
        self.state = State.DEFINED
        #: why it is in that state, where that is worth telling
        self.reason = ""
        self.console = Console()
        self.ledger = Ledger()
        self.backoff = Backoff()
        #: held by whoever changes the VM on a user's or a policy's behalf
        self.lock = trio.Lock()
        #: notified on every change of state and all console output
        self.activity = Signal()
        self.block: VmBlock | None = None
        self.worker: Worker | None = None
        self.lease = ""
        #: what the guest's balloon driver said last, in this life
        self.balloon: BalloonView | None = None
        self.memory_state = MemoryState()
        #: frames that it may have at the moment
        self.ration = Most()
        #: it gets no room beyond that until the keeper's next decision
        self.strict = False
        #: its MachineState while no worker has it
        self.parked = b""
        #: cancelling it gives up a start, or the wait for a restart
        self.starting: trio.CancelScope | None = None
        #: a user is ending this life: the policies do not apply
        self.stopping = False
        self.destroyed = False
        #: why nobody may change it, in a sentence: it is on its way to another host, or may be there
        self.away = ""
        #: what was typed since it stands still for that; whether more is kept, which may be no other host's
        self.typed = b""
        self.keeps_typed = False
        self.born = 0.0
        self.boots = 0
        self.crashes = 0
        self.exit_status: int | None = None
        #: while pages of it are at another host: told which of them the guest waits for
        self.fetching: Callable[[list[int]], None] | None = None
        #: percent of a CPU it is held to for the time being, beside its definition's cap
        self.throttle: int | None = None
        self._events = events

    @property
    def cap(self) -> int:
        """Percent of a CPU it may have at most; 0: all of it."""
        return min((cap for cap in (self.definition.cap, self.throttle) if cap), default=0)

    @property
    def name(self) -> str:
        return self.definition.name

    def follow(self, trigger: Trigger, reason: str = "") -> None:
        """Change the state as the table says, and tell everyone.  Raises Conflict where it says nothing."""
        before, self.state = self.state, lifecycle.follow(self.name, self.state, trigger)
        self.reason = reason
        self._events.publish("vm.state", self.name, state=self.state, before=before, reason=reason)
        self.activity.notify()

    def check(self, *triggers: Trigger) -> None:
        """Raise Conflict unless one of `triggers` is possible now."""
        if not any((self.state, trigger) in lifecycle.TRANSITIONS for trigger in triggers):
            lifecycle.follow(self.name, self.state, triggers[0])

    def check_whole(self) -> None:
        """Raise Conflict while pages of the guest are at another host: its memory cannot be read then."""
        if self.fetching is not None:
            raise Conflict(f"VM {self.name} still fetches memory from the host it came from: "
                           "wait until all of it is here")

    def check_home(self) -> None:
        """Raise Conflict while the VM is on its way to another host, or may be there."""
        if self.away:
            raise Conflict(self.away)

    def begin_life(self) -> None:
        """The guest starts from its first instruction."""
        self.boots += 1
        self.memory_state.begin_life()
        self.balloon = None
        self.begin_ration()
        self.born = trio.current_time()
        self.exit_status = None

    def begin_ration(self) -> None:
        """No worker has had it yet: until the keeper decides, it may have what its limit says."""
        limit = self.definition.limit_bytes
        self.ration = Most(limit // PAGE if limit < self.definition.memory else None)
        self.strict = False

    def age(self) -> float:
        """Seconds since it was started, 0 when it is not."""
        return trio.current_time() - self.born if self.state in lifecycle.RESIDENT and self.born else 0.0

    def write_console(self, data: bytes) -> None:
        self.console.write(data)
        self.activity.notify()

    def view(self) -> VmView:
        definition = self.definition
        accounts = self.ledger.accounts(self.block)
        pages = self.block.memory_counts() if self.block is not None else None
        return VmView(
            name=self.name, state=self.state, reason=self.reason, vmm=definition.vmm,
            memory=definition.memory, memory_target=definition.memory_target,
            reservation=definition.reservation, limit=definition.limit_bytes,
            shares=definition.memory_shares, weight=definition.weight, cap=definition.cap,
            on_crash=definition.on_crash, on_poweroff=definition.on_poweroff, autostart=definition.autostart,
            image=definition.image, kernel=definition.kernel, initrd=definition.initrd,
            append=definition.append, template=definition.template,
            worker=self.worker.index if self.worker else None, uptime_s=round(self.age(), 3),
            exit_status=self.exit_status, cpu=cpu_times(accounts),
            memory_usage=self.memory_state.usage(pages, self.balloon),
            memory_waiting=self.memory_state.waits,
            memory_events=self.memory_state.events(accounts),
            exits=self.ledger.exit_total(self.block), interrupts=accounts["interrupts"],
            world_switches=accounts["world_switches"], boots=self.boots, crashes=self.crashes)
