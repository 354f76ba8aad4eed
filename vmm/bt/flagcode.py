# SPDX-License-Identifier: GPL-2.0-or-later
"""Flags: the instructions by which a kernel reads and changes them, in line.

The arithmetic flags and DF are the host's own while the guest runs; IF and the system flags (IOPL, NT, AC,
ID) are fields of the state block, for at CPL 3, where translated code runs, the host ignores changes to them
without a word - the reason why the paper's classical VMM has to translate at all (section 2.3).

    cli     IF = 0
    sti     leave to the monitor if it has an interrupt to deliver, else IF = 1
    pushf   lahf, seto and the fields, put together by lea, which leaves flags alone
    popf    leave to the monitor if a system flag or DF changes, or IF lets an interrupt in; else sahf, and an
            addition that overflows or does not

cli, sti and popf are these at CPL 0 only; at CPL 3 popf changes no IF, and cli and sti are the monitor's.
"""

from __future__ import annotations

from vmm.bt.decode import Instruction
from vmm.bt.jumps import callout, either, go
from vmm.bt.mode import Mode
from vmm.bt.native.block import OFFSETS
from vmm.bt.stack import load_r8, move_esp, store_register
from vmm.bt.template import JMP, REL32, Ending, Leaving, Template, fixed
from vmm.bt.unit import Mark

_SYSTEM, _IF, _PENDING, _DIRECTION = (OFFSETS[name].to_bytes(1, "little") for name in (
    "system_flags", "interrupt_flag", "interrupt_pending", "direction"))
_RFLAGS_IF, _RFLAGS_DF = 0x200, 0x400
#: CF PF AF ZF SF OF, bit 1, IF: what popf can change without leaving
_FREE_FLAGS = 0xAD7


def _store(field: bytes, value: int) -> bytes:
    """mov dword ptr [r14 + field], value"""
    return b"\x41\xC7\x46" + field + value.to_bytes(4, "little")


_CLI = _store(_IF, 0)
_PUSHF = b"".join((
    b"\x41\x89\xC0",                            # mov r8d, eax
    b"\x41\xB9\x00\x00\x00\x00",                # mov r9d, 0
    b"\x41\xBA\x00\x08\x00\x00",                # mov r10d, 0x800
    b"\x45\x0F\x40\xCA",                        # cmovo r9d, r10d
    b"\x9F",                                    # lahf
    b"\x0F\xB6\xC4",                            # movzx eax, ah
    b"\x46\x8D\x0C\x08",                        # lea r9d, [rax + r9]
    b"\x44\x89\xC0",                            # mov eax, r8d
    b"\x45\x8B\x56" + _IF,                      # mov r10d, [r14 + interrupt_flag]
    b"\x47\x8D\x0C\x11",                        # lea r9d, [r9 + r10]
    b"\x45\x8B\x56" + _SYSTEM,                  # mov r10d, [r14 + system_flags]
    b"\x47\x8D\x0C\x11",                        # lea r9d, [r9 + r10]
    b"\x45\x8B\x56" + _DIRECTION,               # mov r10d, [r14 + direction]
    b"\x47\x8D\x0C\x11",                        # lea r9d, [r9 + r10]
    store_register(9, 4, -4), move_esp(-4)))
_POPF_CHECK = b"".join((
    load_r8(4),                                 # mov r8d, gs:[esp]
    b"\x45\x89\xC1",                            # mov r9d, r8d
    b"\x41\x81\xE1" + (~_FREE_FLAGS & 0xFFFF_FFFF).to_bytes(4, "little"),   # and r9d, the others
    b"\x45\x8B\x56" + _SYSTEM,                  # mov r10d, [r14 + system_flags]
    b"\x45\x0B\x56" + _DIRECTION,               # or r10d, [r14 + direction]
    b"\x45\x39\xD1"))                           # cmp r9d, r10d
_POPF_IF = b"".join((
    b"\x45\x89\xC1",                            # mov r9d, r8d
    b"\x41\x81\xE1\x00\x02\x00\x00",            # and r9d, 0x200
    b"\x74\x0C",                                # je over the next two instructions
    b"\x41\x83\x7E" + _PENDING + b"\x00",       # cmp dword ptr [r14 + interrupt_pending], 0
    b"\x74\x05"))                               # je over the jump to the monitor
_POPF_SET_IF = b"\x45\x89\x4E" + _IF            # mov [r14 + interrupt_flag], r9d
_POPF_FLAGS = b"".join((
    move_esp(4),
    b"\x41\x89\xC1",                            # mov r9d, eax
    b"\x44\x89\xC0",                            # mov eax, r8d
    b"\x88\xC4",                                # mov ah, al
    b"\x41\xC1\xE8\x0B",                        # shr r8d, 11
    b"\x41\x83\xE0\x01",                        # and r8d, 1
    b"\x41\x80\xC0\x7F",                        # add r8b, 0x7f
    b"\x9E",                                    # sahf
    b"\x44\x89\xC8"))                           # mov eax, r9d
_STI_CHECK = b"".join((
    b"\x41\x89\xC8",                            # mov r8d, ecx
    b"\x41\x8B\x4E" + _PENDING,                 # mov ecx, [r14 + interrupt_pending]
    b"\x67\xE3\x08",                            # jecxz over the next two instructions
    b"\x44\x89\xC1"))                           # mov ecx, r8d
_STI = b"\x44\x89\xC1" + _store(_IF, _RFLAGS_IF)    # mov ecx, r8d; IF = 1


def cli(form: Instruction, mode: Mode) -> Template | None:
    """IF is clear from now on."""
    return None if mode.user else fixed(Mark.INLINE, form, _CLI)


def direction(form: Instruction, mode: Mode) -> Template | None:
    """cld and std: in the host's flags, and in the block for pushf."""
    value = _RFLAGS_DF if form.opcode == 0xFD else 0
    return fixed(Mark.INLINE, form, bytes([form.opcode]) + _store(_DIRECTION, value))


def pushf(form: Instruction, mode: Mode) -> Template | None:
    """The flags onto the stack, RF and VM clear."""
    if form.opsize == 2 or not mode.stack:
        return None
    return fixed(Mark.INLINE, form, _PUSHF)


def sti(form: Instruction, mode: Mode) -> Ending | None:
    """IF is set from now on, unless the monitor has to see to that."""
    if mode.user:
        return None

    def emit(code: bytes, at: int, eip: int) -> Leaving:
        return either(_STI_CHECK, callout(eip), go(eip, eip + form.length & 0xFFFF_FFFF), _STI)
    return Ending(Mark.INLINE, emit)


def popf(form: Instruction, mode: Mode) -> Ending | None:
    """The flags from the stack."""
    if form.opsize == 2 or not mode.stack:
        return None
    # je over the jump to the monitor
    check = _POPF_CHECK + b"\x74\x05"
    body = _POPF_FLAGS
    if not mode.user:
        # back to the one jump to the monitor there is
        back = -(len(JMP + REL32) + len(_POPF_IF) + len(JMP + REL32))
        body = _POPF_IF + JMP + back.to_bytes(4, "little", signed=True) + _POPF_SET_IF + body

    def emit(code: bytes, at: int, eip: int) -> Leaving:
        return either(check, callout(eip), go(eip, eip + form.length & 0xFFFF_FFFF), body)
    return Ending(Mark.INLINE, emit)
