# SPDX-License-Identifier: GPL-2.0-or-later
"""Control flow: how units end.

    jcc     jcc [taken]; jmp [what follows]
    call    push the return address; jmp [target]
    ret     pop into r8d; jmp [r15+r8*8], the jump table

The displacements of direct jumps are left to the cache, which knows where the targets' translations are.
What needs a 16-bit EIP, or a stack not in the window, is the monitor's.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from vmm.bt import flagcode
from vmm.bt.decode import Instruction
from vmm.bt.exits import PAGE_MASK, TAKEN, WIDE, before
from vmm.bt.jumps import MOV_R8D, THROUGH_TABLE, callout, either, go
from vmm.bt.mode import Mode
from vmm.bt.operand import access
from vmm.bt.stack import load_r8, move_esp, store_immediate
from vmm.bt.table import Kind
from vmm.bt.template import JMP, REL32, Ending, EndingBuilder, Leaving, Parts
from vmm.bt.unit import Mark

#: mov dword ptr gs:[esp - 4], imm32; lea esp, [rsp - 4]
_STORE, _DOWN = store_immediate(4), move_esp(-4)


#: by their size
_DISPLACEMENTS = {size: struct.Struct(code) for size, code in ((1, "<b"), (2, "<h"), (4, "<i"))}


def _next(form: Instruction, eip: int) -> int:
    return eip + form.length & 0xFFFF_FFFF


def _push_next(form: Instruction, eip: int) -> Parts:
    return _STORE, (eip + form.length & 0xFFFF_FFFF).to_bytes(4, "little"), _DOWN, b""


def _jcc(form: Instruction, mode: Mode) -> Ending:
    condition = form.opcode & 15
    jumps = bytes([0x0F, 0x80 | condition]), REL32, JMP, REL32
    branch, flags = jumps[:2], TAKEN | WIDE
    around = bytes([0x70 | condition ^ 1, len(THROUGH_TABLE)]) + THROUGH_TABLE
    length, imm_at, in_full = form.length, form.imm_at, form.opsize == 4
    displacement = _DISPLACEMENTS[form.imm_size].unpack_from

    def emit(code: bytes, at: int, eip: int) -> Leaving:
        offset = (eip & PAGE_MASK) + length
        there = offset + displacement(code, at + imm_at)[0]
        if 0 <= there <= PAGE_MASK >= offset and in_full:
            # both in this page, by far the most frequent case
            return jumps, ((there | flags, 5, -3), (offset, 0, -1))
        taken, following = form.target(code, at, eip), _next(form, eip)
        onward, exits = go(eip, following)
        if taken ^ eip <= PAGE_MASK:
            return branch + onward, before(onward, ((taken & PAGE_MASK | flags, 0, -1),)) + exits
        # the other way round, over a jump through the table: so what follows can still be fallen into
        return (MOV_R8D, taken.to_bytes(4, "little"), around, b"", *onward), exits
    return Ending(Mark.JCC, emit)


def _loop(form: Instruction, mode: Mode) -> Ending | None:
    if form.addrsize == 2:
        return None

    def emit(code: bytes, at: int, eip: int) -> Leaving:
        # loop +2; jmp over; [taken]; over: [what follows]
        there, onward = go(eip, form.target(code, at, eip), TAKEN), go(eip, _next(form, eip))
        return either(bytes([0x67, form.opcode, 2, 0xEB, sum(map(len, there[0]))]), there, onward)
    return Ending(Mark.JCC, emit)


def _jmp(form: Instruction, mode: Mode) -> Ending:
    def emit(code: bytes, at: int, eip: int) -> Leaving:
        return go(eip, form.target(code, at, eip), TAKEN)
    return Ending(Mark.JMP, emit)


def _call(form: Instruction, mode: Mode) -> Ending | None:
    if not mode.stack or form.opsize == 2:
        return None

    def emit(code: bytes, at: int, eip: int) -> Leaving:
        jump, exits = go(eip, form.target(code, at, eip), TAKEN)
        return _push_next(form, eip) + jump, exits
    return Ending(Mark.CALL, emit)


def _ret(form: Instruction, mode: Mode) -> Ending | None:
    if not mode.stack or form.opsize == 2:
        return None
    pop = load_r8(4)
    plain: Leaving = (pop + move_esp(4) + THROUGH_TABLE, b""), ()

    def emit(code: bytes, at: int, eip: int) -> Leaving:
        dropped = form.immediate(code, at) & 0xFFFF
        return ((pop + move_esp(4 + dropped) + THROUGH_TABLE, b""), ()) if dropped else plain
    return Ending(Mark.RET, emit)


def _load_target(form: Instruction, mode: Mode) -> Callable[[bytes, int], Parts] | None:
    """Code that has the target of an indirect jump in r8d."""
    if form.opsize == 2:
        return None
    if form.mod == 3:
        move = bytes([0x44, 0x8B, 0xC0 | form.rm]), b""
        return lambda code, at: move
    template = access(form, mode, Mark.INDIRECT, b"\x8B", 0, rex=4)
    if template is None:
        return None
    head, tail_at, emit = template.head, template.tail_at, template.emit
    if emit is None:
        return lambda code, at: (head, code[at + tail_at:at + form.length])
    made = emit
    return lambda code, at: made(code, at) or ()


def _jmp_indirect(form: Instruction, mode: Mode) -> Ending | None:
    load = _load_target(form, mode)
    if load is None:
        return None

    def emit(code: bytes, at: int, eip: int) -> Leaving:
        return (*load(code, at), THROUGH_TABLE, b""), ()
    return Ending(Mark.INDIRECT, emit)


def _call_indirect(form: Instruction, mode: Mode) -> Ending | None:
    load = _load_target(form, mode)
    if load is None or not mode.stack:
        return None

    def emit(code: bytes, at: int, eip: int) -> Leaving:
        return (*load(code, at), *_push_next(form, eip), THROUGH_TABLE, b""), ()
    return Ending(Mark.CALL, emit)


ENDINGS: dict[Kind, EndingBuilder] = {
    Kind.JCC: _jcc,
    Kind.LOOP: _loop,
    Kind.JMP: _jmp,
    Kind.CALL: _call,
    Kind.RET: _ret,
    Kind.JMP_INDIRECT: _jmp_indirect,
    Kind.CALL_INDIRECT: _call_indirect,
}
#: single instructions that are not treated as their kind is
_BY_NAME: dict[str, EndingBuilder] = {"sti": flagcode.sti, "popfd": flagcode.popf}


def _emit_callout(code: bytes, at: int, eip: int) -> Leaving:
    return callout(eip)


#: the monitor executes the instruction
CALLOUT = Ending(Mark.CALLOUT, _emit_callout)
#: the same, because the instruction kept trapping
SIMULATED = Ending(Mark.SIMULATED, _emit_callout)


def build(form: Instruction, mode: Mode) -> Ending | None:
    """How `form` ends a unit; None when it does not, or when the monitor has to execute it."""
    builder = _BY_NAME.get(form.entry.mnemonic) or ENDINGS.get(form.entry.kind)
    return None if builder is None else builder(form, mode)
