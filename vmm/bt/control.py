# SPDX-License-Identifier: GPL-2.0-or-later
"""Control flow: how units end.

    jcc     jcc [taken]; jmp [what follows]
    call    push the return address; jmp [target]
    ret     pop into r8d; jmp [r15+r8*8], the jump table

The displacements of direct jumps are left to the cache, which knows where the targets' translations are.
What needs a 16-bit EIP, or a stack not in the window, is the monitor's.
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.bt import flagcode
from vmm.bt.decode import Instruction
from vmm.bt.jumps import FAR_BYTES, THROUGH_TABLE, go, jump
from vmm.bt.mode import Mode
from vmm.bt.operand import access
from vmm.bt.stack import load_r8, move_esp, store_immediate
from vmm.bt.table import Kind
from vmm.bt.template import JMP, REL32, Code, Ending, EndingBuilder, Exit
from vmm.bt.unit import Mark


def _next(form: Instruction, eip: int) -> int:
    return eip + form.length & 0xFFFF_FFFF


def _jcc(form: Instruction, mode: Mode) -> Ending:
    condition = form.opcode & 15
    both = bytes([0x0F, 0x80 | condition]) + REL32 + JMP + REL32
    # the other way round, over a jump through the table: so what follows can still be fallen into
    around = bytes([0x70 | condition ^ 1, FAR_BYTES])

    def emit(code: Code, at: int, eip: int, base: int) -> tuple[bytes, tuple[Exit, ...]]:
        taken, following = form.target(code, at, eip), _next(form, eip)
        if taken ^ eip < 0x1000 and following ^ eip < 0x1000:
            return both, (Exit(base, base + 2, taken, True), Exit(base + 6, base + 7, following))
        there, first = go(eip, taken, base + 2, True)
        skip = around if len(there) == FAR_BYTES else bytes([around[0], len(there)])
        onward, second = go(eip, following, base + 2 + len(there))
        return skip + there + onward, first + second
    return Ending(Mark.JCC, emit)


def _loop(form: Instruction, mode: Mode) -> Ending | None:
    if form.addrsize == 2:
        return None

    def emit(code: Code, at: int, eip: int, base: int) -> tuple[bytes, tuple[Exit, ...]]:
        # loop +2; jmp over; [taken]; over: [what follows]
        there, first = go(eip, form.target(code, at, eip), base + 5, True)
        onward, second = go(eip, _next(form, eip), base + 5 + len(there))
        return (bytes([0x67, form.opcode, 2, 0xEB, len(there)]) + there + onward, first + second)
    return Ending(Mark.JCC, emit)


def _jmp(form: Instruction, mode: Mode) -> Ending:
    def emit(code: Code, at: int, eip: int, base: int) -> tuple[bytes, tuple[Exit, ...]]:
        return go(eip, form.target(code, at, eip), base, True)
    return Ending(Mark.JMP, emit)


def _push_next(form: Instruction, eip: int) -> bytes:
    return store_immediate(_next(form, eip).to_bytes(4, "little"), 4) + move_esp(-4)


def _call(form: Instruction, mode: Mode) -> Ending | None:
    if not mode.stack or form.opsize == 2:
        return None

    def emit(code: Code, at: int, eip: int, base: int) -> tuple[bytes, tuple[Exit, ...]]:
        pushed = _push_next(form, eip)
        host, exits = go(eip, form.target(code, at, eip), base + len(pushed), True)
        return pushed + host, exits
    return Ending(Mark.CALL, emit)


def _ret(form: Instruction, mode: Mode) -> Ending | None:
    if not mode.stack or form.opsize == 2:
        return None
    pop = load_r8(4)

    def emit(code: Code, at: int, eip: int, base: int) -> tuple[bytes, tuple[Exit, ...]]:
        dropped = form.immediate(code, at) & 0xFFFF
        return pop + move_esp(4 + dropped) + THROUGH_TABLE, ()
    return Ending(Mark.RET, emit)


def _load_target(form: Instruction, mode: Mode) -> Callable[[Code, int], bytes] | None:
    """Code that has the target of an indirect jump in r8d."""
    if form.opsize == 2:
        return None
    if form.mod == 3:
        move = bytes([0x44, 0x8B, 0xC0 | form.rm])
        return lambda code, at: move
    template = access(form, mode, Mark.INDIRECT, b"\x8B", 0, rex=4)
    if template is None:
        return None
    head, tail_at, emit = template.head, template.tail_at, template.emit

    def load(code: Code, at: int) -> bytes:
        if emit is None:
            return head + code[at + tail_at:at + form.length]
        return emit(code, at) or b""
    return load


def _jmp_indirect(form: Instruction, mode: Mode) -> Ending | None:
    load = _load_target(form, mode)
    if load is None:
        return None

    def emit(code: Code, at: int, eip: int, base: int) -> tuple[bytes, tuple[Exit, ...]]:
        return load(code, at) + THROUGH_TABLE, ()
    return Ending(Mark.INDIRECT, emit)


def _call_indirect(form: Instruction, mode: Mode) -> Ending | None:
    load = _load_target(form, mode)
    if load is None or not mode.stack:
        return None

    def emit(code: Code, at: int, eip: int, base: int) -> tuple[bytes, tuple[Exit, ...]]:
        return load(code, at) + _push_next(form, eip) + THROUGH_TABLE, ()
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


def _emit_callout(code: Code, at: int, eip: int, base: int) -> tuple[bytes, tuple[Exit, ...]]:
    return jump(eip, base, callout=True)


#: the monitor executes the instruction
CALLOUT = Ending(Mark.CALLOUT, _emit_callout)
#: the same, because the instruction kept trapping
SIMULATED = Ending(Mark.SIMULATED, _emit_callout)


def build(form: Instruction, mode: Mode) -> Ending | None:
    """How `form` ends a unit; None when it does not, or when the monitor has to execute it."""
    builder = _BY_NAME.get(form.entry.mnemonic) or ENDINGS.get(form.entry.kind)
    return None if builder is None else builder(form, mode)
