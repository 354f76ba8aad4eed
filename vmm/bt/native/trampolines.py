# SPDX-License-Identifier: GPL-2.0-or-later
"""The way into translated code and the way back, as a C function `int enter(block)`.

It returns the number of the exit stub by which the guest left, or one of the negative numbers below.
The guest's x87, MMX and SSE state is loaded and saved here, since Python's code uses all of it; what the
System V ABI wants kept (rbx, rbp, r12-r15, rsp, DF, the x87 and SSE control words) is kept here too.  The gs
base stays the last window's: nothing else in a process uses it.

The guest is entered by `iretq`, which loads its rip, flags and rsp in one step: the trap flag then strikes
after one instruction of the guest, and no instruction of the trampoline runs on the guest's stack pointer
but that of `leave`.  Upper halves of all registers of the guest, and of r8-r11, are zero on entry: what the
verifier accepts keeps them so.
"""

from __future__ import annotations

import ctypes

from vmm.bt.native.arena import STUB_BYTES
from vmm.bt.native.assembly import Assembled, assemble
from vmm.bt.native.block import LIVE_FLAGS, OFFSETS

#: what `enter` returns besides the number of a stub
FAULT = -1           # translated code faulted: see Block.fault
MISS = -2            # a jump through the table found nothing: the guest address is in r8
PREEMPTED = -3       # a kick came: the guest stands at Block's rip, where it was entered or got to

_AT_HWCAP2, _HWCAP2_FSGSBASE = 26, 2
_ARCH_SET_GS = 0x1001

