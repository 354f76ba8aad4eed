# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that counts on its console, `n NUMBER` a line in hexadecimal, and ends when it is told to.

Of the keys that are typed, `q` has it power off, `r` reset itself, and `c` crash.
"""

from __future__ import annotations

from tests.kernels import elf32, multiboot_header

_CODE, _ENTRY = 0x100000, 0x20

_PROGRAM = (
    b"\xfa"                                       # start:    cli
    b"\xbc\x00\x90\x00\x00"                       #           mov esp, 0x9000
    b"\x31\xed"                                   #           xor ebp, ebp
    b"\x66\xba\xfa\x03"                           #           mov dx, 0x3fa
    b"\xb0\x01"                                   #           mov al, 0x1
    b"\xee"                                       #           out dx, al
    b"\xb9\x80\x84\x1e\x00"                       # count:    mov ecx, 0x1e8480
    b"\x49"                                       # wait:     dec ecx
    b"\x75\xfd"                                   #           jne wait
    b"\x45"                                       #           inc ebp
    b"\xb0\x6e"                                   #           mov al, 0x6e
    b"\xe8\x57\x00\x00\x00"                       #           call put
    b"\xb0\x20"                                   #           mov al, 0x20
    b"\xe8\x50\x00\x00\x00"                       #           call put
    b"\x89\xeb"                                   #           mov ebx, ebp
    b"\xb9\x08\x00\x00\x00"                       #           mov ecx, 0x8
    b"\xc1\xc3\x04"                               # digit:    rol ebx, 0x4
    b"\x88\xd8"                                   #           mov al, bl
    b"\x24\x0f"                                   #           and al, 0xf
    b"\x04\x30"                                   #           add al, 0x30
    b"\x3c\x39"                                   #           cmp al, 0x39
    b"\x76\x02"                                   #           jbe out
    b"\x04\x27"                                   #           add al, 0x27
    b"\xe8\x35\x00\x00\x00"                       # out:      call put
    b"\xe2\xea"                                   #           loop digit
    b"\xb0\x0a"                                   #           mov al, 0xa
    b"\xe8\x2c\x00\x00\x00"                       #           call put
    b"\x66\xba\xfd\x03"                           #           mov dx, 0x3fd
    b"\xec"                                       #           in al, dx
    b"\xa8\x01"                                   #           test al, 0x1
    b"\x74\xbc"                                   #           je count
    b"\x66\xba\xf8\x03"                           #           mov dx, 0x3f8
    b"\xec"                                       #           in al, dx
    b"\x3c\x71"                                   #           cmp al, 0x71
    b"\x74\x0a"                                   #           je quit
    b"\x3c\x72"                                   #           cmp al, 0x72
    b"\x74\x0f"                                   #           je reset
    b"\x3c\x63"                                   #           cmp al, 0x63
    b"\x75\xab"                                   #           jne count
    b"\x0f\x0b"                                   #           ud2
    b"\x31\xc0"                                   # quit:     xor eax, eax
    b"\x66\xba\xf4\x00"                           #           mov dx, 0xf4
    b"\xee"                                       #           out dx, al
    b"\xeb\xfe"                                   # halt:     jmp halt
    b"\x66\xba\xf9\x0c"                           # reset:    mov dx, 0xcf9
    b"\xb0\x06"                                   #           mov al, 0x6
    b"\xee"                                       #           out dx, al
    b"\x66\xba\xf8\x03"                           # put:      mov dx, 0x3f8
    b"\xee"                                       #           out dx, al
    b"\xc3"                                       #           ret
)


def obedient() -> bytes:
    """Its kernel."""
    text = multiboot_header().ljust(_ENTRY, b"\0") + _PROGRAM
    return elf32(_CODE + _ENTRY, [(_CODE, text, len(text))])
