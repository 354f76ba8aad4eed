# SPDX-License-Identifier: GPL-2.0-or-later
"""The software monitor of one guest: translated code runs it, and the silicon what is not translated.

Most of what a monitor does is the same whatever executes the guest, and so is this class: devices, clocks,
delivery, exits as values come from `vmm.hw.processor`, whose guest state - the silicon's register file - is
the truth whenever no translated code runs.  `enter_guest` is what differs:

    translated      32-bit protected mode, flat code and stack, CPL 0 or 3: units on a TranslationCpu
    a callout       an instruction that is sensitive: by the table of `vmm.bt.callouts`, or one step on the
                    silicon, which is exact for everything
    an interlude    real mode, virtual-8086 mode, 16-bit and long mode: on the silicon, until the guest
                    comes back

Invariants: translated code never runs before the shadow has followed what the guest did to CR0, CR3, CR4 and
its TLB; the silicon never runs code that was written since it last translated it (`_clean`, and traces).
"""

from __future__ import annotations

import time

from vmm.bt import listing
from vmm.bt.cache import Callout, Edge, Translation
from vmm.bt.callouts import CALLOUTS
from vmm.bt.codepage import CodePage
from vmm.bt.decode import Instruction, Truncated, decode
from vmm.bt.engine import TranslationEngine
from vmm.bt.fpu import FpuState
from vmm.bt.linear import ShadowLinear
from vmm.bt.mode import Mode
from vmm.bt.modes import Modes
from vmm.bt.native.block import FLAGS, LIVE_FLAGS, OFFSETS, R8, RIP, Fault
from vmm.bt.native.trampolines import FAULT, MISS, PREEMPTED
from vmm.bt.shadow import Device, Shadow
from vmm.bt.simulate import Simulator
from vmm.bt.table import Unit
from vmm.bt.views import View
from vmm.bt.walk import Walker
from vmm.clock import GuestClock
from vmm.devices.board import Board
from vmm.exitcodes import ExitCode
from vmm.hw.delivery import Delivery, TripleFault, Unsupported
from vmm.hw.processor import Processor
from vmm.memory.block import VmBlock
from vmm.memory.errors import BadAddress, OutOfFrames
from vmm.memory.frames import FrameSource
from vmm.memory.pool import PAGE_SHIFT
from vmm.silicon import layout as at
from vmm.silicon.cpu import Cpu
from vmm.state import CpuState
from vmm.stats import slot_of
from vmm.x86.faults import GuestFault, Vector
from vmm.x86.flags import MASK32, RFLAGS_IF, RFLAGS_TF

_CC, _DF = 0x8D5, 0x400
_SYSTEM = MASK32 & ~(_CC | _DF | RFLAGS_IF | 0x10002)
_FETCHES_AHEAD = 15
# fields of the state block, as doublewords
_SYSTEM_FLAGS, _INTERRUPT_FLAG, _PENDING, _DIRECTION = 2, 3, 4, 31
_GPRS = slice(16, 24)
_FIELD_NAMES = {offset: name for name, offset in OFFSETS.items()}
#: a turn on the silicon before the mode is looked at again
_INTERLUDE_NS = 200_000
_EXCEPTIONS = range(ExitCode.EXCP_DE, ExitCode.EXCP_31 + 1)
#: what an instruction can do to its page before the store is looked at: host instructions of one of the guest
_MOST_STEPS = 256


class _Left(Exception):
    """Translated code was left for good; an exit code, or None to look again."""

    def __init__(self, code: int | None) -> None:
        super().__init__(code)
        self.code = code


