# SPDX-License-Identifier: GPL-2.0-or-later
"""The two cascaded 8259A interrupt controllers of a PC, and their edge/level registers.

Intel 8259A data sheet (order 231468); ELCR as in the 82371AB.  Priorities are a rotation: bit 0 of a mask
rotated right by `rotation` is the highest.  Special fully nested and buffered mode have no effect here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from vmm.devices.bus import BYTES
from vmm.devices.saved import BYTE, FLAG, Kinds, Saved, between, bits, part

#: interrupt inputs that are edge-triggered for ever: timer, keyboard, cascade; RTC, FPU (82371AB, 4.2.4)
ELCR_MASKS = (0xF8, 0xDE)

CASCADE = 2
#: Where a PC's chips pass edges from slave to master, levels are passed here: the same but for a request
#: that goes away in between, which then goes away at the master too.
CASCADE_LEVEL = 1 << CASCADE

# what the next write to the data port is
OPERATION, ICW2, ICW3, ICW4 = range(4)


class Pic(Saved):
    """One 8259A.

    # Invariant: `output` says whether an unmasked request stands above everything in service.
    """

    sizes = BYTES
    __slots__ = ("_changed", "auto_eoi", "elcr", "imr", "irr", "isr", "lines", "output", "poll", "read_isr",
                 "rotate_on_auto_eoi", "rotation", "single", "special_mask", "step", "vector_base",
                 "wants_icw4")

    SAVED: ClassVar[Kinds] = {
        "lines": BYTE, "irr": BYTE, "isr": BYTE, "imr": BYTE, "elcr": BYTE, "vector_base": bits(0xF8),
        "rotation": between(0, 7), "step": between(OPERATION, ICW4), "single": FLAG, "wants_icw4": FLAG,
        "auto_eoi": FLAG, "rotate_on_auto_eoi": FLAG, "special_mask": FLAG, "read_isr": FLAG, "poll": FLAG,
        "output": FLAG,
    }

    def __init__(self, vector_base: int, changed: Callable[[bool], None]) -> None:
        self._changed = changed
        self.output = False
        self.lines = self.irr = self.isr = self.elcr = 0
        # as a BIOS leaves it: initialized, everything masked
        self.imr = 0xFF
        self.vector_base = vector_base
        self.step = OPERATION
        self.single = self.wants_icw4 = False
        self._forget_modes()

    def _forget_modes(self) -> None:
        self.rotation = 0
        self.auto_eoi = self.rotate_on_auto_eoi = self.special_mask = False
        self.read_isr = self.poll = False

    def set_line(self, pin: int, level: bool) -> None:
        """Drive interrupt input `pin`."""
        bit = 1 << pin
        if level:
            # A rising edge is latched; a level input that is already high has its request bit set.
            if self.lines & bit:
                return
            self.lines |= bit
            self.irr |= bit
        else:
            if not self.lines & bit:
                return
            self.lines ^= bit
            if not self.elcr & bit:
                return
            self.irr &= ~bit
        self._update()

    def acknowledge(self) -> int:
        """The first INTA pulse: the input now in service, or 7 for a request that has gone (spurious)."""
        pin = self._request()
        if pin is None:
            self._update()
            return 7
        bit = 1 << pin
        if not self.elcr & bit:
            self.irr &= ~bit
        if not self.auto_eoi:
            self.isr |= bit
        elif self.rotate_on_auto_eoi:
            self.rotation = pin + 1 & 7
        self._update()
        return pin

    def read(self, offset: int, size: int) -> int:
        """Port 0: poll word, IRR or ISR; port 1: the mask."""
        if offset:
            return self.imr
        if self.poll:
            self.poll = False
            return 0x80 | self.acknowledge() if self._request() is not None else 0
        return self.isr if self.read_isr else self.irr

    def write(self, offset: int, size: int, value: int) -> None:
        """Port 0: ICW1, OCW2, OCW3; port 1: OCW1, or ICW2-4 during initialization."""
        if offset:
            if self.step == OPERATION:
                self.imr = value
            else:
                self._initialize_next(value)
        elif value & 0x10:
            self._initialize(value)
        elif value & 0x08:
            self._operation_word_3(value)
        else:
            self._operation_word_2(value)
        self._update()

    def set_elcr(self, value: int) -> None:
        """Choose level (1) or edge (0) triggering for each input."""
        self.elcr = value
        self.irr = self.irr & ~value | self.lines & value
        self._update()

    def _initialize(self, icw1: int) -> None:
        self.irr = self.lines & self.elcr
        self.isr = self.imr = 0
        self._forget_modes()
        self.single = bool(icw1 & 2)
        self.wants_icw4 = bool(icw1 & 1)
        self.step = ICW2

    def _initialize_next(self, value: int) -> None:
        if self.step == ICW2:
            self.vector_base = value & 0xF8
            following = ICW4 if self.single else ICW3
        elif self.step == ICW3:
            # which input or identity the cascade has is wired, not programmed
            following = ICW4
        else:
            self.auto_eoi = bool(value & 2)
            following = OPERATION
        self.step = OPERATION if following == ICW4 and not self.wants_icw4 else following

    def _operation_word_2(self, value: int) -> None:
        rotate, specific, end_of_interrupt = value & 0x80, value & 0x40, value & 0x20
        if not end_of_interrupt:
            if not specific:
                self.rotate_on_auto_eoi = bool(rotate)
            elif rotate:
                self.rotation = (value & 7) + 1 & 7
            return
        if specific:
            pin = value & 7
        else:
            rank = self._rank(self._served())
            if not rank:
                return
            pin = self._input(rank)
        self.isr &= ~(1 << pin)
        if rotate:
            self.rotation = pin + 1 & 7

    def _operation_word_3(self, value: int) -> None:
        if value & 0x40:
            self.special_mask = bool(value & 0x20)
        self.poll = bool(value & 4)
        if value & 2:
            self.read_isr = bool(value & 1)

    def _rank(self, mask: int) -> int:
        """The priority of the highest input in `mask`, 1 (highest) to 8; 0 if there is none."""
        turned = (mask << 8 | mask) >> self.rotation & 0xFF
        return (turned & -turned).bit_length()

    def _input(self, rank: int) -> int:
        return rank - 1 + self.rotation & 7

    def _served(self) -> int:
        """What is in service and counts: in special mask mode masked inputs do not (data sheet, p. 16)."""
        return self.isr & ~self.imr if self.special_mask else self.isr

    def _request(self) -> int | None:
        """The input to serve now: requested, unmasked, above all in service."""
        pending = self.irr & ~self.imr
        if not pending:
            return None
        rank = self._rank(pending)
        served = self._rank(self._served())
        return self._input(rank) if not served or rank < served else None

    def _update(self) -> None:
        # most often nothing is pending: a mask is written, or the request just served is ended
        output = self.irr & ~self.imr != 0 and self._request() is not None
        if output != self.output:
            self.output = output
            self._changed(output)


class PicPair:
    """Master and slave; the slave's INT is the master's input 2."""

    def __init__(self, changed: Callable[[bool], None]) -> None:
        self.master = Pic(0x08, changed)
        self.slave = Pic(0x70, self._cascade)
        self.master.elcr = CASCADE_LEVEL

    def _cascade(self, level: bool) -> None:
        self.master.set_line(CASCADE, level)

    def set_line(self, irq: int, level: bool) -> None:
        """Drive ISA interrupt 0-15 (2 is the cascade and not an input)."""
        if irq > 7:
            self.slave.set_line(irq - 8, level)
        elif irq != CASCADE:
            self.master.set_line(irq, level)

    def acknowledge(self) -> int:
        """An INTA cycle: the vector.  Vectors 7 and 15 of a request that has gone are the spurious ones."""
        pin = self.master.acknowledge()
        # a spurious 7 leaves no trace; a spurious 15 leaves the cascade in service, as documented
        if pin != CASCADE or self.master.single:
            return self.master.vector_base | pin
        return self.slave.vector_base | self.slave.acknowledge()

    def save(self) -> dict[str, Any]:
        """The state as plain values."""
        return {"master": self.master.save(), "slave": self.slave.save()}

    def load(self, state: Any) -> None:
        """Take over what `save` returned; StateError otherwise."""
        master, slave = part(state, "PicPair", ("master", "slave"))
        self.master.load(master)
        self.slave.load(slave)


class Elcr:
    """The edge/level control registers, ports 0x4d0 and 0x4d1."""

    sizes = BYTES

    def __init__(self, pair: PicPair) -> None:
        self._pics = (pair.master, pair.slave)

    def read(self, offset: int, size: int) -> int:
        """The register of the master (0) or the slave (1)."""
        return self._pics[offset].elcr & ELCR_MASKS[offset]

    def write(self, offset: int, size: int, value: int) -> None:
        """Set it; inputs that cannot be level-triggered stay edge-triggered."""
        value &= ELCR_MASKS[offset]
        self._pics[offset].set_elcr(value if offset else value | CASCADE_LEVEL)
