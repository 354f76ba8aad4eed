# SPDX-License-Identifier: GPL-2.0-or-later
"""The consistency checks of vmrun and #VMEXIT (APM vol. 2, 15.5.1 "Canonicalization and Consistency Checks",
15.20 for event injection, 15.25.3 and 15.25.4 for nested paging).

A guest that fails one leaves at once with VMEXIT_INVALID; a host that fails one shuts the processor down.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vmm.exitcodes import ExitCode
from vmm.vmcb import EVENT_VALID, IOPM_BYTES, MSRPM_BYTES, PAGE, SAVE, Event, EventType, SaveArea, Vmcb
from vmm.x86 import descriptors
from vmm.x86.faults import Vector
from vmm.x86.flags import (
    CR0_CD,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    CR4_VALID,
    EFER_LMA,
    EFER_LME,
    EFER_SVME,
    EFER_VALID,
    PHYSICAL_BITS,
    is_valid_pat,
)


class Processor(NamedTuple):
    """What the checks must know of the processor that executes vmrun."""

    physical_bits: int = PHYSICAL_BITS
    long_mode: bool = True
    efer_valid: int = EFER_VALID
    cr4_valid: int = CR4_VALID
    #: CR0.PG of the host when it executes vmrun
    host_paging: bool = True


DEFAULT = Processor()

StateCheck = tuple[str, Callable[[SaveArea, Processor], object]]
ControlCheck = tuple[str, Callable[[Vmcb, Processor], object]]


def _long_mode_paging(state: SaveArea) -> bool:
    return bool(state.efer & EFER_LME and state.cr0 & CR0_PG)


#: what is wrong, and how to see it, in any processor state
STATE_CHECKS: tuple[StateCheck, ...] = (
    ("EFER.SVME is zero", lambda s, p: not s.efer & EFER_SVME),
    ("CR0.CD is zero and CR0.NW is set", lambda s, p: not s.cr0 & CR0_CD and s.cr0 & CR0_NW),
    ("CR0[63:32] are not zero", lambda s, p: s.cr0 >> 32),
    ("a must-be-zero bit of CR3 is set", lambda s, p: s.cr3 >> p.physical_bits),
    ("a must-be-zero bit of CR4 is set", lambda s, p: s.cr4 & ~p.cr4_valid),
    ("DR6[63:32] are not zero", lambda s, p: s.dr6 >> 32),
    ("DR7[63:32] are not zero", lambda s, p: s.dr7 >> 32),
    ("a must-be-zero bit of EFER is set", lambda s, p: s.efer & ~p.efer_valid),
    ("EFER.LMA or EFER.LME is set and the processor has no long mode",
     lambda s, p: s.efer & (EFER_LMA | EFER_LME) and not p.long_mode),
    ("EFER.LME and CR0.PG are set and CR4.PAE is zero",
     lambda s, p: _long_mode_paging(s) and not s.cr4 & CR4_PAE),
    ("EFER.LME and CR0.PG are set and CR0.PE is zero",
     lambda s, p: _long_mode_paging(s) and not s.cr0 & CR0_PE),
    ("EFER.LME, CR0.PG, CR4.PAE, CS.L and CS.D are all set",
     lambda s, p: _long_mode_paging(s) and s.cr4 & CR4_PAE
     and s.cs.attributes & (descriptors.LONG | descriptors.BIG) == descriptors.LONG | descriptors.BIG),
)

#: exceptions of instructions that 64-bit mode does not have (BOUND, INTO)
_NOT_IN_64BIT_MODE = frozenset({Vector.BR, Vector.OF})
_EXCEPTIONS = frozenset(Vector) - {Vector.NMI}
_EVENT_TYPES = frozenset(EventType)


def _event_error(vmcb: Vmcb) -> bool:
    event = Event.decode(vmcb.eventinj)
    if event is None:
        return False
    if event.type != EventType.EXCEPTION:
        return event.type not in _EVENT_TYPES
    if event.vector in _NOT_IN_64BIT_MODE and vmcb.efer & EFER_LMA:
        return bool(vmcb.cs.attributes & descriptors.LONG)
    return event.vector not in _EXCEPTIONS


def _beyond(base: int, size: int, processor: Processor) -> bool:
    """Whether a table at `base` (low 12 bits ignored) reaches past the physical address space."""
    return (base & ~(PAGE - 1)) + size > 1 << processor.physical_bits


CONTROL_CHECKS: tuple[ControlCheck, ...] = (
    ("the VMRUN intercept is clear", lambda v, p: not v.intercepts(ExitCode.VMRUN)),
    ("the MSR permission map reaches past the physical address space",
     lambda v, p: _beyond(v.msrpm_base_pa, MSRPM_BYTES, p)),
    ("the I/O permission map reaches past the physical address space",
     lambda v, p: _beyond(v.iopm_base_pa, IOPM_BYTES, p)),
    ("the event to inject is illegal", lambda v, p: _event_error(v)),
    ("the guest's ASID is zero", lambda v, p: not v.guest_asid),
    ("nested paging is enabled and the host does not page", lambda v, p: v.np_enable and not p.host_paging),
    ("nested paging is enabled and a must-be-zero bit of nCR3 is set",
     lambda v, p: v.np_enable and v.n_cr3 >> p.physical_bits),
    ("nested paging is enabled and the guest's PAT has a reserved memory type",
     lambda v, p: v.np_enable and not is_valid_pat(v.g_pat)),
)


def state_errors(state: SaveArea, processor: Processor = DEFAULT) -> list[str]:
    """What is illegal in a processor state: the subset of the checks #VMEXIT makes on the host's."""
    return [sentence for sentence, wrong in STATE_CHECKS if wrong(state, processor)]


