# SPDX-License-Identifier: GPL-2.0-or-later
"""The wiring of a PC's interrupts: device -> 8259 pair and I/O APIC -> local APIC -> processor.

ISA interrupt n drives input n of the 8259 pair and input n of the I/O APIC, but interrupt 0 is on input 2
of the latter (the MADT and MP table say so).  The 8259's INTR is the local APIC's LINT0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmm.devices.ioapic import PINS, IoApic
from vmm.devices.lapic import LocalApic
from vmm.devices.pic8259 import CASCADE, Elcr, PicPair
from vmm.devices.saved import part
from vmm.devices.timers import Timers
from vmm.state import StateError

ISA_INTERRUPTS = 16
#: the I/O APIC input of ISA interrupt 0
TIMER_PIN = 2


def _nobody() -> None:
    pass


class InterruptSystem:
    """All interrupt controllers of a machine.

    # Invariant: `output` says whether `acknowledge` would return a vector.
    """

    __slots__ = ("elcr", "ioapic", "lapic", "nmi_pending", "on_output", "output", "pic")

    def __init__(self, timers: Timers, read_tsc: Callable[[], int], tsc_to_ns: Callable[[int], int]) -> None:
        #: a maskable interrupt is ready for the processor (whatever its IF says)
        self.output = False
        #: an NMI is; the processor's side clears it when it takes it
        self.nmi_pending = False
        #: called whenever one of the two becomes true
        self.on_output: Callable[[], None] = _nobody
        self.pic = PicPair(self._pic_changed)
        self.elcr = Elcr(self.pic)
        self.lapic = LocalApic(timers, read_tsc, tsc_to_ns, self._end_of_interrupt, self._nmi)
        self.lapic.changed = self._refresh
        self.ioapic = IoApic(self.lapic.deliver)

    def isa_line(self, irq: int) -> Callable[[bool], None]:
        """The level setter of ISA interrupt `irq`; 16 to 23 exist at the I/O APIC only, 2 nowhere."""
        if not 0 <= irq < PINS or irq == CASCADE:
            raise ValueError(f"no interrupt line {irq}")
        to_pic, to_ioapic = self.pic.set_line, self.ioapic.set_line
        if irq >= ISA_INTERRUPTS:
            return lambda level: to_ioapic(irq, level)
        pin = TIMER_PIN if irq == 0 else irq

        def drive(level: bool) -> None:
            to_pic(irq, level)
            to_ioapic(pin, level)

        return drive

    def acknowledge(self) -> int | None:
        """The processor takes the interrupt: its vector, or None if there is none (any more)."""
        if self.lapic.ready:
            return self.lapic.acknowledge()
        if self.pic.master.output and self.lapic.accepts_extint:
            return self.pic.acknowledge()
        return None

    def save(self) -> dict[str, Any]:
        """The state as plain values."""
        return {"pic": self.pic.save(), "ioapic": self.ioapic.save(), "lapic": self.lapic.save(),
                "timer": self.lapic.timer.save(), "nmi_pending": self.nmi_pending}

    def load(self, state: Any) -> None:
        """Take over what `save` returned; StateError otherwise."""
        pic, ioapic, lapic, timer, nmi_pending = part(
            state, "InterruptSystem", ("pic", "ioapic", "lapic", "timer", "nmi_pending"))
        if type(nmi_pending) is not bool:
            raise StateError("InterruptSystem nmi_pending: not true or false")
        self.pic.load(pic)
        self.ioapic.load(ioapic)
        self.lapic.load(lapic)
        self.lapic.timer.load(timer)
        self.nmi_pending = nmi_pending
        self._refresh()

    def _pic_changed(self, level: bool) -> None:
        self.lapic.lint0(level)
        self._refresh()

    def _end_of_interrupt(self, vector: int) -> None:
        self.ioapic.end_of_interrupt(vector)

    def _nmi(self) -> None:
        self.nmi_pending = True
        self.on_output()

    def _refresh(self) -> None:
        lapic = self.lapic
        output = lapic.ready or (self.pic.master.output and lapic.accepts_extint)
        if output != self.output:
            self.output = output
            if output:
                self.on_output()
