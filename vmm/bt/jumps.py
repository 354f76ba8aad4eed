# SPDX-License-Identifier: GPL-2.0-or-later
"""Jumps from a unit to guest addresses known when it is translated.

Only jumps within a page of guest code are direct: what lies in another page, only the guest's page tables
of the moment say, and so a jump there goes through the jump table:

    mov r8d, target; jmp [r15+r8*8]
"""

from __future__ import annotations

from vmm.bt.template import JMP, REL32, Exit

#: jmp [r15 + r8*8]
THROUGH_TABLE = b"\x43\xFF\x24\xC7"
#: mov r8d, imm32
_MOV_R8D = b"\x41\xB8"
_JUMP = JMP + REL32
_PAGE = 1 << 12
#: bytes of a jump through the table
FAR_BYTES = 10


def jump(eip: int, at: int = 0, *, callout: bool = False) -> tuple[bytes, tuple[Exit, ...]]:
    """A direct jump at offset `at`, within the page."""
    return _JUMP, (Exit(at, at + 1, eip, False, callout),)


def go(eip: int, to: int, at: int, taken: bool = False) -> tuple[bytes, tuple[Exit, ...]]:
    """From the instruction at guest address `eip` to guest address `to`."""
    if to ^ eip < _PAGE:
        return _JUMP, (Exit(at, at + 1, to, taken),)
    return far(to), ()


def far(to: int) -> bytes:
    """To guest address `to`, whatever page it is in."""
    return _MOV_R8D + to.to_bytes(4, "little") + THROUGH_TABLE
