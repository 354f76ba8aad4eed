# SPDX-License-Identifier: GPL-2.0-or-later
"""One handler per exit code.

A handler takes the guest's processor and the exit; it returns True when the exit is done with and the
guest may go on where its registers now point, False when the guest must leave the CPU (the processor's
`verdict` then says why, or is None for a mere re-entry).  Raising GuestFault gives the guest that
exception at the current instruction; OutOfFrames makes the guest wait for a frame and repeat it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vmm.exitcodes import ExitCode
from vmm.hw.exits import Fault, MsrAccess, NestedFault, Plain, RegisterMove
from vmm.memory.p2m import Outcome
from vmm.monitor import Stop, StopReason
from vmm.silicon import layout as at
from vmm.silicon.hostarea import DEVICE_WINDOW, DEVICE_WINDOW_BYTES
from vmm.x86 import kvm
from vmm.x86.faults import GeneralProtection, GuestFault, Vector
from vmm.x86.flags import CR4_DE, CR4_PAE, CR4_VALID, EFER_LMA, MASK32, MASK64, RFLAGS_IF, RFLAGS_TF

if TYPE_CHECKING:
    from vmm.hw.processor import Processor

Handler = Callable[["Processor", Any], bool]

RAX, RCX, RDX, RBX = 0, 1, 2, 3
DR6_BS = 1 << 14
#: bits of DR6 and DR7 that always read as one
_DEBUG_ONES = {6: 0xFFFF_0FF0, 7: 0x400}


def _completed(vcpu: Processor, length: int) -> bool:
    """The instruction was carried out here: go on behind it; the shadow of STI or MOV SS ends with it."""
    q, d = vcpu.q, vcpu.d
    q[at.RIP] += length
    d[at.HFLAGS] &= ~at.HF_INHIBIT_IRQ
    if q[at.RFLAGS] & RFLAGS_TF:
        q[vcpu.place.dr + 6] |= DR6_BS
        vcpu.delivery.exception(Vector.DB)
    return True


def on_cpuid(vcpu: Processor, _exit: Plain) -> bool:
    """CPUID: from the table."""
    q = vcpu.q
    q[RAX], q[RBX], q[RCX], q[RDX] = vcpu.cpuid.lookup(q[RAX] & MASK32, q[RCX] & MASK32)
    return _completed(vcpu, 2)


def on_msr(vcpu: Processor, exit: MsrAccess) -> bool:
    """RDMSR, WRMSR: by the table of vmm/x86/msr.py."""
    q = vcpu.q
    number = q[RCX] & MASK32
    if exit.write:
        vcpu.msrs.write(number, q[RAX] & MASK32 | (q[RDX] & MASK32) << 32)
        vcpu.rearm()
    else:
        value = vcpu.msrs.read(number)
        q[RAX], q[RDX] = value & MASK32, value >> 32
    return _completed(vcpu, 2) and not vcpu.reenter


def on_hlt(vcpu: Processor, _exit: Plain) -> bool:
    """HLT: the guest sleeps unless an interrupt is ready and allowed."""
    _completed(vcpu, 1)
    if vcpu.interrupts.output and vcpu.q[at.RFLAGS] & RFLAGS_IF:
        return True
    vcpu.halted = True
    return False


def on_nested_fault(vcpu: Processor, exit: NestedFault) -> bool:
    """First touch, copy-on-write, dirty log: the P2M's business; what is not RAM goes to the devices.

    A present entry faults only for want of write permission, also when a walk of the guest's own page
    tables, which counts as a write, came upon it; so every such fault asks for a writable page.
    """
    outcome = vcpu.p2m.fault(exit.gpa, True, vcpu.frames)
    if outcome is Outcome.MAPPED:
        return True
    if outcome is Outcome.REMAPPED:
        vcpu.cpu.flush_tlb()
        return True
    window = exit.gpa if exit.gpa < DEVICE_WINDOW_BYTES else DEVICE_WINDOW_BYTES - 1
    if vcpu.p2m.map_device(exit.gpa, DEVICE_WINDOW + window):
        vcpu.cpu.flush_tlb()
    return True


def on_exception(vcpu: Processor, exit: Fault) -> bool:
    """An exception of the guest: through its IDT."""
    vcpu.d[vcpu.place.is_int] = 0
    vcpu.delivery.exception(exit.vector, exit.error_code, exit.address)
    return True


def on_nmi(vcpu: Processor, _exit: Fault) -> bool:
    """The NMI that was injected; the guest is entered anew to leave at its handler's IRET."""
    vcpu.take_nmi()
    return False


def on_window(vcpu: Processor, _exit: Plain) -> bool:
    """The first instruction boundary at which the guest takes interrupts."""
    vcpu.take_interrupt()
    return True


