# SPDX-License-Identifier: GPL-2.0-or-later
"""String instructions, repeated by the host's own `rep`.

ES:EDI takes no segment override, so where it is used rdi counts from the window's base, with 64-bit
addresses, and is cut to 32 bits afterwards:

    lea rdi, [rdi+r12]; rep movs gs:[rsi]; mov edi, edi; mov esi, esi

The base is a multiple of 4 GiB: in the middle of it, the low half of rdi is what the guest would see, and
so an interrupted one goes on when it is begun again.
"""

from __future__ import annotations

from vmm.bt.decode import ES, REP, REPNE, Instruction
from vmm.bt.mode import Mode
from vmm.bt.operand import WINDOW
from vmm.bt.template import Template, fixed
from vmm.bt.unit import Mark

#: lea rdi, [rdi + r12]
INTO_WINDOW = b"\x4A\x8D\x3C\x27"
_CUT_EDI, _CUT_ESI = b"\x89\xFF", b"\x89\xF6"
_GS = b"\x65"
_LODS, _MOVS, _CMPS, _SCAS = "lods", "movs", "cmps", "scas"


def string(form: Instruction, mode: Mode) -> Template | None:
    """One string instruction, with its repetition."""
    name = form.entry.mnemonic[:4]
    source, destination = name in (_LODS, _MOVS, _CMPS), name != _LODS
    if form.addrsize == 2 or (source and not mode.flat >> form.segment & 1) or (
            destination and not mode.flat >> ES & 1):
        return None
    repeat = b""
    if form.prefixes & (REP | REPNE):
        compares = name in (_CMPS, _SCAS)
        repeat = b"\xF2" if compares and form.prefixes & REPNE else b"\xF3"
    wide = b"\x66" if form.opsize == 2 and form.opcode & 1 else b""
    instruction = wide + repeat + bytes([form.opcode])
    if not destination:
        return fixed(Mark.IDENT, form, WINDOW + instruction)
    if not source:
        return fixed(Mark.INLINE, form, INTO_WINDOW + instruction + _CUT_EDI)
    return fixed(Mark.INLINE, form, INTO_WINDOW + _GS + instruction + _CUT_EDI + _CUT_ESI)
