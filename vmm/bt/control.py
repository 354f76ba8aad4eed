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

from vmm.bt.decode import Instruction
from vmm.bt.mode import Mode
from vmm.bt.operand import access
from vmm.bt.stack import load_r8, move_esp, store_immediate
from vmm.bt.table import Kind
from vmm.bt.template import JMP, REL32, Code, Ending, EndingBuilder, Exit
from vmm.bt.unit import Mark

#: jmp [r15 + r8*8]
_THROUGH_TABLE = b"\x43\xFF\x24\xC7"
_JUMP = JMP + REL32


def jump(eip: int, at: int = 0, *, taken: bool = False,
         callout: bool = False) -> tuple[bytes, tuple[Exit, ...]]:
    """A direct jump at offset `at`."""
    return _JUMP, (Exit(at, at + 1, eip, taken, callout),)


def _next(form: Instruction, eip: int) -> int:
    return eip + form.length & 0xFFFF_FFFF


def _jcc(form: Instruction, mode: Mode) -> Ending:
    both = bytes([0x0F, 0x80 | form.opcode & 15]) + REL32 + _JUMP

    def emit(code: Code, at: int, eip: int, base: int) -> tuple[bytes, tuple[Exit, ...]]:
        return both, (Exit(base, base + 2, form.target(code, at, eip), True),
                      Exit(base + 6, base + 7, _next(form, eip)))
    return Ending(Mark.JCC, emit)


def _loop(form: Instruction, mode: Mode) -> Ending | None:
    if form.addrsize == 2:
        return None
    # loop +2; jmp +5; jmp [taken]; jmp [what follows]
    every = bytes([0x67, form.opcode, 2, 0xEB, 5]) + _JUMP + _JUMP

    def emit(code: Code, at: int, eip: int, base: int) -> tuple[bytes, tuple[Exit, ...]]:
        return every, (Exit(base + 5, base + 6, form.target(code, at, eip), True),
                       Exit(base + 10, base + 11, _next(form, eip)))
    return Ending(Mark.JCC, emit)


def _jmp(form: Instruction, mode: Mode) -> Ending:
    def emit(code: Code, at: int, eip: int, base: int) -> tuple[bytes, tuple[Exit, ...]]:
        return jump(form.target(code, at, eip), base, taken=True)
    return Ending(Mark.JMP, emit)


def _push_next(form: Instruction, eip: int) -> bytes:
    return store_immediate(_next(form, eip).to_bytes(4, "little"), 4) + move_esp(-4)


def _call(form: Instruction, mode: Mode) -> Ending | None:
    if not mode.stack or form.opsize == 2:
        return None

    def emit(code: Code, at: int, eip: int, base: int) -> tuple[bytes, tuple[Exit, ...]]:
        pushed = _push_next(form, eip)
        host, exits = jump(form.target(code, at, eip), base + len(pushed), taken=True)
        return pushed + host, exits
    return Ending(Mark.CALL, emit)


def _ret(form: Instruction, mode: Mode) -> Ending | None:
    if not mode.stack or form.opsize == 2:
        return None
    pop = load_r8(4)

    def emit(code: Code, at: int, eip: int, base: int) -> tuple[bytes, tuple[Exit, ...]]:
        dropped = form.immediate(code, at) & 0xFFFF
        return pop + move_esp(4 + dropped) + _THROUGH_TABLE, ()
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
        return load(code, at) + _THROUGH_TABLE, ()
    return Ending(Mark.INDIRECT, emit)


def _call_indirect(form: Instruction, mode: Mode) -> Ending | None:
    load = _load_target(form, mode)
    if load is None or not mode.stack:
        return None

    def emit(code: Code, at: int, eip: int, base: int) -> tuple[bytes, tuple[Exit, ...]]:
        return load(code, at) + _push_next(form, eip) + _THROUGH_TABLE, ()
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


def _emit_callout(code: Code, at: int, eip: int, base: int) -> tuple[bytes, tuple[Exit, ...]]:
    return jump(eip, base, callout=True)


#: the monitor executes the instruction
CALLOUT = Ending(Mark.CALLOUT, _emit_callout)


def build(form: Instruction, mode: Mode) -> Ending | None:
    """How `form` ends a unit; None when it does not, or when the monitor has to execute it."""
    builder = ENDINGS.get(form.entry.kind)
    return None if builder is None else builder(form, mode)
