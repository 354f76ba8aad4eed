# SPDX-License-Identifier: GPL-2.0-or-later
"""RDMSR and WRMSR of one guest: whoever keeps a register (vmm/x86/msr.py) is asked for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vmm.silicon import layout as at
from vmm.x86 import msr
from vmm.x86.flags import EFER_SVME

if TYPE_CHECKING:
    from vmm.hw.processor import Processor

_APIC_ENABLED = 1 << 11


class MsrFile:
    """The model-specific registers of the guest on `vcpu`.  Accesses raise GuestFault and OutOfFrames."""

    def __init__(self, vcpu: Processor) -> None:
        self._vcpu = vcpu
        #: those that are nothing but a value
        self.plain: dict[int, int] = {}
        self._cells = vcpu.regs.msr_cells()
        self._readers: dict[msr.Kind, Callable[[int, msr.Msr], int]] = {
            "silicon": self._read_silicon,
            "plain": lambda number, entry: self.plain.get(number, entry.reset),
            "const": lambda _number, entry: entry.reset,
            "lapic": lambda number, _entry: vcpu.lapic.msr_read(number),
            "kvm": lambda number, _entry: vcpu.kvm.read_msr(number),
            "tsc": lambda number, _entry: vcpu.clock.tsc() if number == msr.TSC else 0,
        }
        self._writers: dict[msr.Kind, Callable[[int, int], None]] = {
            "silicon": self._write_silicon,
            "plain": self.plain.__setitem__,
            "const": lambda _number, _value: None,
            "lapic": self._write_lapic,
            "kvm": lambda number, value: vcpu.kvm.write_msr(number, value, vcpu.instant()),
            "tsc": self._write_tsc,
        }

    def read(self, number: int) -> int:
        """RDMSR."""
        entry = msr.find(number)
        return self._readers[entry.kind](number, entry)

    def write(self, number: int, value: int) -> None:
        """WRMSR."""
        self._writers[msr.check_write(number, value).kind](number, value)

    def load(self, values: dict[int, int]) -> None:
        """Take over the plain and the paravirtual ones of a saved state; the CPU has loaded its own."""
        for number, value in values.items():
            entry = msr.MSRS.get(number)
            if entry is not None and entry.kind == "plain":
                self.plain[number] = value
        kept = self._vcpu.kvm.msrs
        kept.update({number: values.get(number, 0) for number in kept})
        self._show_apic()

    def save(self) -> dict[int, int]:
        """What `load` takes."""
        return self.plain | self._vcpu.kvm.msrs

    def _read_silicon(self, number: int, _entry: msr.Msr) -> int:
        if number == msr.EFER:
            return self._vcpu.q[at.EFER] & ~EFER_SVME
        view, index = self._cells[number]
        return view[index]

    def _write_silicon(self, number: int, value: int) -> None:
        if number == msr.EFER:
            q = self._vcpu.q
            q[at.EFER] = msr.efer_after_write(q[at.EFER] & ~EFER_SVME, value, q[at.CR]) | EFER_SVME
            return
        view, index = self._cells[number]
        view[index] = value

    def _write_lapic(self, number: int, value: int) -> None:
        self._vcpu.lapic.msr_write(number, value)
        if number == msr.APIC_BASE:
            self._show_apic()

    def _show_apic(self) -> None:
        enabled = self._vcpu.lapic.msr_read(msr.APIC_BASE) & _APIC_ENABLED
        self._vcpu.cpuid.set_apic(bool(enabled))

    def _write_tsc(self, number: int, value: int) -> None:
        if number == msr.TSC:
            vcpu = self._vcpu
            vcpu.clock.set_tsc(value)
            vcpu.lapic.timer.tsc_changed()
            vcpu.sync_clock()
            vcpu.reenter = True
