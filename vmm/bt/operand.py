# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory operands of the guest as operands of 64-bit code: in its window, by a 32-bit effective address.

    flat segment            op gs:[ea32]                            65 67, else as in the guest
    segment with a base     mov r8d, [r14+base]; op gs:[ea32+r8d]
    two registers already   lea r9d, [ea32]; mov r8d, [r14+base]; op gs:[r9d+r8d]
    16-bit address          lea r8d, [ea]; movzx r8d, r8w; op gs:[r8d]

No flag changes, and the sum wraps at 4 GiB like the guest's.
"""

from __future__ import annotations

from typing import NamedTuple

from vmm.bt.decode import CS, LOCK, Instruction
from vmm.bt.mode import Mode
from vmm.bt.native.block import FIELDS
from vmm.bt.table import Kind, Map, Prefix
from vmm.bt.template import Template, spliced
from vmm.bt.unit import Mark

#: gs, and a 32-bit address
WINDOW = b"\x65\x67"
_REX, _R, _X, _B = 0x40, 4, 2, 1
_SIB = 4
#: SIB byte of an absolute address: no base, no index
_ABSOLUTE = 0x25
_ESCAPES = {Map.ONE_BYTE: b"", Map.TWO_BYTE: b"\x0F", Map.X0F38: b"\x0F\x38", Map.X0F3A: b"\x0F\x3A"}
_MANDATORY = {Prefix.ANY: b"", Prefix.NONE: b"", Prefix.X66: b"\x66", Prefix.XF3: b"\xF3",
              Prefix.XF2: b"\xF2"}
_MOVZX_R8 = b"\x45\x0F\xB7\xC0"                 # movzx r8d, r8w
#: operand sizes that follow the operand-size prefix
_SIZED = frozenset("vkpa")
#: cbw/cwde and cwd/cdq, whose operands are implied
_IMPLIED_SIZE = frozenset({0x98, 0x99})
_ALIASES = {0x82: 0x80}


def load_base(register: int, segment: int) -> bytes:
    """mov r8d or r9d, [r14 + the segment's base]"""
    field = FIELDS["segment_base"]
    return bytes([_REX | _R | _B, 0x8B, 0x46 | (register & 7) << 3, field.offset + segment * field.size])


def legacy_prefixes(form: Instruction) -> bytes:
    """The prefixes that mean something to the instruction, beside those of its address."""
    entry = form.entry
    found = _MANDATORY[entry.prefix]
    sized = any(operand.size in _SIZED or operand.size == "eAX" for operand in entry.operands)
    if form.map is Map.ONE_BYTE and form.opcode in _IMPLIED_SIZE:
        sized = True
    if sized:
        found = found.replace(b"\x66", b"")
        if form.opsize == 2:
            found = b"\x66" + found
    return (b"\xF0" if form.prefixes & LOCK else b"") + found


def opcode_bytes(form: Instruction) -> bytes:
    """Escape bytes and opcode."""
    return _ESCAPES[form.map] + bytes([_ALIASES.get(form.opcode, form.opcode)
                                       if form.map is Map.ONE_BYTE else form.opcode])


class Operand(NamedTuple):
    """How an address is formed: code before the instruction, REX bits, ModRM without reg, SIB.

    The displacement belongs behind `setup` if `early`, followed by `rest`; else behind the SIB byte.
    """

    setup: bytes
    early: bool
    rest: bytes
    rex: int
    modrm: int
    sib: bytes


def operand(form: Instruction, mode: Mode) -> Operand | None:
    """The operand for the memory that `form` addresses; None if its segment is not the window's.

    None, too, for a write to the code segment, which is #GP, and for a bit string at a 16-bit address: the
    bits' own distance wraps at 64 KiB there.
    """
    if form.segment == CS and form.memory is not None and form.memory.written:
        return None
    if form.addrsize == 2 and form.entry.kind is Kind.BIT_STRING:
        return None
    if mode.flat >> form.segment & 1:
        base = b""
    elif mode.based >> form.segment & 1:
        base = load_base(8 if form.addrsize == 4 else 9, form.segment)
    else:
        return None
    if form.addrsize == 2:
        return _short(form, base)
    mod = max(form.mod, 0)
    if not base:
        if form.base < 0 and form.index < 0:
            return Operand(b"", False, b"", 0, _SIB, bytes([_ABSOLUTE]))
        return Operand(b"", False, b"", 0, mod << 6 | form.rm, bytes([form.sib]) if form.sib >= 0 else b"")
    if form.index < 0:           # r8 is the index
        return Operand(base, False, b"", _X, mod << 6 | _SIB, bytes([form.base if form.base >= 0 else 5]))
    if form.base < 0:            # r8 is the base
        return Operand(base, False, b"", _B, 0x80 | _SIB, bytes([form.sib & 0xF8]))
    lea = bytes([_REX | _R, 0x8D, mod << 6 | 1 << 3 | _SIB, form.sib])
    return Operand(lea, True, base, _X | _B, _SIB, b"\x01")


def _short(form: Instruction, base: bytes) -> Operand:
    """A 16-bit address: summed in 32 bits, of which 16 are kept."""
    if form.base < 0:
        lea = bytes([_REX | _R, 0x8D, _SIB, _ABSOLUTE])
    else:
        mod = (0, 1, 2)[form.disp_size]
        where = [form.base] if form.index < 0 else [_SIB, form.index << 3 | form.base]
        lea = bytes([_REX | _R, 0x8D, mod << 6 | where[0], *where[1:]])
    rest = (b"\0\0" if form.disp_size == 2 else b"") + _MOVZX_R8 + base
    if base:                     # [r8 + r9]
        return Operand(lea, True, rest, _X | _B, _SIB, b"\x08")
    return Operand(lea, True, rest, _B, 0, b"")


def access(form: Instruction, mode: Mode, mark: Mark, opcode: bytes, reg: int, *, legacy: bytes = b"",
           rex: int = 0, before: bytes = b"", after: bytes = b"", immediate: bool = False) -> Template | None:
    """An instruction on the memory that `form` addresses, with code before and after it."""
    where = operand(form, mode)
    if where is None:
        return None
    bits = where.rex | rex
    instruction = b"".join((
        WINDOW, legacy, bytes([_REX | bits]) if bits else b"", opcode,
        bytes([where.modrm | reg << 3]), where.sib))
    if where.early:
        return spliced(mark, form, before + where.setup, where.rest + instruction, after, immediate)
    return spliced(mark, form, before + where.setup + instruction, b"", after, immediate)


def pointer(form: Instruction, mode: Mode, mark: Mark, before: bytes, after: bytes) -> Template | None:
    """Code that has the linear address of `form`'s memory in r10d between `before` and `after`."""
    where = operand(form, mode)
    if where is None:
        return None
    lea = bytes([_REX | _R | where.rex, 0x8D, where.modrm | 2 << 3]) + where.sib
    if where.early:
        return spliced(mark, form, before + where.setup, where.rest + lea, after, False)
    return spliced(mark, form, before + where.setup + lea, b"", after, False)
