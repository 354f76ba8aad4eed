# SPDX-License-Identifier: GPL-2.0-or-later
"""What a CPU runs: a guest with its monitor, and the ways in which running one can end in an exception."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from vmm.vmcb import Vmcb


class CpuShutdown(Exception):
    """The host state #VMEXIT would load is inconsistent; this CPU is lost (APM vol. 2, 15.6)."""


class EngineFault(Exception):
    """The silicon refused to go on with the guest (fetch from a device, and the like)."""


class InstructionAborted(Exception):
    """Raised by a port handler: the I/O instruction must fault instead of completing."""


class Monitor(Protocol):
    """What the CPU asks of the monitor of the running guest; registers are live during every call.

    `intercepted` returns whether the exit was completed in place.  `port_in` and `port_out` may raise
    InstructionAborted; then `aborted` is called with the registers back at the start of the instruction.
    """

    def intercepted(self, code: int) -> bool: ...
    def software_interrupt(self, vector: int) -> bool: ...
    def syscall(self) -> None: ...
    def sysenter(self) -> None: ...
    @property
    def port_in(self) -> Callable[[int, int], int]: ...
    @property
    def port_out(self) -> Callable[[int, int, int], None]: ...
    def mmio_read(self, gpa: int, size: int) -> int: ...
    def mmio_write(self, gpa: int, size: int, value: int) -> None: ...
    def aborted(self) -> bool: ...


class Guest:
    """What a CPU keeps of a guest that is not on it: its VMCB, and the registers outside the VMCB."""

    def __init__(self, vmcb_pa: int, page: memoryview, monitor: Monitor, image: bytes) -> None:
        self.vmcb_pa = vmcb_pa
        self.page = page
        self.vmcb = Vmcb(page)
        self.monitor = monitor
        self.image = bytearray(image)
