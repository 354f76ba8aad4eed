# SPDX-License-Identifier: GPL-2.0-or-later
"""Names for the bits of RFLAGS, CR0, CR4 and EFER, and the form of PAT (APM vol. 2, chapters 3 and 7).

Plain integers, since they are used on every exit.  `*_VALID` are the bits our processor implements;
the others must be zero.
"""

from __future__ import annotations

# RFLAGS
RFLAGS_CF = 1 << 0
RFLAGS_ONE = 1 << 1
RFLAGS_PF = 1 << 2
RFLAGS_AF = 1 << 4
RFLAGS_ZF = 1 << 6
RFLAGS_SF = 1 << 7
RFLAGS_TF = 1 << 8
RFLAGS_IF = 1 << 9
RFLAGS_DF = 1 << 10
RFLAGS_OF = 1 << 11
RFLAGS_IOPL = 3 << 12
RFLAGS_IOPL_SHIFT = 12
RFLAGS_NT = 1 << 14
RFLAGS_RF = 1 << 16
RFLAGS_VM = 1 << 17
RFLAGS_AC = 1 << 18
RFLAGS_VIF = 1 << 19
RFLAGS_VIP = 1 << 20
RFLAGS_ID = 1 << 21

# CR0
CR0_PE = 1 << 0
CR0_MP = 1 << 1
CR0_EM = 1 << 2
CR0_TS = 1 << 3
CR0_ET = 1 << 4
CR0_NE = 1 << 5
CR0_WP = 1 << 16
CR0_AM = 1 << 18
CR0_NW = 1 << 29
CR0_CD = 1 << 30
CR0_PG = 1 << 31

# CR4
CR4_VME = 1 << 0
CR4_PVI = 1 << 1
CR4_TSD = 1 << 2
CR4_DE = 1 << 3
CR4_PSE = 1 << 4
CR4_PAE = 1 << 5
CR4_MCE = 1 << 6
CR4_PGE = 1 << 7
CR4_PCE = 1 << 8
CR4_OSFXSR = 1 << 9
CR4_OSXMMEXCPT = 1 << 10
CR4_UMIP = 1 << 11
CR4_FSGSBASE = 1 << 16
CR4_PCIDE = 1 << 17
CR4_OSXSAVE = 1 << 18
CR4_SMEP = 1 << 20
CR4_SMAP = 1 << 21

CR4_VALID = (CR4_TSD | CR4_DE | CR4_PSE | CR4_PAE | CR4_MCE | CR4_PGE | CR4_PCE
             | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_FSGSBASE | CR4_SMEP | CR4_SMAP)

# EFER
EFER_SCE = 1 << 0
EFER_LME = 1 << 8
EFER_LMA = 1 << 10
EFER_NXE = 1 << 11
EFER_SVME = 1 << 12
EFER_LMSLE = 1 << 13
EFER_FFXSR = 1 << 14

EFER_VALID = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE | EFER_SVME

#: bits of physical and linear addresses (CPUID 0x80000008 says the same)
PHYSICAL_BITS = 40
LINEAR_BITS = 48

MASK32 = (1 << 32) - 1
MASK64 = (1 << 64) - 1


def is_canonical(address: int) -> bool:
    """Whether bits 63:47 of a 64-bit linear address are all alike (APM vol. 2, 1.1.3)."""
    return (address + (1 << (LINEAR_BITS - 1))) & MASK64 < 1 << LINEAR_BITS


#: PAT at reset: WB, WT, UC-, UC, twice (APM vol. 2, 7.8.1)
PAT_RESET = 0x0007040600070406


def is_valid_pat(value: int) -> bool:
    """Whether each of the eight fields is a memory type: 0, 1, 4, 5, 6 or 7 (APM vol. 2, table 7-9)."""
    # the five upper bits of every byte clear, and no field 2 or 3 (bit 1 set, bit 2 clear)
    return not (value & 0xF8F8F8F8F8F8F8F8 or value >> 1 & ~(value >> 2) & 0x0101010101010101)