_ENTER = """
        53                              ; push rbx
        55                              ; push rbp
        41 54                           ; push r12
        41 55                           ; push r13
        41 56                           ; push r14
        41 57                           ; push r15
        49 89 FE                        ; mov r14, rdi
        49 89 A6 @host_rsp              ; mov qword ptr [r14 + host_rsp], rsp
        41 0F AE 9E @host_mxcsr         ; stmxcsr dword ptr [r14 + host_mxcsr]
        41 D9 BE @host_fcw              ; fnstcw word ptr [r14 + host_fcw]
        48 B8 =control                  ; movabs rax, control
        4C 89 B0 @current               ; mov qword ptr [rax + current], r14
entering:
        83 B8 @kicked 00                ; cmp dword ptr [rax + kicked], 0
        0F 85 >>abandon                 ; jne abandon
        41 0F AE 8E @fx                 ; fxrstor [r14 + fx]
        4D 8B A6 @window                ; mov r12, qword ptr [r14 + window]
        4D 8B BE @jump_table            ; mov r15, qword ptr [r14 + jump_table]
"""
_SET_GS = {
    True: """
        F3 49 0F AE DC                  ; wrgsbase r12
""",
    False: """
        B8 9E 00 00 00                  ; mov eax, 0x9e
        BF 01 10 00 00                  ; mov edi, 0x1001
        4C 89 E6                        ; mov rsi, r12
        0F 05                           ; syscall
"""}
_ENTER_GUEST = """
        8C D0                           ; mov eax, ss
        50                              ; push rax
        41 8B 86 @rsp                   ; mov eax, dword ptr [r14 + rsp]
        50                              ; push rax
        41 8B 86 @flags                 ; mov eax, dword ptr [r14 + flags]
        25 D5 0C 00 00                  ; and eax, 0xcd5
        0D 02 02 00 00                  ; or eax, 0x202
        41 0B 86 @single_step           ; or eax, dword ptr [r14 + single_step]
        50                              ; push rax
        8C C8                           ; mov eax, cs
        50                              ; push rax
        41 FF B6 @rip                   ; push qword ptr [r14 + rip]
        45 8B 86 @r8                    ; mov r8d, dword ptr [r14 + r8]
        45 8B 8E @r9                    ; mov r9d, dword ptr [r14 + r9]
        45 8B 96 @r10                   ; mov r10d, dword ptr [r14 + r10]
        45 8B 9E @r11                   ; mov r11d, dword ptr [r14 + r11]
        41 8B 8E @rcx                   ; mov ecx, dword ptr [r14 + rcx]
        41 8B 96 @rdx                   ; mov edx, dword ptr [r14 + rdx]
        41 8B 9E @rbx                   ; mov ebx, dword ptr [r14 + rbx]
        41 8B AE @rbp                   ; mov ebp, dword ptr [r14 + rbp]
        41 8B B6 @rsi                   ; mov esi, dword ptr [r14 + rsi]
        41 8B BE @rdi                   ; mov edi, dword ptr [r14 + rdi]
        41 8B 86 @rax                   ; mov eax, dword ptr [r14 + rax]
        48 CF                           ; iretq
abandon:
        C7 80 @kicked 00 00 00 00       ; mov dword ptr [rax + kicked], 0
abandoned:
        41 BD @preempted_number         ; mov r13d, preempted_number
        EB >restore                     ; jmp restore
leave:
        41 89 86 @rax                   ; mov dword ptr [r14 + rax], eax
        41 89 8E @rcx                   ; mov dword ptr [r14 + rcx], ecx
        41 89 96 @rdx                   ; mov dword ptr [r14 + rdx], edx
        41 89 9E @rbx                   ; mov dword ptr [r14 + rbx], ebx
        41 89 A6 @rsp                   ; mov dword ptr [r14 + rsp], esp
        41 89 AE @rbp                   ; mov dword ptr [r14 + rbp], ebp
        41 89 B6 @rsi                   ; mov dword ptr [r14 + rsi], esi
        41 89 BE @rdi                   ; mov dword ptr [r14 + rdi], edi
        45 89 86 @r8                    ; mov dword ptr [r14 + r8], r8d
        45 89 8E @r9                    ; mov dword ptr [r14 + r9], r9d
        45 89 96 @r10                   ; mov dword ptr [r14 + r10], r10d
        45 89 9E @r11                   ; mov dword ptr [r14 + r11], r11d
        49 8B A6 @host_rsp              ; mov rsp, qword ptr [r14 + host_rsp]
        9C                              ; pushfq
        41 8F 86 @flags                 ; pop qword ptr [r14 + flags]
        4D 2B AE @stub_origin           ; sub r13, qword ptr [r14 + stub_origin]
        49 C1 FD 04                     ; sar r13, 4
        41 0F AE 86 @fx                 ; fxsave [r14 + fx]
restore:
        FC                              ; cld
        49 8B A6 @host_rsp              ; mov rsp, qword ptr [r14 + host_rsp]
        DB E3                           ; fninit
        41 D9 AE @host_fcw              ; fldcw word ptr [r14 + host_fcw]
        41 0F AE 96 @host_mxcsr         ; ldmxcsr dword ptr [r14 + host_mxcsr]
        48 B8 =control                  ; movabs rax, control
        48 C7 80 @current 00 00 00 00   ; mov qword ptr [rax + current], 0
        44 89 E8                        ; mov eax, r13d
        41 5F                           ; pop r15
        41 5E                           ; pop r14
        41 5D                           ; pop r13
        41 5C                           ; pop r12
        5D                              ; pop rbp
        5B                              ; pop rbx
        C3                              ; ret
"""


def has_fsgsbase() -> bool:
    """Whether the host lets user code set its gs base without a system call."""
    libc = ctypes.CDLL(None)
    libc.getauxval.restype = ctypes.c_ulong
    return bool(libc.getauxval(ctypes.c_ulong(_AT_HWCAP2)) & _HWCAP2_FSGSBASE)


def listing(fsgsbase: bool) -> str:
    """The trampolines for a host with or without `wrgsbase`."""
    return _ENTER + _SET_GS[fsgsbase] + _ENTER_GUEST


def build(fsgsbase: bool, control: dict[str, int]) -> Assembled:
    """The trampolines; `control` names the address of the control page and its fields."""
    return assemble(listing(fsgsbase), {**OFFSETS, **control, "preempted_number": PREEMPTED})


assert STUB_BYTES == 1 << 4      # `leave` shifts by it
assert LIVE_FLAGS == 0xCD5       # `enter` masks with it
