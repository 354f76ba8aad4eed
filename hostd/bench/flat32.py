# SPDX-License-Identifier: GPL-2.0-or-later
"""The smallest guest in 32-bit protected mode: one program in flat segments, for the software monitor.

    0x1000  the page directory: 4 MiB pages, one to one, none of them global
    0x8000  the program, which does its work EBP times and ends      0xF000  the stack, downwards
    DATA    memory to work on
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmm.memory.pool import PAGE
from vmm.state import RBP, RBX, RSI, RSP, CpuState, Segment
from vmm.x86.flags import CR0_ET, CR0_NE, CR0_PE, CR0_PG, CR4_PGE, CR4_PSE, RFLAGS_ONE

MEMORY_BYTES = 32 << 20
DATA = 4 << 20
DATA_PAGES = (MEMORY_BYTES - DATA) // PAGE
_DIRECTORY, CODE, _STACK = 0x1000, 0x8000, 0xF000
_LARGE = 0x87
_END = b"\xe6\xf4\xeb\xfe"      # out 0xf4, al; jmp to itself

NOTHING = b""
RDTSC = b"\x0f\x31"
IN = b"\x66\xba\xfd\x03\xec"    # mov dx, 0x3fd; in al, dx
#: EBX pages of DATA are read, downwards: none is mapped ahead; a change of CR3 makes the shadow forget
TOUCH_PAGES = (
    b"\x89\xd9"                  #       mov ecx, ebx
    b"\x89\xdf"                  #       mov edi, ebx
    b"\xc1\xe7\x0c"              #       shl edi, 12
    b"\x01\xf7"                  #       add edi, esi
    b"\x81\xef\x00\x10\x00\x00"  # page: sub edi, 0x1000
    b"\x8b\x07"                  #       mov eax, [edi]
    b"\x49"                      #       dec ecx
    b"\x75\xf5"                  #       jnz page
    b"\x0f\x20\xd8"              #       mov eax, cr3
    b"\x0f\x22\xd8"              #       mov cr3, eax
)


def repeat(operation: bytes) -> bytes:
    """`operation`, EBP times over; it may change all registers but EBP, ESI, EBX and ESP."""
    back = -(len(operation) + 3)
    return operation + b"\x4d\x75" + back.to_bytes(1, "little", signed=True) + _END      # dec ebp; jnz


@dataclass(frozen=True)
class FlatGuest32:
    """A program for a guest of its own: EBP is `rounds`, EBX `count`, ESI is DATA."""

    program: bytes
    rounds: int
    count: int = 1

    def writes(self) -> list[tuple[int, bytes]]:
        """What its memory holds at the start; there is something in every page of DATA it touches."""
        directory = struct.pack(f"<{MEMORY_BYTES >> 22}I",
                                *(n << 22 | _LARGE for n in range(MEMORY_BYTES >> 22)))
        return [(_DIRECTORY, directory), (CODE, self.program),
                *((DATA + page * PAGE, b"\1") for page in range(self.count))]

    def cpu(self) -> CpuState:
        """The processor at the program's first instruction."""
        registers = [0] * 16
        registers[RBP], registers[RBX], registers[RSI], registers[RSP] = self.rounds, self.count, DATA, _STACK

        def flat() -> Segment:
            return Segment(0x10, 0xC93, 0xFFFF_FFFF)

        return CpuState(gpr=registers, rip=CODE, rflags=RFLAGS_ONE, cs=Segment(0x08, 0xC9B, 0xFFFF_FFFF),
                        ss=flat(), ds=flat(), es=flat(), fs=flat(), gs=flat(),
                        cr0=CR0_PE | CR0_ET | CR0_NE | CR0_PG, cr3=_DIRECTORY, cr4=CR4_PSE | CR4_PGE)
