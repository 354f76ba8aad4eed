# SPDX-License-Identifier: GPL-2.0-or-later
"""SYSCALL and SYSENTER, which the silicon leaves to its monitor (APM vol. 3, and vol. 2, 6.1).

Both come from a hook of the silicon that adds the instruction's length, 2, to RIP when it returns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.silicon import layout as at
from vmm.x86.faults import GeneralProtection, GuestFault, Vector
from vmm.x86.flags import CR0_PE, EFER_LMA, EFER_SCE, MASK32, RFLAGS_IF, RFLAGS_RF, RFLAGS_VM

if TYPE_CHECKING:
    from vmm.hw.processor import Processor

_LENGTH = 2
# attributes of the flat segments these instructions load (VMCB form)
_CODE64, _CODE32, _DATA = 0xA9B, 0xC9B, 0xC93
_CS64 = 1 << 15      # hflags


def syscall(vcpu: Processor) -> None:
    """SYSCALL from 64-bit, compatibility or legacy mode."""
    q, regs, place = vcpu.q, vcpu.regs, vcpu.place
    efer = q[at.EFER]
    if not efer & EFER_SCE or not q[at.CR] & CR0_PE:
        _refuse(vcpu, GuestFault(Vector.UD))
        return
    behind = q[at.RIP] + _LENGTH
    flags = regs.rflags()
    selector = q[place.star] >> 32 & 0xFFFC
    if efer & EFER_LMA:
        from_64 = vcpu.d[at.HFLAGS] & _CS64
        q[1] = behind
        q[11] = flags & ~RFLAGS_RF
        target = q[place.lstar] if from_64 else q[place.cstar]
        kept = flags & ~(q[place.fmask] & MASK32) & ~RFLAGS_RF
        code = _CODE64
    else:
        q[1] = behind & MASK32
        target = q[place.star] & MASK32
        kept = flags & ~(RFLAGS_VM | RFLAGS_IF | RFLAGS_RF)
        code = _CODE32
    regs.load_segment(at.CS, selector, code, MASK32, 0)
    regs.load_segment(at.SS, selector + 8, _DATA, MASK32, 0)
    regs.set_rflags(kept)
    regs.refresh_hidden_flags(0)
    q[at.RIP] = target - _LENGTH & (1 << 64) - 1


def sysenter(vcpu: Processor) -> None:
    """SYSENTER: legacy mode only on AMD."""
    q, regs, place = vcpu.q, vcpu.regs, vcpu.place
    if q[at.EFER] & EFER_LMA:
        _refuse(vcpu, GuestFault(Vector.UD))
        return
    selector = vcpu.d[place.sysenter_cs] & 0xFFFC
    if not q[at.CR] & CR0_PE or not selector:
        _refuse(vcpu, GeneralProtection())
        return
    regs.set_rflags(regs.rflags() & ~(RFLAGS_VM | RFLAGS_IF | RFLAGS_RF))
    regs.load_segment(at.CS, selector, _CODE32, MASK32, 0)
    regs.load_segment(at.SS, selector + 8, _DATA, MASK32, 0)
    regs.refresh_hidden_flags(0)
    q[4] = q[place.sysenter_esp] & MASK32
    q[at.RIP] = (q[place.sysenter_eip] & MASK32) - _LENGTH & (1 << 64) - 1


def _refuse(vcpu: Processor, fault: GuestFault) -> None:
    if not vcpu.give(fault):
        vcpu.cpu.stop()
    vcpu.q[at.RIP] = vcpu.q[at.RIP] - _LENGTH & (1 << 64) - 1
