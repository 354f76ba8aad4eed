# SPDX-License-Identifier: GPL-2.0-or-later
"""Kicks by time and by input, sent to the thread that runs guests."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import threading
import time

from vmm.bt.native.signals import KICK_SIGNAL

_TIMER_ABSTIME = 1
_SIGEV_THREAD_ID = 4
_REPEAT_NS = 1_000_000
_F_SETSIG, _F_SETOWN_EX, _F_OWNER_TID = 10, 15, 0
_libc = ctypes.PyDLL(None, use_errno=True)


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval_s", ctypes.c_long), ("interval_ns", ctypes.c_long),
                ("value_s", ctypes.c_long), ("value_ns", ctypes.c_long))


class KickTimer:
    """Kicks the thread that made it at a time, and every millisecond from then until set again."""

    def __init__(self) -> None:
        self._thread = threading.get_native_id()
        # struct sigevent: value, signo, notify, thread id, padding
        event = struct.pack("<Qiii44x", 0, KICK_SIGNAL, _SIGEV_THREAD_ID, self._thread)
        timer = ctypes.c_void_p()
        if _libc.timer_create(time.CLOCK_MONOTONIC, event, ctypes.byref(timer)):
            number = ctypes.get_errno()
            raise OSError(number, f"timer_create: {os.strerror(number)}")
        self._timer = timer
        self._spec = _Itimerspec()
        self._spec_pointer = ctypes.byref(self._spec)
        self._armed = 0

    def at(self, when_ns: int) -> None:
        """Kick at CLOCK_MONOTONIC `when_ns`."""
        if when_ns == self._armed and time.monotonic_ns() < when_ns:
            return
        self._armed = when_ns
        self._set(max(when_ns, 1), _REPEAT_NS)

    def rest(self) -> None:
        """No kicks by time any more."""
        if self._armed:
            self._armed = 0
            self._set(0, 0)

    def _set(self, when_ns: int, repeat_ns: int) -> None:
        spec = self._spec
        spec.value_s, spec.value_ns = divmod(when_ns, 1_000_000_000)
        spec.interval_ns = repeat_ns
        _libc.timer_settime(self._timer, _TIMER_ABSTIME, self._spec_pointer, None)

    def on_readable(self, descriptor: int) -> None:
        """Kick whenever input arrives on `descriptor` (a socket)."""
        fcntl.fcntl(descriptor, _F_SETOWN_EX, struct.pack("<ii", _F_OWNER_TID, self._thread))
        fcntl.fcntl(descriptor, _F_SETSIG, KICK_SIGNAL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)

    def close(self) -> None:
        """Delete the timer."""
        self.rest()
        _libc.timer_delete(self._timer)