def on_vmmcall(vcpu: Processor, _exit: Plain) -> bool:
    """A hypercall: number in RAX, result in RAX."""
    q = vcpu.q
    q[RAX] = kvm.hypercall(q[RAX], vcpu.regs.cpl, bool(q[at.EFER] & EFER_LMA))
    vcpu.accounting.hypercalls += 1
    return _completed(vcpu, 3)


def on_register_move(vcpu: Processor, exit: RegisterMove) -> bool:
    """CR8 is the local APIC's; CR4 and debug registers have rules that the silicon does not keep."""
    length, register = vcpu.moved_register()
    q = vcpu.q
    value = q[register] & (MASK64 if q[at.EFER] & EFER_LMA else MASK32)
    if exit.debug:
        _write_debug(vcpu, exit.number, value)
    elif exit.number == 4:
        if value & ~CR4_VALID or (q[at.EFER] & EFER_LMA and not value & CR4_PAE):
            raise GeneralProtection
        vcpu.regs.set_cr4(value)
    elif exit.write:
        if value & ~0xF:
            raise GeneralProtection
        vcpu.lapic.cr8 = value
    else:
        q[register] = vcpu.lapic.cr8
    return _completed(vcpu, length)


def _write_debug(vcpu: Processor, number: int, value: int) -> None:
    """Kept, but never armed: the silicon's breakpoints belong to all guests at once (APM vol. 2, 13.1.1)."""
    if number in (4, 5):
        if vcpu.q[at.CR + 4] & CR4_DE:
            raise GuestFault(Vector.UD)
        number += 2
    if number >= 6:
        if value > MASK32:
            raise GeneralProtection
        value |= _DEBUG_ONES[number]
    vcpu.q[vcpu.place.dr + number] = value


def on_privileged_cache(vcpu: Processor, _exit: Plain) -> bool:
    """INVD, WBINVD: nothing to write back."""
    return _completed(vcpu, 2)


def on_unknown_instruction(_vcpu: Processor, _exit: Plain) -> bool:
    """Instructions this processor does not have: SVM itself, MONITOR, MWAIT, XSETBV, RDPRU."""
    raise GuestFault(Vector.UD)


def on_rdpmc(_vcpu: Processor, _exit: Plain) -> bool:
    """No performance counters."""
    raise GeneralProtection


def on_nmi_return(vcpu: Processor, _exit: Plain) -> bool:
    """IRET while an NMI is being served: the next one may come after it."""
    vcpu.nmi_masked = False
    vcpu.vmcb_intercept(ExitCode.IRET, False)
    return False


def on_shutdown(vcpu: Processor, _exit: Plain) -> bool:
    """The silicon itself ran into a triple fault."""
    vcpu.verdict = Stop(StopReason.CRASHED, "triple fault")
    return False


#: exit code -> handler; a code that is not here crashes the guest with a sentence that names it
HANDLERS: dict[int, Handler] = {
    ExitCode.CPUID: on_cpuid,
    ExitCode.MSR: on_msr,
    ExitCode.HLT: on_hlt,
    ExitCode.NPF: on_nested_fault,
    ExitCode.VINTR: on_window,
    ExitCode.VMMCALL: on_vmmcall,
    ExitCode.CR8_READ: on_register_move,
    ExitCode.CR8_WRITE: on_register_move,
    ExitCode.CR4_WRITE: on_register_move,
    **dict.fromkeys(range(ExitCode.DR0_WRITE, ExitCode.DR7_WRITE + 1), on_register_move),
    ExitCode.INVD: on_privileged_cache,
    ExitCode.WBINVD: on_privileged_cache,
    ExitCode.RDPMC: on_rdpmc,
    ExitCode.IRET: on_nmi_return,
    ExitCode.SHUTDOWN: on_shutdown,
    **dict.fromkeys(
        (ExitCode.VMRUN, ExitCode.VMLOAD, ExitCode.VMSAVE, ExitCode.STGI, ExitCode.CLGI, ExitCode.SKINIT,
         ExitCode.INVLPGA, ExitCode.MONITOR, ExitCode.MWAIT, ExitCode.MWAIT_CONDITIONAL, ExitCode.XSETBV,
         ExitCode.RDPRU, ExitCode.RSM), on_unknown_instruction),
    **dict.fromkeys(range(ExitCode.EXCP_DE, ExitCode.EXCP_31 + 1), on_exception),
    ExitCode.EXCP_NMI: on_nmi,
}

#: what the VMCB intercepts beside all exceptions: the handlers above say what for
INTERCEPTS = tuple(code for code in HANDLERS
                   if code < 0xC0 and code != ExitCode.IRET and code not in range(0x40, 0x60))


