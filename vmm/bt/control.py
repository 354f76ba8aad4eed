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
from vmm.bt.exits import BITS, PAGE_MASK, SITE, TAKEN, WIDE, both
from vmm.bt.jumps import FAR_BYTES, THROUGH_TABLE, THROUGH_TABLE_CUT, callout, go
from vmm.bt.mode import Mode
from vmm.bt.operand import access
from vmm.bt.stack import load_r8, move_esp, store_immediate
from vmm.bt.table import Kind
from vmm.bt.template import JMP, REL32, Code, Ending, EndingBuilder, Leaving
from vmm.bt.unit import Mark

#: mov dword ptr gs:[esp - 4], imm32; lea esp, [rsp - 4]
_STORE, _DOWN = store_immediate(b"", 4), move_esp(-4)
_PUSHED_BYTES = len(_STORE) + 4 + len(_DOWN)
_PUSHED_CUT = bytes((len(_STORE), len(_DOWN)))


def _next(form: Instruction, eip: int) -> int:
    return eip + form.length & 0xFFFF_FFFF


def _push_next(form: Instruction, eip: int) -> bytes:
    return _STORE + (eip + form.length & 0xFFFF_FFFF).to_bytes(4, "little") + _DOWN


def _jcc(form: Instruction, mode: Mode) -> Ending:
    condition = form.opcode & 15
    jumps = bytes([0x0F, 0x80 | condition]) + REL32 + JMP + REL32
    cuts = b"\x02\x01"
    sites = (2 << SITE) + TAKEN + WIDE + (7 << SITE + BITS)
    per_byte = (1 << SITE) + (1 << SITE + BITS)
    # the other way round, over a jump through the table: so what follows can still be fallen into
    around = bytes([0x70 | condition ^ 1, FAR_BYTES])

    length, imm_at, wrap = form.length, form.imm_at, 0xFFFF if form.opsize == 2 else 0xFFFF_FFFF

    def emit(code: Code, at: int, eip: int, base: int) -> Leaving:
        following = eip + length & 0xFFFF_FFFF
        # form.target, without the call
        taken = eip + length + int.from_bytes(code[at + imm_at:at + length], "little", signed=True) & wrap
        if (taken ^ eip | following ^ eip) <= PAGE_MASK:
            return jumps, (sites + base * per_byte + (taken & PAGE_MASK)
                           + ((following & PAGE_MASK) << BITS)), cuts
        there, first, _ = go(eip, taken, base + 2, TAKEN)
        skip = around if len(there) == FAR_BYTES else bytes([around[0], len(there)])
        onward, second, _ = go(eip, following, base + 2 + len(there))
        return skip + there + onward, both(first, second), b""
    return Ending(Mark.JCC, emit)


def _loop(form: Instruction, mode: Mode) -> Ending | None:
    if form.addrsize == 2:
        return None

    def emit(code: Code, at: int, eip: int, base: int) -> Leaving:
        # loop +2; jmp over; [taken]; over: [what follows]
        there, first, _ = go(eip, form.target(code, at, eip), base + 5, TAKEN)
        onward, second, _ = go(eip, _next(form, eip), base + 5 + len(there))
        return bytes([0x67, form.opcode, 2, 0xEB, len(there)]) + there + onward, both(first, second), b""
    return Ending(Mark.JCC, emit)


def _jmp(form: Instruction, mode: Mode) -> Ending:
    def emit(code: Code, at: int, eip: int, base: int) -> Leaving:
        return go(eip, form.target(code, at, eip), base, TAKEN)
    return Ending(Mark.JMP, emit)


def _call(form: Instruction, mode: Mode) -> Ending | None:
    if not mode.stack or form.opsize == 2:
        return None

    def emit(code: Code, at: int, eip: int, base: int) -> Leaving:
        host, exits, cuts = go(eip, form.target(code, at, eip), base + _PUSHED_BYTES, TAKEN)
        return _push_next(form, eip) + host, exits, _PUSHED_CUT + cuts
    return Ending(Mark.CALL, emit)


def _ret(form: Instruction, mode: Mode) -> Ending | None:
    if not mode.stack or form.opsize == 2:
        return None
    pop = load_r8(4)
    plain = pop + move_esp(4) + THROUGH_TABLE
    cuts = bytes((len(plain),))

    def emit(code: Code, at: int, eip: int, base: int) -> Leaving:
        dropped = form.immediate(code, at) & 0xFFFF
        if not dropped:
            return plain, 0, cuts
        return pop + move_esp(4 + dropped) + THROUGH_TABLE, 0, b""
    return Ending(Mark.RET, emit)


def _load_target(form: Instruction, mode: Mode) -> tuple[Callable[[Code, int], bytes], bytes] | None:
    """Code that has the target of an indirect jump in r8d, and how it is cut."""
    if form.opsize == 2:
        return None
    if form.mod == 3:
        move = bytes([0x44, 0x8B, 0xC0 | form.rm])
        return lambda code, at: move, b"\x03"
    template = access(form, mode, Mark.INDIRECT, b"\x8B", 0, rex=4)
    if template is None:
        return None
    head, tail_at, emit = template.head, template.tail_at, template.emit
    if emit is None:
        return (lambda code, at: head + code[at + tail_at:at + form.length],
                bytes((len(head),)))
    made = emit
    return lambda code, at: made(code, at) or b"", b""


def _jmp_indirect(form: Instruction, mode: Mode) -> Ending | None:
    loading = _load_target(form, mode)
    if loading is None:
        return None
    load, cut = loading
    cuts = cut + THROUGH_TABLE_CUT

    def emit(code: Code, at: int, eip: int, base: int) -> Leaving:
        return load(code, at) + THROUGH_TABLE, 0, cuts
    return Ending(Mark.INDIRECT, emit)


def _call_indirect(form: Instruction, mode: Mode) -> Ending | None:
    loading = _load_target(form, mode)
    if loading is None or not mode.stack:
        return None
    load, cut = loading
    cuts = cut + _PUSHED_CUT + THROUGH_TABLE_CUT

    def emit(code: Code, at: int, eip: int, base: int) -> Leaving:
        return load(code, at) + _push_next(form, eip) + THROUGH_TABLE, 0, cuts
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


def _emit_callout(code: Code, at: int, eip: int, base: int) -> Leaving:
    return callout(eip, base)


#: the monitor executes the instruction
CALLOUT = Ending(Mark.CALLOUT, _emit_callout)
#: the same, because the instruction kept trapping
SIMULATED = Ending(Mark.SIMULATED, _emit_callout)


def build(form: Instruction, mode: Mode) -> Ending | None:
    """How `form` ends a unit; None when it does not, or when the monitor has to execute it."""
    builder = _BY_NAME.get(form.entry.mnemonic) or ENDINGS.get(form.entry.kind)
    return None if builder is None else builder(form, mode)
