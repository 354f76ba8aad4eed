# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's own memory on a CPU: page tables, the page of VM_HSAVE_PA, permission maps, a few stubs.

It lies above machine memory, private to the CPU; no guest's nested table ever leads there.
"""

from __future__ import annotations

import ctypes
import mmap
import struct

from unicorn import Uc, unicorn_const, x86_const

from vmm.consistency import state_errors
from vmm.silicon import layout as at
from vmm.vmcb import IOPM_BYTES, MSRPM_BYTES, SAVE, SaveArea
from vmm.x86.flags import RFLAGS_IF

PAGE = 4096
#: machine-physical address of the host's area, above any pool
HOST_AREA = 1 << 38
#: the window through which device pages are reached: its offset is the guest-physical address; it ends with
#: the 40 bits of physical address the silicon has
DEVICE_WINDOW = 1 << 39
DEVICE_WINDOW_BYTES = 1 << 39

_STUBS, _HSAVE, _PML4, _PDPT, _IOPM = (index * PAGE for index in range(5))
_MSRPM = _IOPM + IOPM_BYTES
_FX = _MSRPM + MSRPM_BYTES
_EMPTY = _FX + PAGE
_AREA_BYTES = _EMPTY + PAGE

_VMRUN = 0x00        # vmrun; hlt
_FXSAVE = 0x10       # fxsave64 [rdi]; hlt
_FXRSTOR = 0x20      # fxrstor64 [rdi]; hlt
_CODE = {_VMRUN: b"\x0f\x01\xd8\xf4", _FXSAVE: b"\x48\x0f\xae\x07\xf4", _FXRSTOR: b"\x48\x0f\xae\x0f\xf4"}

MSR_EFER, MSR_VM_HSAVE_PA = 0xC000_0080, 0xC001_0117
#: SCE LME LMA NXE SVME
_EFER = 0x1D01
_CR4 = 0x620         # PAE OSFXSR OSXMMEXCPT
_CR0 = 0x8000_0033   # PG NE ET MP PE

#: what `vmrun` saves of the host and then takes from the VMCB, as quadwords of the register file
_QUADS = ((at.ES, at.FS), (at.GDTR, at.IDTR + 3), (at.CR, at.CR + 1), (at.CR + 3, at.CR + 5),
          (at.EFER, at.EFER + 1), (at.RFLAGS, at.RFLAGS + 1), (at.CC_SRC, at.CC_SRC + 1), (4, 5))
#: and what the silicon derives from it, as doublewords: CC_OP DF HFLAGS HFLAGS2
_WORDS = (at.CC_OP, at.HFLAGS2 + 1)
#: the same as bytes
_OVERLAY = (*((8 * start, 8 * end) for start, end in _QUADS), (4 * _WORDS[0], 4 * _WORDS[1]))

#: MSRs the guest reads and writes without leaving: they live in the register file of the guest
PASSED_MSRS = (0x174, 0x175, 0x176, 0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084,
               0xC000_0100, 0xC000_0101, 0xC000_0102)


class HostArea:
    """The area of one CPU, mapped into its physical address space."""

    iopm_pa = HOST_AREA + _IOPM
    msrpm_pa = HOST_AREA + _MSRPM
    vmrun_stub = HOST_AREA + _STUBS + _VMRUN
    fxsave_stub = HOST_AREA + _STUBS + _FXSAVE
    fxrstor_stub = HOST_AREA + _STUBS + _FXRSTOR
    fx_pa = HOST_AREA + _FX
    #: a nested table that maps nothing
    empty_pa = HOST_AREA + _EMPTY

    def __init__(self, uc: Uc) -> None:
        self._map = mmap.mmap(-1, _AREA_BYTES)
        self.view = memoryview(self._map)
        for offset, code in _CODE.items():
            self.view[_STUBS + offset:_STUBS + offset + len(code)] = code
        struct.pack_into("<Q", self.view, _PML4, HOST_AREA + _PDPT | 7)
        for gib in range(512):
            struct.pack_into("<Q", self.view, _PDPT + 8 * gib, gib << 30 | 0x87)
        self.view[_IOPM:_IOPM + IOPM_BYTES] = b"\xff" * IOPM_BYTES
        self._permit_msrs()
        uc.mem_map_ptr(HOST_AREA, _AREA_BYTES, unicorn_const.UC_PROT_ALL,
                       ctypes.addressof(ctypes.c_char.from_buffer(self._map)))
        self._hsave = self.view[_HSAVE:_HSAVE + PAGE]
        self.fx = self.view[_FX:_FX + 512]

    def _permit_msrs(self) -> None:
        """All MSR accesses leave but those of PASSED_MSRS (two bits each, APM vol. 2, 15.11)."""
        self.view[_MSRPM:_MSRPM + MSRPM_BYTES] = b"\xff" * MSRPM_BYTES
        for msr in PASSED_MSRS:
            bit = (msr if msr < 0x2000 else msr - 0xC000_0000 + 0x2000) * 2
            self.view[_MSRPM + bit // 8] &= ~(3 << bit % 8) & 0xFF

    def enter(self, uc: Uc) -> None:
        """Put the fresh CPU into the host's context: long mode, identity mapped, SVM on, IF set."""
        uc.reg_write(x86_const.UC_X86_REG_CR3, HOST_AREA + _PML4)
        uc.reg_write(x86_const.UC_X86_REG_CR4, _CR4)
        uc.msr_write(MSR_EFER, _EFER)
        uc.reg_write(x86_const.UC_X86_REG_CR0, _CR0)
        uc.msr_write(MSR_VM_HSAVE_PA, HOST_AREA + _HSAVE)
        # under V_INTR_MASKING, the host's IF lets physical interrupts end a guest's run (APM vol. 2, 15.21.1)
        uc.reg_write(x86_const.UC_X86_REG_RFLAGS, RFLAGS_IF)
        uc.reg_write(x86_const.UC_X86_REG_RIP, self.vmrun_stub)

    def keep(self, image: memoryview) -> None:
        """Note the host's registers, to be laid over a guest's before `vmrun`."""
        self._runs = tuple((slice(start, end), bytes(image[start:end])) for start, end in _OVERLAY)

    def overlay_host(self, image: memoryview) -> None:
        """Put the host's registers over those that `vmrun` will load from the VMCB."""
        for run, value in self._runs:
            image[run] = value

    def host_save(self) -> bytes:
        """The host state `vmrun` saved, but for RAX and CR2, as bytes to compare."""
        return bytes(self._hsave[SAVE:SAVE + 0x1F8])

    def host_errors(self) -> list[str]:
        """What makes the saved host state impossible to go back to; empty when nothing does."""
        return state_errors(SaveArea(self._hsave))
