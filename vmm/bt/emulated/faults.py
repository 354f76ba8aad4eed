# SPDX-License-Identifier: GPL-2.0-or-later
"""What the emulated processor reports otherwise than processors do when an instruction faults on memory.

Read-modify-write: it reads first, and so reports a read, and the write only when the page is there.  What an
instruction means to do is in its operands; translated instructions are the guest's but for the prefixes of
their address, so the table of the guest's instructions knows it.

Flags: it keeps the operands of the last instruction that set them (CC_OP says which kind) and computes the
flags when they are used.  A few instructions compute them before they touch memory; on a fault CC_OP is what
it was before the instruction, the operands are not.
"""

from __future__ import annotations

from vmm.bt.decode import Instruction, decode
from vmm.bt.table import Map

_ADDRESS_PREFIXES = b"\x65\x67"
_LEGACY_PREFIXES = b"\x66\xF0\xF2\xF3"
#: QEMU's kinds of CC_OP: the flags are in CC_SRC; a subtraction or comparison
CC_OP_EFLAGS = 1
_CC_OP_SUB = range(14, 18)
#: conditions without their lowest bit, which negates them
_O, _BE, _P, _L, _LE = 0, 6, 10, 12, 14
_SETCC = 0x90


def translated(code: bytes) -> Instruction:
    """The guest's form of the translated instruction that `code` begins with."""
    at = 0
    legacy = bytearray()
    while code[at] in _ADDRESS_PREFIXES or code[at] in _LEGACY_PREFIXES:
        if code[at] in _LEGACY_PREFIXES:
            legacy.append(code[at])
        at += 1
    if code[at] & 0xF0 == 0x40:         # REX: other registers, the same instruction
        at += 1
    return decode(bytes(legacy) + code[at:] + bytes(16), 0, True)


def writes(form: Instruction) -> bool:
    """Whether an instruction writes to its operand in memory."""
    return form.memory is not None and form.memory.written


def has_computed_flags(form: Instruction, cc_op: int) -> bool:
    """Whether an instruction that faulted had its predecessor's flags in CC_SRC already.

    For a setcc that begins a block of the engine's the answer may be wrong: then the kind was not known when
    it was translated, and more conditions want the flags computed.
    """
    if form.map is Map.ONE_BYTE:
        return form.entry.mnemonic in ("rcl", "rcr")
    if form.map is not Map.TWO_BYTE or form.opcode & 0xF0 != _SETCC:
        return False
    condition = form.opcode & 14
    return condition in (_O, _P) or (condition in (_BE, _L, _LE) and cc_op not in _CC_OP_SUB)
