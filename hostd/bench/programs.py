# SPDX-License-Identifier: GPL-2.0-or-later
"""The programs that are timed: machine code for 64-bit mode, assembled by hand.

A program does its work R15 times, writes to the debug-exit port, and stays where it is, `STAY` bytes before
its end.  RSI and RBX are arguments.  `repeat` makes a program of one operation; the others are whole.
"""

from __future__ import annotations

_END = (
    b"\xe6\xf4"              # out   0xf4, al
    b"\xeb\xfe"              # jmp   to itself
)
STAY = 2

_NEXT_ROUND = (
    b"\x49\xff\xcf"          # dec   r15
)


def repeat(operation: bytes) -> bytes:
    """`operation`, R15 times over; it may change all registers but R15 and RSP."""
    back = -(len(operation) + len(_NEXT_ROUND) + 2)
    jump = b"\x75" + back.to_bytes(1, "little", signed=True)     # jnz   to the operation
    return operation + _NEXT_ROUND + jump + _END


NOTHING = b""

#: the serial port's line status, which a booting kernel reads most of all ports
IN = (
    b"\x66\xba\xfd\x03"      # mov   dx, 0x3fd
    b"\xec"                  # in    al, dx
)

#: the serial port's scratch register
OUT = (
    b"\x66\xba\xff\x03"      # mov   dx, 0x3ff
    b"\xee"                  # out   dx, al
)

CPUID = (
    b"\x31\xc0"              # xor   eax, eax
    b"\x31\xc9"              # xor   ecx, ecx
    b"\x0f\xa2"              # cpuid
)

#: APIC_BASE
RDMSR = (
    b"\xb9\x1b\x00\x00\x00"  # mov   ecx, 0x1b
    b"\x0f\x32"              # rdmsr
)

#: RSI points where nothing is mapped; SKIP_FAULT is the handler
PAGE_FAULT = (
    b"\x8a\x06"              # mov   al, [rsi]
)
SKIP_FAULT = (
    b"\x48\x83\x44\x24\x08\x02"      # add   qword [rsp+8], 2
    b"\x48\x83\xc4\x08"      # add   rsp, 8
    b"\x48\xcf"              # iretq
)

#: from ring 3, to SYSTEM_CALL and back
SYSCALL = (
    b"\x0f\x05"              # syscall
)
SYSTEM_CALL = (
    b"\x48\x0f\x07"          # sysretq
)

#: KVM_HC_KICK_CPU, which does nothing
VMMCALL = (
    b"\xb8\x05\x00\x00\x00"  # mov   eax, 5
    b"\x0f\x01\xd9"          # vmmcall
)

#: RSI goes through memory page by page
TOUCH_PAGE = (
    b"\x48\x89\x36"          # mov   [rsi], rsi
    b"\x48\x81\xc6\x00\x10\x00\x00"  # add   rsi, 0x1000
)

#: RSI points to a device's register
READ_DEVICE = (
    b"\x8b\x06"              # mov   eax, [rsi]
)

#: never ends: a guest that leaves its CPU at every instruction
HALT_FOR_EVER = (
    b"\xf4"                  # hlt
    b"\xeb\xfd"              # jmp   to the hlt
)

#: the primes below R15 by trial division: isPrime of the paper's section 3.1 for every number
PRIMES = (
    b"\x45\x31\xd2"          #            xor   r10d, r10d     ; how many
    b"\xbe\x02\x00\x00\x00"  #            mov   esi, 2         ; the number
    b"\xb9\x02\x00\x00\x00"  # number:    mov   ecx, 2         ; the divisor
    b"\x39\xf1"              # divisor:   cmp   ecx, esi
    b"\x7d\x0d"              #            jge   prime
    b"\x89\xf0"              #            mov   eax, esi
    b"\x99"                  #            cdq
    b"\xf7\xf9"              #            idiv  ecx
    b"\x85\xd2"              #            test  edx, edx
    b"\x74\x07"              #            jz    composite
    b"\xff\xc1"              #            inc   ecx
    b"\xeb\xef"              #            jmp   divisor
    b"\x41\xff\xc2"          # prime:     inc   r10d
    b"\xff\xc6"              # composite: inc   esi
    b"\x44\x39\xfe"          #            cmp   esi, r15d
    b"\x7c\xe0"              #            jl    number
) + _END

#: one quadword in each of EBX cache lines from RSI is read and written, R15 times
MEMORY = (
    b"\x48\x89\xf7"          # round:     mov   rdi, rsi
    b"\x89\xd9"              #            mov   ecx, ebx
    b"\x48\x8b\x07"          # line:      mov   rax, [rdi]
    b"\x4c\x01\xf8"          #            add   rax, r15
    b"\x48\x89\x07"          #            mov   [rdi], rax
    b"\x48\x83\xc7\x40"      #            add   rdi, 0x40
    b"\xff\xc9"              #            dec   ecx
    b"\x75\xef"              #            jnz   line
    b"\x49\xff\xcf"          #            dec   r15
    b"\x75\xe5"              #            jnz   round
) + _END
