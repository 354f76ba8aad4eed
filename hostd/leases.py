# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose hands a guest is in: a worker's, or the daemon's.

A worker has a guest from Adopt on.  To do anything to it but type, press its power button, change its share
or look at its translated code, the daemon takes it back (Release), does it, and gives it to a worker again.
So a paused guest survives the death of every worker, and nobody ever reads the memory of a running one.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import trio

from hostd import protocol
from hostd.errors import Conflict, Failed, HostError
from hostd.events import Events
from hostd.lifecycle import Trigger
from hostd.memory import MachineMemory
from hostd.vm import Vm
from hostd.workers import Worker

log = logging.getLogger(__name__)

#: frames a worker is given at once at most
MAX_GRANT = 1 << 14

T = TypeVar("T")

#: keeps the books of what a worker did to a guest's pages
Settle = Callable[[protocol.Reclaimed], None]


class NeverAdopted(Failed):
    """The worker died before it said Adopted.  It says so before it runs a guest for the first time, and what
    it said is read to the end: so it has not run this one."""


class NotTaken(Failed):
    """The worker did not take the guest, which is as it was."""


class Reply(Generic[T]):
    """The answer to a message, when it comes."""

    def __init__(self) -> None:
        self._event = trio.Event()
        self._value: T | None = None
        self._error: HostError | None = None

    def set(self, value: T) -> None:
        self._value = value
        self._event.set()

    def fail(self, error: HostError) -> None:
        self._error = error
        self._event.set()

    async def wait(self) -> T:
        """The answer.  Not to be cancelled: workers answer at once, or are killed and then this fails."""
        with trio.CancelScope(shield=True):
            await self._event.wait()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]


