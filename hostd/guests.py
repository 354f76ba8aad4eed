# SPDX-License-Identifier: GPL-2.0-or-later
"""What is done to guests: start, pause, move, end; and what follows when they end by themselves."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from hostd import protocol
from hostd.errors import Conflict, Failed, HostError, NotFound
from hostd.events import Events
from hostd.images import Images
from hostd.inventory import Inventory
from hostd.leases import Leases, NeverAdopted, NotTaken
from hostd.lifecycle import RESIDENT, Policy, State, Trigger
from hostd.loader import fill, lay_out
from hostd.memory import MachineMemory
from hostd.model import TranslationsView
from hostd.placement import Placement
from hostd.vm import Vm
from hostd.workers import Worker, Workers

if TYPE_CHECKING:
    from vmm.memory.block import VmBlock

log = logging.getLogger(__name__)

#: workers a guest is offered to, one after the other, as long as they die before they have it
HAND_OVERS = 3

#: bytes that can be typed at a guest while it stands still on its way to another host
MAX_TYPED = 2048

Step = Callable[[str, float], None]


class Guests:
    """All VMs."""

    def __init__(self, nursery: trio.Nursery, memory: MachineMemory, images: Images, inventory: Inventory,
                 events: Events) -> None:
        self.vms: dict[str, Vm] = {}
        self.placement = Placement()
        self.leases = Leases(memory, events, self._end)
        #: set by the host once they can be started, with `leases` as their listener
        self.workers: Workers
        #: the host is going down: guests that end stay ended
        self.closing = False
        self._nursery = nursery
        self._memory = memory
        self._images = images
        self._inventory = inventory
        self._events = events

    @asynccontextmanager
    async def changing(self, vm: Vm, patient: bool = False) -> AsyncIterator[None]:
        """Hold the VM's lock.  Raises NotFound if it was destroyed while waiting for it, Conflict while it is
        on its way to another host; `patient`: the end of that is waited for."""
        if not patient:
            vm.check_home()
        async with vm.lock:
            if vm.destroyed:
                raise NotFound(f"VM {vm.name} was destroyed")
            vm.check_home()
            yield

    # --- what users and policies do ---------------------------------------------------------------

    async def start(self, vm: Vm, step: Step) -> None:
        self.give_up_start(vm)
        async with self.changing(vm):
            vm.follow(Trigger.START)
            await self._boot(vm, step)

    async def pause(self, vm: Vm) -> None:
        async with self.changing(vm):
            await self.park(vm)

    async def park(self, vm: Vm) -> protocol.Released:
        """Take a running guest back.  The caller holds its lock."""
        vm.check(Trigger.PAUSE)
        released = await self.leases.release(vm)
        vm.parked = released.state
        vm.follow(Trigger.PAUSE)
        return released

    def free_copy(self, block: VmBlock) -> None:
        """The copy is of no use any more."""
        self._memory.books.free(block)

    async def resume(self, vm: Vm) -> None:
        async with self.changing(vm):
            await self.unpark(vm)

    async def unpark(self, vm: Vm) -> None:
        """Give a parked guest to a worker.  The caller holds its lock."""
        vm.check(Trigger.RESUME)
        await self.hand_over(vm, vm.parked, Trigger.RESUME)

    async def stop(self, vm: Vm, force: bool, timeout: float) -> None:
        """Press the power button and cut the power `timeout` seconds later, or at once with `force`."""
        vm.stopping = True
        try:
            self.give_up_start(vm)
            async with self.changing(vm):
                if vm.state not in RESIDENT:
                    return
                if force or vm.worker is None or not timeout:
                    await self._cut(vm)
                    return
                life = vm.boots
                vm.worker.send(protocol.PowerButton(vm.lease))
            with trio.move_on_after(timeout):
                while vm.state in RESIDENT and vm.boots == life:
                    await vm.activity.wait()
                return
            async with self.changing(vm):
                if vm.state in RESIDENT and vm.boots == life:
                    await self._cut(vm)
        finally:
            vm.stopping = False

    async def type(self, vm: Vm, data: bytes) -> None:
        """Type at the guest's console.  While it stands still on its way to another host what is typed is
        kept, and goes with it.  Raises Conflict if nothing reads its console."""
        if vm.state not in (State.RUNNING, State.MIGRATING):
            raise _unread(vm)
        if not vm.away:
            # the lock waits for a move or a clone to end: what is typed meanwhile would be lost
            async with self.changing(vm):
                await self._room(vm)
                self._type(vm, data)
            return
        await self._room(vm)
        # from here on in one step: it may be stopped at any moment
        if not vm.keeps_typed:
            self._type(vm, data)
        elif len(vm.typed) + len(data) <= MAX_TYPED:
            vm.typed += data
        else:
            raise Conflict(vm.away)

    async def _room(self, vm: Vm) -> None:
        if vm.worker is not None:
            await vm.worker.room()

    def _type(self, vm: Vm, data: bytes) -> None:
        if vm.state is not State.RUNNING or vm.worker is None:
            raise Conflict(vm.away) if vm.away else _unread(vm)
        vm.worker.send(protocol.Input(vm.lease, data))

    def type_kept(self, vm: Vm) -> None:
        """The guest runs: what was typed while it stood still is typed now."""
        typed, vm.typed, vm.keeps_typed = vm.typed, b"", False
        if typed:
            self._type(vm, typed)

    async def reset(self, vm: Vm, step: Step) -> None:
        async with self.changing(vm):
            vm.check(Trigger.RESET)
            if vm.worker is not None:
                await self.leases.release(vm)
            self._end(vm, Trigger.RESET, "reset", follow_up=False)
            await self._boot(vm, step)

    async def destroy(self, vm: Vm, force: bool, patient: bool = False) -> None:
        """`patient`: the end of a migration is waited for."""
        self.give_up_start(vm)
        vm.stopping = True
        try:
            async with self.changing(vm, patient):
                if vm.state in RESIDENT:
                    if not force:
                        raise Conflict(f"VM {vm.name} is {vm.state}: stop it first, or destroy it by force")
                    await self._cut(vm)
                await trio.to_thread.run_sync(self._inventory.remove, vm.name)
                self.forget(vm)
        finally:
            vm.stopping = False

    async def move(self, vm: Vm, target: Worker) -> None:
        """Have another worker run the guest from here on."""
        async with self.changing(vm):
            vm.follow(Trigger.MOVE)
            await self.go_on(vm, await self.leases.release(vm), target)
            self._events.publish("vm.moved", vm.name, worker=vm.worker.index if vm.worker else None)

    async def go_on(self, vm: Vm, released: protocol.Released, target: Worker | None,
                    state: bytes = b"") -> None:
        """Have `target`, or another worker, run a guest in MIGRATING on from where it was released, perhaps
        in another `state`: raises NotTaken if that is refused.  Where that cannot be it is paused."""
        try:
            await self.hand_over(vm, state or released.state, Trigger.MOVED, released.at_ns, target,
                                 tried=bool(state))
        except NotTaken:
            raise
        except HostError:
            if vm.state == State.MIGRATING:
                vm.parked = released.state
                vm.follow(Trigger.PAUSE, "no worker was left to run it")
            raise

    async def try_move(self, vm: Vm, target: Worker) -> None:
        """Move for the balancer's sake: not worth waiting for, and no harm if it does not work out."""
        if vm.lock.locked():
            return
        try:
            await self.move(vm, target)
        except HostError as error:
            log.info("guest not moved", extra={"vm": vm.name, "why": str(error)})

    async def translations(self, vm: Vm, address: int | None) -> TranslationsView:
        """What became of the guest's code under binary translation: at `address`, or anywhere."""
        if vm.definition.vmm != "bt":
            raise Conflict(f"the monitor of VM {vm.name} is {vm.definition.vmm}: "
                           "only guests of bt are translated")
        async with self.changing(vm):
            if vm.worker is None:
                raise Conflict(f"VM {vm.name} is {vm.state}: only a running one has translations")
            listing = await self.leases.translations(vm, address)
        if listing.problem:
            raise Failed(f"VM {vm.name}: {listing.problem}")
        if address is not None and not listing.text:
            raise NotFound(f"nothing at {address:#x} is translated in VM {vm.name}: "
                           "it has not run, or not lately")
        return TranslationsView(text=listing.text, complete=listing.complete)

    def warm_up(self, monitor: str) -> None:
        """A guest of this monitor is about to come, which is not to wait for its worker to get ready."""
        if monitor == "bt":
            for worker in self.workers.alive:
                worker.send(protocol.WarmUp())

    def throttle(self, vm: Vm, percent: int | None) -> None:
        """Hold the guest to `percent` of a CPU (1 to 100), or None: to what its definition says."""
        vm.throttle = percent
        self.tell_share(vm)

    def tell_share(self, vm: Vm) -> None:
        """Its weight, or its cap, is another."""
        if vm.worker is not None:
            vm.worker.send(protocol.SetShare(vm.lease, vm.definition.weight, vm.cap))

    def give_up_start(self, vm: Vm) -> None:
        """Cancel a start under way, or the wait for a restart."""
        if vm.starting is not None:
            vm.starting.cancel()

    async def hand_over(self, vm: Vm, state: bytes, trigger: Trigger, since_ns: int = 0,
                        target: Worker | None = None, unchanged: bool = False, tried: bool = False) -> None:
        """Give the guest to `target`, or to whichever worker suits; to another if that one dies over it.
        `unchanged`: `target` had it last, and nobody has written to its memory since.  `tried`: a worker that
        refuses it leaves it as it was, and NotTaken is raised."""
        for _ in range(HAND_OVERS):
            await self.workers.wait_ready()
            alive = self.workers.alive
            worker = target if target in alive else self.placement.place(alive, self.vms.values())
            try:
                await self.leases.adopt(vm, worker, state, trigger, since_ns, unchanged and worker is target,
                                        tried)
                return
            except NeverAdopted as error:
                log.warning("guest not handed over", extra={"vm": vm.name, "why": str(error)})
        raise Failed(f"VM {vm.name}: every worker died that was to run it")

    # --- definitions ------------------------------------------------------------------------------

    def add(self, vm: Vm) -> None:
        self.vms[vm.name] = vm
        self._events.publish("vm.defined", vm.name, template=vm.definition.template)

    def forget(self, vm: Vm) -> None:
        """The VM's definition is gone, and so is the VM."""
        vm.destroyed = True
        del self.vms[vm.name]
        self._events.publish("vm.destroyed", vm.name)
        vm.console.close()
        vm.activity.notify()

    async def crash(self, vm: Vm, why: str) -> None:
        """The guest cannot go on, for a reason that is not its own."""
        async with self.changing(vm, patient=True):
            if vm.worker is not None:
                await self.leases.release(vm)
            if vm.state in RESIDENT:
                self._end(vm, Trigger.CRASH, why)

    def depart(self, vm: Vm) -> None:
        """The guest lives at another host; its definition has been removed.  The caller holds its lock."""
        self._free(vm)
        self.forget(vm)

    # --- lives ------------------------------------------------------------------------------------

    async def _boot(self, vm: Vm, step: Step) -> None:
        """From STARTING to RUNNING, or to DEFINED with nothing left behind.  The caller holds the lock."""
        with trio.CancelScope() as vm.starting:
            try:
                step("reading the kernel", 0.1)
                files = await trio.to_thread.run_sync(self._images.boot_files, vm.definition)
                image = await trio.to_thread.run_sync(lay_out, files, vm.definition.memory)
                step("filling memory", 0.4)
                vm.block = self._memory.books.new(vm.definition.memory)
                state = await fill(self._memory, vm.block, image, vm.definition.vmm)
                step("waiting for a worker", 0.8)
                await self.workers.wait_ready()
                vm.console.mark_boot()
                vm.begin_life()
                await self.hand_over(vm, state, Trigger.LOADED)
            except BaseException as error:
                if vm.state == State.STARTING:
                    self._free(vm)
                    vm.follow(Trigger.ABANDON,
                              f"not started: {error}" if isinstance(error, HostError) else "start given up")
                raise
            finally:
                vm.starting = None
            return
        raise Conflict(f"the start of VM {vm.name} was given up")

    async def launch(self, vm: Vm, state: bytes) -> None:
        """Have a worker run a guest in STARTING whose memory is there; if none can it is paused, and can be
        resumed.  The caller holds the lock."""
        try:
            await self.hand_over(vm, state, Trigger.LOADED)
        except HostError as error:
            if vm.state == State.STARTING:
                vm.parked = state
                vm.follow(Trigger.PAUSE, str(error))
            raise

    async def _cut(self, vm: Vm) -> None:
        """Cut the power.  The caller holds the lock."""
        if vm.worker is not None:
            try:
                await self.leases.release(vm)
            except HostError:
                if vm.state not in RESIDENT:
                    return                          # it ended by itself in the same moment
                raise
        self._end(vm, Trigger.POWER_OFF, "power cut", follow_up=False)

    def _end(self, vm: Vm, trigger: Trigger, reason: str, follow_up: bool = True) -> None:
        """A life is over: tell, free the memory, and do what the policy says.  No worker has the guest."""
        if trigger is Trigger.RESET and follow_up and (vm.stopping or self.closing):
            trigger = Trigger.POWER_OFF
        lived = vm.age()
        vm.crashes += trigger is Trigger.CRASH
        self._free(vm)
        vm.follow(trigger, reason)
        log.log(logging.WARNING if trigger is Trigger.CRASH else logging.INFO, "guest ended",
                extra={"vm": vm.name, "state": str(vm.state), "why": reason})
        if not follow_up or vm.stopping or self.closing:
            return
        policy = {Trigger.RESET: Policy.RESTART, Trigger.CRASH: vm.definition.on_crash,
                  Trigger.POWER_OFF: vm.definition.on_poweroff}[trigger]
        if policy is Policy.RESTART:
            vm.starting = trio.CancelScope()
            self._nursery.start_soon(self._restart, vm, vm.starting, vm.backoff.delay(lived),
                                     name=f"restart {vm.name}")
        elif policy is Policy.DESTROY:
            self._nursery.start_soon(self._destroy_by_policy, vm, name=f"destroy {vm.name}")

    async def _restart(self, vm: Vm, wait: trio.CancelScope, delay: float) -> None:
        """Start again a guest that ended by itself, after `delay`, unless someone else decides otherwise."""
        state, life = vm.state, vm.boots
        with wait:
            await trio.sleep(delay)
        if vm.starting is wait:
            vm.starting = None
        try:
            async with self.changing(vm, patient=True):
                if (vm.state, vm.boots) != (state, life):
                    return
                if wait.cancelled_caught:
                    if state == State.STARTING:
                        vm.follow(Trigger.ABANDON, "start given up")
                    return
                if state != State.STARTING:         # after a reset it is STARTING already
                    vm.follow(Trigger.START)
                await self._boot(vm, lambda phase, progress: None)
        except HostError as error:
            log.error("restart failed", extra={"vm": vm.name, "why": str(error)})
        except Exception:
            log.exception("restart failed", extra={"vm": vm.name})

    async def _destroy_by_policy(self, vm: Vm) -> None:
        try:
            await self.destroy(vm, force=False, patient=True)
        except HostError as error:
            log.error("destroy by policy failed", extra={"vm": vm.name, "why": str(error)})
        except Exception:
            log.exception("destroy by policy failed", extra={"vm": vm.name})

    def _free(self, vm: Vm) -> None:
        """Give the guest's memory back, keeping its counters."""
        vm.parked, vm.fetching = b"", None
        if vm.block is None:
            return
        block, vm.block = vm.block, None
        vm.ledger.fold(block)
        self._memory.books.free(block)


def _unread(vm: Vm) -> Conflict:
    return Conflict(f"VM {vm.name} is {vm.state}: nothing reads its console")
