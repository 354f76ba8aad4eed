# SPDX-License-Identifier: GPL-2.0-or-later
"""The model-specific registers our guests may touch, and who keeps each of them.

A number that is not in `MSRS` gives #GP.  Beside the architectural registers the table has what an
AMD family 17h processor has and Linux touches on one without being ready for a #GP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from vmm.x86 import kvm
from vmm.x86.faults import GeneralProtection
from vmm.x86.flags import (
    CR0_PG,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
    MASK32,
    MASK64,
    PAT_RESET,
    is_canonical,
    is_valid_pat,
)

#: who keeps the value: the silicon itself, a dictionary of the vCPU, nobody (writes are ignored), the
#: local APIC, the paravirtual interface, the time-stamp counter
Kind = Literal["silicon", "plain", "const", "lapic", "kvm", "tsc"]

TSC = 0x10
APIC_BASE = 0x1B
TSC_ADJUST = 0x3B
PATCH_LEVEL = 0x8B
SYSENTER_CS = 0x174
SYSENTER_ESP = 0x175
SYSENTER_EIP = 0x176
DEBUG_CTL = 0x1D9
PAT = 0x277
TSC_DEADLINE = 0x6E0
X2APIC_FIRST = 0x800
X2APIC_LAST = 0x8FF
EFER = 0xC0000080
STAR = 0xC0000081
LSTAR = 0xC0000082
CSTAR = 0xC0000083
SFMASK = 0xC0000084
FS_BASE = 0xC0000100
GS_BASE = 0xC0000101
KERNEL_GS_BASE = 0xC0000102

#: what a guest may set in EFER; it has no SVM, and LMA is the processor's own
EFER_WRITABLE = EFER_SCE | EFER_LME | EFER_NXE


class Msr(NamedTuple):
    """One register.  Setting a bit outside `writable`, or a value that is not `valid`, gives #GP."""

    name: str
    kind: Kind
    reset: int = 0
    writable: int = MASK64
    valid: Callable[[int], bool] | None = None


MSRS: dict[int, Msr] = {
    TSC: Msr("TSC", "tsc"),
    TSC_ADJUST: Msr("TSC_ADJUST", "tsc"),
    APIC_BASE: Msr("APIC_BASE", "lapic"),
    TSC_DEADLINE: Msr("TSC_DEADLINE", "lapic"),
    **{number: Msr(f"X2APIC_{number - X2APIC_FIRST:02X}", "lapic")
       for number in range(X2APIC_FIRST, X2APIC_LAST + 1)},

    EFER: Msr("EFER", "silicon", 0, EFER_WRITABLE | EFER_LMA),
    STAR: Msr("STAR", "silicon"),
    LSTAR: Msr("LSTAR", "silicon", valid=is_canonical),
    CSTAR: Msr("CSTAR", "silicon", valid=is_canonical),
    SFMASK: Msr("SFMASK", "silicon", 0, MASK32),
    FS_BASE: Msr("FS_BASE", "silicon", valid=is_canonical),
    GS_BASE: Msr("GS_BASE", "silicon", valid=is_canonical),
    KERNEL_GS_BASE: Msr("KERNEL_GS_BASE", "silicon", valid=is_canonical),
    SYSENTER_CS: Msr("SYSENTER_CS", "silicon", 0, MASK32),
    # AMD has no 64-bit SYSENTER: the upper halves are kept and never used, so need not be canonical
    SYSENTER_ESP: Msr("SYSENTER_ESP", "silicon"),
    SYSENTER_EIP: Msr("SYSENTER_EIP", "silicon"),

    PAT: Msr("PAT", "plain", PAT_RESET, valid=is_valid_pat),
    # LBR and BTF can be set; neither is recorded or single-stepped by the silicon
    DEBUG_CTL: Msr("DEBUG_CTL", "plain", 0, 0x3F),
    0x1DB: Msr("BR_FROM", "const"),
    0x1DC: Msr("BR_TO", "const"),
    0x1DD: Msr("LAST_EXCP_FROM", "const"),
    0x1DE: Msr("LAST_EXCP_TO", "const"),
    # no memory type ranges: everything is write-back until PAT says otherwise
    0xFE: Msr("MTRR_CAP", "const"),
    0x2FF: Msr("MTRR_DEF_TYPE", "plain", 0, 0xCFF),

    kvm.MSR_WALL_CLOCK: Msr("KVM_WALL_CLOCK_NEW", "kvm"),
    kvm.MSR_SYSTEM_TIME: Msr("KVM_SYSTEM_TIME_NEW", "kvm"),
    kvm.MSR_STEAL_TIME: Msr("KVM_STEAL_TIME", "kvm", 0, kvm.STEAL_TIME_WRITABLE),

    # family 17h, Processor Programming Reference 54945, and BIOS guides of the families before
    PATCH_LEVEL: Msr("PATCH_LEVEL", "const", 0x0800126E),
    0xC0010010: Msr("SYSCFG", "plain"),
    0xC0010015: Msr("HWCR", "plain", 1 << 24),  # TscFreqSel: the TSC counts at the P0 frequency
    0xC0010016: Msr("IORR_BASE0", "plain"),
    0xC0010017: Msr("IORR_MASK0", "plain"),
    0xC0010018: Msr("IORR_BASE1", "plain"),
    0xC0010019: Msr("IORR_MASK1", "plain"),
    0xC001001A: Msr("TOP_MEM", "plain"),
    0xC001001D: Msr("TOP_MEM2", "plain"),
    0xC001001F: Msr("NB_CFG", "plain"),
    0xC0010055: Msr("INT_PENDING", "const"),
    0xC0010058: Msr("MMIO_CONF_BASE", "const"),
    0xC0010112: Msr("TSEG_ADDR", "const"),
    0xC0010113: Msr("TSEG_MASK", "const"),
    0xC0011005: Msr("CPUID_EXT_FEATURES", "plain"),
    0xC0011020: Msr("LS_CFG", "plain"),
    0xC0011021: Msr("IC_CFG", "plain"),
    0xC0011022: Msr("DC_CFG", "plain"),
    0xC0011023: Msr("TW_CFG", "plain"),
    0xC0011029: Msr("DE_CFG", "plain", 1 << 1),  # LFENCE waits for the instructions before it
    0xC001102A: Msr("BU_CFG2", "plain"),
    0xC001102C: Msr("EX_CFG", "plain"),
}


def find(number: int) -> Msr:
    """The register, for RDMSR.  #GP when there is none."""
    msr = MSRS.get(number)
    if msr is None:
        raise GeneralProtection
    return msr


def check_write(number: int, value: int) -> Msr:
    """The register, for a WRMSR that may store `value`.  #GP when there is none, or when it may not.

    EFER has more rules (`efer_after_write`), as have the registers of the local APIC.
    """
    msr = find(number)
    if msr.kind != "const" and (value & ~msr.writable or (msr.valid is not None and not msr.valid(value))):
        raise GeneralProtection
    return msr


def efer_after_write(current: int, value: int, cr0: int) -> int:
    """EFER after WRMSR of `value` (APM vol. 2, 3.1.7 and 14.6.1).

    LMA stays as it is.  #GP for bits a guest does not have, and for changing LME while paging is on.
    """
    if value & ~(EFER_WRITABLE | EFER_LMA) or (cr0 & CR0_PG and (current ^ value) & EFER_LME):
        raise GeneralProtection
    return value & EFER_WRITABLE | current & ~EFER_WRITABLE
