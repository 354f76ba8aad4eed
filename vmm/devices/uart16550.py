# SPDX-License-Identifier: GPL-2.0-or-later
"""The 16550A serial port (National Semiconductor PC16550D data sheet).

Transmission takes no time: the transmitter is always empty.  Received bytes wait in the 16-byte FIFO, and
behind it in a backlog the host fills.  Interrupts are not gated by OUT2, as on other virtual machines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from vmm.devices.bus import BYTES
from vmm.devices.saved import BYTE, FLAG, QWORD, Kinds, Saved, bits, octets, one_of

# registers; DLL and DLM stand at 0 and 1 while LCR has DLAB set
DATA, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCRATCH = range(8)

IER_RECEIVE, IER_TRANSMIT, IER_LINE, IER_MODEM = 1, 2, 4, 8
IIR_NONE, IIR_LINE, IIR_RECEIVE, IIR_TIMEOUT, IIR_TRANSMIT, IIR_MODEM = 1, 6, 4, 12, 2, 0
FIFOS_ON = 0xC0
DLAB = 0x80
LOOPBACK = 0x10
LSR_READY, LSR_OVERRUN, LSR_IDLE = 0x01, 0x02, 0x60
#: error bits, cleared by reading the LSR
LSR_ERRORS = 0x1E
#: clear to send, data set ready, carrier detect: somebody is always listening
MODEM_CONNECTED = 0xB0

FIFO_SIZE = 16
#: FCR bits 6-7 -> received bytes that raise the interrupt
TRIGGERS = (1, 4, 8, 14)

#: host input kept for a guest that does not read it; more is dropped
MOST_BACKLOG = 1 << 16
#: output goes to the sink at least every so many bytes
CHUNK = 256
NEWLINE = 0x0A


class Uart16550(Saved):
    """A serial port.

    # Invariant: `lsr` bit 0 says whether `fifo` has a byte; the backlog is empty unless the FIFO is full
    # or the port is in loopback.
    """

    sizes = BYTES
    __slots__ = ("_irq", "_pending", "_sink", "backlog", "divisor_high", "divisor_low", "dropped",
                 "empty_event", "fcr", "fifo", "ier", "iir", "lcr", "lsr", "mcr", "msr", "scratch", "trigger")

    SAVED: ClassVar[Kinds] = {
        "ier": bits(0x0F),
        "iir": one_of(IIR_NONE, IIR_LINE, IIR_RECEIVE, IIR_TIMEOUT, IIR_TRANSMIT, IIR_MODEM),
        "fcr": bits(0xC9), "lcr": BYTE, "mcr": bits(0x1F), "lsr": bits(LSR_IDLE | LSR_OVERRUN | LSR_READY),
        "msr": BYTE, "scratch": BYTE, "divisor_low": BYTE, "divisor_high": BYTE, "empty_event": FLAG,
        "fifo": octets(FIFO_SIZE), "backlog": octets(MOST_BACKLOG), "dropped": QWORD,
    }

    def __init__(self, irq: Callable[[bool], None], sink: Callable[[bytes], None]) -> None:
        self._irq = irq
        self._sink = sink
        #: output not yet given to the sink
        self._pending = bytearray()
        self.ier = self.fcr = self.lcr = self.mcr = self.scratch = 0
        self.divisor_low, self.divisor_high = 12, 0
        self.lsr = LSR_IDLE
        self.msr = MODEM_CONNECTED
        self.iir = IIR_NONE
        #: the transmitter became empty and the guest has not been told
        self.empty_event = False
        self.trigger = 1
        self.fifo = bytearray()
        self.backlog = bytearray()
        #: input bytes refused for want of room
        self.dropped = 0

    # the host's side

    def feed(self, data: bytes) -> None:
        """Input for the guest; what exceeds the backlog is dropped and counted."""
        room = MOST_BACKLOG - len(self.backlog)
        self.backlog += data[:room]
        self.dropped += max(0, len(data) - room)
        self._receive()

    def flush(self) -> None:
        """Give the sink what the guest has written so far."""
        if self._pending:
            data = bytes(self._pending)
            self._pending.clear()
            self._sink(data)

    # the guest's side

    def read(self, offset: int, size: int) -> int:
        """A register; reading has side effects on DATA, IIR, LSR and MSR."""
        # the order is that of use: a kernel's console polls the LSR before every byte
        if offset == LSR:
            lsr = self.lsr
            if lsr & LSR_ERRORS:
                self.lsr = lsr & ~LSR_ERRORS
                self._update()
            return lsr
        if offset == DATA:
            return self.divisor_low if self.lcr & DLAB else self._take()
        if offset == IIR_FCR:
            iir = self.iir
            if iir == IIR_TRANSMIT:
                self.empty_event = False
                self._update()
            return iir | FIFOS_ON if self.fcr & 1 else iir
        if offset == IER:
            return self.divisor_high if self.lcr & DLAB else self.ier
        if offset == MSR:
            msr = self.msr
            if msr & 0x0F:
                self.msr = msr & 0xF0
                self._update()
            return msr
        if offset == LCR:
            return self.lcr
        return self.mcr if offset == MCR else self.scratch

    def write(self, offset: int, size: int, value: int) -> None:
        """A register."""
        if offset == DATA:
            if self.lcr & DLAB:
                self.divisor_low = value
            else:
                self._transmit(value)
        elif offset == IER:
            if self.lcr & DLAB:
                self.divisor_high = value
            else:
                # enabling the interrupt of an empty transmitter raises it
                if value & IER_TRANSMIT and not self.ier & IER_TRANSMIT:
                    self.empty_event = True
                self.ier = value & 0x0F
                self._update()
        elif offset == IIR_FCR:
            self._control_fifos(value)
        elif offset == LCR:
            self.lcr = value
        elif offset == MCR:
            self._control_modem(value & 0x1F)
        elif offset == SCRATCH:
            self.scratch = value

    def _transmit(self, value: int) -> None:
        if self.mcr & LOOPBACK:
            self._loop_back(value)
        else:
            pending = self._pending
            pending.append(value)
            if value == NEWLINE or len(pending) >= CHUNK:
                self.flush()
        if self.ier & IER_TRANSMIT:
            # The byte fills the transmitter, which takes the interrupt back, and leaves it at once, which
            # raises it anew: an edge, whether or not the guest had asked what the first one was about.
            if self.iir == IIR_TRANSMIT:
                self._irq(False)
                self._irq(True)
            elif not self.empty_event:
                self.empty_event = True
                self._update()

    def _loop_back(self, value: int) -> None:
        if len(self.fifo) < (FIFO_SIZE if self.fcr & 1 else 1):
            self.fifo.append(value)
            self.lsr |= LSR_READY
        else:
            self.lsr |= LSR_OVERRUN
        self._update()

    def _take(self) -> int:
        if not self.fifo:
            return 0
        value = self.fifo.pop(0)
        if not self.fifo:
            # The line falls until the next byte comes in, which makes an edge even if that one waits already:
            # a handler may take one byte per interrupt.
            self._update()
        self._receive()
        return value

    def _receive(self) -> None:
        """Move what fits from the backlog to the FIFO.  The modem's line is cut off in loopback."""
        if self.backlog and not self.mcr & LOOPBACK:
            room = (FIFO_SIZE if self.fcr & 1 else 1) - len(self.fifo)
            if room > 0:
                self.fifo += self.backlog[:room]
                del self.backlog[:room]
        self.lsr = self.lsr | LSR_READY if self.fifo else self.lsr & ~LSR_READY
        self._update()

    def _control_fifos(self, value: int) -> None:
        # changing bit 0 clears both FIFOs, as does bit 1 the receiver's
        if (value ^ self.fcr) & 1 or value & 2:
            self.fifo.clear()
        self.fcr = value & 0xC9 if value & 1 else 0
        self.trigger = TRIGGERS[self.fcr >> 6]
        self._receive()

    def _control_modem(self, value: int) -> None:
        self.mcr = value
        if value & LOOPBACK:
            # DTR, RTS, OUT1, OUT2 come back as DSR, CTS, RI, DCD
            lines = (value & 1) << 5 | (value & 2) << 3 | (value & 4) << 4 | (value & 8) << 4
        else:
            lines = MODEM_CONNECTED
        changed = (lines ^ self.msr) >> 4
        # RI tells its end only
        changed &= ~4 | self.msr >> 4 & 4
        self.msr = lines | self.msr & 0x0F | changed
        self._receive()

    def _update(self) -> None:
        """Find the highest interrupt (data sheet, table II) and drive the line."""
        ier = self.ier
        if ier & IER_LINE and self.lsr & LSR_ERRORS:
            iir = IIR_LINE
        elif ier & IER_RECEIVE and self.fifo:
            iir = IIR_RECEIVE if len(self.fifo) >= self.trigger else IIR_TIMEOUT
        elif ier & IER_TRANSMIT and self.empty_event:
            iir = IIR_TRANSMIT
        elif ier & IER_MODEM and self.msr & 0x0F:
            iir = IIR_MODEM
        else:
            iir = IIR_NONE
        if iir != self.iir:
            was_quiet = self.iir == IIR_NONE
            self.iir = iir
            if was_quiet or iir == IIR_NONE:
                self._irq(iir != IIR_NONE)

    def restored(self) -> None:
        """Derive trigger level and data ready from what was loaded."""
        self.trigger = TRIGGERS[self.fcr >> 6]
        self.lsr = LSR_IDLE | self.lsr & LSR_OVERRUN | bool(self.fifo)
