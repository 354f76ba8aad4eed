# SPDX-License-Identifier: GPL-2.0-or-later
"""The load of a guest that is migrated: pages that check themselves, written at a rate or at full speed.

A program of 32-bit Linux, which 64-bit kernels run too, assembled by hand: guests have no compiler, and a
shell is too slow.  Its arguments: PAGES RATE WORDS SECONDS NANOSECONDS.  RATE is pages a second, 0 is as fast
as it can; WORDS of each page change every time; between rounds it sleeps SECONDS and NANOSECONDS.

Pages are written one after the other, over and over.  A page's words are its number, its generation, one
that makes the sum of all zero, and random ones.  Before a page is written it is verified: sum, number, and
the generation that the order of writing says it has.  So a page that is lost, old, or another one shows when
its turn comes.  Four times a second it says

    c LINE STEPS GAP CLOCK

the number of the line, pages written so far, the longest time between two rounds since the line before, and
CLOCK_MONOTONIC (both in microseconds, modulo 2**32).  Of a wrong page it says

    b SUM NUMBER GENERATION WANTED PAGE

what was found, the generation it was to have, and its place; then it mends the page and goes on.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from hostd.ctl.cpio import CpioArchive

#: where it lies in the guest
PATH = "bin/load"
#: how often it says something
LINES_PER_SECOND = 4
MAX_PAGES = 16384
PAGE = 4096

#: the 32-bit words from _DATA on, which EBP points to; the last is a timespec of two.  The first five are the
#: arguments in their order; a line is put together below _DATA + 0x200; the pages begin at _DATA + PAGE.
VARIABLES = ("pages", "rate", "words", "seconds", "pause", "page", "generation", "steps", "left", "earned",
             "last", "gap", "next", "lines", "random", "place", "time")
_DATA = 0x9000000

CODE = (
    b"\xbd\x00\x00\x00\x09"                       # start:     mov   ebp, 0x9000000
    b"\x8d\x74\x24\x08"                           #            lea   esi, [esp + 8]
    b"\x89\xef"                                   #            mov   edi, ebp
    b"\xad"                                       # argument:  lodsd eax, [esi]
    b"\x31\xd2"                                   #            xor   edx, edx
    b"\x0f\xb6\x18"                               # digit:     movzx ebx, byte ptr [eax]
    b"\x83\xeb\x30"                               #            sub   ebx, 0x30
    b"\x72\x08"                                   #            jb    parsed
    b"\x6b\xd2\x0a"                               #            imul  edx, edx, 0xa
    b"\x01\xda"                                   #            add   edx, ebx
    b"\x40"                                       #            inc   eax
    b"\xeb\xf0"                                   #            jmp   digit
    b"\x89\x17"                                   # parsed:    mov   [edi], edx
    b"\x83\xc7\x04"                               #            add   edi, 4
    b"\x81\xff\x14\x00\x00\x09"                   #            cmp   edi, 0x9000014
    b"\x75\xe0"                                   #            jne   argument
    b"\xbf\x00\x10\x00\x09"                       #            mov   edi, 0x9001000
    b"\x31\xf6"                                   #            xor   esi, esi
    b"\xb9\x00\x04\x00\x00"                       # fill:      mov   ecx, 0x400
    b"\x31\xd2"                                   #            xor   edx, edx
    b"\x69\xc0\x0d\x66\x19\x00"                   # draw:      imul  eax, eax, 0x19660d
    b"\x05\x5f\xf3\x6e\x3c"                       #            add   eax, 0x3c6ef35f
    b"\x89\x44\x8f\xfc"                           #            mov   [edi + ecx*4 - 4], eax
    b"\x01\xc2"                                   #            add   edx, eax
    b"\x49"                                       #            dec   ecx
    b"\x75\xec"                                   #            jne   draw
    b"\x2b\x17"                                   #            sub   edx, [edi]
    b"\x01\xf2"                                   #            add   edx, esi
    b"\x89\x37"                                   #            mov   [edi], esi
    b"\x2b\x57\x04"                               #            sub   edx, [edi + 4]
    b"\x89\x4f\x04"                               #            mov   [edi + 4], ecx
    b"\x29\x57\x08"                               #            sub   [edi + 8], edx
    b"\x81\xc7\x00\x10\x00\x00"                   #            add   edi, 0x1000
    b"\x46"                                       #            inc   esi
    b"\x3b\x75\x00"                               #            cmp   esi, [pages]
    b"\x75\xca"                                   #            jne   fill
    b"\x89\x45\x38"                               #            mov   [random], eax
    b"\xc7\x45\x3c\x03\x00\x00\x00"               #            mov   [place], 3
    b"\xe8\x91\x01\x00\x00"                       #            call  now
    b"\x89\x45\x28"                               #            mov   [last], eax
    b"\x89\x45\x30"                               #            mov   [next], eax
    b"\xe8\x86\x01\x00\x00"                       # round:     call  now
    b"\x89\xc2"                                   #            mov   edx, eax
    b"\x2b\x55\x28"                               #            sub   edx, [last]
    b"\x89\x45\x28"                               #            mov   [last], eax
    b"\x3b\x55\x2c"                               #            cmp   edx, [gap]
    b"\x76\x03"                                   #            jbe   earn
    b"\x89\x55\x2c"                               #            mov   [gap], edx
    b"\xb8\x40\x00\x00\x00"                       # earn:      mov   eax, 0x40
    b"\x83\x7d\x04\x00"                           #            cmp   [rate], 0
    b"\x74\x1e"                                   #            je    begin
    b"\xb8\xa0\x86\x01\x00"                       #            mov   eax, 0x186a0
    b"\x39\xc2"                                   #            cmp   edx, eax
    b"\x77\x02"                                   #            ja    late
    b"\x89\xd0"                                   #            mov   eax, edx
    b"\xf7\x65\x04"                               # late:      mul   [rate]
    b"\x03\x45\x24"                               #            add   eax, [earned]
    b"\x83\xd2\x00"                               #            adc   edx, 0
    b"\xb9\x40\x42\x0f\x00"                       #            mov   ecx, 0xf4240
    b"\xf7\xf1"                                   #            div   ecx
    b"\x89\x55\x24"                               #            mov   [earned], edx
    b"\x89\x45\x20"                               # begin:     mov   [left], eax
    b"\x85\xc0"                                   #            test  eax, eax
    b"\x0f\x84\xdf\x00\x00\x00"                   #            je    report
    b"\x8b\x7d\x14"                               # step:      mov   edi, [page]
    b"\xc1\xe7\x0c"                               #            shl   edi, 0xc
    b"\x81\xc7\x00\x10\x00\x09"                   #            add   edi, 0x9001000
    b"\x89\xfe"                                   #            mov   esi, edi
    b"\xb9\x00\x01\x00\x00"                       #            mov   ecx, 0x100
    b"\x31\xc0"                                   #            xor   eax, eax
    b"\x03\x06"                                   # sum:       add   eax, [esi]
    b"\x03\x46\x04"                               #            add   eax, [esi + 4]
    b"\x03\x46\x08"                               #            add   eax, [esi + 8]
    b"\x03\x46\x0c"                               #            add   eax, [esi + 0xc]
    b"\x83\xc6\x10"                               #            add   esi, 0x10
    b"\x49"                                       #            dec   ecx
    b"\x75\xef"                                   #            jne   sum
    b"\x8b\x5d\x14"                               #            mov   ebx, [page]
    b"\x8b\x55\x18"                               #            mov   edx, [generation]
    b"\x85\xc0"                                   #            test  eax, eax
    b"\x75\x09"                                   #            jne   bad
    b"\x39\x1f"                                   #            cmp   [edi], ebx
    b"\x75\x05"                                   #            jne   bad
    b"\x39\x57\x04"                               #            cmp   [edi + 4], edx
    b"\x74\x45"                                   #            je    good
    b"\x57"                                       # bad:       push  edi
    b"\x50"                                       #            push  eax
    b"\xff\x37"                                   #            push  [edi]
    b"\xff\x77\x04"                               #            push  [edi + 4]
    b"\x52"                                       #            push  edx
    b"\x53"                                       #            push  ebx
    b"\xbf\x00\x02\x00\x09"                       #            mov   edi, 0x9000200
    b"\xb9\x05\x00\x00\x00"                       #            mov   ecx, 5
    b"\x58"                                       # operand:   pop   eax
    b"\x51"                                       #            push  ecx
    b"\xe8\x14\x01\x00\x00"                       #            call  number
    b"\x59"                                       #            pop   ecx
    b"\x49"                                       #            dec   ecx
    b"\x75\xf5"                                   #            jne   operand
    b"\xb0\x62"                                   #            mov   al, 0x62
    b"\xe8\x21\x01\x00\x00"                       #            call  print
    b"\x5f"                                       #            pop   edi
    b"\x8b\x45\x14"                               #            mov   eax, [page]
    b"\x89\x07"                                   #            mov   [edi], eax
    b"\x8b\x55\x18"                               #            mov   edx, [generation]
    b"\x89\x57\x04"                               #            mov   [edi + 4], edx
    b"\xb9\x00\x04\x00\x00"                       #            mov   ecx, 0x400
    b"\x31\xc0"                                   #            xor   eax, eax
    b"\x89\xfe"                                   #            mov   esi, edi
    b"\x03\x06"                                   # again:     add   eax, [esi]
    b"\x83\xc6\x04"                               #            add   esi, 4
    b"\x49"                                       #            dec   ecx
    b"\x75\xf8"                                   #            jne   again
    b"\x29\x47\x08"                               #            sub   [edi + 8], eax
    b"\xff\x47\x04"                               # good:      inc   [edi + 4]
    b"\xff\x4f\x08"                               #            dec   [edi + 8]
    b"\x8b\x4d\x08"                               #            mov   ecx, [words]
    b"\x8b\x75\x3c"                               #            mov   esi, [place]
    b"\x8d\x14\x0e"                               #            lea   edx, [esi + ecx]
    b"\x81\xfa\x00\x04\x00\x00"                   #            cmp   edx, 0x400
    b"\x76\x05"                                   #            jbe   fits
    b"\xbe\x03\x00\x00\x00"                       #            mov   esi, 3
    b"\x8d\x14\xb7"                               # fits:      lea   edx, [edi + esi*4]
    b"\x01\xce"                                   #            add   esi, ecx
    b"\x89\x75\x3c"                               #            mov   [place], esi
    b"\x8b\x45\x38"                               #            mov   eax, [random]
    b"\x69\xc0\x0d\x66\x19\x00"                   # change:    imul  eax, eax, 0x19660d
    b"\x05\x5f\xf3\x6e\x3c"                       #            add   eax, 0x3c6ef35f
    b"\x8b\x1a"                                   #            mov   ebx, [edx]
    b"\x29\xc3"                                   #            sub   ebx, eax
    b"\x01\x5f\x08"                               #            add   [edi + 8], ebx
    b"\x89\x02"                                   #            mov   [edx], eax
    b"\x83\xc2\x04"                               #            add   edx, 4
    b"\x49"                                       #            dec   ecx
    b"\x75\xe6"                                   #            jne   change
    b"\x89\x45\x38"                               #            mov   [random], eax
    b"\xff\x45\x1c"                               #            inc   [steps]
    b"\x8b\x45\x14"                               #            mov   eax, [page]
    b"\x40"                                       #            inc   eax
    b"\x3b\x45\x00"                               #            cmp   eax, [pages]
    b"\x75\x05"                                   #            jne   advance
    b"\x31\xc0"                                   #            xor   eax, eax
    b"\xff\x45\x18"                               #            inc   [generation]
    b"\x89\x45\x14"                               # advance:   mov   [page], eax
    b"\xff\x4d\x20"                               #            dec   [left]
    b"\x0f\x85\x21\xff\xff\xff"                   #            jne   step
    b"\x8b\x45\x28"                               # report:    mov   eax, [last]
    b"\x89\xc2"                                   #            mov   edx, eax
    b"\x2b\x55\x30"                               #            sub   edx, [next]
    b"\x78\x3e"                                   #            js    rest
    b"\x05\x90\xd0\x03\x00"                       #            add   eax, 0x3d090
    b"\x89\x45\x30"                               #            mov   [next], eax
    b"\xff\x45\x34"                               #            inc   [lines]
    b"\xbf\x00\x02\x00\x09"                       #            mov   edi, 0x9000200
    b"\x8b\x45\x28"                               #            mov   eax, [last]
    b"\xe8\x66\x00\x00\x00"                       #            call  number
    b"\x8b\x45\x2c"                               #            mov   eax, [gap]
    b"\xe8\x5e\x00\x00\x00"                       #            call  number
    b"\x8b\x45\x1c"                               #            mov   eax, [steps]
    b"\xe8\x56\x00\x00\x00"                       #            call  number
    b"\x8b\x45\x34"                               #            mov   eax, [lines]
    b"\xe8\x4e\x00\x00\x00"                       #            call  number
    b"\xc7\x45\x2c\x00\x00\x00\x00"               #            mov   [gap], 0
    b"\xb0\x63"                                   #            mov   al, 0x63
    b"\xe8\x58\x00\x00\x00"                       #            call  print
    b"\x83\x7d\x04\x00"                           # rest:      cmp   [rate], 0
    b"\x0f\x84\x86\xfe\xff\xff"                   #            je    round
    b"\xb8\xa2\x00\x00\x00"                       #            mov   eax, 0xa2
    b"\x8d\x5d\x0c"                               #            lea   ebx, [seconds]
    b"\x31\xc9"                                   #            xor   ecx, ecx
    b"\xcd\x80"                                   #            int   0x80
    b"\xe9\x75\xfe\xff\xff"                       #            jmp   round
    b"\xb8\x09\x01\x00\x00"                       # now:       mov   eax, 0x109
    b"\xbb\x01\x00\x00\x00"                       #            mov   ebx, 1
    b"\x8d\x4d\x40"                               #            lea   ecx, [time]
    b"\xcd\x80"                                   #            int   0x80
    b"\x8b\x45\x44"                               #            mov   eax, [time + 4]
    b"\x31\xd2"                                   #            xor   edx, edx
    b"\xb9\xe8\x03\x00\x00"                       #            mov   ecx, 0x3e8
    b"\xf7\xf1"                                   #            div   ecx
    b"\x69\x55\x40\x40\x42\x0f\x00"               #            imul  edx, [time], 0xf4240
    b"\x01\xd0"                                   #            add   eax, edx
    b"\xc3"                                       #            ret
    b"\xb9\x0a\x00\x00\x00"                       # number:    mov   ecx, 0xa
    b"\x31\xd2"                                   # decimal:   xor   edx, edx
    b"\xf7\xf1"                                   #            div   ecx
    b"\x80\xc2\x30"                               #            add   dl, 0x30
    b"\x4f"                                       #            dec   edi
    b"\x88\x17"                                   #            mov   byte ptr [edi], dl
    b"\x85\xc0"                                   #            test  eax, eax
    b"\x75\xf2"                                   #            jne   decimal
    b"\x4f"                                       #            dec   edi
    b"\xc6\x07\x20"                               #            mov   byte ptr [edi], 0x20
    b"\xc3"                                       #            ret
    b"\x4f"                                       # print:     dec   edi
    b"\x88\x07"                                   #            mov   byte ptr [edi], al
    b"\xba\x01\x02\x00\x09"                       #            mov   edx, 0x9000201
    b"\x29\xfa"                                   #            sub   edx, edi
    b"\xc6\x85\x00\x02\x00\x00\x0a"               #            mov   byte ptr [ebp + 0x200], 0xa
    b"\x89\xf9"                                   #            mov   ecx, edi
    b"\xbb\x01\x00\x00\x00"                       #            mov   ebx, 1
    b"\xb8\x04\x00\x00\x00"                       #            mov   eax, 4
    b"\xcd\x80"                                   #            int   0x80
    b"\xc3"                                       #            ret
)

_TEXT = 0x8048000
_HEADER = struct.Struct("<16s2H5I6H")
_SEGMENT = struct.Struct("<8I")
_HEADERS = _HEADER.size + 2 * _SEGMENT.size
_EXECUTABLE, _I386, _LOAD, _READ_EXECUTE, _READ_WRITE = 2, 3, 1, 5, 6


def executable() -> bytes:
    """The program as an ELF file: what is read and executed, and memory that is zero at first."""
    header = _HEADER.pack(b"\x7fELF\1\1\1", _EXECUTABLE, _I386, 1, _TEXT + _HEADERS, _HEADER.size, 0, 0,
                          _HEADER.size, _SEGMENT.size, 2, 0, 0, 0)
    size = _HEADERS + len(CODE)
    text = _SEGMENT.pack(_LOAD, 0, _TEXT, _TEXT, size, size, _READ_EXECUTE, PAGE)
    data = _SEGMENT.pack(_LOAD, 0, _DATA, _DATA, 0, (1 + MAX_PAGES) * PAGE, _READ_WRITE, PAGE)
    return header + text + data + CODE


def add_to(initrd: Path, target: Path) -> Path:
    """Write the initramfs with the program in it to `target`: the kernel unpacks archives one by one."""
    archive = CpioArchive()
    archive.file(PATH, executable(), 0o755)
    target.write_bytes(initrd.read_bytes() + archive.finish())
    return target


@dataclass(frozen=True)
class Load:
    """What the program is to do."""

    pages: int
    #: pages a second; 0: as fast as it can
    rate: int
    #: 32-bit words of a page that change each time, of 1021
    words: int = 64
    #: seconds of sleep between rounds, less than one
    pause: float = 0.005

    def command(self) -> str:
        """What is typed at the guest's shell, which stays there to be talked to."""
        return f"/{PATH} {self.pages} {self.rate} {self.words} 0 {self.pause * 1e9:.0f} &\n"


#: a guest that does nothing but say that it is there
IDLE = Load(pages=16, rate=20, pause=0.01)
#: 16 MiB, all of it every other second
DIRTY_2000 = Load(pages=4096, rate=2000)
#: 48 MiB, again and again
DIRTIER = Load(pages=12288, rate=0)
