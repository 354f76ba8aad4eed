# SPDX-License-Identifier: GPL-2.0-or-later
"""The worker processes: one per physical CPU, kept alive, talked to.

This module knows processes and messages, not guests.  What a worker says, and that it died, goes to the
`Listener`.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Protocol

import trio

from hostd import protocol
from hostd.errors import Failed
from hostd.lifecycle import Backoff
from hostd.model import WorkerView
from hostd.scheduler import LATENCY_BOUNDS_NS
from vmm.silicon import tsc

log = logging.getLogger(__name__)

#: what runs a worker; hostd/worker.py says what the arguments after it are
WORKER_COMMAND = (sys.executable, "-m", "hostd.worker")
#: how often workers are asked whether they are alive, and how long they may leave it unanswered
HEARTBEAT_S = 1.0
HANG_S = 15.0
#: the silicon's self-test and the mapping of the pool take well under a second
READY_S = 30.0
#: how long a worker that closed its end may take to exit by itself
EXIT_S = 0.5
#: console input waits while this much is queued for a worker...
INPUT_BACKLOG = 1 << 20
#: ...and a worker that lets this much of anything pile up is taken for dead
MAX_BACKLOG = 64 << 20


class Listener(Protocol):
    """Who acts on what workers say.  Both are called in the order things happened, and must not block."""

    def on_message(self, worker: Worker, message: protocol.ToDaemon) -> None: ...

    def on_death(self, worker: Worker, why: str) -> None:
        """The process is gone for good: it does not touch the pool any more."""


class Worker:
    """One worker process from its start to its death; its replacement is another object of the same index."""

    def __init__(self, index: int, restarts: int) -> None:
        self.index = index
        self.restarts = restarts
        self.pid = 0
        self.hello: protocol.Hello | None = None
        self.pong = protocol.Pong(0, [], 0)
        #: set, and replaced, when it answers a Ping or dies
        self.answered = trio.Event()
        self.dead = False
        self.last_heard = math.inf
        self._queue: list[bytes] = []
        self._queued = 0
        self._filled = trio.Event()
        self._drained = trio.Event()

    @property
    def ready(self) -> bool:
        """It said hello and has not died."""
        return self.hello is not None and not self.dead

    def send(self, message: protocol.ToWorker) -> None:
        """Queue a message; it is lost if the worker dies, and `Listener.on_death` tells."""
        if self.dead:
            return
        data = protocol.encode(message)
        self._queue.append(data)
        self._queued += len(data)
        self._filled.set()
        if self._queued > MAX_BACKLOG:
            log.error("worker does not take messages", extra={"worker": self.index})
            self.kill()

    async def room(self) -> None:
        """Wait until little is queued."""
        while self._queued > INPUT_BACKLOG and not self.dead:
            self._drained = trio.Event()
            await self._drained.wait()

    def kill(self) -> None:
        """End the process.  The rest follows from its death."""
        if self.pid and not self.dead:
            os.kill(self.pid, signal.SIGKILL)

    async def take_queue(self) -> bytes:
        """What is to be written to the worker next."""
        while not self._queue:
            self._drained.set()
            self._filled = trio.Event()
            await self._filled.wait()
        data = b"".join(self._queue)
        self._queue.clear()
        self._queued = 0
        return data

    def hear(self, pong: protocol.Pong) -> None:
        self.pong = pong
        self._notify()

    def _notify(self) -> None:
        self.answered.set()
        self.answered = trio.Event()

    def mark_dead(self) -> None:
        self.dead = True
        self._notify()
        self._drained.set()

    def view(self, vms: int) -> WorkerView:
        hello = self.hello
        return WorkerView(index=self.index, pid=self.pid, ready=self.ready, vms=vms, restarts=self.restarts,
                          silicon=hello.silicon if hello else "", tsc_khz=hello.tsc_khz if hello else 0,
                          translator=self.pong.translator)


class Workers:
    """All workers.  Each slot has a task that starts a process, serves it until it dies, and starts anew."""

    def __init__(self, count: int, pool_fd: int, pool_bytes: int, listener: Listener,
                 options: Sequence[str] = (),
                 command: Sequence[str] = WORKER_COMMAND) -> None:
        self._command = command
        self._pool_bytes = pool_bytes
        self._options = options
        #: frequency of the time stamp counter, once it was measured
        self.tsc_khz = 0
        self._pool_fd = pool_fd
        self._listener = listener
        self._slots = [Worker(index, 0) for index in range(count)]
        self._changed = trio.Event()
        self._closing = False
        #: numbers of Pings
        self._beats = itertools.count(1)
        #: what dead workers had counted
        self._past_wakeups = [0] * (len(LATENCY_BOUNDS_NS) + 1)
        self._past_wakeup_ns = 0

    @property
    def all(self) -> list[Worker]:
        return list(self._slots)

    @property
    def ready(self) -> list[Worker]:
        return [worker for worker in self._slots if worker.ready]

    @property
    def alive(self) -> list[Worker]:
        """The ready ones and those that are about to be: what they are told now they do then."""
        return [worker for worker in self._slots if worker.pid and not worker.dead]

    async def wait_ready(self) -> None:
        """Wait until a worker can take guests.  Raises Failed when none comes."""
        with trio.move_on_after(READY_S):
            while not self.ready:
                await self._changed.wait()
        if not self.ready:
            raise Failed("no worker process is ready to run guests: see the daemon's log")

    def healthy(self) -> bool:
        """Every worker that is up answered lately."""
        now = trio.current_time()
        return all(now - worker.last_heard < HANG_S for worker in self._slots if not worker.dead)

    def latency(self) -> tuple[list[int], float]:
        """Wake-up latencies of all workers there ever were: counts per bucket, and their sum in seconds."""
        counts, total = self._past_wakeups, self._past_wakeup_ns
        for worker in self._slots:
            if not worker.dead:
                counts = _add(counts, worker.pong.wakeups)
                total += worker.pong.wakeup_ns
        return counts, total / 1e9

    async def run(self) -> None:
        """Keep all workers running until cancelled or `quit`."""
        # measured once, so that guests see one frequency wherever they go
        self.tsc_khz = await trio.to_thread.run_sync(tsc.measure_khz)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._heartbeat)
            async with trio.open_nursery() as slots:
                for index in range(len(self._slots)):
                    slots.start_soon(self._keep, index, name=f"worker {index}")
            nursery.cancel_scope.cancel()

    async def hear(self, given: Callable[[int], int | None] = lambda index: None) -> None:
        """Until every worker that is ready now has said what it had to say when it was asked, or is dead.
        With `given`, how many frames the worker of an index was ever given, they count those they have."""
        beat, asked = next(self._beats), self.ready
        for worker in asked:
            worker.send(protocol.Ping(beat, given(worker.index)))
        for worker in asked:
            while not worker.dead and worker.pong.id < beat:
                await worker.answered.wait()

    def quit(self) -> None:
        """Tell all workers to end; `run` returns when they have."""
        self._closing = True
        for worker in self._slots:
            worker.send(protocol.Quit())

    async def _keep(self, index: int) -> None:
        backoff = Backoff()
        while True:
            worker = self._slots[index]
            started = trio.current_time()
            why = await self._serve(worker)
            worker.mark_dead()
            self._past_wakeups = _add(self._past_wakeups, worker.pong.wakeups)
            self._past_wakeup_ns += worker.pong.wakeup_ns
            if not self._closing:
                log.error("worker died", extra={"worker": index, "pid": worker.pid, "why": why})
            # also of one that was told to quit: somebody may have asked it for something since
            self._listener.on_death(worker, f"worker {index} died: {why}")
            if self._closing:
                return
            self._slots[index] = Worker(index, worker.restarts + 1)
            await trio.sleep(backoff.delay(trio.current_time() - started))

    async def _serve(self, worker: Worker) -> str:
        """Start the process of `worker` and talk to it until it is reaped; the answer is how it ended."""
        try:
            process, stream = await self._spawn(worker)
        except OSError as error:
            return f"it could not be started: {error.strerror}"
        worker.pid = process.pid
        worker.last_heard = trio.current_time()
        try:
            async with stream, trio.open_nursery() as nursery:
                nursery.start_soon(_write, worker, stream)
                await self._read(worker, stream)
                nursery.cancel_scope.cancel()
        finally:
            # Invariant: nobody is told of a worker's death before its process is reaped, because until then
            # it may write to the frames of its guests.
            with trio.CancelScope(shield=True):
                with trio.move_on_after(EXIT_S):
                    await process.wait()
                process.kill()
                await process.wait()
        return _how(process.returncode)

    async def _spawn(self, worker: Worker) -> tuple[trio.Process, trio.SocketStream]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
            # the same code as the daemon's, wherever that was imported from
            package = str(Path(__file__).parent.parent)
            path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
            try:
                process = await trio.lowlevel.open_process(
                    [*self._command, str(theirs.fileno()), str(worker.index), str(self._pool_fd),
                     str(self._pool_bytes), str(self.tsc_khz), *self._options],
                    stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(), self._pool_fd),
                    # ^C on a terminal is for the daemon, which stops guests before it stops workers
                    start_new_session=True, env={**os.environ, "PYTHONPATH": path})
            except BaseException:
                stream.socket.close()
                raise
        return process, stream

    async def _read(self, worker: Worker, stream: trio.SocketStream) -> None:
        """Pass on what the worker says until its end of the stream is closed."""
        splitter = protocol.Splitter[protocol.ToDaemon](protocol.ToDaemon)
        try:
            async for data in stream:
                worker.last_heard = trio.current_time()
                for message in splitter.feed(bytes(data)):
                    self._dispatch(worker, message)
        except trio.BrokenResourceError:
            pass
        except protocol.ProtocolError as error:
            log.error("worker talks nonsense", extra={"worker": worker.index, "why": str(error)})
        except Exception:
            # a mistake of ours: this worker's guests are lost, the daemon and the others go on
            log.exception("a worker's message could not be dealt with", extra={"worker": worker.index})

    def _dispatch(self, worker: Worker, message: protocol.ToDaemon) -> None:
        match message:
            case protocol.Hello():
                worker.hello = message
                log.info("worker ready", extra={"worker": worker.index, "pid": worker.pid})
                changed, self._changed = self._changed, trio.Event()
                changed.set()
            case protocol.Pong():
                worker.hear(message)
        self._listener.on_message(worker, message)

    async def _heartbeat(self) -> None:
        while True:
            await trio.sleep(HEARTBEAT_S)
            beat = next(self._beats)
            now = trio.current_time()
            for worker in self._slots:
                if worker.ready:
                    worker.send(protocol.Ping(beat))
                if now - worker.last_heard > (HANG_S if worker.ready else READY_S):
                    log.error("worker does not answer", extra={"worker": worker.index, "pid": worker.pid})
                    worker.kill()


async def _write(worker: Worker, stream: trio.SocketStream) -> None:
    try:
        while True:
            await stream.send_all(await worker.take_queue())
    except trio.BrokenResourceError:
        return                      # the reader sees the end of the stream


def _add(left: list[int], right: list[int]) -> list[int]:
    return [a + b for a, b in zip_longest(left, right, fillvalue=0)]


def _how(returncode: int | None) -> str:
    """The end of a process in words."""
    if returncode is None or returncode >= 0:
        return f"exited with status {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"
