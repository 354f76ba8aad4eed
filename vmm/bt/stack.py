# SPDX-License-Identifier: GPL-2.0-or-later
"""Stack instructions, which 64-bit mode would do with 8 bytes: as moves, and `lea` for esp.

The store or load comes first, so that a fault leaves esp as it was; `lea` leaves the flags as they are.
"""

from __future__ import annotations

from vmm.bt.decode import Instruction
from vmm.bt.mode import Mode
from vmm.bt.native.block import OFFSETS
from vmm.bt.operand import WINDOW, access, pointer
from vmm.bt.template import Parts, Template, fixed
from vmm.bt.unit import Mark

_ESP, _EBP = 4, 5
_SPILL = OFFSETS["spill"]
#: mov word or dword, by operand size
_WIDTH = {2: b"\x66", 4: b""}


def move_esp(distance: int) -> bytes:
    """lea esp, [rsp + distance]"""
    if -128 <= distance < 128:
        return b"\x8D\x64\x24" + distance.to_bytes(1, "little", signed=True)
    return b"\x8D\xA4\x24" + distance.to_bytes(4, "little", signed=True)


def store_register(register: int, size: int, at: int) -> bytes:
    """mov gs:[esp + at], register (8 is r8)"""
    rex = b"\x44" if register & 8 else b""
    return (WINDOW + _WIDTH[size] + rex + bytes([0x89, 0x44 | (register & 7) << 3, 0x24])
            + at.to_bytes(1, "little", signed=True))


def store_immediate(size: int) -> bytes:
    """mov gs:[esp - size], immediate, which is to follow"""
    return WINDOW + _WIDTH[size] + b"\xC7\x44\x24" + bytes([-size & 0xFF])


def load_r8(size: int, at: int = 0) -> bytes:
    """mov r8d or movzx r8d, gs:[esp + at]"""
    opcode = b"\x44\x8B" if size == 4 else b"\x44\x0F\xB7"
    return WINDOW + opcode + bytes([0x44, 0x24, at])


def push(form: Instruction, mode: Mode) -> Template | None:
    """push of a register, an immediate, or memory by r8."""
    if not mode.stack:
        return None
    size = form.opsize
    down = move_esp(-size)
    if form.imm_size:
        store = store_immediate(size)

        def emit(code: bytes, at: int) -> Parts:
            return store, form.immediate(code, at).to_bytes(size, "little", signed=True), down, b""
        return Template(Mark.INLINE, b"", 0, emit)
    if form.modrm < 0 or form.mod == 3:
        register = form.opcode & 7 if form.modrm < 0 else form.rm
        return fixed(Mark.INLINE, form, store_register(register, size, -size) + down)
    load = b"\x8B" if size == 4 else b"\x0F\xB7"
    return access(form, mode, Mark.INLINE, load, 0, rex=4, after=store_register(8, size, -size) + down)


def pop(form: Instruction, mode: Mode) -> Template | None:
    """pop to a register, or to memory by r8; an address with esp is that after the pop."""
    if not mode.stack:
        return None
    size = form.opsize
    up = move_esp(size)
    if form.modrm >= 0 and form.mod != 3:
        shift = size if form.base == _ESP and form.addrsize == 4 else 0
        store = WINDOW + _WIDTH[size] + bytes([0x45, 0x89, 0x42, shift])      # mov gs:[r10d + shift], r8
        return pointer(form, mode, Mark.INLINE, b"", load_r8(size) + store + up)
    register = form.opcode & 7 if form.modrm < 0 else form.rm
    if register == _ESP:
        # mov esp, gs:[esp], or of its low half only
        code = WINDOW + b"\x8B\x24\x24" if size == 4 else load_r8(2) + up + b"\x66\x44\x89\xC4"
        return fixed(Mark.INLINE, form, code)
    load = WINDOW + _WIDTH[size] + bytes([0x8B, 0x04 | register << 3, 0x24])
    return fixed(Mark.INLINE, form, load + up)


def pusha(form: Instruction, mode: Mode) -> Template | None:
    """Eight stores below esp."""
    if not mode.stack:
        return None
    size = form.opsize
    stores = b"".join(store_register(register, size, -size * (register + 1)) for register in range(8))
    return fixed(Mark.INLINE, form, stores + move_esp(-8 * size))


def popa(form: Instruction, mode: Mode) -> Template | None:
    """Everything is loaded before any register changes: what was below lies in the spill fields then."""
    if not mode.stack:
        return None
    size = form.opsize
    loaded, taken = [], []
    for register in (7, 6, 5, 4, 3, 2, 1, 0):
        at = (7 - register) * size
        loaded.append(load_r8(size, at))
        if register == _ESP:        # thrown away, but a fault is a fault
            continue
        spill = _SPILL + 4 * register
        loaded.append(_WIDTH[size] + bytes([0x45, 0x89, 0x46, spill]))
        taken.append(_WIDTH[size] + bytes([0x41, 0x8B, 0x46 | register << 3, spill]))
    return fixed(Mark.INLINE, form, b"".join(loaded + taken) + move_esp(8 * size))


def enter(form: Instruction, mode: Mode) -> Template | None:
    """enter with level 0; the display of a deeper one is the monitor's business.

    It ends with a check that what esp points to can be written: xchg r8d and what is there, and back.
    """
    if not mode.stack or form.opsize == 2:
        return None
    # xchg gs:[esp + top], r8d; mov gs:[esp + top], r8d
    check = store_register(_EBP, 4, -4) + WINDOW + b"\x44\x87\x84\x24"
    restore = WINDOW + b"\x44\x89\x84\x24"
    # lea ebp, [rsp - 4]; lea esp, [rsp + top]
    move = b"\x8D\x6C\x24\xFC\x8D\xA4\x24"

    def emit(code: bytes, at: int) -> Parts | None:
        value = form.immediate(code, at) & 0xFFFFFF
        if value >> 16 & 31:
            return None
        top = (-4 - (value & 0xFFFF)).to_bytes(4, "little", signed=True)
        return check, top, restore, top, move, top
    return Template(Mark.INLINE, b"", 0, emit)


def leave(form: Instruction, mode: Mode) -> Template | None:
    """esp from ebp, and ebp from the stack."""
    if not mode.stack:
        return None
    if form.opsize == 4:
        # mov r8d, gs:[ebp]; lea esp, [rbp + 4]; mov ebp, r8d
        return fixed(Mark.INLINE, form, WINDOW + b"\x44\x8B\x45\x00\x8D\x65\x04\x44\x89\xC5")
    # movzx r8d, word ptr gs:[ebp]; lea esp, [rbp + 2]; mov bp, r8w
    return fixed(Mark.INLINE, form, WINDOW + b"\x44\x0F\xB7\x45\x00\x8D\x65\x02\x66\x44\x89\xC5")