def consistency_errors(vmcb: Vmcb, processor: Processor = DEFAULT) -> list[str]:
    """Everything for which vmrun of this control block gives VMEXIT_INVALID; empty when it may run."""
    return state_errors(vmcb, processor) + [
        sentence for sentence, wrong in CONTROL_CHECKS if wrong(vmcb, processor)]


# where `is_consistent` finds its fields
_CS_ATTRIBUTES = SAVE // 2 + 9
_Q_EFER, _Q_CR4, _Q_CR3, _Q_CR0, _Q_DR7, _Q_DR6, _Q_PAT = (
    (SAVE + offset) // 8 for offset in (0xD0, 0x148, 0x150, 0x158, 0x160, 0x168, 0x268))
_Q_IOPM, _Q_MSRPM, _Q_EVENTINJ, _Q_NCR3 = (offset // 8 for offset in (0x40, 0x48, 0xA8, 0xB0))
_LAST_MAP = (1 << PHYSICAL_BITS) - max(IOPM_BYTES, MSRPM_BYTES)
_LONG_MODE_CR0 = CR0_PE | CR0_PG
_BAD_CR4 = ~CR4_VALID
_BAD_EFER = ~EFER_VALID
_LONG_AND_BIG = descriptors.LONG | descriptors.BIG


def is_consistent(vmcb: Vmcb) -> bool:
    """`not consistency_errors(vmcb)`, at the speed every vmrun needs.

    Settles the states that guests are really in by a few words of the page; anything else, right or
    wrong, goes through the table.  True here implies that every check of the table passes.
    """
    qwords = vmcb.qwords
    efer, cr0, cr4 = qwords[_Q_EFER], qwords[_Q_CR0], qwords[_Q_CR4]
    if (efer & EFER_SVME and not efer & _BAD_EFER and not cr4 & _BAD_CR4
            and not (cr0 | qwords[_Q_DR6] | qwords[_Q_DR7]) >> 32
            and not (qwords[_Q_CR3] | qwords[_Q_NCR3]) >> PHYSICAL_BITS
            and cr0 & (CR0_CD | CR0_NW) != CR0_NW
            and (not efer & EFER_LME or not cr0 & CR0_PG or (
                cr0 & CR0_PE and cr4 & CR4_PAE
                and vmcb.words[_CS_ATTRIBUTES] & _LONG_AND_BIG != _LONG_AND_BIG))
            and vmcb.dwords[4] & 1 and vmcb.dwords[22]
            and qwords[_Q_IOPM] <= _LAST_MAP and qwords[_Q_MSRPM] <= _LAST_MAP
            and not (qwords[_Q_EVENTINJ] & EVENT_VALID and _event_error(vmcb))
            and is_valid_pat(qwords[_Q_PAT])):
        return True
    return not consistency_errors(vmcb)
