# SPDX-License-Identifier: GPL-2.0-or-later
"""#VMEXITs as values: what the exit code and EXITINFO1/2 say, decoded (APM vol. 2, 15.6 to 15.12, 15.25)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vmm.exitcodes import ExitCode
from vmm.x86.faults import PUSHES_ERROR_CODE, Vector


class Plain(NamedTuple):
    """An instruction or event that its code says everything about."""

    code: int


class Fault(NamedTuple):
    """An intercepted exception; `address` is what CR2 would get (page faults)."""

    vector: int
    error_code: int | None = None
    address: int | None = None


class NestedFault(NamedTuple):
    """A guest-physical address the nested table does not allow."""

    gpa: int
    write: bool
    fetch: bool = False


class MsrAccess(NamedTuple):
    """RDMSR or WRMSR; number and value are in the registers."""

    write: bool


class RegisterMove(NamedTuple):
    """MOV to or from a control or debug register; which general register is in the instruction."""

    debug: bool
    number: int
    write: bool


Exit = Plain | Fault | NestedFault | MsrAccess | RegisterMove
Decoder = Callable[[int, int, int], Exit]


def _exception(code: int, info1: int, info2: int) -> Exit:
    vector = code - ExitCode.EXCP_DE
    return Fault(vector, info1 if vector in PUSHES_ERROR_CODE else None,
                      info2 if vector == Vector.PF else None)


def _nested(_code: int, info1: int, info2: int) -> Exit:
    return NestedFault(info2, bool(info1 & 2), bool(info1 & 16))


def _msr(_code: int, info1: int, _info2: int) -> Exit:
    return MsrAccess(bool(info1 & 1))


def _move(code: int, _info1: int, _info2: int) -> Exit:
    return RegisterMove(bool(code & 0x20), code & 0xF, bool(code & 0x10))


def _plain(code: int, _info1: int, _info2: int) -> Exit:
    return Plain(code)


#: exit code -> decoder
DECODERS: dict[int, Decoder] = {
    **{int(code): _plain for code in ExitCode},
    **dict.fromkeys(range(ExitCode.CR0_READ, ExitCode.DR15_WRITE + 1), _move),
    **dict.fromkeys(range(ExitCode.EXCP_DE, ExitCode.EXCP_31 + 1), _exception),
    ExitCode.MSR: _msr,
    ExitCode.NPF: _nested,
}


def decode(code: int, info1: int, info2: int) -> Exit:
    """The exit as a value.  Codes outside the manual's table come as Plain."""
    return DECODERS.get(code, _plain)(code, info1, info2)
