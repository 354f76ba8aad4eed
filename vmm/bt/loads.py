# SPDX-License-Identifier: GPL-2.0-or-later
"""Loads of segment registers: the common ones, from descriptors nothing is wrong with.

Each function does everything or nothing: it returns False, having changed nothing, for whatever is not
plainly allowed, and the silicon then raises the right fault, or does what is rare (APM vol. 2, 4.7 and 8.9).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.memory.errors import BadAddress
from vmm.silicon import layout as at
from vmm.x86 import descriptors as ds
from vmm.x86.faults import GuestFault
from vmm.x86.flags import (
    MASK32,
    RFLAGS_AC,
    RFLAGS_ID,
    RFLAGS_IF,
    RFLAGS_IOPL,
    RFLAGS_NT,
    RFLAGS_TF,
    RFLAGS_VM,
)

if TYPE_CHECKING:
    from vmm.bt.cache import Callout
    from vmm.bt.processor import TranslatingProcessor

_ESP = 4
#: 32-bit code or data segment of any privilege, present, accessed, 4 GiB: type and S, P, D/B, G
_DATA, _CODE = 0x00C0_9300, 0x00C0_9B00
_FORM = 0x00C0_9F00
_DPL = 0x6000
_LIMIT = 0x000F_0000
#: of a whole descriptor: S with P, and the accessed bit
_CODE_OR_DATA, _ACCESSED = 0x9000 << 32, 0x100 << 32
#: what POPF and IRET may change at CPL 0; VM, RF, VIF and VIP are left to the silicon
_POPPED = 0xCD5 | RFLAGS_TF | RFLAGS_IF | RFLAGS_IOPL | RFLAGS_NT | RFLAGS_AC | RFLAGS_ID


def _descriptor(vcpu: TranslatingProcessor, selector: int) -> int | None:
    """The descriptor a selector names, marked as accessed; None where it is not to be had without ado."""
    q = vcpu.q
    offset = selector & 0xFFF8
    if selector & ds.TABLE_INDICATOR:
        if not q[at.LDTR + 2] >> 32 & 0x8000 or not q[at.LDTR] & 0xFFFC:
            return None
        base, limit = q[at.LDTR + 1], q[at.LDTR + 2] & MASK32
    else:
        base, limit = q[at.GDTR + 1], q[at.GDTR + 2] & MASK32
    if offset + 7 > limit:
        return None
    place = base + offset & MASK32
    try:
        descriptor = vcpu.linear.read_quad(place)
        if descriptor & (_CODE_OR_DATA | _ACCESSED) == _CODE_OR_DATA:
            descriptor |= _ACCESSED
            vcpu.linear.write(place, descriptor.to_bytes(8, "little"))
    except (GuestFault, BadAddress):
        return None
    return descriptor


def _set(vcpu: TranslatingProcessor, index: int, selector: int, descriptor: int) -> None:
    upper, q = descriptor >> 32, vcpu.q
    limit = upper & _LIMIT | descriptor & 0xFFFF
    if upper & 0x80_0000:
        limit = limit << 12 | 0xFFF
    q[index] = selector
    q[index + 1] = upper & 0xFF00_0000 | upper << 16 & 0xFF_0000 | descriptor >> 16 & 0xFFFF
    q[index + 2] = limit | upper << 32


def load_data_segment(vcpu: TranslatingProcessor, index: int, selector: int) -> bool:
    """DS, ES, FS or GS: a null selector, or a present data segment in reach of CPL and RPL."""
    q = vcpu.q
    cpl = vcpu.regs.cpl
    old = q[index], q[index + 1], q[index + 2]
    if not selector & 0xFFFC:
        q[index], q[index + 1], q[index + 2] = selector, 0, 0
    else:
        descriptor = _descriptor(vcpu, selector)
        if descriptor is None:
            return False
        upper = descriptor >> 32
        # present, data or readable code, accessed
        if upper & 0x9100 != 0x9100 or (upper & 0x800 and upper & 0x600 != 0x200):
            return False
        if max(cpl, selector & 3) > upper >> 13 & 3:
            return False
        _set(vcpu, index, selector, descriptor)
    if old != (q[index], q[index + 1], q[index + 2]):
        vcpu.regs.refresh_hidden_flags(cpl)
    return True


def merge_flags(vcpu: TranslatingProcessor, value: int, size: int, cpl: int) -> None:
    """RFLAGS as POPF and IRET set them from `value`, at a privilege level."""
    old = vcpu.regs.rflags()
    writable = _POPPED
    if cpl:
        writable &= ~RFLAGS_IOPL
    if cpl > old >> 12 & 3:
        writable &= ~RFLAGS_IF
    if size == 2:
        writable &= 0xFFFF
    vcpu.regs.set_rflags(old & ~writable | value & writable)


def far_return(vcpu: TranslatingProcessor, callout: Callout) -> bool:
    """IRETD in protected mode, to flat 32-bit code of the same or of the outermost ring."""
    q, regs = vcpu.q, vcpu.regs
    cpl = regs.cpl
    if q[at.RFLAGS] & RFLAGS_NT:
        return False
    frame = vcpu.linear.load(q[_ESP], 12, cpl == 3)
    eip, selector, flags = frame & MASK32, frame >> 32 & 0xFFFF, frame >> 64
    ring = selector & 3
    if flags & (RFLAGS_VM | RFLAGS_TF) or ring not in (cpl, 3) or not selector & 0xFFFC:
        return False
    code = _descriptor(vcpu, selector)
    if code is None or code >> 32 & (_FORM | _LIMIT | _DPL) != _CODE | _LIMIT | ring << 13 or (
            code & 0xFFFF != 0xFFFF):
        return False
    if ring == cpl:
        merge_flags(vcpu, flags, 4, cpl)
        _set(vcpu, at.CS, selector, code)
        q[_ESP] = q[_ESP] + 12 & MASK32
    else:
        outer = vcpu.linear.load(q[_ESP] + 12 & MASK32, 8, cpl == 3)
        esp, stack = outer & MASK32, outer >> 32 & 0xFFFF
        data = _descriptor(vcpu, stack) if stack & 0xFFFC else None
        if stack & 3 != ring or data is None or data >> 32 & (_FORM | _LIMIT | _DPL) != (
                _DATA | _LIMIT | ring << 13) or data & 0xFFFF != 0xFFFF:
            return False
        merge_flags(vcpu, flags, 4, cpl)
        _set(vcpu, at.CS, selector, code)
        _set(vcpu, at.SS, stack, data)
        q[_ESP] = esp
        for index in (at.ES, at.DS, at.FS, at.GS):
            upper = q[index + 2] >> 32
            # data or non-conforming code of an inner ring is no longer in reach
            if upper & 0xC00 != 0xC00 and upper >> 13 & 3 < ring and q[index] & 0xFFFC:
                q[index], q[index + 1], q[index + 2] = 0, 0, 0
    q[at.RIP] = eip
    regs.refresh_hidden_flags(ring)
    vcpu.d[at.HFLAGS] &= ~at.HF_INHIBIT_IRQ
    return True


def sysexit(vcpu: TranslatingProcessor) -> bool:
    """SYSEXIT from CPL 0: flat code and stack of ring 3, EIP from EDX and ESP from ECX (APM vol. 3)."""
    q, regs = vcpu.q, vcpu.regs
    selector = vcpu.d[vcpu.place.sysenter_cs] & 0xFFFC
    if regs.cpl or not selector:
        return False
    for index, offset, form in (at.CS, 16, _CODE), (at.SS, 24, _DATA):
        q[index] = selector + offset | 3
        q[index + 1] = 0
        q[index + 2] = MASK32 | (form | _DPL | _LIMIT) << 32
    q[at.RIP], q[_ESP] = q[2] & MASK32, q[1] & MASK32
    regs.refresh_hidden_flags(3)
    vcpu.d[at.HFLAGS] &= ~at.HF_INHIBIT_IRQ
    return True
