# SPDX-License-Identifier: GPL-2.0-or-later
"""Segment registers are read from the state block: the host's own are not the guest's.

Loading one is the monitor's: it takes a descriptor, and can change the mode.
"""

from __future__ import annotations

from vmm.bt.decode import Instruction
from vmm.bt.mode import Mode
from vmm.bt.native.block import FIELDS
from vmm.bt.operand import access
from vmm.bt.stack import move_esp, store_register
from vmm.bt.template import Template, fixed
from vmm.bt.unit import Mark

_SELECTORS = FIELDS["selector"]
_NAMES = ("ES", "CS", "SS", "DS", "FS", "GS")


def _load_r8(segment: int) -> bytes:
    """mov r8d, [r14 + selector]"""
    return b"\x45\x8B\x46" + bytes([_SELECTORS.offset + _SELECTORS.size * segment])


def read(form: Instruction, mode: Mode) -> Template | None:
    """push of a segment register, and mov from one; None for all that load one."""
    entry = form.entry
    if entry.mnemonic == "push":
        if not mode.stack or form.opsize == 2:
            return None
        segment = _NAMES.index(entry.operands[0].size)
        return fixed(Mark.INLINE, form, _load_r8(segment) + store_register(8, 4, -4) + move_esp(-4))
    if entry.mnemonic != "mov" or form.opcode != 0x8C or form.reg > 5:
        return None
    if form.mod != 3:
        if not mode.flat >> form.segment & 1 or form.addrsize == 2:
            return None         # its address needs r8
        return access(form, mode, Mark.INLINE, b"\x89", 0, legacy=b"\x66", rex=4, before=_load_r8(form.reg))
    wide = b"\x66" if form.opsize == 2 else b""
    # mov rm, r8d
    return fixed(Mark.INLINE, form, _load_r8(form.reg) + wide + bytes([0x44, 0x89, 0xC0 | form.rm]))
