# SPDX-License-Identifier: GPL-2.0-or-later
"""A bad line between two hosts: it understands what goes over it, stops at a word, and fails as it is told.

The line runs in threads of its own.  A `Trap` holds one connection at a word, or at a byte, until the test
has done there what it wants done; meanwhile all others go on.
"""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from hostd.migration import wire
from tests.private_daemon import SOON
from tests.two_hosts import LOOPBACK

Direction = Literal["to target", "to source"]
#: a frame of any kind and length
_ANY = dict.fromkeys(wire.Kind, 1 << 30)
PREAMBLE = "Preamble"
#: a socket with this linger is reset when it is closed
_RESET = struct.pack("ii", 1, 0)
#: what frames are called that carry no message
_BINARY = {wire.Kind.PAGES: "Pages", wire.Kind.DIGESTS: "Digests", wire.Kind.BLOB: "BlobPiece"}


def _word(frame: wire.Frame) -> str:
    """What it says."""
    return _BINARY.get(frame.kind) or str(msgspec.msgpack.decode(frame.payload)[0])


@dataclass
class Trap:
    """Where the line is held: before or after the `nth` message named `word`; or once `byte` bytes have gone
    into a direction, over all connections."""

    word: str = ""
    when: Literal["before", "after"] = "before"
    nth: int = 1
    byte: tuple[Direction, int] | None = None
    connection: Connection | None = None
    reached: threading.Event = field(default_factory=threading.Event)
    _go_on: threading.Event = field(default_factory=threading.Event)

    def hold(self, connection: Connection) -> None:
        """Called by the line."""
        self.connection = connection
        self.reached.set()
        self._go_on.wait(SOON)

    def release(self) -> None:
        """Have the line go on."""
        self._go_on.set()


class Connection:
    """One of the source's, and what stands for it at the target."""

    def __init__(self, line: BadLine, source: socket.socket) -> None:
        self.line = line
        self.source = source
        self.target: socket.socket | None = None
        #: what goes this way is lost
        self.swallowed: set[Direction] = set()

    def open(self) -> None:
        """Reach the target; if it is not there, it is not for the source."""
        try:
            self.target = socket.create_connection(self.line.target, timeout=SOON)
            self.target.settimeout(None)
        except OSError:
            self.cut()
            return
        for sender, receiver, direction in ((self.source, self.target, "to target"),
                                            (self.target, self.source, "to source")):
            threading.Thread(target=self._pump, args=(sender, receiver, direction), daemon=True).start()

    def cut(self) -> None:
        """Both ends see that it is broken."""
        for end in (self.source, self.target):
            if end is not None:
                with suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    end.shutdown(socket.SHUT_RD)        # wakes the thread that receives
                end.close()

    def _pump(self, sender: socket.socket, receiver: socket.socket, direction: Direction) -> None:
        splitter, greeted = wire.Splitter(), False
        try:
            while data := sender.recv(1 << 18):
                splitter.feed(data)
                if not greeted:
                    spoken = splitter.preamble()
                    if spoken is None:
                        continue
                    greeted = True
                    self._pass(PREAMBLE, wire.preamble(spoken), receiver, direction)
                while (frame := splitter.take(_ANY)) is not None:
                    self._pass(_word(frame), wire.frame(*frame), receiver, direction)
            if not self._loses(direction):
                receiver.shutdown(socket.SHUT_WR)
        except OSError:
            if not self._loses(direction):
                self.cut()

    def _loses(self, direction: Direction) -> bool:
        return direction in self.swallowed or self.line.dark

    def _pass(self, word: str, data: bytes, receiver: socket.socket, direction: Direction) -> None:
        line = self.line
        trap = line.met(word)
        if trap is not None and trap.when == "before":
            trap.hold(self)
        for piece, held in line.cut_up(data, direction):
            if not self._loses(direction):
                receiver.sendall(piece)
            if held is not None:
                held.hold(self)
        if trap is not None and trap.when == "after":
            trap.hold(self)


class BadLine:
    """Listens at `address` for the source, and calls the target, which listens at `target`."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self._listener = socket.create_server((LOOPBACK, 0))
        self.address = f"{LOOPBACK}:{self._listener.getsockname()[1]}"
        #: nothing comes through, and nobody is told
        self.dark = False
        #: whoever calls is hung up on
        self.down = False
        self.trap: Trap | None = None
        #: every word that was said, and bytes
        self.words: list[str] = []
        self.bytes: dict[Direction, int] = {"to target": 0, "to source": 0}
        self._connections: list[Connection] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def arm(self, trap: Trap | None) -> None:
        """From now on."""
        with self._lock:
            self.trap, self.words, self.bytes = trap, [], {"to target": 0, "to source": 0}

    def cut(self) -> None:
        """All connections there are."""
        with self._lock:
            connections, self._connections = self._connections, []
        for connection in connections:
            connection.cut()

    def heal(self) -> None:
        """Whoever calls is connected, and nothing is held.  Connections of which something was lost end."""
        if self.trap is not None:
            self.trap.release()
        was_dark, self.dark, self.down, self.trap = self.dark, False, False, None
        with self._lock:
            lossy = [one for one in self._connections if one.swallowed or was_dark]
        for connection in lossy:
            connection.cut()

    def close(self) -> None:
        self.heal()
        self._listener.close()
        self.cut()

    def met(self, word: str) -> Trap | None:
        """The trap, if this is where it is."""
        with self._lock:
            self.words.append(word)
            trap = self.trap
            here = trap is not None and trap.word == word and self.words.count(word) == trap.nth
            return trap if here else None

    def cut_up(self, data: bytes, direction: Direction) -> list[tuple[bytes, Trap | None]]:
        """The data in pieces, after one of which the trap may be."""
        with self._lock:
            before, trap = self.bytes[direction], self.trap
            self.bytes[direction] += len(data)
        if trap is None or trap.byte is None or trap.byte[0] != direction:
            return [(data, None)]
        at = trap.byte[1] - before
        if not 0 <= at < len(data):
            return [(data, None)]
        return [(data[:at], trap), (data[at:], None)]

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                source, _ = self._listener.accept()
                connection = Connection(self, source)
                if self.down:
                    connection.cut()
                    continue
                with self._lock:
                    self._connections.append(connection)
                connection.open()
