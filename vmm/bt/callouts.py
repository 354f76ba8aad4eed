# SPDX-License-Identifier: GPL-2.0-or-later
"""Callouts: sensitive instructions the monitor executes, one function each.

A callout finds the guest's registers in the register file, EIP at the instruction.  It returns None when the
guest goes on where EIP then points, or the exit code with which the guest has to leave; GuestFault gives the
guest that exception, with all registers as they were.  What has no function here, and what a function
declines, the silicon executes (`vcpu.silicon.step()`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vmm.bt import fxsave
from vmm.bt.cache import Callout
from vmm.bt.decode import FS, GS, Instruction
from vmm.bt.loads import far_return, load_data_segment, merge_flags, sysexit
from vmm.exitcodes import ExitCode
from vmm.silicon import layout as at
from vmm.silicon.cpu import InstructionAborted
from vmm.x86.faults import GeneralProtection, Vector
from vmm.x86.flags import CR4_TSD, MASK32, RFLAGS_IF

if TYPE_CHECKING:
    from vmm.bt.processor import TranslatingProcessor

Handler = Callable[["TranslatingProcessor", Callout], int | None]

_EAX, _EDX, _ESP = 0, 2, 4
_LOW = (0xFF, 0xFFFF, 0, MASK32)
_SEGMENT_INDEX = {"ES": at.ES, "DS": at.DS, "FS": at.FS, "GS": at.GS}
_BY_NUMBER = (at.ES, at.CS, at.SS, at.DS, at.FS, at.GS)


def _port(vcpu: TranslatingProcessor, callout: Callout, operand: str) -> int:
    if operand == "DX":
        return vcpu.q[_EDX] & 0xFFFF
    return callout.code[callout.form.imm_at]


def _io_size(form: Instruction) -> int:
    return form.opsize if form.opcode & 1 else 1


def _in(vcpu: TranslatingProcessor, callout: Callout) -> int | None:
    """IN: the port is read with RIP at the instruction, as on the silicon."""
    form, q = callout.form, vcpu.q
    size = _io_size(form)
    try:
        value = vcpu.port_in(_port(vcpu, callout, form.entry.operands[1].size), size)
    except InstructionAborted:
        return None if vcpu.aborted() else int(ExitCode.IOIO)
    low = _LOW[size - 1]
    q[_EAX] = q[_EAX] & ~low & MASK32 | value & low
    return _done(vcpu, form)


def _out(vcpu: TranslatingProcessor, callout: Callout) -> int | None:
    form = callout.form
    size = _io_size(form)
    try:
        vcpu.port_out(_port(vcpu, callout, form.entry.operands[0].size), size,
                      vcpu.q[_EAX] & _LOW[size - 1])
    except InstructionAborted:
        return None if vcpu.aborted() else int(ExitCode.IOIO)
    return _done(vcpu, form)


def _done(vcpu: TranslatingProcessor, form: Instruction) -> int | None:
    """The instruction was carried out."""
    vcpu.q[at.RIP] = vcpu.q[at.RIP] + form.length & MASK32
    return None if vcpu.verdict is None else int(ExitCode.IOIO)


def _privileged(vcpu: TranslatingProcessor) -> None:
    if vcpu.regs.cpl:
        raise GeneralProtection


def _exit(code: ExitCode, privileged: bool) -> Handler:
    """An instruction that both monitors handle by its exit code."""
    def handler(vcpu: TranslatingProcessor, callout: Callout) -> int | None:
        if privileged:
            _privileged(vcpu)
        if code == ExitCode.MSR:
            vcpu.d[vcpu.place.error_code] = callout.form.entry.mnemonic == "wrmsr"
        return None if vcpu.intercepted(code) else int(code)
    return handler


def _rdtsc(vcpu: TranslatingProcessor, callout: Callout) -> int | None:
    q = vcpu.q
    if q[at.CR + 4] & CR4_TSD:
        _privileged(vcpu)
    now = vcpu.clock.tsc()
    q[_EAX], q[_EDX] = now & MASK32, now >> 32 & MASK32
    return _done(vcpu, callout.form)


def _sti(vcpu: TranslatingProcessor, callout: Callout) -> int | None:
    q = vcpu.q
    if vcpu.regs.cpl > q[at.RFLAGS] >> 12 & 3:
        raise GeneralProtection
    if not q[at.RFLAGS] & RFLAGS_IF:
        q[at.RFLAGS] |= RFLAGS_IF
        vcpu.d[at.HFLAGS] |= at.HF_INHIBIT_IRQ
    return _done(vcpu, callout.form)


def _cli(vcpu: TranslatingProcessor, callout: Callout) -> int | None:
    q = vcpu.q
    if vcpu.regs.cpl > q[at.RFLAGS] >> 12 & 3:
        raise GeneralProtection
    q[at.RFLAGS] &= ~RFLAGS_IF
    return _done(vcpu, callout.form)


def read_stack(vcpu: TranslatingProcessor, size: int) -> int:
    """What lies on top of the stack, which is flat."""
    return vcpu.linear.load(vcpu.q[_ESP], size, vcpu.regs.cpl == 3)


def write_stack(vcpu: TranslatingProcessor, size: int, value: int) -> None:
    """Push."""
    q = vcpu.q
    top = q[_ESP] - size & MASK32
    vcpu.linear.store(top, size, value, vcpu.regs.cpl == 3)
    q[_ESP] = top


def _popf(vcpu: TranslatingProcessor, callout: Callout) -> int | None:
    size = callout.form.opsize
    value = read_stack(vcpu, size)
    merge_flags(vcpu, value, size, vcpu.regs.cpl)
    vcpu.q[_ESP] = vcpu.q[_ESP] + size & MASK32
    return _done(vcpu, callout.form)


def _pushf(vcpu: TranslatingProcessor, callout: Callout) -> int | None:
    write_stack(vcpu, callout.form.opsize, vcpu.regs.rflags() & 0xFCFFFF)
    return _done(vcpu, callout.form)


def _interrupt(vector: int | None) -> Handler:
    """INT n, INT3; INTO raises when OF is set."""
    def handler(vcpu: TranslatingProcessor, callout: Callout) -> int | None:
        number = callout.code[callout.form.imm_at] if vector is None else vector
        _done(vcpu, callout.form)
        if vector == Vector.OF and not vcpu.regs.rflags() & 0x800:
            return None
        return None if vcpu.software_interrupt(number) else int(ExitCode.SWINT)
    return handler


def _pop(vcpu: TranslatingProcessor, callout: Callout) -> int | None:
    form = callout.form
    operand = form.entry.operands[0]
    if operand.kind != "@" or operand.size not in _SEGMENT_INDEX or form.opsize == 2:
        return vcpu.silicon.step()
    selector = read_stack(vcpu, 4) & 0xFFFF
    if not load_data_segment(vcpu, _SEGMENT_INDEX[operand.size], selector):
        return vcpu.silicon.step()
    vcpu.q[_ESP] = vcpu.q[_ESP] + 4 & MASK32
    return _done(vcpu, form)


def effective_address(vcpu: TranslatingProcessor, callout: Callout) -> int:
    """The linear address of a 32-bit memory operand."""
    form, q = callout.form, vcpu.q
    address = form.displacement(callout.code, 0)
    if form.base >= 0:
        address += q[form.base]
    if form.index >= 0:
        address += q[form.index] * form.scale
    return address + q[_BY_NUMBER[form.segment] + 1] & MASK32


def _mov(vcpu: TranslatingProcessor, callout: Callout) -> int | None:
    """MOV to and from control, debug and segment registers."""
    form, q = callout.form, vcpu.q
    kinds = {operand.kind for operand in form.entry.operands}
    if "C" in kinds:
        return _mov_control(vcpu, callout)
    if form.opcode == 0x8E and form.reg in (0, 3, FS, GS):
        if form.mod == 3:
            selector = q[form.rm] & 0xFFFF
        elif form.addrsize == 4 and vcpu.modes.spans(form.segment):
            selector = vcpu.linear.load(effective_address(vcpu, callout), 2, vcpu.regs.cpl == 3)
        else:
            return vcpu.silicon.step()
        if load_data_segment(vcpu, _BY_NUMBER[form.reg], selector):
            return _done(vcpu, form)
    return vcpu.silicon.step()


def _mov_control(vcpu: TranslatingProcessor, callout: Callout) -> int | None:
    form, q = callout.form, vcpu.q
    _privileged(vcpu)
    number, register = form.reg, form.rm
    if form.opcode == 0x20 and number in (0, 2, 3, 4) and not form.prefixes & 1:
        q[register] = q[at.CR + number] & MASK32
        return _done(vcpu, form)
    if form.opcode == 0x22 and number == 2:
        q[at.CR + 2] = q[register]
        return _done(vcpu, form)
    if form.opcode == 0x22 and number == 3:
        vcpu.set_cr3(q[register])
        return _done(vcpu, form)
    return vcpu.silicon.step()


def _invlpg(vcpu: TranslatingProcessor, callout: Callout) -> int | None:
    _privileged(vcpu)
    if callout.form.addrsize == 2:
        code = vcpu.silicon.step()
        vcpu.shadow.flush()
        return code
    vcpu.shadow.invalidate(effective_address(vcpu, callout))
    return _done(vcpu, callout.form)


def _sysenter(vcpu: TranslatingProcessor, callout: Callout) -> int | None:
    vcpu.sysenter()
    _done(vcpu, callout.form)
    return None if vcpu.verdict is None else int(ExitCode.SWINT)


def _syscall(vcpu: TranslatingProcessor, callout: Callout) -> int | None:
    vcpu.syscall()
    _done(vcpu, callout.form)
    return None if vcpu.verdict is None else int(ExitCode.SWINT)


def _sysexit(vcpu: TranslatingProcessor, callout: Callout) -> int | None:
    return None if sysexit(vcpu) else vcpu.silicon.step()


def _fx(move: Callable[[TranslatingProcessor, int], None]) -> Handler:
    def handler(vcpu: TranslatingProcessor, callout: Callout) -> int | None:
        form = callout.form
        if not vcpu.modes.fpu_usable or not vcpu.modes.spans(form.segment) or form.addrsize == 2:
            return vcpu.silicon.step(fpu=True)
        move(vcpu, effective_address(vcpu, callout))
        return _done(vcpu, form)
    return handler


def _iret(vcpu: TranslatingProcessor, callout: Callout) -> int | None:
    if callout.form.opsize == 2 or not far_return(vcpu, callout):
        return vcpu.silicon.interlude()
    if vcpu.nmi_masked:
        vcpu.nmi_served()
    return None


#: mnemonic -> handler
CALLOUTS: dict[str, Handler] = {
    "in": _in,
    "out": _out,
    "hlt": _exit(ExitCode.HLT, True),
    "cpuid": _exit(ExitCode.CPUID, False),
    "rdmsr": _exit(ExitCode.MSR, True),
    "wrmsr": _exit(ExitCode.MSR, True),
    "invd": _exit(ExitCode.INVD, True),
    "wbinvd": _exit(ExitCode.WBINVD, True),
    "rdpmc": _exit(ExitCode.RDPMC, False),
    "vmmcall": _exit(ExitCode.VMMCALL, False),
    "rdtsc": _rdtsc,
    "cli": _cli,
    "sti": _sti,
    "pushfd": _pushf,
    "popfd": _popf,
    "int": _interrupt(None),
    "int3": _interrupt(Vector.BP),
    "into": _interrupt(Vector.OF),
    "pop": _pop,
    "mov": _mov,
    "invlpg": _invlpg,
    "sysenter": _sysenter,
    "syscall": _syscall,
    "sysexit": _sysexit,
    "iretd": _iret,
    "fxsave": _fx(fxsave.save),
    "fxrstor": _fx(fxsave.restore),
}
