# SPDX-License-Identifier: GPL-2.0-or-later
"""Templates of the instructions that stay themselves, and of those with another encoding in 64-bit mode.

Every instruction can be begun again when it faults: nothing the guest could see changes before the last
access to memory that can fault.
"""

from __future__ import annotations

from vmm.bt import flagcode, segments, stack, strings
from vmm.bt.decode import DS, Instruction
from vmm.bt.mode import Mode
from vmm.bt.operand import access, legacy_prefixes, load_base, opcode_bytes
from vmm.bt.table import Kind, Map
from vmm.bt.template import Builder, Template, fixed, spliced
from vmm.bt.unit import Mark

_NOP = b"\x90"
#: SSE4A, which only AMD's processors execute
_AMD_ONLY = frozenset({"extrq", "insertq", "movntss", "movntsd"})


def _ident(form: Instruction, mode: Mode) -> Template | None:
    if form.entry.mnemonic == "nop" or (form.entry.mnemonic == "prefetch" and form.reg > 2):
        return fixed(Mark.INLINE if form.length > 1 else Mark.IDENT, form, _NOP)
    if form.entry.mnemonic in _AMD_ONLY or (form.entry.mnemonic == "bswap" and form.opsize == 2):
        return None
    legacy, opcode = legacy_prefixes(form), opcode_bytes(form)
    if form.entry.mnemonic == "lea":
        return _lea(form, legacy)
    reg = 0 if _reg_is_ignored(form) else form.reg
    if form.memory is None or form.mod == 3:
        modrm = bytes([0xC0 | reg << 3 | form.rm]) if form.modrm >= 0 else b""
        return spliced(Mark.IDENT, form, legacy + opcode + modrm)
    # with REX, which r8 and r9 need, ah-bh have no encoding
    if _names_high_byte(form) and not (mode.flat >> form.segment & 1 and form.addrsize == 4):
        return None
    return access(form, mode, Mark.IDENT, opcode, reg, legacy=legacy, immediate=True)


def _reg_is_ignored(form: Instruction) -> bool:
    """setcc, for which ModRM.reg means nothing, and the second encoding of test."""
    return (form.entry.mnemonic == "test" and form.entry.opcode in ("f6/1", "f7/1")) or (
        form.map is Map.TWO_BYTE and form.opcode & 0xF0 == 0x90)


def _names_high_byte(form: Instruction) -> bool:
    return form.reg >= 4 and any(operand.kind == "G" and operand.size == "b"
                                 for operand in form.entry.operands)


def _lea(form: Instruction, legacy: bytes) -> Template:
    """An address is the same whatever the segment; of a 16-bit one, 16 bits are kept."""
    sib = bytes([form.sib]) if form.sib >= 0 else b""
    if form.addrsize == 4:
        if form.base < 0 and form.index < 0:
            return spliced(Mark.IDENT, form, legacy + bytes([0x8D, form.reg << 3 | 4, 0x25]))
        return spliced(Mark.IDENT, form, legacy + bytes([0x8D, form.modrm]) + sib)
    pad = b"\0\0" if form.disp_size == 2 else b""
    if form.base < 0:
        address = bytes([0x44, 0x8D, 0x04, 0x25])
    else:
        tail = [form.base] if form.index < 0 else [4, form.index << 3 | form.base]
        address = bytes([0x44, 0x8D, (0, 1, 2)[form.disp_size] << 6 | tail[0], *tail[1:]])
    # mov reg16, r8w or movzx reg32, r8w
    move = (b"\x66\x41\x8B" if form.opsize == 2 else b"\x41\x0F\xB7") + bytes([0xC0 | form.reg << 3])
    return spliced(Mark.INLINE, form, address, pad + move)


def _inc_dec(form: Instruction, mode: Mode) -> Template:
    """inc and dec of a register as FF /0 and /1."""
    legacy = b"\x66" if form.opsize == 2 else b""
    return fixed(Mark.IDENT, form, legacy + bytes([0xFF, 0xC0 | form.opcode & 0xF]))


def _moffs(form: Instruction, mode: Mode) -> Template | None:
    """mov al/eax from and to an address: 8A, 8B, 88, 89, since A0-A3 cost a stall with an address prefix."""
    opcode = bytes([(0x8A, 0x8B, 0x88, 0x89)[form.opcode & 3]])
    return access(form, mode, Mark.INLINE, opcode, 0, legacy=legacy_prefixes(form))


def _xlat(form: Instruction, mode: Mode) -> Template | None:
    if form.addrsize == 2:
        return None
    # movzx r9d, al
    index = b"\x44\x0F\xB6\xC8"
    if mode.flat >> form.segment & 1:
        return fixed(Mark.INLINE, form, index + b"\x65\x67\x42\x8A\x04\x0B")     # mov al, gs:[ebx+r9d]
    if mode.based >> form.segment & 1:
        # lea r9d, [rbx+r9]; r8d = base; mov al, gs:[r9d+r8d]
        return fixed(Mark.INLINE, form, index + b"\x46\x8D\x0C\x0B" + load_base(8, form.segment)
                     + b"\x65\x67\x43\x8A\x04\x01")
    return None


def _maskmov(form: Instruction, mode: Mode) -> Template | None:
    if form.addrsize == 2 or not mode.flat >> form.segment & 1 or form.segment != DS:
        return None
    return fixed(Mark.IDENT, form, b"\x65\x67" + legacy_prefixes(form) + opcode_bytes(form)
                 + bytes([form.modrm]))


#: single instructions that are not treated as their kind is
_BY_NAME: dict[str, Builder] = {
    "cli": flagcode.cli,
    "cld": flagcode.direction,
    "std": flagcode.direction,
    "pushfd": flagcode.pushf,
}

#: how each kind of instruction is translated; of the kinds not here, the monitor executes all
BUILDERS: dict[Kind, Builder] = {
    Kind.IDENT: _ident,
    Kind.BIT_STRING: _ident,
    Kind.INC_DEC: _inc_dec,
    Kind.MOFFS: _moffs,
    Kind.XLAT: _xlat,
    Kind.MASKMOV: _maskmov,
    Kind.PUSH: stack.push,
    Kind.POP: stack.pop,
    Kind.PUSHA: stack.pusha,
    Kind.POPA: stack.popa,
    Kind.ENTER: stack.enter,
    Kind.LEAVE: stack.leave,
    Kind.STRING: strings.string,
    Kind.SEGMENT: segments.read,
}


def build(form: Instruction, mode: Mode) -> Template | None:
    """The template of an instruction that does not end a unit; None when the monitor has to execute it."""
    builder = _BY_NAME.get(form.entry.mnemonic) or BUILDERS.get(form.entry.kind)
    if builder is None or form.entry.unit not in mode.units or form.vvvv >= 0:
        return None
    return builder(form, mode)
