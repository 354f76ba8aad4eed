# SPDX-License-Identifier: GPL-2.0-or-later
"""Jumps from a unit to guest addresses known when it is translated.

Only jumps within a page of guest code are direct: what lies in another page, only the guest's page tables
of the moment say, and so a jump there goes through the jump table:

    mov r8d, target; jmp [r15+r8*8]
"""

from __future__ import annotations

from vmm.bt.exits import CALLOUT, PAGE_MASK, before
from vmm.bt.template import JMP, REL32, Leaving, Parts

#: jmp [r15 + r8*8]
THROUGH_TABLE = b"\x43\xFF\x24\xC7"
#: mov r8d, imm32
MOV_R8D = b"\x41\xB8"
_JUMP = JMP, REL32
_PAGE = 1 << 12


def callout(eip: int) -> Leaving:
    """To the monitor, for the instruction at guest address `eip`."""
    return _JUMP, ((eip & PAGE_MASK | CALLOUT, 0, -1),)


def go(eip: int, to: int, flags: int = 0) -> Leaving:
    """From the instruction at guest address `eip` to guest address `to`."""
    if to ^ eip < _PAGE:
        return _JUMP, ((to & PAGE_MASK | flags, 0, -1),)
    return far(to), ()


def far(to: int) -> Parts:
    """To guest address `to`, whatever page it is in."""
    return MOV_R8D, to.to_bytes(4, "little"), THROUGH_TABLE, b""


def either(choice: bytes, there: Leaving, onward: Leaving, body: bytes = b"") -> Leaving:
    """`choice`, which goes on behind itself or skips what leaves behind it; there `body`, and on."""
    (jump, *others), exits = there
    (first, *rest), further = onward
    behind = body + first, *rest
    return (choice + jump, *others, *behind), before(behind, exits) + further
