# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon of one's own: temporary state, its own socket, gone when the `with` ends, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hostd.ctl.client import Client
from hostd.ctl.errors import CtlError

_START_TIMEOUT = 20.0
_STOP_TIMEOUT = 15.0
_SUSPEND_TIMEOUT = 120.0

_CONFIGURATION = """\
[host]
state_dir = "{directory}/state"
runtime_dir = "{directory}"
shutdown_timeout = 0
{host}
[metrics]
address = "{metrics}"
{tables}
"""


@dataclass(frozen=True)
class PrivateDaemon:
    """A running daemon that belongs to this process."""

    client: Client
    socket: Path
    pid: int
    #: seconds from its start until its API answered
    start_seconds: float
    #: the file of what it says
    log: Path


@contextmanager
def private_daemon(*, workers: int = 0, metrics: str = "127.0.0.1:0", pool: int = 0, tables: str = "",
                   directory: Path | None = None, suspend: bool = False) -> Iterator[PrivateDaemon]:
    """Run a daemon with temporary state.  Raises CtlError if it does not start.

    workers: 0 = one a CPU; pool: bytes of machine memory, 0 = as much as a daemon takes by itself; tables:
    more of the configuration file; directory: where its state is and stays; suspend: its guests go to disk
    when it ends.
    """
    with _signals_unwind(), _place(directory) as place:
        configuration = place / "hostd.toml"
        host = "".join(line for line, wanted in (
            (f"workers = {workers}\n", workers), (f"memory = {pool}\n", pool),
            ('on_shutdown = "suspend"\n', suspend)) if wanted)
        configuration.write_text(_CONFIGURATION.format(directory=place, host=host, metrics=metrics,
                                                       tables=tables))
        (place / "state").mkdir(exist_ok=True)
        log = place / "log"
        with log.open("wb") as output:
            began = time.monotonic()
            # In a session of its own, Ctrl-C reaches us only, and we end it in order.
            process = subprocess.Popen(
                [sys.executable, "-m", "hostd.daemon", "--config", str(configuration)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        socket = place / "hostd.sock"
        try:
            with Client(socket) as client:
                _await_answer(client, process, log)
                yield PrivateDaemon(client, socket, process.pid, time.monotonic() - began, log)
        finally:
            _end(process, _SUSPEND_TIMEOUT if suspend else _STOP_TIMEOUT)


@contextmanager
def _place(directory: Path | None) -> Iterator[Path]:
    """`directory`, or a temporary one."""
    if directory is not None:
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="hostd-") as temporary:
        yield Path(temporary)


def _await_answer(client: Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise CtlError(f"the private daemon ended at once: {said[-1]}")
        with suppress(CtlError):
            client.host()
            return
        time.sleep(0.02)
    raise CtlError(f"the private daemon did not answer within {_START_TIMEOUT:.0f} seconds")


def _end(process: subprocess.Popen[bytes], patience: float) -> None:
    """End the daemon, which has so many seconds for it, and whatever is left of its session."""
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    finally:                                        # also if we are told to end while we wait
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _signals_unwind() -> Iterator[None]:
    """Being told to end runs the clean-up, once: impatience must not cut it short."""
    unwinding = False

    def unwind(number: int, frame: FrameType | None) -> None:
        nonlocal unwinding
        if not unwinding:
            unwinding = True
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, unwind) for number in ending}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
