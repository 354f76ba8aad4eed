# SPDX-License-Identifier: GPL-2.0-or-later
"""A terminal attached to a VM's console: raw keys out, raw bytes in, over a WebSocket on the Unix socket."""

from __future__ import annotations

import math
import os
import sys
import termios
import tty
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, HandshakeError, WebSocketConnection
from trio_websocket import wrap_client_stream as open_websocket

from hostd.ctl.client import vm_path
from hostd.ctl.errors import CtlError

#: Ctrl-], as with telnet and virsh
LEAVE = b"\x1d"
#: close code of a daemon that asks the client to come back (RFC 6455; registered by IANA)
COME_BACK = 1012
#: a migrating VM is away for less than a second; after this it will not return
_PATIENCE = 30.0
#: seconds between two attempts
_PAUSE = 0.2


class Attachment:
    """The console of one VM on this process's standard input and output."""

    def __init__(self, socket: Path, name: str) -> None:
        self._socket = socket
        self._name = name
        #: bytes of the console seen so far, counted as the daemon does; None before the first connection
        self._position: int | None = None
        #: until then what fails is tried again: the VM is on its way
        self._deadline = -math.inf
        #: keys that were typed and did not get away before a connection ended
        self._unsent = b""

    async def run(self) -> str:
        """Stay attached until the user leaves or the console ends; says which."""
        with raw_terminal():
            while True:
                try:
                    farewell, come_back = await self._visit()
                except CtlError:
                    if trio.current_time() >= self._deadline:
                        raise
                    await trio.sleep(_PAUSE)
                    continue
                if not come_back:
                    return farewell
                say(f"{farewell}, reconnecting")
                self._deadline = trio.current_time() + _PATIENCE

    async def _visit(self) -> tuple[str, bool]:
        """One connection, from its opening to its end; why it ended, and whether to come back."""
        farewell, come_back = f"left {self._name}", False
        failure: Exception | None = None
        showing = trio.CancelScope()

        async def show(websocket: WebSocketConnection) -> None:
            nonlocal farewell, come_back
            with showing:
                farewell, come_back = await self._show(websocket)
                nursery.cancel_scope.cancel()

        try:
            async with trio.open_nursery() as nursery:
                websocket = await self._open(nursery)
                nursery.start_soon(show, websocket)
                await self._type(websocket)
                showing.cancel()
                await websocket.aclose()
        except* ConnectionRejected as failures:
            failure = _refusal(failures)
        except* CtlError as failures:
            failure = failures.exceptions[0]
        if failure is not None:
            raise failure
        return farewell, come_back

    async def _open(self, nursery: trio.Nursery) -> WebSocketConnection:
        """Open the WebSocket.  A refusal is raised in the nursery, by the task that reads from it."""
        resource = vm_path(self._name, "console")
        if self._position is not None:
            resource += f"?since={self._position}"
        try:
            stream = await trio.open_unix_socket(str(self._socket))
            websocket = await open_websocket(nursery, stream, "hostd", resource)
        except (OSError, HandshakeError) as error:
            raise CtlError(f"cannot reach hostd at {self._socket}: {error}") from None
        if self._position is None and sys.stdin.isatty():
            say(f"connected to {self._name}; Ctrl-] leaves")
        self._deadline = -math.inf
        headers = {name.lower(): value for name, value in websocket.handshake_headers}
        self._position = int(headers.get(b"console-position", b"0"))
        return websocket

    async def _show(self, websocket: WebSocketConnection) -> tuple[str, bool]:
        """Guest to terminal, until the connection ends."""
        try:
            while True:
                message = await websocket.get_message()
                data = message.encode() if isinstance(message, str) else message
                self._position = (self._position or 0) + len(data)
                await write_out(data)
        except ConnectionClosed as closed:
            reason = closed.reason
            if reason is None or not reason.reason:  # whoever closes on purpose says why
                raise CtlError("the daemon broke off") from None
            return str(reason.reason), reason.code == COME_BACK

    async def _type(self, websocket: WebSocketConnection) -> None:
        """Terminal to guest, until the user leaves or the input ends."""
        await self._send_unsent(websocket)
        async for keys in keystrokes():
            before, leave, _ = keys.partition(LEAVE)
            self._unsent = before
            await self._send_unsent(websocket)
            if leave:
                return

    async def _send_unsent(self, websocket: WebSocketConnection) -> None:
        try:
            if self._unsent:
                await websocket.send_message(self._unsent)
                self._unsent = b""
        except ConnectionClosed:
            await trio.sleep_forever()  # `_show` has the reason, and ends this


async def keystrokes() -> AsyncIterator[bytes]:
    """What comes on standard input, piece by piece, until its end.

    The descriptor stays blocking (its flags are shared with the shell that started us): it is read only when
    something is there.
    """
    descriptor = sys.stdin.fileno()
    while True:
        await trio.lowlevel.wait_readable(descriptor)
        data = os.read(descriptor, 4096)
        if not data:
            return
        yield data


async def write_out(data: bytes) -> None:
    """Write all of it to standard output, without holding up the event loop on a slow terminal."""
    view = memoryview(data)
    descriptor = sys.stdout.fileno()
    while view:
        view = view[await trio.to_thread.run_sync(os.write, descriptor, view) :]


def say(text: str) -> None:
    """A remark of ours on a raw terminal."""
    os.write(sys.stderr.fileno(), f"\r\n[{text}]\r\n".encode())


@contextmanager
def raw_terminal() -> Iterator[None]:
    """Every key goes to the guest as it is typed, Ctrl-C too; afterwards the terminal is what it was."""
    if not sys.stdin.isatty():
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setraw(descriptor)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _refusal(failures: BaseExceptionGroup[ConnectionRejected]) -> CtlError:
    error = failures.exceptions[0]
    assert isinstance(error, ConnectionRejected)
    try:
        sentence = msgspec.json.decode(error.body or b"", type=dict[str, str])["error"]
    except (msgspec.DecodeError, KeyError):
        sentence = f"the daemon answered {error.status_code}"
    return CtlError.of_status(error.status_code, sentence)
