# SPDX-License-Identifier: GPL-2.0-or-later
"""What a worker process does: the guests that take turns on its CPU, and what the daemon tells it.

One thread does everything: it reads messages, asks the run queue whose turn it is, runs that guest until its
slice ends, another guest's alarm is due or a message arrives (either kicks the CPU), and settles what came of
it.  While nobody can run it sleeps in select(2) until the next alarm or message.
"""

from __future__ import annotations

import heapq
import logging
import os
import select
import socket
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

from hostd import protocol
from hostd.openslots import OpenSlots
from hostd.resident import Resident
from hostd.scheduler import RunQueue
from hostd.stock import Stock
from hostd.translations import Translations
from hostd.translator import NoTranslator, Translator
from vmm.memory.block import VmBlock
from vmm.memory.pool import Pool
from vmm.memory.records import StoreError
from vmm.monitor import Stop, StopReason
from vmm.silicon.cpu import Cpu, CpuShutdown
from vmm.state import StateError

log = logging.getLogger(__name__)

#: output that is collected before it is sent, unless a turn ends first
OUTPUT_BUFFER = 256 << 10
#: console input that a guest was too slow for is dropped by its UART; nothing else is read in larger pieces
RECEIVE = 256 << 10


_ENDINGS: dict[StopReason, protocol.Ending] = {
    StopReason.POWEROFF: "poweroff",
    StopReason.RESET: "reset",
    StopReason.CRASHED: "crashed",
    StopReason.EXIT: "exit",
}


class DaemonGone(Exception):
    """The other end of the socket is closed: there is nobody to work for."""


