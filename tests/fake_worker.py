# SPDX-License-Identifier: GPL-2.0-or-later
"""A worker without a CPU: it speaks the protocol over its inherited socket, and its guests do what they are
told on their consoles.

    poweroff | reset | crash WHY | exit STATUS     the guest ends
    die                                            the worker process does
    nonsense                                       it breaks the protocol
    last words                                     asked about its translations, or for pages, it powers off
    untranslatable                                 what it is asked about its translations has a problem
    anything else                                  is echoed

A guest whose state is b"refuse" is refused; the power button makes a guest print and power off, unless it was
told `stubborn`.  The state of a guest is what was typed to it so far, and
so are its translations, all of them beginning at address 0x1000.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

from hostd import protocol
from hostd.model import TranslatorView
from vmm.state import decode

signal.signal(signal.SIGINT, signal.SIG_IGN)


class FakeWorker:
    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.states: dict[str, bytes] = {}

    def send(self, message: protocol.Message) -> None:
        self.channel.sendall(protocol.encode(message))

    def run(self) -> None:
        splitter = protocol.Splitter[protocol.ToWorker](protocol.ToWorker)
        self.send(protocol.Hello(os.getpid(), 1_000_000, "a fake"))
        while data := self.channel.recv(65536):
            for message in splitter.feed(data):
                self.act(message)

    def act(self, message: protocol.ToWorker) -> None:
        match message:
            case protocol.Adopt(vm=vm, state=b"refuse"):
                self.send(protocol.Refused(vm, "adopt", "it does not look well"))
            case protocol.Adopt(vm=vm, state=state):
                # a fresh machine state is not something that was typed
                fresh = not state.startswith(b"typed:")
                self.states[vm] = b"typed:" if fresh else state
                self.send(protocol.Adopted(vm))
                monitor = f", to be run by {decode(state).monitor}" if fresh else ""
                self.send(protocol.Console(vm, f"adopted{monitor}\n".encode()))
            case protocol.Release(vm=vm) if vm in self.states:
                self.send(protocol.Released(vm, self.states.pop(vm), time.monotonic_ns()))
            case protocol.Release(vm=vm):
                self.send(protocol.Refused(vm, "release", "it has ended"))
            case protocol.Input(vm=vm, data=data) if vm in self.states:
                self.typed(vm, data)
            case protocol.PowerButton(vm=vm) if vm in self.states:
                if b"stubborn" not in self.states[vm]:
                    self.send(protocol.Console(vm, b"the button was pressed\n"))
                    self.end(vm, "poweroff", "")
            case protocol.SetShare(vm=vm, weight=weight, cap=cap):
                self.send(protocol.Console(vm, f"share {weight} {cap}\n".encode()))
            case protocol.ListTranslations(vm=vm, address=address) if vm in self.states:
                self.list(vm, address)
            case protocol.Reclaim(vm=vm, frames=frames) if b"last words" in self.states.get(vm, b""):
                self.send(protocol.Reclaimed(vm, b"", frames))
                self.end(vm, "poweroff", "")
            case protocol.Reclaim(vm=vm) if vm in self.states:
                self.send(protocol.Reclaimed(vm, b"", b""))
            case protocol.Ping(id=id):
                self.send(protocol.Pong(id, [1, 2], 3000, TranslatorView(units=5, used_bytes=80)))
            case protocol.Quit():
                sys.exit()

    def typed(self, vm: str, data: bytes) -> None:
        self.states[vm] += data
        word, _, rest = data.decode().strip().partition(" ")
        match word:
            case "poweroff" | "reset":
                self.end(vm, word, "")
            case "crash":
                self.end(vm, "crashed", rest)
            case "exit":
                self.send(protocol.Stopped(vm, "exit", "", int(rest)))
                del self.states[vm]
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "nonsense":
                self.send(protocol.Console("nobody#0", b""))
            case "state":
                self.send(protocol.Console(vm, self.states[vm]))
            case _:
                self.send(protocol.Console(vm, data))

    def list(self, vm: str, address: int | None) -> None:
        typed = self.states[vm].decode()
        if "last words" in typed:
            self.end(vm, "poweroff", "")
        elif "untranslatable" in typed:
            self.send(protocol.Listing(vm, "", True, "its monitor is at a loss"))
        else:
            self.send(protocol.Listing(vm, typed if address in (None, 0x1000) else "", address is not None))

    def end(self, vm: str, why: protocol.Ending, detail: str) -> None:
        del self.states[vm]
        self.send(protocol.Stopped(vm, why, detail, None))


if __name__ == "__main__":
    FakeWorker(socket.socket(fileno=int(sys.argv[1]))).run()
