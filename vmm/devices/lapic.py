# SPDX-License-Identifier: GPL-2.0-or-later
"""The local APIC: xAPIC registers in memory and x2APIC registers as MSRs (Intel SDM vol. 3, chapter 11).

IRR, ISR and TMR are 256-bit ints, bit v for vector v: the highest vector is a `bit_length`.  A register
has one number in both modes: its MMIO offset divided by 16, its MSR minus 0x800.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final

from vmm.devices import lapic_registers as reg
from vmm.devices.lapic_timer import ApicTimer
from vmm.devices.saved import BYTE, DWORD, QWORD, Kinds, Saved, bits, list_of, wide
from vmm.devices.timers import Timers
from vmm.x86.faults import GeneralProtection


def _unmoved(_: int) -> None:
    pass


def _unheard() -> None:
    pass


class LocalApic(Saved):
    """The local APIC of the machine's one processor, whose initial APIC ID is 0.

    # Invariant: `ppr` is the processor priority of `tpr` and `isr`; `ready` says whether the highest
    # request is above it; `accepts_extint` whether the 8259's INTR reaches the processor.
    """

    sizes = frozenset({1, 4})
    __slots__ = ("_end_of_interrupt", "_nmi", "accepts_extint", "base", "changed", "dfr", "errors", "esr",
                 "icr", "identity", "irr", "isr", "ldr", "lvt", "moved", "ppr", "ready", "svr", "timer",
                 "tmr", "tpr")

    SAVED: ClassVar[Kinds] = {
        "base": bits(reg.BASE_ADDRESS | reg.BSP | reg.EXTENDED | reg.ENABLED), "identity": BYTE, "tpr": BYTE,
        "ldr": bits(0xFF00_0000), "dfr": DWORD, "svr": bits(0x3FF), "isr": wide(32), "irr": wide(32),
        "tmr": wide(32), "esr": BYTE, "errors": BYTE, "icr": QWORD, "lvt": list_of(bits(0x1_A7FF), 5),
    }

    def __init__(self, timers: Timers, read_tsc: Callable[[], int], tsc_to_ns: Callable[[int], int],
                 end_of_interrupt: Callable[[int], None], nmi: Callable[[], None]) -> None:
        #: called when `ready` or `accepts_extint` may have changed
        self.changed: Callable[[], None] = _unheard
        self._end_of_interrupt = end_of_interrupt
        self._nmi = nmi
        #: called with the new address when IA32_APIC_BASE moves the registers
        self.moved: Callable[[int], None] = _unmoved
        self.timer = ApicTimer(timers, self._fire, read_tsc, tsc_to_ns)
        self.base = reg.MMIO_BASE | reg.BSP | reg.ENABLED
        self.ready = False
        self._reset()
        # virtual wire mode, as firmware leaves it: the 8259's INTR comes through LINT0
        # (MultiProcessor Specification 1.4, 3.6.2.2)
        self.lvt[reg.LVT_LINT0 - reg.LVT_THERMAL] = reg.EXTINT << 8
        self._reroute()

    def _reset(self) -> None:
        self.identity = 0
        self.tpr = self.ppr = 0
        self.ldr, self.dfr, self.svr = 0, 0xFFFF_FFFF, 0xFF
        self.isr = self.irr = self.tmr = 0
        self.esr = self.errors = self.icr = 0
        self.lvt = [reg.MASKED] * 5
        self.timer.reset()

    # interrupts in and out

    def accept(self, vector: int, level: bool = False) -> None:
        """A fixed interrupt for this processor."""
        if vector < 16:
            self._error(reg.RECEIVED_ILLEGAL)
            return
        bit = 1 << vector
        self.irr |= bit
        if level:
            self.tmr |= bit
        else:
            self.tmr &= ~bit
        self._refresh()

    def acknowledge(self) -> int:
        """Take the highest request into service; only when `ready`."""
        vector = self.irr.bit_length() - 1
        bit = 1 << vector
        self.irr ^= bit
        self.isr |= bit
        # `ready` meant the vector's class is above that of all in service and of the TPR
        self.ppr = vector & 0xF0
        self.ready = False
        self.changed()
        return vector

    def deliver(self, destination: int, logical: bool, mode: int, vector: int, level: bool) -> bool:
        """A message on the APIC bus: whether this processor accepts it."""
        if not self.base & reg.ENABLED or not self._addressed(destination, logical):
            return False
        return self._take(mode, vector, level)

    def lint0(self, level: bool) -> None:
        """The 8259's INTR.  ExtINT needs nothing here; other modes take the rising edge."""
        if level:
            self._raise_local(reg.LVT_LINT0)

    @property
    def cr8(self) -> int:
        """CR8 is the upper half of the TPR."""
        return self.tpr >> 4

    @cr8.setter
    def cr8(self, value: int) -> None:
        self._set_tpr(value << 4 & 0xF0)

    def _take(self, mode: int, vector: int, level: bool) -> bool:
        if mode in (reg.FIXED, reg.LOWEST):
            if not self.svr & reg.SOFTWARE_ENABLED:
                return False
            self.accept(vector, level)
        elif mode == reg.NMI:
            self._nmi()
        # INIT and start-up mean nothing to a processor that is alone; there is no SMM
        return True

    def _addressed(self, destination: int, logical: bool) -> bool:
        if self.base & reg.EXTENDED:
            if destination in (0xFF, 0xFFFF_FFFF):
                return True
            return bool(destination >> 16 == 0 and destination & 1) if logical else destination == 0
        destination &= 0xFF
        if not logical:
            return destination in (self.identity, 0xFF)
        own = self.ldr >> 24
        if self.dfr >> 28 == 0xF:
            return bool(destination & own)
        return destination >> 4 in (own >> 4, 0xF) and bool(destination & own & 0xF)

    def _raise_local(self, register: int) -> None:
        entry = self.lvt[register - reg.LVT_THERMAL]
        if not entry & reg.MASKED:
            mode = entry >> 8 & 7
            if mode in (reg.FIXED, reg.NMI):
                self._take(mode, entry & 0xFF, False)

    def _fire(self, lvt: int) -> None:
        if not lvt & reg.MASKED:
            self._take(reg.FIXED, lvt & 0xFF, False)

    def _error(self, bit: int) -> None:
        # A second error of a kind changes nothing, which also ends the recursion of an error interrupt
        # whose own vector is illegal.
        if not self.errors & bit:
            self.errors |= bit
            self._raise_local(reg.LVT_ERROR)

    def _prioritize(self) -> None:
        served = self.isr.bit_length() - 1 & 0xF0 if self.isr else 0
        self.ppr = self.tpr if self.tpr & 0xF0 >= served else served
        self._refresh()

    def _refresh(self) -> None:
        irr = self.irr
        ready = irr != 0 and irr.bit_length() - 1 & 0xF0 > self.ppr & 0xF0
        if ready != self.ready:
            self.ready = ready
            self.changed()

    def _reroute(self) -> None:
        """INTR goes straight to the processor when the APIC is off, else through LINT0."""
        lint0 = self.lvt[reg.LVT_LINT0 - reg.LVT_THERMAL]
        through_lint0 = not lint0 & reg.MASKED and lint0 >> 8 & 7 == reg.EXTINT
        self.accepts_extint = through_lint0 or not self.base & reg.ENABLED
        self.changed()

    # the two windows on the registers

    def read(self, offset: int, size: int) -> int:
        """A register in memory; defined for aligned 32-bit reads, bytes read parts of them."""
        if self.base & reg.X2APIC != reg.XAPIC:
            return (1 << 8 * size) - 1
        reader = _READERS.get(offset >> 4)
        if reader is None:
            self._error(reg.ILLEGAL_REGISTER)
            return 0
        value = reader(self) & 0xFFFF_FFFF
        if size == 4:
            return value
        return value >> 8 * (offset & 3) & 0xFF if offset & 0xF < 4 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A register in memory; other than aligned 32-bit writes are lost, as on silicon."""
        if size != 4 or offset & 0xF or self.base & reg.X2APIC != reg.XAPIC:
            return
        writer = _WRITERS.get(offset >> 4)
        if writer is None:
            self._error(reg.ILLEGAL_REGISTER)
        else:
            writer(self, value)

    def msr_read(self, number: int) -> int:
        """RDMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register; may raise GeneralProtection."""
        if number == reg.IA32_TSC_DEADLINE:
            return self.timer.deadline()
        if number == reg.IA32_APIC_BASE:
            return self.base
        register = number - reg.X2APIC_FIRST
        reader = _READERS.get(register)
        if self.base & reg.X2APIC != reg.X2APIC or reader is None or register in reg.X2APIC_UNREADABLE:
            raise GeneralProtection
        return reader(self)

    def msr_write(self, number: int, value: int) -> None:
        """WRMSR of the same; raises GeneralProtection for a read-only register or reserved bits."""
        if number == reg.IA32_TSC_DEADLINE:
            self.timer.set_deadline(value)
            return
        if number == reg.IA32_APIC_BASE:
            self._set_base(value)
            return
        register = number - reg.X2APIC_FIRST
        writable = reg.X2APIC_WRITABLE.get(register)
        if self.base & reg.X2APIC != reg.X2APIC or writable is None or value & ~writable:
            raise GeneralProtection
        if register == reg.EOI:
            self._eoi(0)
        elif register == reg.ICR:
            self.icr = value
            self._send(value, value >> 32)
        elif register == reg.SELF_IPI:
            self._send(value | reg.TO_SELF, 0)
        else:
            _WRITERS[register](self, value)

    # what registers do

    def _set_base(self, value: int) -> None:
        if value & ~(reg.BASE_ADDRESS | reg.BSP | reg.EXTENDED | reg.ENABLED):
            raise GeneralProtection
        old, new = self.base & reg.X2APIC, value & reg.X2APIC
        if new == reg.INVALID or (old != new and (old, new) not in reg.MODE_CHANGES):
            raise GeneralProtection
        moved = (value ^ self.base) & reg.BASE_ADDRESS
        self.base = value
        if old != new and new == reg.OFF:
            self._reset()
            self._prioritize()
        elif old != new and new == reg.X2APIC:
            self.identity = 0
            self.icr &= 0xFFFF_FFFF
        self._reroute()
        if moved:
            self.moved(value & reg.BASE_ADDRESS)

    def _read_identity(self) -> int:
        return 0 if self.base & reg.EXTENDED else self.identity << 24

    def _set_identity(self, value: int) -> None:
        self.identity = value >> 24

    def _read_ldr(self) -> int:
        # x2APIC: cluster 0, bit 0, both from the ID
        return 1 if self.base & reg.EXTENDED else self.ldr

    def _set_ldr(self, value: int) -> None:
        self.ldr = value & 0xFF00_0000

    def _set_dfr(self, value: int) -> None:
        self.dfr = value | 0x0FFF_FFFF

    def _set_tpr(self, value: int) -> None:
        self.tpr = value & 0xFF
        self._prioritize()

    def _eoi(self, _: int) -> None:
        isr = self.isr
        if not isr:
            return
        vector = isr.bit_length() - 1
        bit = 1 << vector
        self.isr = isr ^ bit
        self._prioritize()
        if self.tmr & bit:
            self._end_of_interrupt(vector)

    def _set_svr(self, value: int) -> None:
        self.svr = value & 0x3FF
        if not value & reg.SOFTWARE_ENABLED:
            self.timer.set_lvt(self.timer.lvt | reg.MASKED)
            self.lvt = [entry | reg.MASKED for entry in self.lvt]
            self._reroute()

    def _latch_errors(self, _: int) -> None:
        self.esr, self.errors = self.errors, 0

    def _set_icr_low(self, value: int) -> None:
        self.icr = self.icr & ~0xFFFF_FFFF | value & 0x000C_CFFF
        self._send(value, self.icr >> 56)

    def _set_icr_high(self, value: int) -> None:
        self.icr = self.icr & 0xFFFF_FFFF | (value & 0xFF00_0000) << 32

    def _send(self, command: int, destination: int) -> None:
        """An interprocessor interrupt; the only processor to receive it is this one."""
        shorthand = command & reg.SHORTHAND
        if shorthand == reg.TO_OTHERS:
            return
        if not shorthand and not self._addressed(destination, bool(command & reg.LOGICAL)):
            return
        mode, vector = command >> 8 & 7, command & 0xFF
        if mode in (reg.FIXED, reg.LOWEST) and vector < 16:
            self._error(reg.SEND_ILLEGAL)
        else:
            self._take(mode, vector, False)

    def _set_lvt(self, register: int, value: int) -> None:
        index = register - reg.LVT_THERMAL
        if not self.svr & reg.SOFTWARE_ENABLED:
            value |= reg.MASKED
        self.lvt[index] = value & reg.LVT_WRITABLE[index]
        self._reroute()

    def _set_lvt_timer(self, value: int) -> None:
        self.timer.set_lvt(value if self.svr & reg.SOFTWARE_ENABLED else value | reg.MASKED)

    def restored(self) -> None:
        """Derive priority and routing, and put the registers where IA32_APIC_BASE says."""
        self.moved(self.base & reg.BASE_ADDRESS)
        self._prioritize()
        self._reroute()


def _word_reader(name: str, index: int) -> Callable[[LocalApic], int]:
    return lambda apic: getattr(apic, name) >> 32 * index & 0xFFFF_FFFF


def _lvt_reader(index: int) -> Callable[[LocalApic], int]:
    return lambda apic: apic.lvt[index]


def _lvt_writer(register: int) -> Callable[[LocalApic, int], None]:
    return lambda apic, value: apic._set_lvt(register, value)


#: register -> how to read it (the ICR whole: a 32-bit read takes its low half)
_READERS: Final[dict[int, Callable[[LocalApic], int]]] = {
    reg.ID: LocalApic._read_identity,
    reg.VERSION: lambda apic: reg.VERSION_VALUE,
    reg.TPR: lambda apic: apic.tpr,
    reg.ARBITRATION: lambda apic: apic.ppr,
    reg.PPR: lambda apic: apic.ppr,
    reg.EOI: lambda apic: 0,
    reg.REMOTE_READ: lambda apic: 0,
    reg.LDR: LocalApic._read_ldr,
    reg.DFR: lambda apic: apic.dfr,
    reg.SVR: lambda apic: apic.svr,
    reg.ESR: lambda apic: apic.esr,
    reg.ICR: lambda apic: apic.icr,
    reg.ICR_HIGH: lambda apic: apic.icr >> 32,
    reg.LVT_TIMER: lambda apic: apic.timer.lvt,
    reg.INITIAL_COUNT: lambda apic: apic.timer.initial,
    reg.CURRENT_COUNT: lambda apic: apic.timer.current(),
    reg.DIVIDE: lambda apic: apic.timer.divide_configuration,
    **{reg.LVT_THERMAL + index: _lvt_reader(index) for index in range(5)},
    **{first + index: _word_reader(name, index)
       for first, name in ((reg.ISR, "isr"), (reg.TMR, "tmr"), (reg.IRR, "irr")) for index in range(8)},
}

#: register -> how to write it with 32 bits; read-only registers ignore it
_WRITERS: Final[dict[int, Callable[[LocalApic, int], None]]] = {
    **{register: lambda apic, value: None for register in _READERS},
    reg.ID: LocalApic._set_identity,
    reg.TPR: LocalApic._set_tpr,
    reg.EOI: LocalApic._eoi,
    reg.LDR: LocalApic._set_ldr,
    reg.DFR: LocalApic._set_dfr,
    reg.SVR: LocalApic._set_svr,
    reg.ESR: LocalApic._latch_errors,
    reg.ICR: LocalApic._set_icr_low,
    reg.ICR_HIGH: LocalApic._set_icr_high,
    reg.LVT_TIMER: LocalApic._set_lvt_timer,
    reg.INITIAL_COUNT: lambda apic, value: apic.timer.set_initial(value),
    reg.DIVIDE: lambda apic, value: apic.timer.set_divide(value),
    **{reg.LVT_THERMAL + index: _lvt_writer(reg.LVT_THERMAL + index) for index in range(5)},
}
