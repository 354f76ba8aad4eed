# SPDX-License-Identifier: GPL-2.0-or-later
"""Signals while a guest runs in this process: its faults, kicks, and everything that is not the guest's.

Handlers are machine code on an alternate stack, for the guest's esp is no stack of ours.  A fault whose rip
lies among the units of the block on the CPU is the guest's: the handler notes it in the block and lets the
signal return to `leave`, r13 saying what happened.  A jump through an empty entry of the jump table arrives
at rip 0.  Anything else is a crash of this process: the handler that was there before is put back and the
instruction faults again, so that faulthandler, or the kernel, reports it as if we were not there.

A kick among the units makes the guest leave; one that finds the trampoline still entering makes it give up,
and any other is kept in the control page and makes the next entry give up.  So no kick is ever lost.

The control page is one per process: at most one guest is on the CPU, that of the only thread that enters.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import threading

from vmm.bt.native import memory
from vmm.bt.native.arena import STUB_BYTES
from vmm.bt.native.assembly import assemble
from vmm.bt.native.block import OFFSETS
from vmm.bt.native.trampolines import FAULT, MISS, PREEMPTED

FAULT_SIGNALS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP)
#: sent to make a running guest leave; the other signals above SIGRTMIN belong to other CPUs
KICK_SIGNAL = signal.SIGRTMAX

_SIGNALS = 65
_ACTION_BYTES = 32
_CONTROL = {"current": 0, "kicked": 8, "previous": 64}
#: offsets in ucontext_t and siginfo_t of Linux on x86-64
_CONTEXT = {"uc_r13": 80, "uc_rip": 168, "uc_efl": 176, "uc_err": 192, "uc_trapno": 200, "uc_cr2": 216,
            "si_code": 8}
_MARKS = {f"mark_{name}": -number * STUB_BYTES & 0xFFFF_FFFF
          for name, number in (("fault", FAULT), ("miss", MISS), ("preempted", PREEMPTED))}

# registers on entry: edi signal, rsi siginfo, rdx ucontext; all may be changed, sigreturn restores them
HANDLERS = """
fault:
        49 B8 =control                  ; movabs r8, control
        4D 8B 88 @current               ; mov r9, qword ptr [r8 + current]
        4D 85 C9                        ; test r9, r9
        0F 84 >>foreign                 ; je foreign
        83 BE @si_code 00               ; cmp dword ptr [rsi + si_code], 0
        0F 8E >>foreign                 ; jle foreign
        48 8B 82 @uc_rip                ; mov rax, qword ptr [rdx + uc_rip]
        48 89 C1                        ; mov rcx, rax
        49 2B 89 @units                 ; sub rcx, qword ptr [r9 + units]
        49 3B 89 @units_bytes           ; cmp rcx, qword ptr [r9 + units_bytes]
        72 >guest                       ; jb guest
        48 85 C0                        ; test rax, rax
        0F 84 >>miss                    ; je miss
        83 FF 05                        ; cmp edi, 5
        0F 85 >>foreign                 ; jne foreign
        48 89 C1                        ; mov rcx, rax
        49 2B 89 @monitor_code          ; sub rcx, qword ptr [r9 + monitor_code]
        49 3B 89 @monitor_code_bytes    ; cmp rcx, qword ptr [r9 + monitor_code_bytes]
        0F 83 >>foreign                 ; jae foreign
        81 A2 @uc_efl FF FE FF FF       ; and dword ptr [rdx + uc_efl], 0xfffffeff
        C3                              ; ret
guest:
        49 89 81 @rip                   ; mov qword ptr [r9 + rip], rax
        48 8B 8A @uc_trapno             ; mov rcx, qword ptr [rdx + uc_trapno]
        49 89 89 @fault_vector          ; mov qword ptr [r9 + fault_vector], rcx
        48 8B 8A @uc_err                ; mov rcx, qword ptr [rdx + uc_err]
        49 89 89 @fault_error           ; mov qword ptr [r9 + fault_error], rcx
        48 8B 8A @uc_cr2                ; mov rcx, qword ptr [rdx + uc_cr2]
        49 89 89 @fault_address         ; mov qword ptr [r9 + fault_address], rcx
        B9 @mark_fault                  ; mov ecx, mark_fault
        EB >leave                       ; jmp leave
