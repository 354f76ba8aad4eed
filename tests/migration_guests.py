# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that tell what became of them while they were moved: of their memory, clock and keyboard.

The *witness* is 32-bit code, without paging and interrupts.  It writes pages, one after the other and over
and over, each of which it verifies first.  On its console it says, a number being eight hexadecimal digits,

    t HIGH LOW LINE     every so many cycles: its time stamp counter, and the number of the line
    <K>                 of each key that was typed, once
    B PAGE              of a page that is not as it left it

The *counter* is 64-bit code: it says `n NUMBER`, one more each time.
"""

from __future__ import annotations

import re
import struct

from tests.kernels import elf32, multiboot_header

#: enough for either
MEMORY = 16 << 20
#: the most pages a witness of so much memory can write
PAGES = (MEMORY >> 12) - 1024

_CODE, _VARIABLES, _ENTRY = 0x100000, 0x200000, 0x20

#: EBP points to _VARIABLES, which are words; pages are from 0x400000 on
_WITNESS = (
    b"\xfa"                                       # start:    cli
    b"\xfc"                                       #           cld
    b"\xbc\x00\x90\x00\x00"                       #           mov esp, 0x9000
    b"\xbd\x00\x00\x20\x00"                       #           mov ebp, 0x200000
    b"\xba\xfa\x03\x00\x00"                       #           mov edx, 0x3fa
    b"\xb0\x01"                                   #           mov al, 0x1
    b"\xee"                                       #           out dx, al
    b"\x83\x7d\x00\x00"                           # round:    cmp [pages], 0x0
    b"\x74\x6a"                                   #           je time
    b"\x8b\x5d\x0c"                               #           mov ebx, [page]
    b"\x89\xdf"                                   #           mov edi, ebx
    b"\xc1\xe7\x0c"                               #           shl edi, 0xc
    b"\x81\xc7\x00\x00\x40\x00"                   #           add edi, 0x400000
    b"\x8b\x45\x10"                               #           mov eax, [generation]
    b"\x39\x07"                                   #           cmp [edi], eax
    b"\x75\x0c"                                   #           jne bad
    b"\x8d\x4c\x1b\x01"                           #           lea ecx, [ebx+ebx*1+0x1]
    b"\x0f\xaf\xc8"                               #           imul ecx, eax
    b"\x39\x4f\x04"                               #           cmp [edi+0x4], ecx
    b"\x74\x11"                                   #           je good
    b"\xb0\x42"                                   # bad:      mov al, 0x42
    b"\xe8\xc3\x00\x00\x00"                       #           call put
    b"\x89\xd8"                                   #           mov eax, ebx
    b"\xe8\x95\x00\x00\x00"                       #           call number
    b"\x8b\x45\x10"                               #           mov eax, [generation]
    b"\x40"                                       # good:     inc eax
    b"\x8d\x4c\x1b\x01"                           #           lea ecx, [ebx+ebx*1+0x1]
    b"\x0f\xaf\xc8"                               #           imul ecx, eax
    b"\x89\x07"                                   #           mov [edi], eax
    b"\x89\x4f\x04"                               #           mov [edi+0x4], ecx
    b"\x83\xc7\x08"                               #           add edi, 0x8
    b"\x8b\x4d\x08"                               #           mov ecx, [words]
    b"\x8b\x45\x1c"                               #           mov eax, [random]
    b"\x49"                                       # fill:     dec ecx
    b"\x78\x0e"                                   #           js next
    b"\x69\xc0\x0d\x66\x19\x00"                   #           imul eax, eax, 0x19660d
    b"\x05\x5f\xf3\x6e\x3c"                       #           add eax, 0x3c6ef35f
    b"\xab"                                       #           stosd
    b"\xeb\xef"                                   #           jmp fill
    b"\x89\x45\x1c"                               # next:     mov [random], eax
    b"\x43"                                       #           inc ebx
    b"\x3b\x5d\x00"                               #           cmp ebx, [pages]
    b"\x72\x05"                                   #           jb same
    b"\x31\xdb"                                   #           xor ebx, ebx
    b"\xff\x45\x10"                               #           inc [generation]
    b"\x89\x5d\x0c"                               # same:     mov [page], ebx
    b"\x0f\x31"                                   # time:     rdtsc
    b"\x89\xc1"                                   #           mov ecx, eax
    b"\x2b\x4d\x14"                               #           sub ecx, [last]
    b"\x3b\x4d\x04"                               #           cmp ecx, [period]
    b"\x72\x84"                                   #           jb round
    b"\x89\x45\x14"                               #           mov [last], eax
    b"\xff\x45\x18"                               #           inc [lines]
    b"\x50"                                       #           push eax
    b"\x52"                                       #           push edx
    b"\xb0\x74"                                   #           mov al, 0x74
    b"\xe8\x66\x00\x00\x00"                       #           call put
    b"\x58"                                       #           pop eax
    b"\xe8\x39\x00\x00\x00"                       #           call number
    b"\x58"                                       #           pop eax
    b"\xe8\x33\x00\x00\x00"                       #           call number
    b"\x8b\x45\x18"                               #           mov eax, [lines]
    b"\xe8\x2b\x00\x00\x00"                       #           call number
    b"\xb0\x0a"                                   #           mov al, 0xa
    b"\xe8\x4b\x00\x00\x00"                       #           call put
    b"\xba\xfd\x03\x00\x00"                       # keys:     mov edx, 0x3fd
    b"\xec"                                       #           in al, dx
    b"\xa8\x01"                                   #           test al, 0x1
    b"\x0f\x84\x4c\xff\xff\xff"                   #           je round
    b"\xb0\x3c"                                   #           mov al, 0x3c
    b"\xe8\x36\x00\x00\x00"                       #           call put
    b"\xec"                                       #           in al, dx
    b"\xe8\x30\x00\x00\x00"                       #           call put
    b"\xb0\x3e"                                   #           mov al, 0x3e
    b"\xe8\x29\x00\x00\x00"                       #           call put
    b"\xeb\xdc"                                   #           jmp keys
    b"\x53"                                       # number:   push ebx
    b"\x89\xc3"                                   #           mov ebx, eax
    b"\xb0\x20"                                   #           mov al, 0x20
    b"\xe8\x1d\x00\x00\x00"                       #           call put
    b"\xb9\x08\x00\x00\x00"                       #           mov ecx, 0x8
    b"\xc1\xc3\x04"                               # digit:    rol ebx, 0x4
    b"\x88\xd8"                                   #           mov al, bl
    b"\x24\x0f"                                   #           and al, 0xf
    b"\x04\x30"                                   #           add al, 0x30
    b"\x3c\x39"                                   #           cmp al, 0x39
    b"\x76\x02"                                   #           jbe decimal
    b"\x04\x27"                                   #           add al, 0x27
    b"\xe8\x04\x00\x00\x00"                       # decimal:  call put
    b"\xe2\xea"                                   #           loop digit
    b"\x5b"                                       #           pop ebx
    b"\xc3"                                       #           ret
    b"\xba\xf8\x03\x00\x00"                       # put:      mov edx, 0x3f8
    b"\xee"                                       #           out dx, al
    b"\xc3"                                       #           ret
)

_COUNTER = (
    b"\xfa"                                       # start:    cli
    b"\xb8\x00\x00\x21\x00"                       #           mov eax, 0x210000
    b"\x0f\x22\xd8"                               #           mov cr3, eax
    b"\xb8\x20\x00\x00\x00"                       #           mov eax, 0x20
    b"\x0f\x22\xe0"                               #           mov cr4, eax
    b"\xb9\x80\x00\x00\xc0"                       #           mov ecx, 0xc0000080
    b"\xb8\x00\x01\x00\x00"                       #           mov eax, 0x100
    b"\x31\xd2"                                   #           xor edx, edx
    b"\x0f\x30"                                   #           wrmsr
    b"\xb8\x11\x00\x00\x80"                       #           mov eax, 0x80000011
    b"\x0f\x22\xc0"                               #           mov cr0, eax
    b"\x0f\x01\x15\x80\x00\x20\x00"               #           lgdt [GDT]
    b"\xea\x55\x00\x10\x00\x08\x00"                 #           jmp 8:long
    b"\xb8\x10\x00\x00\x00"                       # long:     mov eax, 0x10
    b"\x8e\xd8"                                   #           mov ds, eax
    b"\x8e\xc0"                                   #           mov es, eax
    b"\x8e\xd0"                                   #           mov ss, eax
    b"\xbc\x00\x90\x00\x00"                       #           mov esp, 0x9000
    b"\x45\x31\xe4"                               #           xor r12d, r12d
    b"\x49\x0f\xba\xec\x28"                       #           bts r12, 0x28
    b"\x49\xff\xc4"                               # count:    inc r12
    b"\xb9\x60\xea\x00\x00"                       #           mov ecx, 0xea60
    b"\xe2\xfe"                                   # wait:     loop wait
    b"\xb0\x6e"                                   #           mov al, 0x6e
    b"\xba\xf8\x03\x00\x00"                       #           mov edx, 0x3f8
    b"\xee"                                       #           out dx, al
    b"\xb0\x20"                                   #           mov al, 0x20
    b"\xee"                                       #           out dx, al
    b"\xb9\x10\x00\x00\x00"                       #           mov ecx, 0x10
    b"\x49\xc1\xc4\x04"                           # digit:    rol r12, 0x4
    b"\x44\x88\xe0"                               #           mov al, r12b
    b"\x24\x0f"                                   #           and al, 0xf
    b"\x04\x30"                                   #           add al, 0x30
    b"\x3c\x39"                                   #           cmp al, 0x39
    b"\x76\x02"                                   #           jbe decimal
    b"\x04\x27"                                   #           add al, 0x27
    b"\xee"                                       # decimal:  out dx, al
    b"\xe2\xec"                                   #           loop digit
    b"\xb0\x0a"                                   #           mov al, 0xa
    b"\xee"                                       #           out dx, al
    b"\xeb\xcd"                                   #           jmp count
)
#: a descriptor table, and page tables: the first 16 MiB, one to one
_GDT, _ROOT = _VARIABLES + 0x80, _VARIABLES + 0x10000


def witness(pages: int = 0, words: int = 0, period: int = 10_000_000) -> bytes:
    """The kernel of one that writes `pages` pages, `words` (0 to 1022) of each at random, and says a line
    after so many cycles."""
    return _kernel(_WITNESS, struct.pack("<8I", pages, period, words, 0, 0, 0, 0, 1))


def counter() -> bytes:
    """The kernel of the 64-bit guest."""
    gdt = struct.pack("<HI10x3Q", 23, _GDT + 16, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)
    tables = struct.pack("<Q4088xQ4088x8Q", _ROOT + 0x1000 | 3, _ROOT + 0x2000 | 3,
                         *(number << 21 | 0x83 for number in range(8)))
    return _kernel(_COUNTER, bytes(0x80) + gdt.ljust(_ROOT - _GDT, b"\0") + tables)


def _kernel(code: bytes, data: bytes) -> bytes:
    text = multiboot_header().ljust(_ENTRY, b"\0") + code
    return elf32(_CODE + _ENTRY, [(_CODE, text, len(text)), (_VARIABLES, data, len(data))])


class Evidence:
    """What the console of a witness says; all numbers as they were said, in their order."""

    def __init__(self, console: str) -> None:
        said = re.findall(r"t ([0-9a-f]{8}) ([0-9a-f]{8}) ([0-9a-f]{8})\n", console)
        #: the time stamp counter at each line
        self.clock = [int(high + low, 16) for high, low, _ in said]
        self.lines = [int(line, 16) for _, _, line in said]
        self.keys = "".join(re.findall(r"<(.)>", console, re.DOTALL))
        self.bad = re.findall(r"B [0-9a-f]{8}", console)

    def check(self) -> None:
        """Nothing is lost, doubled, or out of order."""
        assert not self.bad
        assert self.lines == list(range(self.lines[0], self.lines[0] + len(self.lines)))
        assert self.clock == sorted(set(self.clock))


def counted(console: str) -> list[int]:
    """The numbers that a counter said."""
    return [int(number, 16) for number in re.findall(r"^n ([0-9a-f]{16})$", console, re.MULTILINE)]
