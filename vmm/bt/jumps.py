# SPDX-License-Identifier: GPL-2.0-or-later
"""Jumps from a unit to guest addresses known when it is translated.

Only jumps within a page of guest code are direct: what lies in another page, only the guest's page tables
of the moment say, and so a jump there goes through the jump table:

    mov r8d, target; jmp [r15+r8*8]
"""

from __future__ import annotations

from vmm.bt.exits import CALLOUT, PAGE_MASK, SITE
from vmm.bt.template import JMP, REL32, Leaving

#: jmp [r15 + r8*8], and how it is cut
THROUGH_TABLE = b"\x43\xFF\x24\xC7"
THROUGH_TABLE_CUT = b"\x04"
#: mov r8d, imm32
_MOV_R8D = b"\x41\xB8"
_JUMP = JMP + REL32
_JUMP_CUT, _FAR_CUT = b"\x01", b"\x02" + THROUGH_TABLE_CUT
_PAGE = 1 << 12
#: bytes of a jump through the table
FAR_BYTES = 10


def callout(eip: int, at: int) -> Leaving:
    """To the monitor, for the instruction at guest address `eip`, by a jump at offset `at`."""
    return _JUMP, at + 1 << SITE | eip & PAGE_MASK | CALLOUT, _JUMP_CUT


def go(eip: int, to: int, at: int, flags: int = 0) -> Leaving:
    """From the instruction at guest address `eip` to guest address `to`, by a jump at offset `at`."""
    if to ^ eip < _PAGE:
        return _JUMP, at + 1 << SITE | to & PAGE_MASK | flags, _JUMP_CUT
    return far(to), 0, _FAR_CUT


def far(to: int) -> bytes:
    """To guest address `to`, whatever page it is in."""
    return _MOV_R8D + to.to_bytes(4, "little") + THROUGH_TABLE
