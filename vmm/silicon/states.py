# SPDX-License-Identifier: GPL-2.0-or-later
"""What guests of a CPU have in their registers, as values: loaded before they run, saved when they move.

The silicon gives and takes the FPU's registers by instructions alone, FXSAVE64 and FXRSTOR64 (APM vol. 5),
which stubs in the host's own memory execute; no guest is on the CPU meanwhile.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from vmm.consistency import state_errors
from vmm.silicon.guest import Guest
from vmm.state import CpuState, StateError
from vmm.vmcb import PAGE, SaveArea
from vmm.x86 import msr
from vmm.x86.flags import EFER_SVME, RFLAGS_VM

if TYPE_CHECKING:
    from vmm.silicon.cpu import Cpu

#: the parts of the FPU's state are not farther apart in the register file
_FPU_GAP = 256
#: what the VMCB holds of a state under the same names
_IN_VMCB = ("cs", "ss", "ds", "es", "fs", "gs", "ldtr", "tr", "gdtr", "idtr", "cr0", "cr2", "cr3", "cr4",
            "rflags", "rip")
_RDI, _RSP, _RAX = 7, 4, 0


def check(state: CpuState) -> None:
    """Raises StateError for what no guest of ours can have come to, and no `vmrun` would enter."""
    area = SaveArea(memoryview(bytearray(PAGE)))
    _fill(area, state)
    wrong = state_errors(area)
    if wrong:
        raise StateError(f"a CPU that cannot run: {wrong[0]}")
    for number, value in state.msrs.items():
        if number in msr.MSRS and value & ~msr.MSRS[number].writable:
            raise StateError(f"a CPU that cannot run: MSR {msr.MSRS[number].name} is {value:#x}")


def _fill(area: SaveArea, state: CpuState) -> None:
    """What a VMCB holds of a state."""
    for name in _IN_VMCB:
        setattr(area, name, getattr(state, name))
    area.efer = state.efer | EFER_SVME
    area.rsp, area.rax = state.gpr[_RSP], state.gpr[_RAX]
    area.dr6, area.dr7 = state.dr[6], state.dr[7]
    area.cpl = 3 if state.rflags & RFLAGS_VM else state.ss.attributes >> 5 & 3


class States:
    """Of the guests of `cpu`.  A guest that is loaded or saved leaves the CPU for it."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self._fpu: slice | None = None

    def load(self, guest: Guest, state: CpuState) -> None:
        """Make `guest`, which has not run yet, be in `state`: its VMCB and the registers outside it.

        Invariant, here and below: whatever happens, the registers are the host's again afterwards.
        """
        cpu = self._cpu
        cpu.evict()
        try:
            if state.fxsave:
                self._load_fx(state.fxsave)
            cpu.regs.load(state)
            guest.image[:] = cpu.regs.image
        finally:
            self._back_to_host()
        _fill(guest.vmcb, state)
        guest.vmcb.interrupt_shadow = 1 if state.interrupt_shadow else 0

    def save(self, guest: Guest) -> CpuState:
        """All registers of `guest`."""
        cpu = self._cpu
        cpu.evict()
        try:
            cpu.regs.image[:] = guest.image
            state = cpu.regs.to_state()
            # the hidden flag is the silicon's from the first `vmrun` on only
            state.interrupt_shadow = bool(guest.vmcb.interrupt_shadow)
            state.fxsave = self._save_fx()
        finally:
            self._back_to_host()
        return state

    def save_fpu(self, guest: Guest) -> bytes:
        """x87, MMX and SSE state of `guest` as FXSAVE64 stores it."""
        self._cpu.evict()
        try:
            self._cpu.regs.image[:] = guest.image
            return self._save_fx()
        finally:
            self._back_to_host()

    def load_fpu(self, guest: Guest, fxsave: bytes) -> None:
        """Give `guest` this x87, MMX and SSE state."""
        self._cpu.evict()
        where = self._fpu_range()
        try:
            self._load_fx(fxsave)
            guest.image[where] = self._cpu.regs.image[where]
        finally:
            self._back_to_host()

    def _save_fx(self) -> bytes:
        """What FXSAVE64 stores of the registers as they are."""
        area = self._cpu.area
        area.overlay_host(self._cpu.regs.image)
        self._run_stub(area.fxsave_stub)
        return bytes(area.fx)

    def _load_fx(self, fxsave: bytes) -> None:
        self._cpu.area.fx[:] = fxsave
        self._run_stub(self._cpu.area.fxrstor_stub)

    def _run_stub(self, address: int) -> None:
        """Run a stub of the host area on its scratch page, up to its HLT."""
        self._cpu.q[_RDI] = self._cpu.area.fx_pa
        self._cpu.run_host(address)

    def _back_to_host(self) -> None:
        self._cpu.regs.image[:] = self._cpu.host_image

    def _fpu_range(self) -> slice:
        """Where the register file has what FXRSTOR loads: found by loading two images that differ in all."""
        if self._fpu is None:
            images = []
            for byte in 0x00, 0xFF:
                self._load_fx(bytes([byte]) * 24 + bytes(8) + bytes([byte]) * 480)
                images.append(bytes(self._cpu.regs.image))
                self._back_to_host()
            different = [at for at, (one, other) in enumerate(zip(*images)) if one != other]
            # one stretch; what differs far behind it, if anything does, is derived, and not the FPU's
            last = next((at for at, following in pairwise(different) if following > at + _FPU_GAP),
                        different[-1])
            self._fpu = slice(different[0] & ~3, (last | 3) + 1)
        return self._fpu