miss:
        B9 @mark_miss                   ; mov ecx, mark_miss
        EB >leave                       ; jmp leave
preempt:
        49 89 81 @rip                   ; mov qword ptr [r9 + rip], rax
        B9 @mark_preempted              ; mov ecx, mark_preempted
leave:
        49 8B 81 @stub_origin           ; mov rax, qword ptr [r9 + stub_origin]
        48 29 C8                        ; sub rax, rcx
        48 89 82 @uc_r13                ; mov qword ptr [rdx + uc_r13], rax
        49 8B 81 @exit                  ; mov rax, qword ptr [r9 + exit]
        48 89 82 @uc_rip                ; mov qword ptr [rdx + uc_rip], rax
        81 A2 @uc_efl FF FE FF FF       ; and dword ptr [rdx + uc_efl], 0xfffffeff
        C3                              ; ret
kick:
        49 B8 =control                  ; movabs r8, control
        4D 8B 88 @current               ; mov r9, qword ptr [r8 + current]
        4D 85 C9                        ; test r9, r9
        74 >note                        ; je note
        48 8B 82 @uc_rip                ; mov rax, qword ptr [rdx + uc_rip]
        48 89 C1                        ; mov rcx, rax
        49 2B 89 @units                 ; sub rcx, qword ptr [r9 + units]
        49 3B 89 @units_bytes           ; cmp rcx, qword ptr [r9 + units_bytes]
        72 >preempt                     ; jb preempt
        48 89 C1                        ; mov rcx, rax
        49 2B 89 @entering              ; sub rcx, qword ptr [r9 + entering]
        49 3B 89 @entering_bytes        ; cmp rcx, qword ptr [r9 + entering_bytes]
        73 >note                        ; jae note
        49 8B 81 @abandon               ; mov rax, qword ptr [r9 + abandon]
        48 89 82 @uc_rip                ; mov qword ptr [rdx + uc_rip], rax
        C3                              ; ret
note:
        41 C7 80 @kicked 01 00 00 00    ; mov dword ptr [r8 + kicked], 1
        C3                              ; ret
foreign:
        89 FB                           ; mov ebx, edi
        49 89 F4                        ; mov r12, rsi
        89 FE                           ; mov esi, edi
        48 C1 E6 05                     ; shl rsi, 5
        49 8D B4 30 @previous           ; lea rsi, [r8 + rsi + previous]
        31 D2                           ; xor edx, edx
        41 BA 08 00 00 00               ; mov r10d, 8
        B8 0D 00 00 00                  ; mov eax, 0xd
        0F 05                           ; syscall
        48 C7 06 00 00 00 00            ; mov qword ptr [rsi], 0
        41 83 BC 24 @si_code 00         ; cmp dword ptr [r12 + si_code], 0
        7E >again                       ; jle again
        83 FB 05                        ; cmp ebx, 5
        74 >again                       ; je again
        C3                              ; ret
again:
        B8 27 00 00 00                  ; mov eax, 0x27
        0F 05                           ; syscall
        89 C7                           ; mov edi, eax
        B8 BA 00 00 00                  ; mov eax, 0xba
        0F 05                           ; syscall
        89 C6                           ; mov esi, eax
        89 DA                           ; mov edx, ebx
        B8 EA 00 00 00                  ; mov eax, 0xea
        0F 05                           ; syscall
        C3                              ; ret
