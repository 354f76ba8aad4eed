# SPDX-License-Identifier: GPL-2.0-or-later
"""The emulated processor in flat 32-bit code at CPL 0, for one instruction at a time."""

from __future__ import annotations

from unicorn import UC_ARCH_X86, UC_ERR_INSN_INVALID, UC_HOOK_INTR, UC_MODE_32, Uc, UcError
from unicorn.x86_const import (
    UC_CPU_X86_EPYC,
    UC_X86_REG_CR4,
    UC_X86_REG_EAX,
    UC_X86_REG_EBP,
    UC_X86_REG_EBX,
    UC_X86_REG_ECX,
    UC_X86_REG_EDI,
    UC_X86_REG_EDX,
    UC_X86_REG_EFLAGS,
    UC_X86_REG_ESI,
    UC_X86_REG_ESP,
)

from vmm.x86 import flags
from vmm.x86.faults import Vector

EIP = 0x1000
#: what every general register holds: an address of memory
ADDRESS = 0x100000
_REGISTERS = (UC_X86_REG_EAX, UC_X86_REG_ECX, UC_X86_REG_EDX, UC_X86_REG_EBX, UC_X86_REG_ESP, UC_X86_REG_EBP,
              UC_X86_REG_ESI, UC_X86_REG_EDI)


class Silicon:
    """`run` starts from the same state every time."""

    def __init__(self) -> None:
        self._uc = Uc(UC_ARCH_X86, UC_MODE_32)
        self._uc.ctl_set_cpu_model(UC_CPU_X86_EPYC)
        self._uc.mem_map(0, 2 * ADDRESS)
        self._uc.reg_write(UC_X86_REG_CR4, flags.CR4_OSFXSR | flags.CR4_OSXMMEXCPT)
        self._reset = self._uc.context_save()
        self._raised: list[int] = []
        self._uc.hook_add(UC_HOOK_INTR, self._exception)

    def _exception(self, uc: Uc, vector: int, data: object) -> None:
        self._raised.append(vector)
        uc.emu_stop()

    def run(self, code: bytes, eflags: int = flags.RFLAGS_ONE) -> int | None:
        """Execute the instruction; the vector it raises, -1 for an access outside memory."""
        self._raised.clear()
        self._uc.context_restore(self._reset)
        for register in _REGISTERS:
            self._uc.reg_write(register, ADDRESS)
        self._uc.reg_write(UC_X86_REG_EFLAGS, eflags)
        self._uc.mem_write(EIP, code)
        self._uc.ctl_remove_cache(EIP, EIP + 0x20)
        try:
            self._uc.emu_start(EIP, EIP + 0x800, count=1)
        except UcError as error:
            return int(Vector.UD) if error.errno == UC_ERR_INSN_INVALID else -1
        return self._raised[0] if self._raised else None

    @property
    def eflags(self) -> int:
        """EFLAGS after the instruction."""
        return int(self._uc.reg_read(UC_X86_REG_EFLAGS))
