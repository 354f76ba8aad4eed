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

Invariant: translated code never runs before the shadow has followed what the guest did to CR0, CR3, CR4 and
its TLB.
"""

from __future__ import annotations

from vmm.bt import events, listing
from vmm.bt.cache import Callout, Edge, Translation
from vmm.bt.callouts import CALLOUTS
from vmm.bt.engine import TranslationEngine
from vmm.bt.fpu import FpuState
from vmm.bt.linear import ShadowLinear
from vmm.bt.mode import Mode
from vmm.bt.modes import Modes
from vmm.bt.native.block import OFFSETS, R8, RIP
from vmm.bt.native.trampolines import FAULT, MISS, PREEMPTED
from vmm.bt.shadow import Device, Shadow
from vmm.bt.silicon import OnSilicon
from vmm.bt.simulate import Simulator
from vmm.bt.table import Kind, Unit
from vmm.bt.transfer import Transfer
from vmm.bt.unitfaults import MOST_STEPS, Left, UnitFaults
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
from vmm.x86.faults import GuestFault, Vector
from vmm.x86.flags import RFLAGS_IF

_FIELD_NAMES = {offset: name for name, offset in OFFSETS.items()}


class TranslatingProcessor(Processor):
    """One guest whose code is translated, on `cpu` for what is not."""

    def __init__(self, cpu: Cpu, block: VmBlock, frames: FrameSource, board: Board, clock: GuestClock,
                 state: CpuState, engine: TranslationEngine) -> None:
        super().__init__(cpu, block, frames, board, clock, state)
        self.counts, self.times = self._counts, self._times
        self.cache = engine.cache
        self.translated = engine.cpu
        self.state_block = engine.cpu.new_block()
        self._bq = self.state_block.q
        self.walker = Walker(self.q, self.memory)
        self.shadow = Shadow(self.q, self.walker, block.p2m, frames, engine.cache, engine.new_view,
                             lambda source: self.silicon.code_changed(source))
        self.linear: ShadowLinear = ShadowLinear(self.q, self.memory, self.shadow)
        self.delivery = Delivery(self.regs, self.linear)
        self.modes = Modes(self.regs)
        self.simulator = Simulator(self, self.shadow, engine.cache)
        self.fpu = FpuState(cpu, self.guest, self.state_block)
        self._control_registers = self._controls()
        self._closed = False
        self.transfer = Transfer(self.regs, self.modes, self.state_block)
        self.silicon = OnSilicon(self)
        self.faults = UnitFaults(self)

    # -- the loop ----------------------------------------------------------------------------------

    def enter_guest(self) -> int:
        """Let the guest run until it has to leave; its exit code."""
        if self.silicon.shadow_stale:
            # it left in an interlude: most probably that goes on, and needs no other way in than its own
            code = self.silicon.interlude()
            if code is not None:
                return code
        self.settle()
        self.translated.prepare()
        while True:
            if self.virtio.waiting:
                self.rose = True
                return int(ExitCode.INTR)
            mode = self.modes.now()
            if mode is None:
                code = self.silicon.interlude()
                if code is not None:
                    return code
                continue
            self._follow_controls()
            self.shadow.follow_p2m()
            if self.fpu.in_silicon:
                self.fpu.to_block()
                self.settle()
                continue
            if self.d[at.HFLAGS] & at.HF_INHIBIT_IRQ:
                code = self.silicon.step()
                if code is not None:
                    return code
                continue
            try:
                if self.q[at.RFLAGS] & RFLAGS_IF and self._interrupt_waits():
                    self.take_interrupt()
                    continue
                code = self._run_units(mode)
            except GuestFault as fault:
                if not self.give(fault):
                    return int(ExitCode.INTR)
                continue
            except (TripleFault, Unsupported, BadAddress, OutOfFrames) as failure:
                self.give_up(failure)
                return int(ExitCode.INTR)
            if code is not None:
                return code

    def settle(self) -> None:
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
        """The shadow follows control registers that were changed behind its back.  Raises OutOfFrames, and
        then it does not yet."""
        now, before = self._controls(), self._control_registers
        if self.silicon.shadow_stale:
            before = 0, 0, 0        # the silicon did what it did, and told nobody
        elif now == before:
            return
        if now[:2] != before[:2]:
            self.shadow.flush()
        else:
            self.shadow.set_cr3()
        self._control_registers = now
        self.silicon.shadow_stale = False

    def set_cr3(self, value: int) -> None:
        """MOV to CR3."""
        self.q[at.CR + 3] = value
        self._control_registers = self._controls()
        self.shadow.set_cr3()

    def _take_nmi(self) -> None:
        """Deliver an NMI at the boundary where the guest stands, unless that is behind STI or MOV SS."""
        self.settle()
        if self.d[at.HFLAGS] & at.HF_INHIBIT_IRQ:
            return
        try:
            self.take_nmi()
            self.halted = False
            self.evict()            # IRET is intercepted from the next entry on
        except (TripleFault, Unsupported, BadAddress) as failure:
            self.give_up(failure)

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
        self.transfer.to_block(view, self._interrupt_waits())
        eip = q[at.RIP]
        try:
            address = self.lookup(view, mode, eip).address
            while True:
                left = cpu.enter(block, address)
                if left >= 0:
                    what = cache.exits[left]
                    if what.__class__ is Edge:
                        self.counts[events.CHAIN] += 1
                        eip = what.eip
                        address = self._follow(what, mode).address
                        continue
                    assert isinstance(what, Callout)
                    eip = what.eip
                    code = self._callout(what)
                    if code is not None:
                        return code
                    if not self._stays(view, mode):
                        return int(ExitCode.INTR) if self.rose else None
                    self.transfer.to_block(view, self._interrupt_waits())
                    eip = q[at.RIP]
                    address = self.lookup(view, mode, eip).address
                    continue
                if left == FAULT:
                    fault = block.fault()
                    traces = self.shadow.traces.count
                    if fault.vector == Vector.PF and self.faults.hidden(view, mode, fault):
                        if self.shadow.traces.count != traces:
                            # a fault on the way is that instruction's
                            now = cache.eip_at(fault.rip)
                            assert now is not None
                            eip = now
                            self.faults.mind_own_page(view, mode, fault)
                        address = cache.resume_at(fault.rip)
                        continue
                    found = cache.at(fault.rip)
                    assert found is not None
                    eip = found.eip_at(fault.rip - found.address)
                    address = self.faults.resolve(view, mode, eip, fault)
                    if not found.alive:         # retranslated meanwhile
                        address = self.lookup(view, mode, eip).address
                elif left == MISS:
                    self.counts[events.MISS] += 1
                    eip = bq[R8]
                    unit = self.lookup(view, mode, eip)
                    view.table.set(eip, unit.address)
                    address = unit.address
                else:
                    assert left == PREEMPTED
                    return self._preempted(view, mode)
        except Left as left_with:
            return left_with.code
        except BaseException:
            self.transfer.to_registers(eip)
            raise
        finally:
            self.silicon.native_ran = True

    def _follow(self, edge: Edge, mode: Mode) -> Translation:
        """The unit a jump leads to.  Raises as `lookup` does."""
        try:
            return self.cache.follow(edge, lambda: self.shadow.beyond(mode.user, edge.eip >> PAGE_SHIFT))
        except Device:
            raise self._no_memory(edge.eip) from None

    @staticmethod
    def _no_memory(eip: int) -> Unsupported:
        return Unsupported(f"the guest cannot go on: it fetches code from {eip:#x}, where no memory is")

    def _stays(self, view: View, mode: Mode) -> bool:
        """After a callout: whether translated code goes on in this view and mode, and nothing else waits."""
        if (self.interrupts.nmi_pending and not self.nmi_masked) or self.virtio.waiting:
            self.rose = True
            return False
        return (self.modes.now() is mode and self.shadow.view(mode.user) is view and view.mode is mode
                and not self.d[at.HFLAGS] & at.HF_INHIBIT_IRQ and self.cpu.resident is self.guest
                and self._control_registers == self._controls() and not self.fpu.in_silicon
                and not (self.q[at.RFLAGS] & RFLAGS_IF and self._interrupt_waits()))

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
            raise self._no_memory(eip) from None
        unit.hits += 1
        return unit

    def _interrupt_waits(self) -> bool:
        return self.interrupts.output or self._accepted is not None

    def _callout(self, callout: Callout) -> int | None:
        """The monitor executes an instruction."""
        self.transfer.to_registers(callout.eip)
        if callout.simulated:
            if self.faults.simulate(callout):
                return None if self.verdict is None else int(ExitCode.NPF)
            return self.silicon.step(fpu=True)
        if callout.form.kind is Kind.UD:
            # never to be tried on the silicon, which LOCK of a register operand makes abort the process
            raise GuestFault(Vector.UD)
        handler = CALLOUTS.get(callout.form.entry.mnemonic)
        if handler is None:
            return self.silicon.step(callout.form.entry.unit is not Unit.INTEGER)
        return handler(self, callout)

    def _preempted(self, view: View, mode: Mode) -> int | None:
        """A kick came: the guest goes on to the end of its instruction."""
        block, cache = self.state_block, self.cache
        rip = self._bq[RIP]
        for _ in range(MOST_STEPS):
            eip = cache.boundary(rip)
            if eip is not None:
                unit = cache.at(rip)
                if unit is not None:
                    unit.hits += 1
                self.transfer.to_registers(eip)
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
            self.transfer.to_registers(eip)
            return int(ExitCode.INTR)
        raise AssertionError("an instruction without an end")

    def _shadow_of_sti(self, view: View, eip: int) -> None:
        """Behind STI one instruction runs before interrupts are taken."""
        page = view.code.get(eip - 1 >> PAGE_SHIFT)
        if page is not None and page.code[eip - 1 & 0xFFF] == 0xFB and self.q[at.RFLAGS] & RFLAGS_IF:
            self.d[at.HFLAGS] |= at.HF_INHIBIT_IRQ

    # -- what the CPU asks -------------------------------------------------------------------------

    def intercepted(self, code: int) -> bool:
        """An exit; one in a step ends the step."""
        if not self.silicon.ends_step(code):
            return super().intercepted(code)
        if code == ExitCode.EXCP_DB:
            self.q[self.place.dr + 6] = self.silicon.dr6
        else:
            super().intercepted(code)
        return False

    def aborted(self) -> bool:
        """An I/O instruction must fault; in a step, that ends the step."""
        ends = self.silicon.ends_step(ExitCode.IOIO)
        done = super().aborted()
        if ends:
            self.cpu.stop()
        return done

    def _output_rose(self) -> None:
        """An interrupt became ready: translated code looks for it between units."""
        if self.silicon.in_interlude or self.silicon.stepping:
            super()._output_rose()

    def _device_waits(self) -> None:
        """A device is to be served: translated code looks for that, too, between units."""
        if self.silicon.in_interlude:
            super()._device_waits()

    # -- state -------------------------------------------------------------------------------------

    def capture(self) -> CpuState:
        """The state, the guest being off the CPU afterwards."""
        if not self.fpu.in_silicon:
            self.fpu.to_silicon()
        return super().capture()

    def listing(self, address: int | None, most: int) -> str:
        """The units of the code that is executed, or those with `address` in them, as the paper lists them.

        At most `most` units, those entered most often.
        """
        units = {id(unit): unit for view in self.shadow.views() for page in view.executed()
                 for unit in page.all_units()}
        found = [unit for unit in units.values()
                 if address is None or unit.eip <= address < unit.eip + max(unit.guest_bytes, 1)]
        found = sorted(found, key=lambda unit: -unit.hits)[:most]
        found.sort(key=lambda unit: unit.address)
        return listing.render(map(self.cache.unit, found), fields=_FIELD_NAMES)

    def close(self) -> None:
        """The guest goes: its views and its block do, too."""
        if not self._closed:
            self._closed = True
            self.shadow.close()
            self.state_block.close()