class Leases:
    """The guests that workers have (hostd.workers.Listener)."""

    def __init__(self, memory: MachineMemory, events: Events,
                 ended: Callable[[Vm, Trigger, str], None]) -> None:
        self._memory = memory
        self._events = events
        #: called when a guest has ended, or is lost, and no worker has it any more
        self._ended = ended
        self._numbers = itertools.count(1)
        self._held: dict[str, Vm] = {}
        self._adopting: dict[str, tuple[Trigger, Reply[None]]] = {}
        #: leases of guests that live on, whatever their workers say to them
        self._tried: set[str] = set()
        self._releasing: dict[str, Reply[protocol.Released]] = {}
        self._listing: dict[str, Reply[protocol.Listing]] = {}
        self._reclaiming: dict[str, tuple[Settle, Reply[protocol.Reclaimed]]] = {}
        self._logging: dict[str, Reply[protocol.Dirty]] = {}
        #: frames that workers asked for and that were not there
        self._hungry: dict[Worker, int] = {}
        #: of those that were asked to count their frames, what was wrong the last time, "" for nothing
        self._miscounts: dict[Worker, str] = {}
        #: workers that were given frames since they were last asked for those they can do without
        self._stocked: set[Worker] = set()
        #: called when a worker begins to wait for frames
        self.on_hunger: Callable[[], None] = lambda: None
        memory.on_freed = self._feed_hungry
        #: called when a guest stands still because it has as many frames as it may
        self.on_limit: Callable[[Vm], None] = lambda vm: None
        self._on: dict[type, Callable[[Worker, Any], None]] = {
            protocol.Adopted: self._on_adopted,
            protocol.Released: self._on_released,
            protocol.Refused: self._on_refused,
            protocol.Stopped: self._on_stopped,
            protocol.Console: self._on_console,
            protocol.Listing: self._on_listing,
            protocol.NeedFrames: self._on_need_frames,
            protocol.GivenBack: self._on_given_back,
            protocol.AtLimit: self._on_at_limit,
            protocol.Reported: self._on_reported,
            protocol.Reclaimed: self._on_reclaimed,
            protocol.Dirty: self._on_dirty,
            protocol.Wanted: self._on_wanted,
            protocol.BalloonView: self._on_balloon,
            protocol.Pong: self._on_pong,
        }

    async def adopt(self, vm: Vm, worker: Worker, state: bytes, trigger: Trigger, since_ns: int = 0,
                    unchanged: bool = False, tried: bool = False) -> None:
        """Give the guest to `worker`; when it has it, `trigger` happens.  `unchanged`: it had it last, and
        nobody has written to the guest's memory since.

        Raises NeverAdopted if the worker dies first: the guest is as it was.  Raises Failed if the worker
        refuses it: the guest has crashed; or NotTaken, if that was only to be `tried`.
        """
        assert vm.block is not None and vm.worker is None
        vm.worker, vm.lease = worker, f"{vm.name}#{next(self._numbers)}"
        self._held[vm.lease] = vm
        reply = Reply[None]()
        self._adopting[vm.lease] = trigger, reply
        if tried:
            self._tried.add(vm.lease)
        books = self._memory.books
        books.adopted(vm.block, worker.index)
        worker.send(protocol.Adopt(
            vm=vm.lease, base_frame=vm.block.first, memory_bytes=vm.definition.memory, state=state,
            since_ns=since_ns, snapshot=books.snapshot(vm.block),
            weight=vm.definition.weight, cap=vm.cap,
            stores=books.stores.told(books.stores_of(vm.block)), unchanged=unchanged,
            logging=vm.block.p2m.logging, ration=vm.ration))
        if worker.dead:
            self._lost(vm, NeverAdopted(f"worker {worker.index} died"))
        await reply.wait()

    async def release(self, vm: Vm) -> protocol.Released:
        """Take the guest back from its worker.  Raises Conflict if it ended first, Failed if the
        worker did."""
        assert vm.worker is not None
        reply = self._releasing[vm.lease] = Reply[protocol.Released]()
        vm.worker.send(protocol.Release(vm.lease))
        return await reply.wait()

    async def translations(self, vm: Vm, address: int | None) -> protocol.Listing:
        """Ask the guest's worker for its translated code; one at a time may.  Raises Conflict if the guest
        ends first, Failed if the worker does."""
        assert vm.worker is not None and vm.lease not in self._listing
        reply = self._listing[vm.lease] = Reply[protocol.Listing]()
        vm.worker.send(protocol.ListTranslations(vm.lease, address))
        return await reply.wait()

    async def reclaim(self, vm: Vm, what: protocol.Reclaiming, settle: Settle, pages: bytes, frames: bytes,
                      slots: bytes) -> protocol.Reclaimed:
        """Have the guest's worker do something to its pages; one at a time may.  `settle` is called with the
        answer when it comes.  Raises Conflict if the guest ends first, Failed if the worker does."""
        assert vm.worker is not None and vm.lease not in self._reclaiming
        reply = Reply[protocol.Reclaimed]()
        self._reclaiming[vm.lease] = settle, reply
        vm.worker.send(protocol.Reclaim(vm.lease, what, pages, frames, slots))
        return await reply.wait()

    async def dirty_log(self, vm: Vm, what: protocol.Logging) -> protocol.Dirty:
        """Have the guest's worker start, collect or stop its dirty log; one at a time may.  Raises Conflict
        if the guest ends first, Failed if the worker does."""
        assert vm.worker is not None and vm.block is not None and vm.lease not in self._logging
        block = vm.block
        reply = self._logging[vm.lease] = Reply[protocol.Dirty]()
        vm.worker.send(protocol.DirtyLog(vm.lease, what))
        answer = await reply.wait()
        # Invariant: what the worker goes by; the next one will, too (Adopt.logging)
        block.p2m.logging = what != "stop"
        return answer

    def _hand_back(self, vm: Vm) -> None:
        """The worker does not have the guest any more."""
        del self._held[vm.lease]
        self._tried.discard(vm.lease)
        if vm.worker is not None:
            self._stocked.add(vm.worker)            # it needs less than it may have kept
        vm.worker, vm.lease = None, ""
        vm.memory_state.waits = False

    def on_message(self, worker: Worker, message: protocol.ToDaemon) -> None:
        handler = self._on.get(type(message))
        if handler is None:
            return
        lease = getattr(message, "vm", None)
        if lease is not None:
            vm = self._held.get(lease)
            if vm is None and isinstance(message, protocol.Refused) and message.request == "release":
                return                              # it ended before our Release arrived
            if vm is None or vm.worker is not worker:
                raise protocol.ProtocolError(f"{type(message).__name__} about {lease}, which is not its own")
        handler(worker, message)

    def on_death(self, worker: Worker, why: str) -> None:
        # first of all, or what its guests leave would be lent to it
        self._hungry.pop(worker, None)
        self._miscounts.pop(worker, None)
        for vm in [vm for vm in self._held.values() if vm.worker is worker]:
            if vm.lease in self._adopting:
                self._lost(vm, NeverAdopted(why))
            else:
                self._lost(vm, Failed(f"VM {vm.name} was lost: {why}"))
                self._ended(vm, Trigger.CRASH, why)
        self._stocked.discard(worker)
        self._memory.books.reclaim(worker.index)
        self._events.publish("worker", index=worker.index, state="died", reason=why)

    def _lost(self, vm: Vm, error: HostError) -> None:
        """The guest came out of its worker's hands otherwise than asked: whoever waits is told."""
        _, adopting = self._adopting.pop(vm.lease, (None, None))
        releasing = self._releasing.pop(vm.lease, None)
        listing = self._listing.pop(vm.lease, None)
        _, reclaiming = self._reclaiming.pop(vm.lease, (None, None))
        logging = self._logging.pop(vm.lease, None)
        self._hand_back(vm)
        for reply in adopting, releasing, listing, reclaiming, logging:
            if reply is not None:
                reply.fail(error)

    def _on_adopted(self, worker: Worker, message: protocol.Adopted) -> None:
        # Invariant: the state changes here and not in whoever waits, because the guest's own end may be the
        # next message.
        trigger, reply = _expected(self._adopting, message)
        vm = self._held[message.vm]
        vm.parked = b""
        vm.follow(trigger)
        reply.set(None)

    def _on_released(self, worker: Worker, message: protocol.Released) -> None:
        reply = _expected(self._releasing, message)
        self._hand_back(self._held[message.vm])
        reply.set(message)

    def _on_refused(self, worker: Worker, message: protocol.Refused) -> None:
        vm = self._held[message.vm]
        if vm.lease in self._tried and vm.lease in self._adopting:
            self._lost(vm, NotTaken(message.reason))
            return
        self._lost(vm, Failed(f"VM {vm.name}: {message.reason}"))
        self._ended(vm, Trigger.CRASH, message.reason)

    def _on_stopped(self, worker: Worker, message: protocol.Stopped) -> None:
        vm = self._held[message.vm]
        vm.exit_status = message.status
        trigger, reason = _ENDINGS[message.why]
        reason = message.detail or reason
        self._lost(vm, Conflict(f"VM {vm.name} ended: {reason}"))
        self._ended(vm, trigger, reason)

    def _on_console(self, worker: Worker, message: protocol.Console) -> None:
        self._held[message.vm].write_console(message.data)

    def _on_listing(self, worker: Worker, message: protocol.Listing) -> None:
        _expected(self._listing, message).set(message)

    def _on_need_frames(self, worker: Worker, message: protocol.NeedFrames) -> None:
        extents = self._memory.books.lend(worker.index, min(message.count, MAX_GRANT))
        if extents:
            self._hungry.pop(worker, None)
            self._stocked.add(worker)
            worker.send(protocol.Grant(extents))
        elif worker not in self._hungry:
            log.warning("machine memory is exhausted: guests wait", extra={"worker": worker.index})
            self._hungry[worker] = message.count
            self.on_hunger()

    def _on_at_limit(self, worker: Worker, message: protocol.AtLimit) -> None:
        self.on_limit(self._held[message.vm])

    def waiting(self) -> int:
        """Workers that wait for frames."""
        return len(self._hungry)

    def demanded(self) -> int:
        """Frames that workers wait for."""
        return sum(self._hungry.values())

    def collect_stock(self) -> None:
        """Somebody waits for frames: have workers that do not give back those they have to spare."""
        for worker in self._stocked - self._hungry.keys():
            worker.send(protocol.GiveBack())
            self._stocked.discard(worker)

    def _on_given_back(self, worker: Worker, message: protocol.GivenBack) -> None:
        try:
            self._memory.books.given_back(worker.index, message.extents)
        except ValueError as error:
            raise protocol.ProtocolError(f"stock given back that cannot be: {error}") from None

    def _feed_hungry(self) -> None:
        """Memory came free: give it to the workers that wait for some."""
        for worker, count in list(self._hungry.items()):
            self._on_need_frames(worker, protocol.NeedFrames(count))

    def _on_reported(self, worker: Worker, message: protocol.Reported) -> None:
        block = self._held[message.vm].block
        if block is None:
            return
        try:
            self._memory.books.reported(block, message.dropped, message.freed, message.fetched)
        except ValueError as error:
            raise protocol.ProtocolError(f"a report about {message.vm} that cannot be: {error}") from None

    def _on_reclaimed(self, worker: Worker, message: protocol.Reclaimed) -> None:
        # Invariant: the books follow here and not in whoever waits, because the guest's own end, and with it
        # that of its memory, may be the next message.
        settle, reply = _expected(self._reclaiming, message)
        try:
            settle(message)
        except (ValueError, IndexError) as error:
            reply.fail(Failed(f"VM {self._held[message.vm].name}: its worker does not do as it is asked"))
            raise protocol.ProtocolError(f"an answer about {message.vm} that cannot be: {error}") from None
        reply.set(message)

    def _on_dirty(self, worker: Worker, message: protocol.Dirty) -> None:
        _expected(self._logging, message).set(message)

    def _on_wanted(self, worker: Worker, message: protocol.Wanted) -> None:
        vm = self._held[message.vm]
        if vm.block is None or not all(0 <= page < vm.block.pages for page in message.pages):
            raise protocol.ProtocolError(f"{message.vm} waits for pages it does not have")
        if vm.fetching is not None:
            vm.fetching(message.pages)

    def _on_balloon(self, worker: Worker, message: protocol.BalloonView) -> None:
        self._held[message.vm].balloon = message

    def _on_pong(self, worker: Worker, message: protocol.Pong) -> None:
        if message.given is not None:
            held = [vm.block for vm in self._held.values() if vm.block is not None]
            self._miscounts[worker] = self._memory.books.check_worker(worker.index, message.frames,
                                                                      message.given, held)

    def miscounts(self) -> list[str]:
        """What was wrong when workers last counted their frames (Workers.hear), a sentence each."""
        return [sentence for sentence in self._miscounts.values() if sentence]


def _expected(replies: dict[str, T], message: protocol.Adopted | protocol.Released | protocol.Listing
              | protocol.Reclaimed | protocol.Dirty) -> T:
    """What waits for this answer."""
    try:
        return replies.pop(message.vm)
    except KeyError:
        raise protocol.ProtocolError(f"{type(message).__name__} about {message.vm}, unasked") from None


#: how a guest can end by itself: what happens to the VM, and what is said where the worker has no detail
_ENDINGS: dict[protocol.Ending, tuple[Trigger, str]] = {
    "poweroff": (Trigger.POWER_OFF, "powered off"),
    "exit": (Trigger.POWER_OFF, "ended itself by the debug exit port"),
    "reset": (Trigger.RESET, "reset itself"),
    "crashed": (Trigger.CRASH, "crashed"),
}
