# SPDX-License-Identifier: GPL-2.0-or-later
"""Exceptions of the guest's processor, as Python exceptions.

Code that acts for the guest (an MSR access, a page walk, an interrupt delivery) raises `GuestFault`
where the processor would raise the exception; the monitor turns it into an event for the guest.
APM vol. 2, chapter 8.
"""

from __future__ import annotations

from enum import IntEnum


class Vector(IntEnum):
    """Exception vectors (APM vol. 2, table 8-1)."""

    DE = 0
    DB = 1
    NMI = 2
    BP = 3
    OF = 4
    BR = 5
    UD = 6
    NM = 7
    DF = 8
    TS = 10
    NP = 11
    SS = 12
    GP = 13
    PF = 14
    MF = 16
    AC = 17
    MC = 18
    XF = 19
    CP = 21
    HV = 28
    VC = 29
    SX = 30


#: exceptions that push an error code (APM vol. 2, table 8-1)
PUSHES_ERROR_CODE = frozenset({
    Vector.DF, Vector.TS, Vector.NP, Vector.SS, Vector.GP, Vector.PF, Vector.AC,
    Vector.CP, Vector.VC, Vector.SX,
})

#: exceptions that make a double fault together with one another (APM vol. 2, 8.2.9)
CONTRIBUTORY = frozenset({Vector.DE, Vector.TS, Vector.NP, Vector.SS, Vector.GP})

# page-fault error code (APM vol. 2, 8.4.2)
PF_PRESENT = 1 << 0
PF_WRITE = 1 << 1
PF_USER = 1 << 2
PF_RESERVED = 1 << 3
PF_FETCH = 1 << 4

# selector error code (APM vol. 2, 8.4.1): the selector without its RPL, and these
SELECTOR_EXT = 1 << 0
SELECTOR_IDT = 1 << 1


class GuestFault(Exception):
    """An exception the guest must receive.

    `error_code` is None for exceptions that push none; `address` is what CR2 gets (page faults only).
    """

    def __init__(self, vector: int, error_code: int | None = None, address: int | None = None) -> None:
        super().__init__(vector, error_code, address)
        self.vector = vector
        self.error_code = error_code
        self.address = address

    def __str__(self) -> str:
        try:
            text = f"#{Vector(self.vector).name}"
        except ValueError:
            text = f"vector {self.vector}"
        if self.error_code is not None:
            text += f"({self.error_code:#x})"
        if self.address is not None:
            text += f" at {self.address:#x}"
        return text


class GeneralProtection(GuestFault):
    """#GP with an error code; 0 unless a selector or IDT entry is to blame."""

    def __init__(self, error_code: int = 0) -> None:
        super().__init__(Vector.GP, error_code)


def becomes_double_fault(first: int, second: int) -> bool:
    """Whether `second`, raised while delivering `first`, turns into #DF (APM vol. 2, table 8-5).

    Otherwise `second` is simply delivered.  `becomes_shutdown` must be asked before.
    """
    if first == Vector.PF:
        return second == Vector.PF or second in CONTRIBUTORY
    return first in CONTRIBUTORY and second in CONTRIBUTORY


def becomes_shutdown(first: int, second: int) -> bool:
    """Whether `second`, raised while delivering `first`, is a triple fault."""
    return first == Vector.DF and (second == Vector.PF or second in CONTRIBUTORY)
