# SPDX-License-Identifier: GPL-2.0-or-later
"""FXSAVE and FXRSTOR, between the guest's memory and the state block (APM vol. 2, 11.4.4; vol. 5).

Executed by the host they would show XMM8-15 to a guest that has none, and the addresses of translated code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.x86.faults import GeneralProtection
from vmm.x86.paging import Access

if TYPE_CHECKING:
    from vmm.bt.processor import TranslatingProcessor

#: what is written and read in legacy mode: the header, eight x87 or MMX registers, eight XMM registers
_BYTES = 288
#: FOP, FIP, FCS, FDP, FDS: where the last x87 instruction was, which is not known here
_POINTERS = slice(6, 24)
_MXCSR, _MXCSR_MASK = slice(24, 28), slice(28, 32)
_MXCSR_VALID = 0xFFFF
_REACH = 0x1000 - _BYTES


def save(vcpu: TranslatingProcessor, address: int) -> None:
    """FXSAVE to a linear address.  Raises GuestFault, with nothing written."""
    if address & 15:
        raise GeneralProtection
    image = bytearray(vcpu.state_block.fx[:_BYTES])
    image[_POINTERS] = bytes(18)
    image[_MXCSR_MASK] = _MXCSR_VALID.to_bytes(4, "little")
    user = vcpu.regs.cpl == 3
    if address & 0xFFF <= _REACH:
        vcpu.linear.store(address, _BYTES, int.from_bytes(image, "little"), user)
    else:
        vcpu.linear.general().write(address, bytes(image), Access(write=True, user=user))


def restore(vcpu: TranslatingProcessor, address: int) -> None:
    """FXRSTOR from a linear address.  Raises GuestFault, with nothing loaded."""
    if address & 15:
        raise GeneralProtection
    image = vcpu.linear.load(address, _BYTES, vcpu.regs.cpl == 3).to_bytes(_BYTES, "little")
    if int.from_bytes(image[_MXCSR], "little") & ~_MXCSR_VALID:
        raise GeneralProtection
    vcpu.state_block.fx[:_BYTES] = image
