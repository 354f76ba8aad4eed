# SPDX-License-Identifier: GPL-2.0-or-later
"""The 8042 keyboard controller with no keyboard behind it, ports 0x60 and 0x64, and port 0x92.

It passes its self-test, answers for the absent keyboard as a real controller does (timeout, 0xFE) so that
probing ends at once, has no mouse port, and resets the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from vmm.devices.bus import BYTES
from vmm.devices.saved import BYTE, Kinds, Saved, bits

OUTPUT_FULL, SYSTEM, COMMAND, UNLOCKED, TIMEOUT = 0x01, 0x04, 0x08, 0x10, 0x40

READ_CONFIGURATION, WRITE_CONFIGURATION = 0x20, 0x60
TEST_MOUSE_PORT, SELF_TEST, TEST_KEYBOARD_PORT = 0xA9, 0xAA, 0xAB
DISABLE_KEYBOARD, ENABLE_KEYBOARD = 0xAD, 0xAE
READ_INPUT_PORT, READ_OUTPUT_PORT, WRITE_OUTPUT_PORT = 0xC0, 0xD0, 0xD1
WRITE_KEYBOARD_BUFFER, WRITE_MOUSE_BUFFER = 0xD2, 0xD3
#: 0xF0-0xFF pulse the output port's low bits that are 0; bit 0 is the processor's reset
PULSE = 0xF0

CONFIGURATION_INTERRUPT, KEYBOARD_DISABLED = 0x01, 0x10
OUTPUT_RESET, OUTPUT_A20 = 0x01, 0x02
#: no error; clock line stuck low (no mouse); self-test passed; keyboard unlocked; resend
PORT_GOOD, PORT_DEAD, SELF_TEST_PASSED, INPUT_PORT, RESEND = 0x00, 0x01, 0x55, 0x80, 0xFE

#: commands that answer with a constant
ANSWERS = {TEST_MOUSE_PORT: PORT_DEAD, SELF_TEST: SELF_TEST_PASSED, TEST_KEYBOARD_PORT: PORT_GOOD,
           READ_INPUT_PORT: INPUT_PORT}
#: commands whose parameter comes through port 0x60
WITH_PARAMETER = frozenset({
    WRITE_CONFIGURATION, WRITE_OUTPUT_PORT, WRITE_KEYBOARD_BUFFER, WRITE_MOUSE_BUFFER})


class I8042(Saved):
    """The controller; `DataPort` and `CommandPort` put it on the bus."""

    __slots__ = ("_irq1", "_reset", "command", "configuration", "data", "status")

    SAVED: ClassVar[Kinds] = {"status": BYTE, "data": BYTE, "configuration": BYTE, "command": BYTE}

    def __init__(self, irq1: Callable[[bool], None], reset: Callable[[], None]) -> None:
        self._irq1 = irq1
        self._reset = reset
        self.status = UNLOCKED | SYSTEM
        self.data = 0
        self.configuration = CONFIGURATION_INTERRUPT | SYSTEM
        #: the command that waits for its parameter; 0 = none
        self.command = 0

    def read_data(self) -> int:
        """Port 0x60: the output buffer."""
        self.status &= ~(OUTPUT_FULL | TIMEOUT)
        self._irq1(False)
        return self.data

    def read_status(self) -> int:
        """Port 0x64."""
        return self.status

    def write_data(self, value: int) -> None:
        """Port 0x60: a command's parameter, or a byte for the keyboard that is not there."""
        self.status &= ~COMMAND
        command, self.command = self.command, 0
        if command == WRITE_CONFIGURATION:
            self.configuration = value
        elif command == WRITE_OUTPUT_PORT:
            if not value & OUTPUT_RESET:
                self._reset()
        elif command:
            # as if the device had sent it; without a mouse port even the mouse's goes here
            self._answer(value)
        else:
            self._answer(RESEND, TIMEOUT)

    def write_command(self, value: int) -> None:
        """Port 0x64."""
        self.status |= COMMAND
        self.command = value if value in WITH_PARAMETER else 0
        if value in ANSWERS:
            self._answer(ANSWERS[value])
        elif value == READ_CONFIGURATION:
            self._answer(self.configuration)
        elif value == READ_OUTPUT_PORT:
            self._answer(OUTPUT_RESET | OUTPUT_A20)
        elif value in (DISABLE_KEYBOARD, ENABLE_KEYBOARD):
            self.configuration &= ~KEYBOARD_DISABLED
            self.configuration |= KEYBOARD_DISABLED if value == DISABLE_KEYBOARD else 0
        elif value >= PULSE and not value & OUTPUT_RESET:
            self._reset()

    def _answer(self, value: int, status: int = 0) -> None:
        self.data = value
        self.status = self.status & ~TIMEOUT | OUTPUT_FULL | status
        if self.configuration & CONFIGURATION_INTERRUPT:
            self._irq1(False)
            self._irq1(True)


class DataPort:
    """Port 0x60 of the controller."""

    sizes = BYTES

    def __init__(self, controller: I8042) -> None:
        self._controller = controller

    def read(self, offset: int, size: int) -> int:
        """The output buffer."""
        return self._controller.read_data()

    def write(self, offset: int, size: int, value: int) -> None:
        """A parameter or a byte for the keyboard."""
        self._controller.write_data(value)


class CommandPort:
    """Port 0x64 of the controller."""

    sizes = BYTES

    def __init__(self, controller: I8042) -> None:
        self._controller = controller

    def read(self, offset: int, size: int) -> int:
        """The status."""
        return self._controller.read_status()

    def write(self, offset: int, size: int, value: int) -> None:
        """A command."""
        self._controller.write_command(value)


class Port92(Saved):
    """System control port A: bit 0 resets the machine, bit 1 is the A20 gate, which gates nothing here."""

    sizes = BYTES
    __slots__ = ("_reset", "latch")

    SAVED: ClassVar[Kinds] = {"latch": bits(0xFE)}

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset
        self.latch = OUTPUT_A20

    def read(self, offset: int, size: int) -> int:
        """What was written."""
        return self.latch

    def write(self, offset: int, size: int, value: int) -> None:
        """Reset on bit 0."""
        self.latch = value & ~1
        if value & 1:
            self._reset()