class TranslatingProcessor(Processor):
    """One guest whose code is translated, on `cpu` for what is not."""

    def __init__(self, cpu: Cpu, block: VmBlock, frames: FrameSource, board: Board, clock: GuestClock,
                 state: CpuState, engine: TranslationEngine) -> None:
        super().__init__(cpu, block, frames, board, clock, state)
        self.engine = engine
        self.cache = engine.cache
        self.translated = engine.cpu
        self.state_block = engine.cpu.new_block()
        self._bq, self._bd = self.state_block.q, self.state_block.d
        self.walker = Walker(self.q, self.memory)
        self.shadow = Shadow(self.q, self.walker, block.p2m, frames, engine.cache, engine.new_view,
                             self._code_changed)
        self.linear: ShadowLinear = ShadowLinear(self.q, self.memory, self.shadow)
        self.delivery = Delivery(self.regs, self.linear)
        self.modes = Modes(self.regs)
        self.simulator = Simulator(self, self.shadow, engine.cache)
        self.fpu = FpuState(cpu, self.guest, self.state_block)
        self._control_registers = self._controls()
        #: guest-physical pages of code that the silicon knows as it is; each is traced
        self._clean: set[int] = set()
        self._native_ran = self._shadow_stale = False
        self._stepping = self._stepped = self._closed = False
        self._interlude = False

    # -- the loop ----------------------------------------------------------------------------------

    def enter_guest(self) -> int:
        """Let the guest run until it has to leave; its exit code."""
        if self._shadow_stale:
            # it left in an interlude: most probably that goes on, and needs no other way in than its own
            code = self.interlude()
            if code is not None:
                return code
        self._settle()
        self.translated.prepare()
        while True:
            mode = self.modes.now()
            if mode is None:
                code = self.interlude()
                if code is not None:
                    return code
                continue
            self._follow_controls()
            self.shadow.follow_p2m()
            if self.fpu.in_silicon:
                self.fpu.to_block()
                self._settle()
                continue
            if self.d[at.HFLAGS] & at.HF_INHIBIT_IRQ:
                code = self.step()
                if code is not None:
                    return code
                continue
            try:
                if (self.interrupts.output or self._accepted is not None) and self.q[at.RFLAGS] & RFLAGS_IF:
                    self.take_interrupt()
                    continue
                code = self._run_units(mode)
            except GuestFault as fault:
                if not self.give(fault):
                    return int(ExitCode.INTR)
                continue
            except (TripleFault, Unsupported, BadAddress, OutOfFrames) as failure:
                self._give_up(failure)
                return int(ExitCode.INTR)
            if code is not None:
                return code

    def _settle(self) -> None:
        """The guest's registers are on the silicon; nothing of it has run for that."""
        if self.cpu.resident is not self.guest:
            self.guest.vmcb.v_irq = 0
            self.cpu.stop()
            self.cpu.vmrun(self.guest)
            self.cpu.forget_stop()

    def _controls(self) -> tuple[int, int, int]:
        q = self.q
        return q[at.CR], q[at.CR + 4], q[at.CR + 3]

    def _follow_controls(self) -> None:
        """The shadow follows control registers that were changed behind its back."""
        now, before = self._controls(), self._control_registers
        if self._shadow_stale:
            self._shadow_stale = False
            before = 0, 0, 0        # the silicon did what it did, and told nobody
        elif now == before:
            return
        self._control_registers = now
        if now[:2] != before[:2]:
            self.shadow.flush()
        else:
            self.shadow.set_cr3()

    def set_cr3(self, value: int) -> None:
        """MOV to CR3."""
        self.q[at.CR + 3] = value
        self._control_registers = self._controls()
        self.shadow.set_cr3()

    def _take_nmi(self) -> None:
        """Deliver an NMI at the boundary where the guest stands, unless that is behind STI or MOV SS."""
        self._settle()
        if self.d[at.HFLAGS] & at.HF_INHIBIT_IRQ:
            return
        try:
            self.take_nmi()
            self.halted = False
            self.evict()            # IRET is intercepted from the next entry on
        except (TripleFault, Unsupported, BadAddress) as failure:
            self._give_up(failure)

    def nmi_served(self) -> None:
        """IRET: the next NMI may come."""
        self.nmi_masked = False
        self.vmcb_intercept(ExitCode.IRET, False)

    # -- translated code ---------------------------------------------------------------------------

    def _run_units(self, mode: Mode) -> int | None:
        """From the guest's EIP until the monitor has to look; an exit code, or None to go on."""
        bq, block, cache, cpu, q = self._bq, self.state_block, self.cache, self.translated, self.q
        view = self.shadow.view(mode.user)
        if view.mode is not mode:
            view.change_mode(mode)
        self._to_block(view)
        eip = q[at.RIP]
        try:
            address = self.lookup(view, mode, eip).address
            while True:
                left = cpu.enter(block, address)
                if left >= 0:
                    what = cache.exits[left]
                    if what.__class__ is Edge:
                        self._counts[_CHAIN] += 1
                        eip = what.eip
                        address = cache.follow(what, lambda: self.shadow.beyond(mode.user, eip >> 12)).address
                        continue
                    assert isinstance(what, Callout)
                    eip = what.eip
                    code = self._callout(what)
                    if code is not None:
                        return code
                    if not self._stays(view, mode):
                        return int(ExitCode.INTR) if self._rose else None
                    self._to_block(view)
                    eip = q[at.RIP]
                    address = self.lookup(view, mode, eip).address
                    continue
                if left == FAULT:
                    fault = block.fault()
                    traces = self.shadow.traces.count
                    if fault.vector == Vector.PF and self._hidden(view, mode, fault):
                        if self.shadow.traces.count != traces:
                            self._mind_own_page(view, mode, fault)
                        address = cache.resume_at(fault.rip)
                        continue
                    found = cache.at(fault.rip)
                    assert found is not None
                    eip = found.eip_at(fault.rip - found.address)
                    address = self._fault_of_unit(view, mode, eip, fault)
                    if not found.alive:         # retranslated meanwhile
                        address = self.lookup(view, mode, eip).address
                elif left == MISS:
                    self._counts[_MISS] += 1
                    eip = bq[R8]
                    unit = self.lookup(view, mode, eip)
                    view.table.set(eip, unit.address)
                    address = unit.address
                else:
                    assert left == PREEMPTED
                    return self._preempted(view, mode)
        except _Left as left_with:
            return left_with.code
        except BaseException:
            self._to_registers(eip)
            raise
        finally:
            self._native_ran = True

    def _stays(self, view: View, mode: Mode) -> bool:
        """After a callout: whether translated code goes on in the same view and mode, and nothing else waits."""
        if self.interrupts.nmi_pending and not self.nmi_masked:
            self._rose = True
            return False
        return (self.modes.now() is mode and self.shadow.view(mode.user) is view and view.mode is mode
                and not self.d[at.HFLAGS] & at.HF_INHIBIT_IRQ and self.cpu.resident is self.guest
                and self._control_registers == self._controls() and not self.fpu.in_silicon
                and not (self.q[at.RFLAGS] & RFLAGS_IF
                         and (self.interrupts.output or self._accepted is not None)))

    def lookup(self, view: View, mode: Mode, eip: int) -> Translation:
        """The unit at `eip`.  Raises GuestFault, OutOfFrames; GuestFault also where no memory is."""
        number = eip >> PAGE_SHIFT
        page = view.code.get(number)
        try:
            if page is None:
                page = self.shadow.code_page(mode, number)
            unit = page.units.get(eip & 0xFFF)
            if unit is None:
                unit = self.cache.get(page, eip, lambda: self.shadow.beyond(mode.user, number))
        except Device:
            raise Unsupported(f"the guest cannot go on: it fetches code from {eip:#x}, where no memory is") from None
        unit.hits += 1
        return unit

    def _to_block(self, view: View) -> None:
        """The guest's registers go to the state block."""
        q, d, bq, bd = self.q, self.d, self._bq, self._bd
        bq[_GPRS] = q[0:8]
        if d[at.CC_OP] == 1:
            flags = q[at.CC_SRC] & _CC | (_DF if d[at.DF] != 1 else 0)
        else:
            flags = self.regs.rflags() & LIVE_FLAGS
        bq[FLAGS] = flags
        rflags = q[at.RFLAGS]
        bd[_SYSTEM_FLAGS] = rflags & _SYSTEM
        bd[_INTERRUPT_FLAG] = rflags & RFLAGS_IF
        bd[_DIRECTION] = flags & _DF
        bd[_PENDING] = self.interrupts.output or self._accepted is not None
        self.modes.load_segments(bd)
        view.enter(bq)

    def _to_registers(self, eip: int) -> None:
        """The guest's registers come back, at a boundary between instructions."""
        q, d, bq, bd = self.q, self.d, self._bq, self._bd
        q[0:8] = bq[_GPRS]
        flags = bq[FLAGS]
        q[at.CC_SRC] = flags & _CC
        d[at.CC_OP] = 1
        d[at.DF] = MASK32 if flags & _DF else 1
        q[at.RFLAGS] = bd[_SYSTEM_FLAGS] | bd[_INTERRUPT_FLAG] | 2
        q[at.RIP] = eip

    def _callout(self, callout: Callout) -> int | None:
        """The monitor executes an instruction."""
        self._to_registers(callout.eip)
        if callout.simulated:
            if self._simulate(callout):
                return None if self.verdict is None else int(ExitCode.NPF)
            return self.step(fpu=True)
        handler = CALLOUTS.get(callout.form.entry.mnemonic)
        if handler is None:
            return self.step(callout.form.entry.unit is not Unit.INTEGER)
        return handler(self, callout)

    def _preempted(self, view: View, mode: Mode) -> int | None:
        """A kick came: the guest goes on to the end of its instruction."""
        block, cache = self.state_block, self.cache
        rip = self._bq[RIP]
        for _ in range(_MOST_STEPS):
            eip = cache.boundary(rip)
            if eip is not None:
                unit = cache.at(rip)
                if unit is not None:
                    unit.hits += 1
                self._to_registers(eip)
                self._shadow_of_sti(view, eip)
                return int(ExitCode.INTR)
            left = self.translated.step(block, rip)
            rip = self._bq[RIP]
            if left == PREEMPTED or (left == FAULT and block.fault().vector == Vector.DB):
                continue
            if left == MISS:
                eip = self._bq[R8]
            elif left >= 0:
                what = cache.exits[left]
                assert what is not None
                eip = what.eip
            else:       # it would have faulted anyway, and will again
                eip = cache.eip_at(rip)
                assert eip is not None
            self._to_registers(eip)
            return int(ExitCode.INTR)
        raise AssertionError("an instruction without an end")

    def _shadow_of_sti(self, view: View, eip: int) -> None:
        """Behind STI one instruction runs before interrupts are taken."""
        page = view.code.get(eip - 1 >> PAGE_SHIFT)
        if page is not None and page.code[eip - 1 & 0xFFF] == 0xFB and self.q[at.RFLAGS] & RFLAGS_IF:
            self.d[at.HFLAGS] |= at.HF_INHIBIT_IRQ

    # -- faults of translated code -----------------------------------------------------------------

    def _hidden(self, view: View, mode: Mode, fault: Fault) -> bool:
        """Whether a page fault was one the guest does not see: a page the view did not have, now mapped."""
        address = fault.address - view.window.base
        if not 0 <= address <= MASK32 or address >> PAGE_SHIFT in view.window.pages:
            return False
        started = time.perf_counter_ns()
        try:
            self.shadow.fill(mode.user, address, bool(fault.error & 2))
        except (GuestFault, Device, OutOfFrames):
            return False        # comes again, where the guest's registers are known
        self._counts[_HIDDEN] += 1
        self._times[_HIDDEN] += time.perf_counter_ns() - started
        return True

    def _mind_own_page(self, view: View, mode: Mode, fault: Fault) -> None:
        """A store is about to change code.  If that of its own page, it must not go on to what was translated.

        Raises _Left when the instruction has been carried out for that reason.
        """
        unit = self.cache.at(fault.rip)
        assert unit is not None
        if view.code.get(unit.page.number) is unit.page:
            return
        eip = unit.eip_at(fault.rip - unit.address)
        if self.cache.resume_at(fault.rip) != fault.rip:
            # a string instruction, which cannot be entered in its middle: the silicon repeats it once
            self._to_registers(eip)
            raise _Left(self.step())
        self._finish_instruction(view, mode, eip)
        raise _Left(None)

    def _fault_of_unit(self, view: View, mode: Mode, eip: int, fault: Fault) -> int:
        """Where to go on in translated code.

        Raises GuestFault for a fault that is the guest's, _Left when the instruction has been carried out.
        """
        if fault.vector != Vector.PF:
            raise GuestFault(fault.vector, 0 if fault.vector == Vector.GP else None)
        address = fault.address - view.window.base
        if not 0 <= address <= MASK32:
            # over the end of the window: the silicon knows how such an access wraps
            self._to_registers(eip)
            raise _Left(self.step(fpu=True))
        write = bool(fault.error & 2)
        try:
            if write and address >> PAGE_SHIFT in view.window.pages:
                self._store_to_protected(view, mode, eip, address)
            traces = self.shadow.traces.count
            self.shadow.fill(mode.user, address, write)
            if self.shadow.traces.count != traces:
                self._mind_own_page(view, mode, fault)
        except Device:
            self._to_registers(eip)
            raise _Left(self._device_access(view, mode, eip)) from None
        return self.cache.resume_at(self._bq[RIP])

    def _store_to_protected(self, view: View, mode: Mode, eip: int, address: int) -> None:
        """A store to a write-protected page.  Raises _Left when it has been carried out here."""
        source = view.sources.get(address >> PAGE_SHIFT)
        if source is None or source not in self.p2m.traced:
            return
        # the guest's own page tables may forbid it
        self.walker.find(address, True, view.user)
        self._counts[_TRACE] += 1
        stands = self._bq[RIP]
        if (self.cache.resume_at(stands) == stands and self.shadow.traces.store_in_place(source)
                and self.shadow.open(view, address) is not None):
            try:
                self._finish_instruction(view, mode, eip)
            finally:
                self.shadow.shut(view, address)
            self.shadow.stored(source)
            self._trapped(view, eip)
            raise _Left(None)
        self._trapped(view, eip)

    def _finish_instruction(self, view: View, mode: Mode, eip: int) -> None:
        """One instruction of translated code, but for those on strings, to its end; registers follow."""
        block, cache = self.state_block, self.cache
        rip = self._bq[RIP]
        for _ in range(_MOST_STEPS):
            left = self.translated.step(block, rip)
            rip = self._bq[RIP]
            if left == PREEMPTED:
                self._rose = True       # whoever kicked will be seen to
                continue
            if left == FAULT and block.fault().vector == Vector.DB:
                now = cache.boundary(rip)
                if now is None:
                    continue
            elif left == MISS:
                now = self._bq[R8]
            elif left >= 0:
                what = cache.exits[left]
                assert what is not None
                now = what.eip
            else:
                # another page of it faults: from the start, once that is there
                now = eip
                fault = block.fault()
                if fault.vector != Vector.PF:
                    raise GuestFault(fault.vector, 0 if fault.vector == Vector.GP else None)
                self.shadow.fill(mode.user, fault.address - view.window.base & MASK32, bool(fault.error & 2))
            self._to_registers(now)
            return
        raise AssertionError("an instruction without an end")

    def _instruction(self, view: View, eip: int) -> tuple[CodePage, Instruction, bytes] | None:
        """The instruction at EIP, if all of it lies in a page of code."""
        page = view.code.get(eip >> PAGE_SHIFT)
        if page is None:
            return None
        code = page.code[eip & 0xFFF:(eip & 0xFFF) + 15]
        try:
            form = decode(code, 0, True)
        except Truncated:
            return None
        return page, form, code[:form.length]

    def _trapped(self, view: View, eip: int) -> None:
        """The instruction at EIP cost a trap; if it does so often, it is simulated from now on."""
        found = self._instruction(view, eip)
        if found is not None and self.simulator.trapped(found[0], eip & 0xFFF, found[1]):
            self._counts[_ADAPTED] += 1

    def _device_access(self, view: View, mode: Mode, eip: int) -> int | None:
        """An instruction meets a device's page: a move is carried out here, anything else on the silicon."""
        found = self._instruction(view, eip)
        if found is None:
            return self.step(fpu=True)
        page, form, code = found
        if self.simulator.trapped(page, eip & 0xFFF, form):
            self._counts[_ADAPTED] += 1
        self._counts[_SIMULATED] += 1
        if self.simulator.carry_out(form, code, view, mode.user) is None:
            return self.step(fpu=True)
        return None if self.verdict is None else int(ExitCode.NPF)

    def _simulate(self, callout: Callout) -> bool:
        """Carry out a move that kept trapping; False when it has become something else meanwhile."""
        user = self.regs.cpl == 3
        view = self.shadow.view(user)
        self._counts[_SIMULATED] += 1
        started = time.perf_counter_ns()
        useful = self.simulator.carry_out(callout.form, callout.code, view, user)
        self._times[_SIMULATED] += time.perf_counter_ns() - started
        if useful is None:
            return False
        page = view.code.get(callout.eip >> PAGE_SHIFT)
        if page is not None and self.simulator.settle(page, callout.eip & 0xFFF, useful):
            self._counts[_ADAPTED] += 1
        return True

    # -- the silicon -------------------------------------------------------------------------------

    def step(self, fpu: bool = False) -> int | None:
        """One instruction on the silicon; an exit code when the guest has to leave, else None."""
        self._counts[_SILICON] += 1
        started = time.perf_counter_ns()
        try:
            return self._step(fpu)
        finally:
            self._times[_SILICON] += time.perf_counter_ns() - started

    def _step(self, fpu: bool) -> int | None:
        if fpu and self.modes.fpu_usable:
            self.fpu.to_silicon()
            self._settle()
        code = self._clean_code()
        if code is not None:
            return code
        q, cpu = self.q, self.cpu
        cpu.window(False)
        cpu.flush_tlb()
        q[at.RFLAGS] |= RFLAGS_TF
        self._stepping, self._stepped = True, False
        try:
            while True:
                code = cpu.vmrun(self.guest)
                if self._stepped:
                    break
                if code == ExitCode.INTR and self.verdict is None and not self.halted:
                    if self._rose:
                        self._rose = False
                        continue
                    return int(ExitCode.INTR)
                return code
        finally:
            self._stepping = False
            if not self._stepped:
                q[at.RFLAGS] &= ~RFLAGS_TF
        return None if self.verdict is None and not self.halted else code

    def _clean_code(self) -> int | None:
        """The silicon translates the code at EIP from what it is now, not from what it was."""
        eip = self.q[at.RIP] + self.q[at.CS + 1]
        try:
            for address in {eip & MASK32, eip + _FETCHES_AHEAD & MASK32}:
                source = self.shadow.source_of_code(address, self.regs.cpl == 3)
                if source is not None and source not in self._clean:
                    self._clean.add(source)
                    frame = self.shadow.frame_number(source)
                    self.cpu.invalidate(frame, 1)
                    self._settle()
        except GuestFault:
            return None         # the silicon raises it again, if the instruction is there at all
        except OutOfFrames as failure:
            self._give_up(failure)
            return int(ExitCode.INTR)
        return None

    def _code_changed(self, source: int) -> None:
        """A traced guest-physical page is written."""
        self._clean.discard(source)

    def interlude(self) -> int | None:
        """An interlude: untranslated modes, until the guest has to leave or its code is translated again."""
        self._counts[_SILICON] += 1
        cpu = self.cpu
        if self.reenter:
            cpu.evict()             # the VMCB changed, and counts from the next entry on
            self.reenter = False
        self.fpu.to_silicon()
        if self._native_ran:
            self._native_ran = False
            cpu.invalidate_all()
            self._clean.clear()
        self._ask_window()
        cpu.flush_tlb()
        self._interlude = True
        try:
            while True:
                until = min(self._armed, time.monotonic_ns() + _INTERLUDE_NS)
                cpu.kicker.at(until)
                code = cpu.vmrun(self.guest)
                now = time.monotonic_ns()
                if (code != ExitCode.INTR or self.verdict is not None or self.halted or self.reenter
                        or now >= self._armed or now < until):
                    return code
                if self.modes.now() is not None:
                    return None
        finally:
            self._interlude = False
            self._shadow_stale = True
            cpu.kicker.at(self._armed)

    # -- what the CPU asks -------------------------------------------------------------------------

    def intercepted(self, code: int) -> bool:
        """An exit; one in a step ends the step."""
        if not self._stepping or code in (ExitCode.NPF, ExitCode.VINTR):
            return super().intercepted(code)
        self.q[at.RFLAGS] &= ~RFLAGS_TF
        self._stepped = True
        if code == ExitCode.EXCP_DB:
            self.q[self.place.dr + 6] &= ~(1 << 14)
            return False
        super().intercepted(code)
        return False

    def aborted(self) -> bool:
        """An I/O instruction must fault."""
        if self._stepping:
            self.q[at.RFLAGS] &= ~RFLAGS_TF
            self._stepped = True
        done = super().aborted()
        if self._stepping:
            self.cpu.stop()
        return done

    def _output_rose(self) -> None:
        """An interrupt became ready: translated code looks for it between units."""
        if self._interlude or self._stepping:
            super()._output_rose()

    # -- state -------------------------------------------------------------------------------------

    def capture(self) -> CpuState:
        """The state, the guest being off the CPU afterwards."""
        if not self.fpu.in_silicon:
            self.fpu.to_silicon()
        return super().capture()

    def listing(self, address: int | None, most: int) -> str:
        """The units of the code that is executed now, as the paper lists them; or those with `address` in them.

        At most `most` units, those entered most often.
        """
        units = {id(unit): unit for view in self.shadow.views() for page in view.executed()
                 for unit in page.all_units()}
        found = [unit for unit in units.values()
                 if address is None or unit.eip <= address < unit.eip + max(unit.guest_bytes, 1)]
        found = sorted(found, key=lambda unit: -unit.hits)[:most]
        return listing.render([self.cache.unit(unit) for unit in sorted(found, key=lambda unit: unit.address)],
                              fields=_FIELD_NAMES)

    def close(self) -> None:
        """The guest goes: its views and its block do, too."""
        if not self._closed:
            self._closed = True
            self.shadow.close()
            self.state_block.close()


_HIDDEN, _TRACE, _ADAPTED, _SIMULATED, _MISS, _CHAIN, _SILICON = (slot_of(code) for code in (
    ExitCode.BT_HIDDEN_FAULT, ExitCode.BT_TRACE, ExitCode.BT_ADAPTED, ExitCode.BT_SIMULATED,
    ExitCode.BT_MISS, ExitCode.BT_CHAIN, ExitCode.BT_SILICON))