class WorkerLoop:
    """The guests of this process.

    Invariant: a guest is in `_guests`, and in the run queue, from its Adopt until its Stopped, Released or
    Refused is in `_output`; nothing is said about it outside that time.
    """

    def __init__(self, channel: socket.socket, pool: Pool, cpu: Cpu, translator: Translator, tsc_khz: int,
                 slice_ns: int, refill: int) -> None:
        self._channel = channel
        self._pool = pool
        self._cpu = cpu
        self._translator = translator
        self._tsc_khz = tsc_khz
        self._stock = Stock(refill)
        self._translations = Translations(cpu)
        self._slots = OpenSlots()
        self._queue = RunQueue(slice_ns)
        self._guests: dict[str, Resident] = {}
        #: (CLOCK_MONOTONIC ns, lease) of halted guests; an entry counts if it is its guest's `alarm`
        self._alarms: list[tuple[int, str]] = []
        #: guests waiting for a Grant, or for a page from another host
        self._starved: list[str] = []
        self._quit = False
        self._splitter = protocol.Splitter[protocol.ToWorker](protocol.ToWorker)
        self._output = bytearray()
        self._on: dict[type, Callable[[Any], None]] = {
            protocol.Adopt: self._on_adopt,
            protocol.Release: self._on_release,
            protocol.Input: self._on_input,
            protocol.SetShare: self._on_set_share,
            protocol.PowerButton: self._on_power_button,
            protocol.Reclaim: self._on_reclaim,
            protocol.DirtyLog: self._on_dirty_log,
            protocol.SetBalloon: self._on_set_balloon,
            protocol.SetRation: self._on_set_ration,
            protocol.CloseStore: self._on_close_store,
            protocol.ListTranslations: self._on_list_translations,
            protocol.WarmUp: self._on_warm_up,
            protocol.Grant: self._on_grant,
            protocol.GiveBack: self._on_give_back,
            protocol.Ping: self._on_ping,
            protocol.Quit: self._on_quit,
        }
        self._after: dict[StopReason, Callable[[Resident, Stop, int], None]] = {
            StopReason.SLICE: self._go_on,
            StopReason.KICKED: self._go_on,
            StopReason.HALTED: self._halted,
            StopReason.NO_FRAMES: self._starve,
            **dict.fromkeys(_ENDINGS, self._ended),
        }

    def run(self) -> None:
        """Work until the daemon says Quit, or is gone."""
        try:
            while not self._quit:
                self._receive()
                now = time.monotonic_ns()
                self._ring_alarms(now)
                pick = self._queue.pick(now)
                if pick is None:
                    self._sleep(now)
                else:
                    self._turn(self._guests[pick.id], now, pick.slice_ns)
        except DaemonGone:
            log.warning("the daemon is gone")

    # --- turns ----------------------------------------------------------------------------------------

    def _turn(self, guest: Resident, now: int, slice_ns: int) -> None:
        """Run the guest whose turn it is, and settle what came of it."""
        deadline = now + slice_ns
        if self._alarms and self._alarms[0][0] < deadline:
            deadline = max(self._alarms[0][0], now + 1)
        guest.tell_steal(self._queue.usage(guest.lease, now).wait_ns)
        # CPU time, not elapsed time: what the machine's other work took from this process, the guest waited
        began = time.thread_time_ns()
        stop = guest.run(deadline)
        ran, ended = time.thread_time_ns() - began, time.monotonic_ns()
        self._queue.charge(guest.lease, ran, ended)
        self._after[stop.reason](guest, stop, ended)
        if guest.lease in self._guests:
            guest.account(self._queue.usage(guest.lease, ended))
            self._report(guest)
            for message in guest.take_wanted(), guest.take_balloon():
                if message is not None:
                    self._send(message)
        self._keep_stock()
        self._flush()

    def _go_on(self, guest: Resident, stop: Stop, now: int) -> None:
        """It can run on whenever its turn comes."""

    def _halted(self, guest: Resident, stop: Stop, now: int) -> None:
        if guest.machine.wake_pending():
            return
        self._queue.sleep(guest.lease, now)
        alarm = guest.machine.next_wake()
        if alarm is not None and alarm != guest.alarm:
            guest.alarm = alarm
            heapq.heappush(self._alarms, (alarm, guest.lease))

    def _starve(self, guest: Resident, stop: Stop, now: int) -> None:
        self._queue.sleep(guest.lease, now)
        self._starved.append(guest.lease)
        if guest.ration.used_up:
            self._send(protocol.AtLimit(guest.lease))

    def _ended(self, guest: Resident, stop: Stop, now: int) -> None:
        guest.machine.pause_clock()                 # off the CPU, before its memory becomes somebody else's
        self._forget(guest, now)
        self._send(protocol.Stopped(guest.lease, _ENDINGS[stop.reason], stop.detail, stop.status))

    def _ring_alarms(self, now: int) -> None:
        while self._alarms and self._alarms[0][0] <= now:
            when, lease = heapq.heappop(self._alarms)
            guest = self._guests.get(lease)
            if guest is not None and guest.alarm == when:
                guest.alarm = None
                if lease not in self._starved:
                    self._queue.wake(lease, when)

    def _sleep(self, now: int) -> None:
        """Nobody can run: wait for a message, an alarm, or a cap that lets go."""
        times = [when for when in (self._alarms[0][0] if self._alarms else None, self._queue.next_event(now))
                 if when is not None]
        timeout = max(0, min(times) - now) / 1e9 if times else None
        select.select([self._channel], [], [], timeout)

    # --- messages -------------------------------------------------------------------------------------

    def _receive(self) -> None:
        """Act on what the daemon has said by now."""
        try:
            data = self._channel.recv(RECEIVE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            raise DaemonGone
        for message in self._splitter.feed(data):
            self._on[type(message)](message)
        self._flush()

    def _on_adopt(self, message: protocol.Adopt) -> None:
        now = time.monotonic_ns()
        lease = message.vm
        try:
            block = VmBlock(self._pool, message.base_frame, message.memory_bytes)
            self._translations.forget_guest(block.leaf(), message.snapshot, message.unchanged)
            self._slots.open(message.stores)
            guest = Resident(message, self._cpu, block, self._stock.magazine, self._tsc_khz,
                             lambda data: self._say(lease, data), self._translator, self._slots)
        except (StateError, StoreError) as error:
            self._send(protocol.Refused(lease, "adopt", f"its state cannot be loaded: {error}"))
            return
        except NoTranslator as error:
            log.exception("no engine for binary translation")
            self._send(protocol.Refused(lease, "adopt", str(error)))
            return
        except CpuShutdown:
            raise
        except Exception as error:
            # a state that nobody thought of is that guest's affair: the others here live on
            log.exception("guest not adopted", extra={"vm": lease})
            self._send(protocol.Refused(
                lease, "adopt", f"its state cannot be loaded: {type(error).__name__}: {error}"))
            return
        self._guests[lease] = guest
        self._queue.add(lease, message.weight, message.cap, now)
        self._send(protocol.Adopted(lease))
        self._keep_stock()

    def _on_release(self, message: protocol.Release) -> None:
        guest = self._guests.get(message.vm)
        if guest is None:
            self._send(protocol.Refused(message.vm, "release", "it has ended"))
            return
        state, stopped_ns = guest.capture()
        self._forget(guest, time.monotonic_ns())
        self._send(protocol.Released(guest.lease, state, stopped_ns))

    def _on_input(self, message: protocol.Input) -> None:
        guest = self._guests.get(message.vm)
        if guest is not None:
            guest.machine.feed(message.data)
            self._rouse(guest)

    def _on_power_button(self, message: protocol.PowerButton) -> None:
        guest = self._guests.get(message.vm)
        if guest is not None:
            guest.machine.power_button()
            self._rouse(guest)

    def _on_set_share(self, message: protocol.SetShare) -> None:
        if message.vm in self._guests:
            self._queue.set_share(message.vm, message.weight, message.cap)

    def _on_reclaim(self, message: protocol.Reclaim) -> None:
        guest = self._guests.get(message.vm)
        if guest is None:
            return
        if message.what in ("merge", "install"):
            self._translations.forget_others(message.frames)
        done = guest.reclaim(message)
        # Invariant: what a page let go of by itself is told before what was done to it, or the books would
        # take off what it is charged with now
        self._report(guest)
        self._send(done)
        if message.what not in ("watch", "freeze"):     # which give nobody a frame yet
            self._feed(message.vm)

    def _on_dirty_log(self, message: protocol.DirtyLog) -> None:
        guest = self._guests.get(message.vm)
        if guest is not None:
            self._send(guest.dirty_log(message.what))

    def _on_set_balloon(self, message: protocol.SetBalloon) -> None:
        guest = self._guests.get(message.vm)
        if guest is not None:
            self._send(guest.set_balloon(message.pages, message.statistics))
            self._rouse(guest)

    def _on_set_ration(self, message: protocol.SetRation) -> None:
        guest = self._guests.get(message.vm)
        if guest is not None:
            guest.ration.set(message.most)
            self._feed(message.vm)

    def _on_close_store(self, message: protocol.CloseStore) -> None:
        self._slots.close(message.number)

    def _on_list_translations(self, message: protocol.ListTranslations) -> None:
        guest = self._guests.get(message.vm)
        if guest is not None:
            self._send(guest.listing(message.address))

    def _on_warm_up(self, message: protocol.WarmUp) -> None:
        try:
            self._translator.engine()
            import_module("vmm.bt.processor")
        except NoTranslator as error:
            log.warning("no engine for binary translation", extra={"why": str(error)})

    def _on_grant(self, message: protocol.Grant) -> None:
        for first, count in message.extents:
            self._translations.forget_frames(first, count)
        self._stock.granted(message.extents)
        self._starved = [lease for lease in self._starved if lease in self._guests]
        for lease in [lease for lease in self._starved if not self._guests[lease].ration.used_up]:
            self._feed(lease)

    def _on_give_back(self, message: protocol.GiveBack) -> None:
        spare = self._stock.spare(guests=bool(self._guests))
        if spare is not None:
            self._send(spare)

    def _on_ping(self, message: protocol.Ping) -> None:
        now = time.monotonic_ns()
        for lease, guest in self._guests.items():
            guest.account(self._queue.usage(lease, now))
        latency = self._queue.latency
        frames = 0 if message.given is None else self._count()
        self._send(protocol.Pong(message.id, latency.counts, latency.sum_ns, self._translator.view(),
                                 frames, message.given))

    def _on_quit(self, message: protocol.Quit) -> None:
        self._quit = True

    # --- small change ---------------------------------------------------------------------------------

    def _feed(self, lease: str) -> None:
        """There may be a frame for the guest: if it waits for one, it tries again."""
        if lease in self._starved:
            self._starved.remove(lease)
            self._queue.wake(lease, time.monotonic_ns())

    def _rouse(self, guest: Resident) -> None:
        """An interrupt may have come up for the guest: if it halted, it is ready again."""
        if guest.machine.wake_pending() and guest.lease not in self._starved:
            self._queue.wake(guest.lease, time.monotonic_ns())

    def _forget(self, guest: Resident, now: int) -> None:
        """Close the guest's books: it is not here any more."""
        guest.account(self._queue.remove(guest.lease, now))
        self._report(guest)
        guest.close()
        del self._guests[guest.lease]

    def _report(self, guest: Resident) -> None:
        report = guest.take_report()
        if report is not None:
            self._send(report)

    def _count(self) -> int:
        """Frames that it has, in stock and in guests' own pages; what they gave back was told before."""
        for guest in self._guests.values():
            self._report(guest)
        return len(self._stock.magazine) + sum(guest.private_pages() for guest in self._guests.values())

    def _keep_stock(self) -> None:
        wanted = self._stock.wanted()
        if wanted is not None:
            self._send(wanted)

    def _say(self, lease: str, data: bytes) -> None:
        self._send(protocol.Console(lease, data))
        if len(self._output) > OUTPUT_BUFFER:
            self._flush()

    def _send(self, message: protocol.Message) -> None:
        self._output += protocol.encode(message)

    def _flush(self) -> None:
        if not self._output:
            return
        output, self._output = self._output, bytearray()
        try:
            self._channel.sendall(output)
        except ConnectionError:
            raise DaemonGone from None

    def hello(self, silicon: str) -> None:
        """Tell the daemon that guests can come."""
        self._send(protocol.Hello(os.getpid(), self._tsc_khz, silicon))
        self._flush()
