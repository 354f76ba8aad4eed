# SPDX-License-Identifier: GPL-2.0-or-later
"""Stopping a running CPU from outside: by time, and by input on a descriptor.

A signal whose handler is a few bytes of machine code raises the CPU's interrupt line, as a device would: it
needs no thread, takes no interpreter lock, and arrives within microseconds.  An interrupt that comes while no
guest runs waits for the next one.  Only one that meets another change of the pending-interrupt word can get
lost; therefore the timer, once due, repeats every millisecond until it is set again.

`uc_emu_stop`, which is meant for this, is not used: once its flag is up, the OUT, SYSCALL and SYSENTER that
are still ahead in the same block pass as no-ops, since Unicorn does not call their hooks any more.

One real-time signal a CPU; a process can have as many CPUs as it has such signals (about thirty).
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import signal
import struct
import time
from collections.abc import Callable

from unicorn.unicorn_py3.unicorn import uclib

from vmm.silicon.layout import INTERRUPT_HARD

_libc = ctypes.CDLL(None, use_errno=True)
# SA_SIGINFO; SA_RESTART; SA_ONSTACK, since translated code may be running on a stack pointer of its own
_FLAGS = 0x4 | 0x1000_0000 | 0x0800_0000
_TIMER_ABSTIME = 1
_REPEAT_NS = 1_000_000
_F_SETSIG = 10

_RET = b"\xc3"
#: handlers of CPUs that are gone
_retired: list[mmap.mmap] = []
_free_signals = list(range(signal.SIGRTMIN + 2, signal.SIGRTMAX))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval_s", ctypes.c_long), ("interval_ns", ctypes.c_long),
                ("value_s", ctypes.c_long), ("value_ns", ctypes.c_long))


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


class Kicker:
    """Interrupts a CPU at a time or when a descriptor becomes readable.

    `cpu_object` and `interrupt_request` are addresses inside the engine (vmm.silicon.layout).
    """

    def __init__(self, cpu_object: int, interrupt_request: int) -> None:
        if not _free_signals:
            raise OSError("no real-time signal is left for another CPU in this process")
        self.signal = _free_signals.pop()
        leave = ctypes.cast(uclib.cpu_exit, ctypes.c_void_p).value or 0
        code = b"".join((
            b"\x48\xb8", struct.pack("<Q", interrupt_request),          # mov rax, interrupt_request
            b"\xf0\x83\x08", bytes([INTERRUPT_HARD]),                   # lock or dword [rax], INTERRUPT_HARD
            b"\x48\xbf", struct.pack("<Q", cpu_object),                 # mov rdi, cpu_object
            b"\x48\xb8", struct.pack("<Q", leave), b"\xff\xe0"))       # mov rax, cpu_exit; jmp rax
        self._code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._code.write(code)
        #: address of the handler, a function without arguments
        self.handler = ctypes.addressof(ctypes.c_char.from_buffer(self._code))
        self._both: mmap.mmap | None = None
        self.forget_other: Callable[[], None] | None = None
        self._install(self.handler)
        # struct sigevent: value, signo, notify (SIGEV_SIGNAL = 0), padding
        event = struct.pack("<QiI48x", 0, self.signal, 0)
        timer = ctypes.c_void_p()
        _check(_libc.timer_create(time.CLOCK_MONOTONIC, event, ctypes.byref(timer)), "timer_create")
        self._timer = timer
        self._spec = _Itimerspec()
        self._spec_pointer = ctypes.byref(self._spec)
        self._settime = _libc.timer_settime
        self._armed = 0
        self.closed = False

    def _install(self, handler: int) -> None:
        # struct sigaction of glibc on x86-64: handler, 128 bytes of mask, flags, restorer
        action = struct.pack("<Q128sIxxxxQ", handler, bytes(128), _FLAGS, 0)
        _check(_libc.sigaction(self.signal, action, None), "sigaction")

    def precede(self, other: int, forget: Callable[[], None]) -> None:
        """Whenever this CPU is stopped another handler, at address `other`, is called first.

        `forget` takes back what that handler did, when a stop has been seen to before it took effect.
        """
        self.forget_other = forget
        code = b"".join((
            b"\x48\x83\xec\x08",                                        # sub rsp, 8
            b"\x48\xb8", struct.pack("<Q", other), b"\xff\xd0",          # mov rax, other; call rax
            b"\x48\x83\xc4\x08",                                        # add rsp, 8
            b"\x48\xb8", struct.pack("<Q", self.handler), b"\xff\xe0"))  # mov rax, handler; jmp rax
        self._both = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._both.write(code)
        self._install(ctypes.addressof(ctypes.c_char.from_buffer(self._both)))

    def at(self, when_ns: int) -> None:
        """Stop the CPU at CLOCK_MONOTONIC `when_ns`, and every millisecond from then until set again."""
        if when_ns == self._armed and time.monotonic_ns() < when_ns:
            return
        spec = self._spec
        spec.value_s, spec.value_ns = divmod(max(when_ns, 1), 1_000_000_000)
        spec.interval_ns = _REPEAT_NS
        self._armed = when_ns
        self._settime(self._timer, _TIMER_ABSTIME, self._spec_pointer, None)

    def rest(self) -> None:
        """No stops any more."""
        if self._armed:
            self._armed = 0
            self._spec.value_s = self._spec.value_ns = self._spec.interval_ns = 0
            self._settime(self._timer, 0, self._spec_pointer, None)

    def on_readable(self, descriptor: int) -> None:
        """Stop the CPU whenever input arrives on `descriptor` (a socket)."""
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(descriptor, _F_SETSIG, self.signal)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)

    def close(self) -> None:
        """Delete the timer and give the signal back."""
        if not self.closed:
            self.closed = True
            _libc.timer_delete(self._timer)
            # a signal still under way must not find the code gone, nor another CPU's that calls it first
            self._code[0:1] = _RET
            _retired.append(self._code)
            signal.signal(self.signal, signal.SIG_IGN)
            _free_signals.append(self.signal)
