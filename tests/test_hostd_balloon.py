# SPDX-License-Identifier: GPL-2.0-or-later
"""What balloon drivers do and say, as the daemon comes to know it from real workers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from hostd.model import MONITORS, PAGE
from hostd.protocol import BalloonView, SetBalloon
from hostd.vm import Vm
from tests.kernels import elf32, multiboot_header
from tests.test_monitor_paging import repeat, store, word
from tests.test_virtio_machine import AVAILABLE, QUEUE, RESULTS, USED, request, start
from tests.told_host import SOON, ToldHost, real_host
from vmm.devices.virtio.balloon import REPORTING, STATS_VQ
from vmm.devices.virtio.bank import BALLOON
from vmm.devices.virtio.mmio import Register

_CODE, _ENTRY = 0x10_0000, 0x20
#: pages that a guest has no use for, and how many
_FREE, PAGES = 0x14_0000, 64
#: waits for a key: mov dx, 0x3fd; in al, dx; test al, 1; jz
_KEY = b"\x66\xba\xfd\x03\xec\xa8\x01\x74\xfb"
_NOTIFY = BALLOON.base + Register.QUEUE_NOTIFY


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[ToldHost]:
    async with real_host(tmp_path, "[sharing]\nenabled = false\n") as told:
        yield told


def kernel(code: bytes) -> bytes:
    text = multiboot_header().ljust(_ENTRY, b"\0") + code
    return elf32(_CODE + _ENTRY, [(_CODE, text, len(text))])


def talks() -> bytes:
    """A driver with a buffer for one statistic, what is free."""
    code = start(BALLOON, 2).replace(word(REPORTING), word(STATS_VQ))
    return code + store(QUEUE, RESULTS) + store(QUEUE + 8, 10) + store(QUEUE + 12, 0) + store(RESULTS, 4)


def talkative_kernel() -> bytes:
    """Multiboot.  Whenever it is asked how its memory is doing, a byte more of it is free."""
    code = talks() + b"\x31\xed"                                        #       xor ebp, ebp
    say = (b"\x45\x89\x2d" + word(RESULTS + 2)                         # say:  inc ebp; mov [RESULTS + 2], ebp
           + b"\x89\xe8\xc1\xe0\x10"                                  #       mov eax, ebp; shl eax, 16
           + b"\xa3" + word(AVAILABLE) + store(_NOTIFY, 2)              #       mov [AVAILABLE], eax
           + b"\x66\x39\x2d" + word(USED + 2) + b"\x75\xf7")           # wait: cmp [USED + 2], bp; jne wait
    return kernel(code + say + b"\xeb" + bytes([-len(say) - 2 & 0xFF]))  #       jmp say


def rude_kernel() -> bytes:
    """Multiboot.  It says once how its memory is doing, and when a key is typed breaks the rules."""
    code = talks() + store(RESULTS + 2, 1) + store(AVAILABLE, 1 << 16) + store(_NOTIFY, 2)
    return kernel(code + _KEY + store(AVAILABLE, 1000 << 16) + store(_NOTIFY, 2) + b"\xfa\xf4")


def generous_kernel() -> bytes:
    """Multiboot.  It writes to so many pages, prints a dot, and when a key is typed reports them as free."""
    code = start(BALLOON, 2)
    write = b"\x89\x3f\x81\xc7" + word(PAGE)                          # mov [edi], edi; add edi, 0x1000
    code += b"\xbf" + word(_FREE) + repeat(PAGES, write)
    code += b"\x66\xba\xf8\x03\xb0.\xee"                             # mov dx, 0x3f8; mov al, '.'; out dx, al
    return kernel(code + _KEY + request(BALLOON, 2, 1, _FREE, PAGES * PAGE) + b"\xfa\xf4")


async def hears(vm: Vm, true: Callable[[BalloonView], bool]) -> None:
    """Wait until what is known of the guest's balloon is so."""
    with trio.fail_after(SOON):
        while vm.balloon is None or not true(vm.balloon):
            await trio.sleep(0.01)


@pytest.mark.parametrize("monitor", MONITORS)
async def test_what_a_guest_is_asked_is_known_when_it_has_said_it(host: ToldHost, monitor: str) -> None:
    """And not only when it is asked the next time."""
    await host.running("vm", kernel=await host.blob(talkative_kernel()), vmm=monitor)
    vm = host.host._guests.vms["vm"]
    await hears(vm, lambda said: said.driver and said.statistics == {"free": 1})
    assert vm.worker is not None
    vm.worker.send(SetBalloon(vm.lease, 0, statistics=True))
    await hears(vm, lambda said: said.statistics == {"free": 2})


@pytest.mark.parametrize("monitor", MONITORS)
async def test_pages_given_back_are_neither_written_nor_swapped_in(host: ToldHost, monitor: str) -> None:
    await host.running("vm", kernel=await host.blob(generous_kernel()), vmm=monitor)
    await host.prints("vm", r"\.")
    await host.clone("vm", "clone")
    await host.tell("clone", "x")
    vm = host.host._guests.vms["clone"]
    with trio.fail_after(SOON):
        while (events := vm.view().memory_events).reported < PAGES:
            await trio.sleep(0.01)
    assert events.broken < PAGES and events.swapped_in == 0


@pytest.mark.parametrize("monitor", MONITORS)
async def test_what_a_driver_said_goes_when_it_breaks_the_rules(host: ToldHost, monitor: str) -> None:
    await host.running("vm", kernel=await host.blob(rude_kernel()), vmm=monitor)
    vm = host.host._guests.vms["vm"]
    await hears(vm, lambda said: said.driver and said.statistics == {"free": 1})
    await host.tell("vm", "x")
    await hears(vm, lambda said: not said.driver and not said.statistics)
