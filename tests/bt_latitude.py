# SPDX-License-Identifier: GPL-2.0-or-later
"""What the architecture leaves open, and so is not compared."""

from __future__ import annotations

from tests.bt_example import Example, Outcome, State
from vmm.bt.decode import Instruction, decode
from vmm.bt.table import Kind
from vmm.x86.faults import Vector

_LIMIT = 0xFFFF_FFFF
#: the longest operand, and what all of pusha stores
_NEAR = 32


def agree(example: Example, got: Outcome, wanted: Outcome) -> bool:
    """Whether two outcomes are the same as far as that is defined."""
    if got.eip == wanted.eip and _round_the_limit(example, got, wanted):
        return True
    got = begun_again(example, got, wanted)
    return (got[:4] == wanted[:4] and got.memory == wanted.memory
            and _visible(got.state) == _visible(wanted.state))


def begun_again(example: Example, got: Outcome, wanted: Outcome) -> Outcome:
    """What a popa that faulted has loaded already does not matter: it will be loaded again."""
    if wanted.vector == Vector.PF and wanted.access != "fetch" and _kind(example, wanted.eip) is Kind.POPA:
        return got._replace(state=State(wanted.state.registers, *got.state[1:]))
    return got


def undefined(example: Example, got: Outcome, wanted: Outcome, forms: list[Instruction]) -> bool:
    """Whether there is a push of a segment register: the upper half of what it pushes may be anything."""
    return any(form.kind is Kind.SEGMENT and form.entry.mnemonic == "push" for form in forms)


def _kind(example: Example, eip: int) -> Kind:
    at = eip - example.eip
    return decode(example.code[max(at, 0):].ljust(15, b"\0"), 0, True).kind


def _round_the_limit(example: Example, got: Outcome, wanted: Outcome) -> bool:
    """An operand that goes on at offset 0 of a segment of 4 GiB may be #GP or #SS, or not."""
    return wanted.vector in (Vector.GP, Vector.SS) and got.vector == Vector.PF and any(
        got.address - base & _LIMIT > _LIMIT - _NEAR for base in (0, *example.bases))


def _visible(state: State) -> tuple[tuple[int, ...], int, bytes]:
    """Without the address of the last x87 instruction and of its operand, and what is reserved."""
    registers, flags, fx = state
    # control, status and tags; MXCSR; ST0 to ST7; XMM0 to XMM7
    parts = [fx[0:5], fx[24:28], *(fx[at:at + 10] for at in range(32, 160, 16)), fx[160:288]]
    return registers, flags, b"".join(parts)
