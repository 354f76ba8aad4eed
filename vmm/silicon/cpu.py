# SPDX-License-Identifier: GPL-2.0-or-later
"""One physical CPU: Unicorn's emulated AMD-V, with the parts of SVM it lacks.

The silicon has `vmrun`, nested paging and intercepts, on a real VMCB in machine memory.  It lacks the
second half of #VMEXIT and the consistency checks of `vmrun`: an intercept calls back with the guest's
registers live, and everything after that is done here (AMD64 APM vol. 2, 15.5 and 15.6; the paper, 4.4).

An intercept is first offered to the guest's monitor while the guest is still on the CPU.  If the monitor
completes it there, the guest goes on, and no world switch happened; else `vmrun` returns its exit code.
After an exit the guest stays resident, its state in the registers, until another guest is entered or
somebody needs its VMCB: `evict` then completes the #VMEXIT.  Re-entering a resident guest costs nothing.

Coherence, kept here so that callers need not think of it:

    stale TLB entries     `vmrun` flushes; `flush_tlb` after a nested entry of the resident guest changed
    stale translations    guest stores invalidate by themselves; memory written from outside (images, DMA,
                          frames that change hands) must be announced by `invalidate`
    isolation             guests change only through evict and vmrun, never by exchanging registers alone

Invariant: `resident` is None, or the registers, pending interrupt word and hidden flags on the silicon are
those of that guest and HF_GUEST is set.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

from unicorn import UC_ARCH_X86, UC_MODE_64, Uc, UcError, unicorn_const, x86_const
from unicorn.unicorn_py3.unicorn import uclib

from vmm.consistency import is_consistent
from vmm.exitcodes import ExitCode
from vmm.memory.pool import PAGE_SHIFT, Pool
from vmm.silicon import layout as at
from vmm.silicon.guest import CpuShutdown, EngineFault, Guest, InstructionAborted, Monitor
from vmm.silicon.hostarea import DEVICE_WINDOW, DEVICE_WINDOW_BYTES, HostArea
from vmm.silicon.kick import Kicker
from vmm.silicon.registers import Registers
from vmm.silicon.states import States
from vmm.x86.faults import Vector

_V = ctypes.c_void_p
_INTR_HOOK = ctypes.CFUNCTYPE(None, _V, ctypes.c_uint32, _V)
_IN_HOOK = ctypes.CFUNCTYPE(ctypes.c_uint32, _V, ctypes.c_uint32, ctypes.c_int, _V)
_OUT_HOOK = ctypes.CFUNCTYPE(None, _V, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint32, _V)
_PLAIN_HOOK = ctypes.CFUNCTYPE(None, _V, _V)
_MMIO_READ = ctypes.CFUNCTYPE(ctypes.c_uint64, _V, ctypes.c_uint64, ctypes.c_uint, _V)
_MMIO_WRITE = ctypes.CFUNCTYPE(None, _V, ctypes.c_uint64, ctypes.c_uint, ctypes.c_uint64, _V)

#: a guest that stays on the CPU has its TLB flushed at intervals that double from the first to the second
_TLB_FIRST_NS, _TLB_LONGEST_NS = 5_000_000, 1_000_000_000
#: an intercept arrives as an interrupt of this number plus its exit code
_EXIT_BASE = 0x100
VMEXIT_INVALID = ExitCode.INVALID & (1 << 64) - 1


def _ctl_write(kind: int, arguments: int) -> int:
    """A control word of uc_ctl that passes `arguments` values."""
    return kind | arguments << 26 | unicorn_const.UC_CTL_IO_WRITE << 30


_TLB_FLUSH = _ctl_write(unicorn_const.UC_CTL_TLB_FLUSH, 0)
_TB_REMOVE = _ctl_write(unicorn_const.UC_CTL_TB_REMOVE_CACHE, 2)
_TB_FLUSH = _ctl_write(unicorn_const.UC_CTL_TB_FLUSH, 0)


def new_engine() -> Uc:
    """An engine for a `Cpu`.

    Make it before a large pool is mapped: then its translated code lies close to its library.  Where the two
    are 2**37 bytes apart, jumps between them are predicted badly, and everything runs at half the speed.
    """
    uc = Uc(UC_ARCH_X86, UC_MODE_64)
    uc.ctl_set_cpu_model(x86_const.UC_CPU_X86_EPYC)
    # no "until" address: an unmapped one acts as a hidden page fault
    uc.ctl_exits_enabled(True)
    uc.reg_read(x86_const.UC_X86_REG_RIP)     # the first access reserves the translated code's memory
    return uc


class Cpu:
    """A CPU over the machine memory of `pool`.  Raises SiliconError where Unicorn is not the one we know."""

    def __init__(self, pool: Pool, engine_made_before: Uc | None = None) -> None:
        self.pool = pool
        self.uc = engine_made_before or new_engine()
        engine = self.uc._uch
        assert engine is not None
        self.handle: int = engine.value or 0
        place = at.find(self.uc, self.handle)
        ctypes.c_ubyte.from_address(place.no_exit_request).value = 1
        self.regs = Registers(place, self.handle)
        self.q, self.d = self.regs.q, self.regs.d
        self._interrupt_request = ctypes.c_uint32.from_address(place.interrupt_request)
        self.uc.mem_map_ptr(0, pool.size, unicorn_const.UC_PROT_ALL, pool.base)
        self.area = HostArea(self.uc)
        self.area.enter(self.uc)
        # the host takes no interrupts itself (APM vol. 2, 15.17); `vmrun` sets GIF
        self.d[at.HFLAGS2] &= ~at.HF2_GIF
        self._start = uclib["uc_emu_start"]
        self._start.argtypes = (_V, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t)
        self._stop = uclib["uc_emu_stop"]
        self._stop.argtypes = (_V,)
        self._ctl = uclib["uc_ctl"]
        self._cpu_object = place.cpu_object
        self._exit_block = uclib["cpu_exit"]
        self._exit_block.argtypes, self._exit_block.restype = (_V,), None
        self.kicker = Kicker(place.cpu_object, place.interrupt_request)
        # before the engine's memory goes, also at exit: no signal may reach a dead engine
        self._closed = weakref.finalize(self, self.kicker.close)
        self.area.keep(self.regs.image)
        self.host_image = bytes(self.regs.image)
        self._host_save = b""
        self.resident: Guest | None = None
        #: the registers of guests as values
        self.states = States(self)
        #: world switches into a guest, since the CPU was made
        self.switches = 0
        self._tlb_due = 0
        self._tlb_interval = _TLB_FIRST_NS
        self._exit = 0
        self._left = False
        self._failure: BaseException | None = None
        self._snapshot: bytes | None = None
        self._hooks = [self._hook(unicorn_const.UC_HOOK_INTR, _INTR_HOOK(self._on_interrupt))]
        for instruction, hook in ((x86_const.UC_X86_INS_SYSCALL, _PLAIN_HOOK(self._on_syscall)),
                                  (x86_const.UC_X86_INS_SYSENTER, _PLAIN_HOOK(self._on_sysenter)),
                                  (x86_const.UC_X86_INS_IN, _IN_HOOK(self._on_in)),
                                  (x86_const.UC_X86_INS_OUT, _OUT_HOOK(self._on_out))):
            self._hooks.append(self._hook(unicorn_const.UC_HOOK_INSN, hook, ctypes.c_int(instruction)))
        mmio = (_MMIO_READ(self._on_mmio_read), _MMIO_WRITE(self._on_mmio_write))
        self._hooks.extend(mmio)
        self._check(uclib["uc_mmio_map"](
            _V(self.handle), ctypes.c_uint64(DEVICE_WINDOW), ctypes.c_uint64(DEVICE_WINDOW_BYTES),
            mmio[0], None, mmio[1], None), "mapping the device window")

    def close(self) -> None:
        """Give up the timer; the engine goes with the object."""
        self.evict()
        self._closed()

    # -- engine calls ------------------------------------------------------------------------------

    def _check(self, error: int, what: str) -> None:
        if error:
            raise at.SiliconError(f"{what} failed: {UcError(error)}")

    def _hook(self, kind: int, callback: Any, *extra: Any) -> Any:
        cell = ctypes.c_size_t()
        add: Any = uclib["uc_hook_add"]     # variadic: a function object of its own, without argtypes
        self._check(add(_V(self.handle), ctypes.byref(cell), ctypes.c_int(kind), callback, None,
                        ctypes.c_uint64(1), ctypes.c_uint64(0), *extra), "a hook")
        return callback

    def run_host(self, address: int) -> None:
        """Run the host's own code there, up to its HLT.  No guest may be resident."""
        self._check(self._start(self.handle, address, 0, 0, 0), "code of the host area")

    def stop(self) -> None:
        """A physical interrupt: the guest leaves with ExitCode.INTR at the next boundary between blocks."""
        self._interrupt_request.value |= at.INTERRUPT_HARD
        self._exit_block(self._cpu_object)

    @property
    def stopping(self) -> bool:
        """Whether a stop is still to come."""
        return bool(self._interrupt_request.value & at.INTERRUPT_HARD)

    def forget_stop(self) -> None:
        """What a stop was for has been seen to; if it is still to come, it need not."""
        self._interrupt_request.value &= ~at.INTERRUPT_HARD
        if self.kicker.forget_other is not None:
            self.kicker.forget_other()

    def kick_on_readable(self, descriptor: int) -> None:
        """Make input on a socket stop the running guest."""
        self.kicker.on_readable(descriptor)

    def rest(self) -> None:
        """No guest will run for a while: no more timed stops."""
        self.kicker.rest()

    def flush_tlb(self) -> None:
        """Forget all address translations (about 1 us); the guest may be resident."""
        self._ctl(_V(self.handle), ctypes.c_int(_TLB_FLUSH))

    def size_tlb(self, now_ns: int) -> None:
        """Let the TLB grow to what the guest uses: the silicon resizes it only when it is flushed.

        World switches flush; a guest that has the CPU for itself would keep the smallest TLB for ever, and
        walk two sets of page tables at every miss.  To be called now and then; it flushes at ever longer
        intervals while a guest stays.
        """
        if now_ns >= self._tlb_due:
            self.flush_tlb()
            self._tlb_due = now_ns + self._tlb_interval
            self._tlb_interval = min(2 * self._tlb_interval, _TLB_LONGEST_NS)

    def invalidate(self, first: int, count: int) -> None:
        """Frames whose bytes were changed from outside the CPU: forget what was translated from them."""
        self.evict()
        start = first << PAGE_SHIFT
        self._check(self._ctl(_V(self.handle), ctypes.c_int(_TB_REMOVE), ctypes.c_uint64(start),
                              ctypes.c_uint64(start + (count << PAGE_SHIFT))), "dropping translations")

    def invalidate_all(self) -> None:
        """Any code may have changed: forget everything that was translated."""
        self.evict()
        self._check(self._ctl(_V(self.handle), ctypes.c_int(_TB_FLUSH)), "dropping translations")

    def new_guest(self, vmcb_pa: int, monitor: Monitor) -> Guest:
        """A guest for the VMCB at `vmcb_pa`, its other registers as after reset."""
        frame = vmcb_pa >> PAGE_SHIFT
        return Guest(vmcb_pa, self.pool.page(frame), monitor, self.host_image)

    # -- vmrun and #VMEXIT -------------------------------------------------------------------------

    def vmrun(self, guest: Guest) -> int:
        """Run `guest` until it leaves; returns the exit code, which is also in its VMCB.

        ExitCode.INTR stands for a kick (time, input).  VMEXIT_INVALID means the VMCB's state is illegal and
        the guest was not entered.  Raises CpuShutdown, EngineFault, and what a monitor's handler raised.
        """
        self._left = False
        if self.resident is guest:
            error = self._start(self.handle, self.q[at.RIP], 0, 0, 0)
        else:
            self.evict()
            if not is_consistent(guest.vmcb):
                guest.vmcb.exitcode = VMEXIT_INVALID
                return VMEXIT_INVALID
            error = self._enter(guest)
        if self._snapshot is not None:
            self._restart_aborted(guest)
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if error:
            raise EngineFault(f"{UcError(error)} at rip {self.q[at.RIP]:#x}")
        vmcb = guest.vmcb
        code = self._exit if self._left else int(ExitCode.INTR)
        vmcb.exitcode = code
        vmcb.exitinfo1 = self.d[self.regs.place.error_code] if self._left else 0
        return code

    def _enter(self, guest: Guest) -> int:
        """The first half: the silicon saves the host to VM_HSAVE_PA, loads the guest, and runs it."""
        q, d, regs = self.q, self.d, self.regs
        regs.image[:] = guest.image
        self.area.overlay_host(regs.image)
        q[0] = guest.vmcb_pa
        q[at.RIP] = self.area.vmrun_stub
        d[regs.place.is_int] = 0
        if guest.vmcb.interrupt_shadow:
            d[at.HFLAGS] |= at.HF_INHIBIT_IRQ       # `vmrun` leaves it alone
        self.resident = guest
        self._monitor = monitor = guest.monitor
        self._port_in, self._port_out = monitor.port_in, monitor.port_out
        self.switches += 1
        self._tlb_interval = _TLB_FIRST_NS
        error = self._start(self.handle, q[at.RIP], 0, 0, 0)
        # a stop can land before `vmrun` itself: the host's state must not be taken for the guest's
        while not error and not d[at.HFLAGS] & at.HF_GUEST:
            error = self._start(self.handle, q[at.RIP], 0, 0, 0)
        return int(error)

    def evict(self) -> None:
        """Complete the resident guest's #VMEXIT: clear GIF, save the guest, load and check the host."""
        guest = self.resident
        if guest is None:
            return
        self.resident = None
        regs = self.regs
        pending = self._interrupt_request.value & at.INTERRUPT_VIRQ
        self._interrupt_request.value &= ~at.INTERRUPT_VIRQ
        regs.save_to(guest.page)
        vmcb = guest.vmcb
        vmcb.v_irq = 1 if pending else 0
        vmcb.interrupt_shadow = 1 if self.d[at.HFLAGS] & at.HF_INHIBIT_IRQ else 0
        vmcb.eventinj = vmcb.exitintinfo = 0      # events are delivered whole: no exit finds one half-way
        guest.image[:] = regs.image
        save = self.area.host_save()
        if save != self._host_save:
            errors = self.area.host_errors()
            if errors:
                raise CpuShutdown(f"inconsistent host state after #VMEXIT: {errors[0]}")
            self._host_save = save
        regs.image[:] = self.host_image      # GIF is clear in it

    def window(self, wanted: bool) -> None:
        """Ask for (or take back) ExitCode.VINTR at the first instruction that could be interrupted."""
        if wanted:
            self._interrupt_request.value |= at.INTERRUPT_VIRQ
        else:
            self._interrupt_request.value &= ~at.INTERRUPT_VIRQ

    # -- what the silicon calls --------------------------------------------------------------------

    _monitor: Monitor
    _port_in: Callable[[int, int], int]
    _port_out: Callable[[int, int, int], None]

    def _fail(self, failure: BaseException) -> None:
        self._failure = failure
        self._stop(self.handle)

    def _on_interrupt(self, _engine: int, number: int, _data: int) -> None:
        try:
            self.regs.settle_flags()
            if self._snapshot is not None:
                # An aborted I/O instruction: its block runs out unheard.  An interrupt that stayed pending
                # would come again and again before the stop is looked at; `vmrun` returns and asks anew.
                self._interrupt_request.value &= ~(at.INTERRUPT_HARD | at.INTERRUPT_VIRQ)
                self._stop(self.handle)
                return
            code = number - _EXIT_BASE
            if code == ExitCode.INTR:
                self.forget_stop()
                done = False
            elif code >= 0:
                if code == ExitCode.VINTR:
                    self._interrupt_request.value &= ~at.INTERRUPT_VIRQ
                done = self._monitor.intercepted(code)
            elif self.d[self.regs.place.is_int]:
                # `int n`: left set, later exits would overwrite RIP
                self.d[self.regs.place.is_int] = 0
                done = self._monitor.software_interrupt(number)
                code = ExitCode.SWINT
            elif number == Vector.NMI:
                # the silicon injects interrupts alone by itself
                done, code = self._monitor.intercepted(ExitCode.EXCP_NMI), ExitCode.EXCP_NMI
            else:
                return      # the echo of an injected interrupt: already delivered
            if not done:
                self._exit = code
                self._left = True
                self._stop(self.handle)
        except BaseException as failure:
            self._fail(failure)

    def _on_in(self, _engine: int, port: int, size: int, _data: int) -> int:
        try:
            if self._snapshot is None:
                return self._port_in(port, size)
        except InstructionAborted:
            self._abort()
        except BaseException as failure:
            self._fail(failure)
        return 0

    def _on_out(self, _engine: int, port: int, size: int, value: int, _data: int) -> None:
        try:
            if self._snapshot is None:
                self._port_out(port, size, value)
        except InstructionAborted:
            self._abort()
        except BaseException as failure:
            self._fail(failure)

    def _abort(self) -> None:
        """Remember the registers as they are at the start of this instruction; the block's rest is undone.

        The silicon offers no way to leave a block from a port callback, so the few instructions that
        follow in the same block still run, but under an empty nested table, and deaf to ports: the first
        that touches memory ends the block, and what the others did to registers is thrown away.
        """
        self._snapshot = bytes(self.regs.image)
        self.q[self.regs.place.nested_cr3] = self.area.empty_pa
        self.flush_tlb()
        self._stop(self.handle)

    def _restart_aborted(self, guest: Guest) -> None:
        snapshot, self._snapshot = self._snapshot, None
        self.regs.image[:] = snapshot or b""
        self.flush_tlb()
        if not guest.monitor.aborted():
            self._exit, self._left = int(ExitCode.IOIO), True

    def _on_syscall(self, _engine: int, _data: int) -> None:
        try:
            if self._snapshot is None:
                self.regs.settle_flags()
                self._monitor.syscall()
        except BaseException as failure:
            self._fail(failure)

    def _on_sysenter(self, _engine: int, _data: int) -> None:
        try:
            if self._snapshot is None:
                self.regs.settle_flags()
                self._monitor.sysenter()
        except BaseException as failure:
            self._fail(failure)

    def _on_mmio_read(self, _engine: int, offset: int, size: int, _data: int) -> int:
        try:
            return self._monitor.mmio_read(offset, size)
        except BaseException as failure:
            self._fail(failure)
        return 0

    def _on_mmio_write(self, _engine: int, offset: int, size: int, value: int, _data: int) -> None:
        try:
            self._monitor.mmio_write(offset, size, value)
        except BaseException as failure:
            self._fail(failure)
