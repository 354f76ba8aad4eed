# SPDX-License-Identifier: GPL-2.0-or-later
"""Names and masks of the local APIC's registers (Intel SDM vol. 3, chapter 11)."""

from __future__ import annotations

from typing import Final

from vmm.x86.flags import PHYSICAL_BITS

MMIO_BASE = 0xFEE0_0000
MMIO_LENGTH = 0x1000

IA32_APIC_BASE, IA32_TSC_DEADLINE, X2APIC_FIRST = 0x1B, 0x6E0, 0x800

# IA32_APIC_BASE
BSP, EXTENDED, ENABLED = 1 << 8, 1 << 10, 1 << 11
BASE_ADDRESS = (1 << PHYSICAL_BITS) - 0x1000
OFF, XAPIC, INVALID, X2APIC = 0, ENABLED, EXTENDED, ENABLED | EXTENDED
#: legal changes of mode, SDM figure 11-27; every mode may also be kept
MODE_CHANGES = frozenset({(OFF, XAPIC), (XAPIC, X2APIC), (XAPIC, OFF), (X2APIC, OFF)})

# register numbers
ID, VERSION, TPR, ARBITRATION, PPR, EOI, REMOTE_READ, LDR, DFR, SVR = (
    0x02, 0x03, 0x08, 0x09, 0x0A, 0x0B, 0x0C, 0x0D, 0x0E, 0x0F)
ISR, TMR, IRR, ESR, ICR, ICR_HIGH = 0x10, 0x18, 0x20, 0x28, 0x30, 0x31
LVT_TIMER, LVT_THERMAL, LVT_COUNTER, LVT_LINT0, LVT_LINT1, LVT_ERROR = 0x32, 0x33, 0x34, 0x35, 0x36, 0x37
INITIAL_COUNT, CURRENT_COUNT, DIVIDE, SELF_IPI = 0x38, 0x39, 0x3E, 0x3F

#: integrated APIC, six LVT entries
VERSION_VALUE = 0x14 | 5 << 16

SOFTWARE_ENABLED = 1 << 8
MASKED = 1 << 16

# ICR
LOGICAL, SHORTHAND, TO_SELF, TO_OTHERS = 1 << 11, 3 << 18, 1 << 18, 3 << 18
# delivery modes
FIXED, LOWEST, NMI, EXTINT = 0, 1, 4, 7

# ESR
SEND_ILLEGAL, RECEIVED_ILLEGAL, ILLEGAL_REGISTER = 1 << 5, 1 << 6, 1 << 7

#: writable bits of the LVT registers after the timer's: vector, delivery mode, polarity, trigger, mask
LVT_WRITABLE: Final = (0x1_07FF, 0x1_07FF, 0x1_A7FF, 0x1_A7FF, 0x1_00FF)

#: What a WRMSR may have set, for each register x2APIC mode can write; other bits are #GP.  The LVT's
#: read-only bits (delivery status, remote IRR) may be set: kernels do when they restore virtual wire mode.
X2APIC_WRITABLE: Final = {
    TPR: 0xFF, EOI: 0, SVR: 0x3FF, ESR: 0, ICR: 0xFFFF_FFFF_000C_CFFF,
    LVT_TIMER: 0x7_10FF, LVT_THERMAL: 0x1_17FF, LVT_COUNTER: 0x1_17FF, LVT_LINT0: 0x1_F7FF,
    LVT_LINT1: 0x1_F7FF, LVT_ERROR: 0x1_10FF, INITIAL_COUNT: 0xFFFF_FFFF, DIVIDE: 0xB, SELF_IPI: 0xFF,
}
#: registers that exist only in xAPIC mode, or cannot be read as an MSR
X2APIC_UNREADABLE: Final = frozenset({ARBITRATION, EOI, REMOTE_READ, DFR, ICR_HIGH, SELF_IPI})
