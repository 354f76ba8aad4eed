# SPDX-License-Identifier: GPL-2.0-or-later
"""Multiboot kernels that are hardly more than a balloon driver, good or bad."""

from __future__ import annotations

from tests.kernels import elf32, multiboot_header
from tests.test_monitor_paging import repeat, store, word
from tests.test_virtio_machine import AVAILABLE, QUEUE, RESULTS, USED, request, start
from vmm.devices.virtio.balloon import REPORTING, STATS_VQ
from vmm.devices.virtio.bank import BALLOON
from vmm.devices.virtio.mmio import Register
from vmm.memory.pool import PAGE

_CODE, _ENTRY = 0x10_0000, 0x20
#: pages that a guest has no use for, and how many
_FREE, PAGES = 0x14_0000, 64
#: waits for a key: mov dx, 0x3fd; in al, dx; test al, 1; jz
_KEY = b"\x66\xba\xfd\x03\xec\xa8\x01\x74\xfb"
_NOTIFY = BALLOON.base + Register.QUEUE_NOTIFY


def _kernel(code: bytes) -> bytes:
    text = multiboot_header().ljust(_ENTRY, b"\0") + code
    return elf32(_CODE + _ENTRY, [(_CODE, text, len(text))])


def _talks() -> bytes:
    """A driver with a buffer for one statistic, what is free."""
    code = start(BALLOON, 2).replace(word(REPORTING), word(STATS_VQ))
    return code + store(QUEUE, RESULTS) + store(QUEUE + 8, 10) + store(QUEUE + 12, 0) + store(RESULTS, 4)


def talkative_kernel() -> bytes:
    """Whenever it is asked how its memory is doing, a byte more of it is free."""
    code = _talks() + b"\x31\xed"                                   #       xor ebp, ebp
    say = (b"\x45\x89\x2d" + word(RESULTS + 2)                      # say:  inc ebp; mov [RESULTS + 2], ebp
           + b"\x89\xe8\xc1\xe0\x10"                                #       mov eax, ebp; shl eax, 16
           + b"\xa3" + word(AVAILABLE) + store(_NOTIFY, 2)          #       mov [AVAILABLE], eax
           + b"\x66\x39\x2d" + word(USED + 2) + b"\x75\xf7")        # wait: cmp [USED + 2], bp; jne wait
    return _kernel(code + say + b"\xeb" + bytes([-len(say) - 2 & 0xFF]))  #       jmp say


def rude_kernel() -> bytes:
    """It says once how its memory is doing, and when a key is typed breaks the rules."""
    code = _talks() + store(RESULTS + 2, 1) + store(AVAILABLE, 1 << 16) + store(_NOTIFY, 2)
    return _kernel(code + _KEY + store(AVAILABLE, 1000 << 16) + store(_NOTIFY, 2) + b"\xfa\xf4")


def generous_kernel() -> bytes:
    """It writes to so many pages, prints a dot, and when a key is typed reports them as free."""
    code = start(BALLOON, 2)
    write = b"\x89\x3f\x81\xc7" + word(PAGE)                        # mov [edi], edi; add edi, 0x1000
    code += b"\xbf" + word(_FREE) + repeat(PAGES, write)
    code += b"\x66\xba\xf8\x03\xb0.\xee"                            # mov dx, 0x3f8; mov al, '.'; out dx, al
    return _kernel(code + _KEY + request(BALLOON, 2, 1, _FREE, PAGES * PAGE) + b"\xfa\xf4")
