# SPDX-License-Identifier: GPL-2.0-or-later
"""Unicorn as a bare x86-64 processor at CPL 3, without a kernel above it.

Whatever would enter a kernel comes back to the caller instead: `syscall` ends the run, and an exception calls
`on_exception` with the registers live.  A kick is a physical interrupt, taken between two blocks of the
engine's own.  There being no interrupt table, it becomes a #GP of its own kind (`INTERRUPTED`).  Until then
it waits in the pending-interrupt word: one that comes while nothing runs meets the next run; none is lost.

Physical memory is what `provide` put there; virtual memory what the page tables under `root` say.  The
engine caches both sides: after a change of either, `flush_tlb` and `forget` are for the caller to call.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable

from unicorn import UcError, unicorn_const, x86_const
from unicorn.unicorn_py3.unicorn import uclib

from vmm.silicon import layout as at
from vmm.silicon.cpu import new_engine
from vmm.silicon.kick import Kicker
from vmm.silicon.registers import Registers
from vmm.x86.flags import RFLAGS_IF, RFLAGS_ONE

_V = ctypes.c_void_p
_EXCEPTION_HOOK = ctypes.CFUNCTYPE(None, _V, ctypes.c_uint32, _V)

MSR_EFER = 0xC000_0080
_EFER = 0xD01            # SCE LME LMA NXE
_CR4 = 0x620             # PAE OSFXSR OSXMMEXCPT
_CR0 = 0x8000_0033       # PG NE ET MP PE
_CODE, _DATA = 0xAFB, 0xCF3      # attributes of 64-bit code and of data, both of CPL 3
_CODE_SELECTOR, _DATA_SELECTOR = 0x33, 0x2B
_USER = 3
_LIMIT = 0xFFFF_FFFF

READ, WRITE, EXECUTE = unicorn_const.UC_PROT_READ, unicorn_const.UC_PROT_WRITE, unicorn_const.UC_PROT_EXEC
#: bit of the error code of #GP: an interrupt found no table.  Translated code has no other way to set it.
INTERRUPTED = 2
#: what `run` returns for an invalid instruction, the one exception that calls nobody
INVALID_INSTRUCTION = unicorn_const.UC_ERR_INSN_INVALID


def _ctl_write(kind: int, arguments: int) -> ctypes.c_int:
    """A control word of uc_ctl that passes `arguments` values."""
    return ctypes.c_int(kind | arguments << 26 | unicorn_const.UC_CTL_IO_WRITE << 30)


_TLB_FLUSH = _ctl_write(unicorn_const.UC_CTL_TLB_FLUSH, 0)
_TB_REMOVE = _ctl_write(unicorn_const.UC_CTL_TB_REMOVE_CACHE, 2)


class Engine:
    """A processor; `q` and `d` are its register file (vmm.silicon.layout).

    `on_exception` is called with the vector; it must not raise.  Raises SiliconError where Unicorn is not the
    one whose inside we know.
    """

    def __init__(self, on_exception: Callable[[int], None]) -> None:
        self._uc = new_engine()
        engine = self._uc._uch
        assert engine is not None
        self._handle: int = engine.value or 0
        self.place = at.find(self._uc, self._handle)
        ctypes.c_ubyte.from_address(self.place.no_exit_request).value = 1
        self.regs = Registers(self.place, self._handle)
        self.q, self.d = self.regs.q, self.regs.d
        self._start = uclib["uc_emu_start"]
        self._start.argtypes = (_V, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t)
        self._stop = uclib["uc_emu_stop"]
        self._stop.argtypes = (_V,)
        self._ctl = uclib["uc_ctl"]
        self._interrupt_request = ctypes.c_uint32.from_address(self.place.interrupt_request)
        self._exit_block = uclib["cpu_exit"]
        self._exit_block.argtypes, self._exit_block.restype = (_V,), None
        self.kicker = Kicker(self.place.cpu_object, self.place.interrupt_request)
        # before the engine's memory goes, also at exit: no signal may reach a dead engine
        self.close = weakref.finalize(self, self.kicker.close)
        self._hooks = (_EXCEPTION_HOOK(lambda engine, vector, data: on_exception(vector)),
                       ctypes.cast(self._stop, _V))
        self._hook(unicorn_const.UC_HOOK_INTR, self._hooks[0])
        # `syscall` calls the engine's own stop: no Python runs on the way out
        self._hook(unicorn_const.UC_HOOK_INSN, self._hooks[1], ctypes.c_int(x86_const.UC_X86_INS_SYSCALL))

    def _check(self, error: int, what: str) -> None:
        if error:
            raise at.SiliconError(f"{what} failed: {UcError(error)}")

    def _hook(self, kind: int, callback: object, *extra: object) -> None:
        cell = ctypes.c_size_t()
        add = uclib["uc_hook_add"]     # variadic: a function object of its own, without argtypes
        self._check(add(_V(self._handle), ctypes.byref(cell), ctypes.c_int(kind), callback, None,
                        ctypes.c_uint64(1), ctypes.c_uint64(0), *extra), "a hook")

    def go_to_user_mode(self, root: int) -> None:
        """Enter CPL 3 of long mode, under the page tables at physical `root`."""
        self._uc.reg_write(x86_const.UC_X86_REG_CR3, root)
        self._uc.reg_write(x86_const.UC_X86_REG_CR4, _CR4)
        self._uc.msr_write(MSR_EFER, _EFER)
        self._uc.reg_write(x86_const.UC_X86_REG_CR0, _CR0)
        regs = self.regs
        regs.load_segment(at.CS, _CODE_SELECTOR, _CODE, _LIMIT, 0)
        for index in (at.SS, at.DS, at.ES, at.FS, at.GS):
            regs.load_segment(index, _DATA_SELECTOR, _DATA, _LIMIT, 0)
        regs.set_rflags(RFLAGS_IF | RFLAGS_ONE)
        regs.refresh_hidden_flags(_USER)
        self.d[self.place.old_exception] = 0xFFFF_FFFF

    def provide(self, physical: int, length: int, address: int, access: int) -> None:
        """Put `length` bytes of this process's memory at a physical address; they stay for good."""
        self._uc.mem_map_ptr(physical, length, access, address)

    def run(self, address: int) -> int:
        """Run from `address` up to `syscall` or `stop`; Unicorn's error."""
        error: int = self._start(self._handle, address, 0, 0, 0)
        return error

    def stop(self) -> None:
        """End the run from within `on_exception`."""
        self._stop(self._handle)

    def forget_kick(self) -> None:
        """Take a kick back that is still to be heeded."""
        self._interrupt_request.value &= ~at.INTERRUPT_HARD

    def kick(self) -> None:
        """Interrupt the run; if none is under way, the next."""
        self._interrupt_request.value |= at.INTERRUPT_HARD
        self._exit_block(self.place.cpu_object)

    def flush_tlb(self) -> None:
        """Forget what the page tables said."""
        self._ctl(_V(self._handle), _TLB_FLUSH)

    def forget(self, start: int, end: int) -> None:
        """The code at these addresses, which are mapped, changed: forget what was translated from it."""
        self._check(self._ctl(_V(self._handle), _TB_REMOVE, ctypes.c_uint64(start), ctypes.c_uint64(end)),
                    "dropping translations")
