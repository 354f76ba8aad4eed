# SPDX-License-Identifier: GPL-2.0-or-later
"""The last moments of a guest on this host: stopped, its last pages sent, handed over, let go of.

Invariant: up to the word Commit this host alone decides what becomes of the guest, from that word on the
other host alone (docs/MIGRATION.md, the commit protocol).  What goes wrong before it ends with the guest
running here; afterwards nothing but the other host's answer, or a user's word, does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import trio

from hostd.definition import Definition
from hostd.errors import Failed, HostError
from hostd.lifecycle import State, Trigger
from hostd.migration.conversation import Conversation, Declined
from hostd.migration.copying import Copying
from hostd.migration.dirty import DirtyLog
from hostd.migration.doubt import Doubt, let_go
from hostd.migration.here import Here
from hostd.migration.memory_out import OutgoingMemory
from hostd.migration.messages import Commit, Committed, Final, Ready
from hostd.migration.pages import pack_bitmap
from hostd.migration.peers import Peer
from hostd.migration.progress import Progress
from hostd.migration.serving_pages import serve
from hostd.saved import Life, SavedVm, encode_saved
from hostd.vm import Vm
from vmm.state import decode, encode

log = logging.getLogger(__name__)

#: how long the other host may take to say that it has all of a guest that stands still, beyond what was
#: expected; and then whether the guest is its own, before it is asked on another connection
ANSWER_S = 5.0


class Stopped(NamedTuple):
    """A guest that stands still: its MachineState, since when (host monotonic time), and whether a user had
    paused it before."""

    state: bytes
    at_ns: int
    paused: bool


class Leaving:
    """One guest's."""

    def __init__(self, here: Here, vm: Vm, peer: Peer, progress: Progress) -> None:
        self.doubt = Doubt(progress.token)
        #: round all of the migration; shielded once it is not to be cancelled by a user, until the host goes
        #: down
        self.scope = trio.CancelScope()
        self._here = here
        self._vm = vm
        self._peer = peer
        self._progress = progress
        #: when the other host was heard to be ready
        self._ready_ns = 0

    async def run(self, talks: Sequence[Conversation], copying: Copying, written: DirtyLog, left: np.ndarray,
                  later: bool, definition: Definition) -> None:
        """Hand the guest over.  `left`: pages that were not sent yet; `later`: they are fetched when the
        guest runs there.

        Raises HostError, and the guest is here.
        """
        talk, token = talks[0], self._progress.token
        handovers = self._here.handovers
        self._here.departures.forget(self._vm.name)
        await trio.to_thread.run_sync(handovers.fence, token, self._vm.definition, self._peer.name)
        try:
            stopped = await self._stop()
            try:
                left = await self._send_last(talk, copying, written, stopped, left, later, definition)
            except BaseException:
                await self._go_on(stopped)
                raise
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(handovers.forget, token)
            raise
        self.scope.shield = True
        await self._commit(talk, stopped, left)

    async def _stop(self) -> Stopped:
        vm = self._vm
        self._progress.phase = "stopping"
        paused, state = vm.state is State.PAUSED, vm.parked
        vm.follow(Trigger.MOVE)
        if paused:
            vm.parked = b""
            return Stopped(state, time.monotonic_ns(), True)
        vm.typed, vm.keeps_typed = b"", True
        try:
            released = await self._here.guests.leases.release(vm)
        except HostError:
            vm.keeps_typed = False
            raise
        return Stopped(released.state, released.at_ns, False)

    async def _go_on(self, stopped: Stopped) -> None:
        """It stays here."""
        vm = self._vm
        with trio.CancelScope(shield=True):
            try:
                if not stopped.paused:
                    vm.keeps_typed = True
                    await self._here.guests.hand_over(vm, stopped.state, Trigger.MOVED, stopped.at_ns)
                    self._here.guests.type_kept(vm)
                    return
            except HostError as error:
                vm.keeps_typed = False
                log.error("guest does not go on", extra={"vm": vm.name, "why": str(error)})
            if vm.state is State.MIGRATING:
                vm.parked = stopped.state
                vm.follow(Trigger.PAUSE, "" if stopped.paused else "no worker was left to run it")

    async def _send_last(self, talk: Conversation, copying: Copying, written: DirtyLog, stopped: Stopped,
                         left: np.ndarray, later: bool, definition: Definition) -> np.ndarray:
        """All that the other host does not have, or with `later` all but pages; the answer is those."""
        within = ANSWER_S + 2 * (self._progress.expected_downtime or 0)
        try:
            with trio.fail_after(within):
                return await self._send_all(talk, copying, written, stopped, left, later, definition)
        except trio.TooSlowError:
            raise Failed(f"{self._peer.name} did not have the rest of VM {self._vm.name} within {within:.0f} "
                         "seconds: it runs on here") from None

    async def _send_all(self, talk: Conversation, copying: Copying, written: DirtyLog, stopped: Stopped,
                        left: np.ndarray, later: bool, definition: Definition) -> np.ndarray:
        vm = self._vm
        assert vm.block is not None
        left = np.union1d(left, await written.collect())
        await copying.send(left[:0] if later else left)
        left = left if later else left[:0]
        state = stopped.state
        if definition.vmm != vm.definition.vmm:
            machine = decode(state)
            machine.monitor = definition.vmm
            state = encode(machine)
        life = SavedVm(definition=definition, life=Life.of(vm, stopped.paused))
        pages = vm.block.pages
        await talk.send(Final(
            state=state, life=encode_saved(life), paused=stopped.paused, pages_left=len(left),
            left=pack_bitmap(left, pages) if len(left) else b"",
            ballooned=pack_bitmap(vm.block.ballooned(), pages)))
        await copying.confirmed()
        await talk.expect(Ready)
        self._ready_ns = time.monotonic_ns()
        return left

    async def _commit(self, talk: Conversation, stopped: Stopped, left: np.ndarray) -> None:
        self._progress.phase = "handing over"
        why = await self._ask(talk, stopped)
        if why is not None:
            await self._go_on(stopped)
            await trio.to_thread.run_sync(self._here.handovers.forget, self._progress.token)
            raise Failed(f"{self._peer.name} did not take VM {self._vm.name} over, it runs on here: {why}")
        if not stopped.paused:
            self._progress.downtime = (time.monotonic_ns() - stopped.at_ns) / 1e9
        if len(left):
            assert self._vm.block is not None
            # its console is there from now on, and some of its memory here
            self._here.departures.add(self._vm.name, self._peer.name, self._progress.token)
            self._vm.console.close()
            await serve(self._peer, talk, OutgoingMemory(self._vm.block), left, self._progress)
        await self._depart(talk)

    async def _ask(self, talk: Conversation, stopped: Stopped) -> str | None:
        """Say Commit; None: the guest is the other host's now, else why it is not."""
        try:
            with trio.fail_after(ANSWER_S):
                now = time.monotonic_ns()
                elapsed = 0 if stopped.paused else now - stopped.at_ns
                # what is typed from here on is refused: it may be the other host's guest that it is for
                self._vm.keeps_typed = False
                await talk.send(Commit(self._progress.token, elapsed, self._vm.typed,
                                       now - self._ready_ns))
                await talk.expect(Committed)
            return None
        except Declined as error:
            return str(error)
        except (HostError, trio.TooSlowError) as error:
            return await self._resolve(str(error) or "no answer")

    async def _resolve(self, why: str) -> str | None:
        """The same, when the answer did not come."""
        vm, before = self._vm, self._vm.away
        log.warning("hand-over in doubt", extra={"vm": vm.name, "peer": self._peer.name, "why": why})
        self._progress.phase = "in doubt"
        vm.away = vm.reason = self._here.handovers.doubt_sentence(self._progress.token)
        vm.activity.notify()
        committed = await self.doubt.resolve(self._peer)
        self._progress.phase = "handing over"
        vm.away, vm.reason = before, ""
        if committed:
            return None
        return f"a user took it back ({why})" if self.doubt.recovered else f"it does not have it ({why})"

    async def _depart(self, talk: Conversation) -> None:
        """The guest is gone, and so is all that it had here."""
        here, vm, token = self._here, self._vm, self._progress.token
        here.departures.add(vm.name, self._peer.name, token)
        await trio.to_thread.run_sync(here.inventory.remove, vm.name)
        here.guests.depart(vm)
        await trio.to_thread.run_sync(here.handovers.forget, token)
        self._progress.end("done")
        if not await let_go(talk, token):
            here.farewells.owe(self._peer, token)
