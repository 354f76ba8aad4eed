# SPDX-License-Identifier: GPL-2.0-or-later
"""Immediate wake: how long a halted guest takes to answer a key, alone and beside busy guests.

The whole way is timed, as a user has it: from the request that carries the key to its echo in the stream of
the console.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median

from hostd.bench.measures import Benchmark, Measure, Samples, Settings
from hostd.bench.shares import WORKERS, Share, start_busy
from hostd.ctl.client import Client, vm_path
from hostd.ctl.errors import CtlError
from hostd.ctl.private import private_daemon
from hostd.model import BlobView, VmCreate

_NAME = "echo"
_MEMORY = 16 << 20
_BUSY = 8
_KEYS = 100
#: between keys the guest sleeps again, and is in step with nobody's slice
_PAUSE_S = 0.013
_READY, _KEY = b"!", b"x"

_ORIGIN, _HANDLER = 0x7C00, 0x40
_MAIN = (
    b"\xfa"                              # cli
    b"\x31\xc0\x8e\xd8"                  # xor   ax, ax; mov ds, ax
    b"\xb0\x11\xe6\x20"                  # the 8259: edges, a slave, four words;
    b"\xb0\x08\xe6\x21"                  #     vectors from 8 up;
    b"\xb0\x04\xe6\x21"                  #     the slave is on IRQ 2;
    b"\xb0\x01\xe6\x21"                  #     8086 mode;
    b"\xb0\xef\xe6\x21"                  #     all but IRQ 4 masked
    b"\xc7\x06\x30\x00\x40\x7c"          # mov   word [0x30], 0x7c40: vector 12
    b"\xc7\x06\x32\x00\x00\x00"          # mov   word [0x32], 0
    b"\xba\xf9\x03\xb0\x01\xee"          # the 16550: an interrupt for received data,
    b"\xba\xfc\x03\xb0\x08\xee"          #     let through by OUT2
    b"\xba\xf8\x03\xb0!\xee"             # _READY
    b"\xfb\xf4\xeb\xfc"                  # sti; hlt; jmp to the sti
)
_ECHO = (
    b"\xba\xf8\x03\xec\xee"              # mov   dx, 0x3f8; in al, dx; out dx, al
    b"\xb0\x20\xe6\x20\xcf"              # end of interrupt; iret
)
#: a boot sector that prints what is typed, and halts in between
ECHO_IMAGE = (_MAIN.ljust(_HANDLER, b"\x90") + _ECHO).ljust(510, b"\0") + b"\x55\xaa"

_BUSY_OF = {"key-echo": 0, "key-echo-crowded": _BUSY}


def measure(settings: Settings, wanted: frozenset[str]) -> Mapping[str, Samples]:
    """The median of many keys, for each crowd."""
    samples = {}
    for name, busy in _BUSY_OF.items():
        if name in wanted:
            settings.say(f"typing at a halted guest beside {busy} busy ones")
            with private_daemon(workers=WORKERS) as daemon:
                start_echo(daemon.client)
                start_busy(daemon.client, {f"busy-{number}": Share(100) for number in range(busy)})
                time.sleep(settings.settle / 5)
                samples[name] = Samples([median(_key_seconds(daemon.client))])
    return samples


def start_echo(client: Client) -> None:
    """The guest that answers keys."""
    blob: BlobView = client.call("PUT", "/blobs", BlobView, content=ECHO_IMAGE)
    client.call("POST", "/vms", body=VmCreate(name=_NAME, kernel=blob.sha256, memory=_MEMORY, start=True))


def _key_seconds(client: Client) -> list[float]:
    """Type, and wait for the echo, over and over."""
    taken = []
    with client.stream(vm_path(_NAME, "log"), {"follow": 1}) as console:
        echoes = console.iter_raw()
        _expect(_READY, next(echoes))
        for _ in range(_KEYS):
            began = time.monotonic()
            client.call("POST", vm_path(_NAME, "input"), content=_KEY)
            _expect(_KEY, next(echoes))
            taken.append(time.monotonic() - began)
            time.sleep(_PAUSE_S)
    return taken


def _expect(wanted: bytes, got: bytes) -> None:
    if got != wanted:
        raise CtlError(f"the guest that echoes keys printed {got!r} instead of {wanted!r}")


BENCHMARK = Benchmark(
    (
        Measure("key-echo", "a key typed at a halted guest, until its echo is here", "s"),
        Measure("key-echo-crowded", f"the same beside {_BUSY} busy guests", "s"),
    ), measure)
