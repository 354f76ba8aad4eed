# SPDX-License-Identifier: GPL-2.0-or-later
"""The way into translated code and out of it on the emulated processor, at CPL 3 like the code itself.

A copy of what translated code may see of the state block lies at a fixed address.  `enter` loads the guest
from it, `registers` all of it but its FPU; `leave`, where the stubs jump, stores the guest there; `pause`
ends a run with the guest's registers as they are.  r13 says why a guest left, as in the native trampolines.
"""

from __future__ import annotations

from vmm.bt.native.assembly import Assembled, assemble
from vmm.bt.native.block import LIVE_FLAGS, OFFSETS

LISTING = """
enter:
        49 BE =block                    ; movabs r14, block
        41 0F AE 8E @fx                 ; fxrstor [r14 + fx]
registers:
        49 BE =block                    ; movabs r14, block
        4D 8B A6 @window                ; mov r12, qword ptr [r14 + window]
        4D 8B BE @jump_table            ; mov r15, qword ptr [r14 + jump_table]
        41 8B 86 @flags                 ; mov eax, dword ptr [r14 + flags]
        25 D5 0C 00 00                  ; and eax, 0xcd5
        49 8D A6 @stack                 ; lea rsp, [r14 + stack]
        50                              ; push rax
        9D                              ; popfq
        45 8B 86 @r8                    ; mov r8d, dword ptr [r14 + r8]
        45 8B 8E @r9                    ; mov r9d, dword ptr [r14 + r9]
        45 8B 96 @r10                   ; mov r10d, dword ptr [r14 + r10]
        45 8B 9E @r11                   ; mov r11d, dword ptr [r14 + r11]
        41 8B 8E @rcx                   ; mov ecx, dword ptr [r14 + rcx]
        41 8B 96 @rdx                   ; mov edx, dword ptr [r14 + rdx]
        41 8B 9E @rbx                   ; mov ebx, dword ptr [r14 + rbx]
        41 8B A6 @rsp                   ; mov esp, dword ptr [r14 + rsp]
        41 8B AE @rbp                   ; mov ebp, dword ptr [r14 + rbp]
        41 8B B6 @rsi                   ; mov esi, dword ptr [r14 + rsi]
        41 8B BE @rdi                   ; mov edi, dword ptr [r14 + rdi]
        41 8B 86 @rax                   ; mov eax, dword ptr [r14 + rax]
        41 FF A6 @rip                   ; jmp qword ptr [r14 + rip]
leave:
        49 BE =block                    ; movabs r14, block
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
        49 8D A6 @stack                 ; lea rsp, [r14 + stack]
        9C                              ; pushfq
        41 0F AE 86 @fx                 ; fxsave [r14 + fx]
pause:
        0F 05                           ; syscall
left:
        EB >left                        ; jmp left
"""


def build(block: int) -> Assembled:
    """The trampolines for a state block at virtual address `block`."""
    # a push there is one to `flags`
    return assemble(LISTING, {**OFFSETS, "block": block, "stack": OFFSETS["flags"] + 8})


assert LIVE_FLAGS == 0xCD5       # `enter` masks with it