"""

_SA_SIGINFO, _SA_ONSTACK, _SA_RESTART, _SA_NODEFER = 0x4, 0x0800_0000, 0x1000_0000, 0x4000_0000
_SYS_RT_SIGACTION = 13
_STACK_BYTES = 256 << 10
#: kept by the C library for threads, or not to be caught at all
_UNTOUCHABLE = frozenset({32, 33, signal.SIGKILL, signal.SIGSTOP})
# struct sigaction of glibc: handler, mask, flags, restorer
_ACTION = struct.Struct("<Q128sIxxxxQ")
_EMPTY_MASK = bytes(128)
# stack_t: address, flags, size
_STACK = struct.Struct("<QixxxxQ")
_libc = ctypes.PyDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _action(number: int) -> tuple[int, bytes, int, int]:
    """What the process does on a signal: handler, mask, flags, restorer."""
    old = ctypes.create_string_buffer(_ACTION.size)
    _check(_libc.sigaction(number, None, old), f"action of signal {number}")
    return _ACTION.unpack(old.raw)


def _install(number: int, handler: int, mask: bytes, flags: int) -> None:
    _check(_libc.sigaction(number, _ACTION.pack(handler, mask, flags, 0), None), f"signal {number}")


def _kernel_action(number: int) -> bytes:
    """A signal's action as the kernel has it, to be given back to it by machine code."""
    old = ctypes.create_string_buffer(_ACTION_BYTES)
    _check(_libc.syscall(_SYS_RT_SIGACTION, number, None, old, 8), f"action of signal {number}")
    return old.raw


class Handlers:
    """The signal handlers of this process, its control page and its alternate stack.

    Invariant, restored by `ensure`: the fault signals and the kick have our handlers, every other handler
    of the process runs on the alternate stack, and that stack is ours.
    """

    def __init__(self) -> None:
        self.control = memory.reserve(memory.PAGE, memory.READ | memory.WRITE)
        self._view = memory.view(self.control, memory.PAGE)
        #: names for machine code that uses the control page
        self.names = {**_CONTROL, "control": self.control}
        code = assemble(HANDLERS, {**OFFSETS, **_CONTEXT, **_MARKS, **self.names})
        page = memory.reserve(memory.PAGE, memory.READ | memory.WRITE)
        memory.view(page, memory.PAGE)[:len(code.code)] = code.code
        memory.protect(page, memory.PAGE, memory.READ | memory.EXEC)
        self._fault, self._kick = page + code.labels["fault"], page + code.labels["kick"]
        stack = memory.reserve(_STACK_BYTES, memory.READ | memory.WRITE)
        self._stack = _STACK.pack(stack, 0, _STACK_BYTES)
        self._stack_address = stack
        self.ensure()

    def ensure(self) -> None:
        """Put our handlers (back) in front of what others installed; what is there now becomes previous."""
        for number in map(int, FAULT_SIGNALS):
            now = _kernel_action(number)
            if int.from_bytes(now[:8], "little") != self._fault:
                at = _CONTROL["previous"] + number * _ACTION_BYTES
                self._view[at:at + _ACTION_BYTES] = now
                _install(number, self._fault, _EMPTY_MASK, _SA_SIGINFO | _SA_ONSTACK | _SA_NODEFER)
        _install(KICK_SIGNAL, self._kick, _EMPTY_MASK, _SA_SIGINFO | _SA_ONSTACK | _SA_RESTART)
        for number in range(1, _SIGNALS):
            if number not in _UNTOUCHABLE:
                self._move_to_stack(number)
        _check(_libc.sigaltstack(self._stack, None), "alternate stack")

    @staticmethod
    def _move_to_stack(number: int) -> None:
        """A handler of somebody else's must not run on the guest's esp either."""
        handler, mask, flags, _ = _action(number)
        if handler not in (signal.SIG_DFL, signal.SIG_IGN) and not flags & _SA_ONSTACK:
            _install(number, handler, mask, flags | _SA_ONSTACK)

    @property
    def kick_handler(self) -> int:
        """Address of the handler of kicks, for other signals that are kicks as well."""
        return self._kick

    def forget_kick(self) -> None:
        """A kick that found no guest running has been seen to."""
        at = _CONTROL["kicked"]
        self._view[at:at + 4] = bytes(4)

    def intact(self) -> bool:
        """Whether the alternate stack and the handler of SIGSEGV are still ours."""
        stack = ctypes.create_string_buffer(_STACK.size)
        _check(_libc.sigaltstack(None, stack), "alternate stack")
        return (_action(signal.SIGSEGV)[0] == self._fault
                and _STACK.unpack(stack.raw)[0] == self._stack_address)

    def kick(self) -> None:
        """Make the guest of this thread leave, or its next entry give up."""
        signal.pthread_kill(threading.get_ident(), KICK_SIGNAL)
