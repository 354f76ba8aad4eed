# SPDX-License-Identifier: GPL-2.0-or-later
"""#VMEXIT codes: why a guest left the processor (APM vol. 2, appendix C).

The codes below 0xC0 are also the numbers of the intercepts: the manual lays the intercept vector out
(VMCB offsets 0x00-0x17, bit 0 of the first byte first) so that bit N makes the guest leave with code N.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes by their names in the manual, without VMEXIT_."""

    (CR0_READ, CR1_READ, CR2_READ, CR3_READ, CR4_READ, CR5_READ, CR6_READ, CR7_READ,
     CR8_READ, CR9_READ, CR10_READ, CR11_READ, CR12_READ, CR13_READ, CR14_READ, CR15_READ,
     CR0_WRITE, CR1_WRITE, CR2_WRITE, CR3_WRITE, CR4_WRITE, CR5_WRITE, CR6_WRITE, CR7_WRITE,
     CR8_WRITE, CR9_WRITE, CR10_WRITE, CR11_WRITE, CR12_WRITE, CR13_WRITE, CR14_WRITE, CR15_WRITE,
     DR0_READ, DR1_READ, DR2_READ, DR3_READ, DR4_READ, DR5_READ, DR6_READ, DR7_READ,
     DR8_READ, DR9_READ, DR10_READ, DR11_READ, DR12_READ, DR13_READ, DR14_READ, DR15_READ,
     DR0_WRITE, DR1_WRITE, DR2_WRITE, DR3_WRITE, DR4_WRITE, DR5_WRITE, DR6_WRITE, DR7_WRITE,
     DR8_WRITE, DR9_WRITE, DR10_WRITE, DR11_WRITE, DR12_WRITE, DR13_WRITE, DR14_WRITE, DR15_WRITE,
     ) = range(0x00, 0x40)
    (EXCP_DE, EXCP_DB, EXCP_NMI, EXCP_BP, EXCP_OF, EXCP_BR, EXCP_UD, EXCP_NM,
     EXCP_DF, EXCP_9, EXCP_TS, EXCP_NP, EXCP_SS, EXCP_GP, EXCP_PF, EXCP_15,
     EXCP_MF, EXCP_AC, EXCP_MC, EXCP_XF, EXCP_20, EXCP_CP, EXCP_22, EXCP_23,
     EXCP_24, EXCP_25, EXCP_26, EXCP_27, EXCP_HV, EXCP_VC, EXCP_SX, EXCP_31,
     ) = range(0x40, 0x60)
    INTR = 0x60
    NMI = 0x61
    SMI = 0x62
    INIT = 0x63
    VINTR = 0x64
    CR0_SEL_WRITE = 0x65
    IDTR_READ = 0x66
    GDTR_READ = 0x67
    LDTR_READ = 0x68
    TR_READ = 0x69
    IDTR_WRITE = 0x6A
    GDTR_WRITE = 0x6B
    LDTR_WRITE = 0x6C
    TR_WRITE = 0x6D
    RDTSC = 0x6E
    RDPMC = 0x6F
    PUSHF = 0x70
    POPF = 0x71
    CPUID = 0x72
    RSM = 0x73
    IRET = 0x74
    SWINT = 0x75
    INVD = 0x76
    PAUSE = 0x77
    HLT = 0x78
    INVLPG = 0x79
    INVLPGA = 0x7A
    IOIO = 0x7B
    MSR = 0x7C
    TASK_SWITCH = 0x7D
    FERR_FREEZE = 0x7E
    SHUTDOWN = 0x7F
    VMRUN = 0x80
    VMMCALL = 0x81
    VMLOAD = 0x82
    VMSAVE = 0x83
    STGI = 0x84
    CLGI = 0x85
    SKINIT = 0x86
    RDTSCP = 0x87
    ICEBP = 0x88
    WBINVD = 0x89
    MONITOR = 0x8A
    MWAIT = 0x8B
    MWAIT_CONDITIONAL = 0x8C
    XSETBV = 0x8D
    RDPRU = 0x8E
    EFER_WRITE_TRAP = 0x8F
    (CR0_WRITE_TRAP, CR1_WRITE_TRAP, CR2_WRITE_TRAP, CR3_WRITE_TRAP,
     CR4_WRITE_TRAP, CR5_WRITE_TRAP, CR6_WRITE_TRAP, CR7_WRITE_TRAP,
     CR8_WRITE_TRAP, CR9_WRITE_TRAP, CR10_WRITE_TRAP, CR11_WRITE_TRAP,
     CR12_WRITE_TRAP, CR13_WRITE_TRAP, CR14_WRITE_TRAP, CR15_WRITE_TRAP,
     ) = range(0x90, 0xA0)
    INVLPGB = 0xA0
    INVLPGB_ILLEGAL = 0xA1
    INVPCID = 0xA2
    MCOMMIT = 0xA3
    TLBSYNC = 0xA4
    BUSLOCK = 0xA5
    IDLE_HLT = 0xA6
    NPF = 0x400
    AVIC_INCOMPLETE_IPI = 0x401
    AVIC_NOACCEL = 0x402
    VMGEXIT = 0x403
    # events of the software monitor, which leaves its guest for them (vmm/bt/processor.py)
    BT_HIDDEN_FAULT = 0x408        # a page the shadow did not have
    BT_TRACE = 0x409               # a store to a traced page
    BT_ADAPTED = 0x40A             # an instruction retranslated as a simulation, or back
    BT_SIMULATED = 0x40B
    BT_MISS = 0x40C                # an indirect jump the table did not know
    BT_CHAIN = 0x40D               # a jump not yet led to its translation
    BT_SILICON = 0x40E             # an instruction, or an interlude, left to the emulated silicon
    # -1 to -4, as they lie in the 64-bit EXITCODE field
    INVALID = 0xFFFFFFFF_FFFFFFFF
    BUSY = 0xFFFFFFFF_FFFFFFFE
    IDLE_REQUIRED = 0xFFFFFFFF_FFFFFFFD
    INVALID_PMC = 0xFFFFFFFF_FFFFFFFC


#: codes below this one are intercepts (the vector has six 32-bit words)
INTERCEPT_BITS = 192

_NAMES: dict[int, str] = {code: code.name.lower() for code in ExitCode}


def exit_name(code: int) -> str:
    """Lower-case name of an exit code, `unknown` for a number that is none: a bounded set of labels."""
    return _NAMES.get(code, "unknown")
