# SPDX-License-Identifier: GPL-2.0-or-later
"""Faults of translated code: hidden ones, true ones, stores to traced pages, and devices.

A hidden fault is the shadow's alone: the page is mapped, and the host instruction goes on.  A true one is the
guest's.  A store to a traced page sets the trace off and goes on, with two exceptions: a page of code that
holds data as well keeps its trace while the one store is carried out; and a store to the page it stands on is
carried out before anything that was translated from that page goes on.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vmm.bt import events
from vmm.bt.cache import Callout
from vmm.bt.codepage import CodePage
from vmm.bt.decode import Instruction, Truncated, decode
from vmm.bt.mode import Mode
from vmm.bt.native.block import R8, RIP, Fault
from vmm.bt.native.trampolines import FAULT, MISS, PREEMPTED
from vmm.bt.shadow import Device
from vmm.bt.views import View
from vmm.exitcodes import ExitCode
from vmm.memory.errors import OutOfFrames
from vmm.memory.pool import PAGE_SHIFT
from vmm.x86.faults import GuestFault, Vector
from vmm.x86.flags import MASK32

if TYPE_CHECKING:
    from vmm.bt.processor import TranslatingProcessor

#: host instructions that one instruction of the guest can take
MOST_STEPS = 256


class Left(Exception):
    """Translated code was left for good; an exit code, or None to look again."""

    def __init__(self, code: int | None) -> None:
        super().__init__(code)
        self.code = code


class UnitFaults:
    """The faults of the guest on `vcpu`."""

    def __init__(self, vcpu: TranslatingProcessor) -> None:
        self._vcpu = vcpu
        self._cpu, self._block, self._bq = vcpu.translated, vcpu.state_block, vcpu.state_block.q
        self._cache, self._shadow, self._walker = vcpu.cache, vcpu.shadow, vcpu.walker
        self._simulator = vcpu.simulator
        self._counts, self._times = vcpu.counts, vcpu.times

    def hidden(self, view: View, mode: Mode, fault: Fault) -> bool:
        """Whether a page fault was one the guest does not see: a page the view did not have, now mapped."""
        address = fault.address - view.window.base
        if not 0 <= address <= MASK32 or address >> PAGE_SHIFT in view.window.pages:
            return False
        started = time.perf_counter_ns()
        try:
            self._shadow.fill(mode.user, address, bool(fault.error & 2))
        except (GuestFault, Device, OutOfFrames):
            return False        # comes again, where the guest's registers are known
        self._counts[events.HIDDEN] += 1
        self._times[events.HIDDEN] += time.perf_counter_ns() - started
        return True

    def resolve(self, view: View, mode: Mode, eip: int, fault: Fault) -> int:
        """Where to go on in translated code.

        Raises GuestFault for a fault that is the guest's, Left when the instruction has been carried out.
        """
        if fault.vector != Vector.PF:
            raise GuestFault(fault.vector, 0 if fault.vector == Vector.GP else None)
        address = fault.address - view.window.base
        if not 0 <= address <= MASK32:
            # over the end of the window: the silicon knows how such an access wraps
            self._vcpu.transfer.to_registers(eip)
            raise Left(self._vcpu.silicon.step(fpu=True))
        write = bool(fault.error & 2)
        try:
            if write and address >> PAGE_SHIFT in view.window.pages:
                self._store_to_protected(view, mode, eip, address)
            traces = self._shadow.traces.count
            self._shadow.fill(mode.user, address, write)
            if self._shadow.traces.count != traces:
                self.mind_own_page(view, mode, fault)
        except Device:
            self._vcpu.transfer.to_registers(eip)
            raise Left(self._device_access(view, mode, eip)) from None
        return self._cache.resume_at(self._bq[RIP])

    def mind_own_page(self, view: View, mode: Mode, fault: Fault) -> None:
        """A store is about to change code.  If that of its own page, it must not go on to what is stale.

        Raises Left when the instruction has been carried out for that reason.
        """
        unit = self._cache.at(fault.rip)
        assert unit is not None
        if view.code.get(unit.page.number) is unit.page:
            return
        eip = unit.eip_at(fault.rip - unit.address)
        if self._cache.resume_at(fault.rip) != fault.rip:
            # a string instruction, which cannot be entered in its middle: the silicon repeats it once
            self._vcpu.transfer.to_registers(eip)
            raise Left(self._vcpu.silicon.step())
        self._finish_instruction(view, mode, eip)
        raise Left(None)

    def _store_to_protected(self, view: View, mode: Mode, eip: int, address: int) -> None:
        """A store to a write-protected page.  Raises Left when it has been carried out here."""
        source = view.sources.get(address >> PAGE_SHIFT)
        if source is None or source not in self._vcpu.p2m.traced:
            return
        # the guest's own page tables may forbid it
        self._walker.find(address, True, view.user)
        self._counts[events.TRACE] += 1
        stands = self._bq[RIP]
        if (self._cache.resume_at(stands) == stands and self._shadow.traces.store_in_place(source)
                and self._shadow.open(view, address) is not None):
            try:
                self._finish_instruction(view, mode, eip)
            finally:
                self._shadow.shut(view, address)
            self._shadow.stored(source)
            self._trapped(view, eip)
            raise Left(None)
        self._trapped(view, eip)

    def _finish_instruction(self, view: View, mode: Mode, eip: int) -> None:
        """One instruction of translated code, but for those on strings, to its end; registers follow."""
        block, cache = self._block, self._cache
        rip = self._bq[RIP]
        for _ in range(MOST_STEPS):
            left = self._cpu.step(block, rip)
            rip = self._bq[RIP]
            if left == PREEMPTED:
                self._vcpu.rose = True       # whoever kicked will be seen to
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
                address = fault.address - view.window.base & MASK32
                try:
                    self._shadow.fill(mode.user, address, bool(fault.error & 2))
                except Device:
                    self._vcpu.transfer.to_registers(eip)
                    raise Left(self._vcpu.silicon.step(fpu=True)) from None
            self._vcpu.transfer.to_registers(now)
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
        if found is not None and self._simulator.trapped(found[0], eip & 0xFFF, found[1]):
            self._counts[events.ADAPTED] += 1

    def _device_access(self, view: View, mode: Mode, eip: int) -> int | None:
        """An instruction meets a device's page: a move is carried out here, anything else on the silicon."""
        found = self._instruction(view, eip)
        if found is None:
            return self._vcpu.silicon.step(fpu=True)
        page, form, code = found
        if self._simulator.trapped(page, eip & 0xFFF, form):
            self._counts[events.ADAPTED] += 1
        self._counts[events.SIMULATED] += 1
        if self._simulator.carry_out(form, code, view, mode.user) is None:
            return self._vcpu.silicon.step(fpu=True)
        return None if self._vcpu.verdict is None else int(ExitCode.NPF)

    def simulate(self, callout: Callout) -> bool:
        """Carry out a move that kept trapping; False when it has become something else meanwhile."""
        user = self._vcpu.regs.cpl == 3
        view = self._shadow.view(user)
        self._counts[events.SIMULATED] += 1
        started = time.perf_counter_ns()
        useful = self._simulator.carry_out(callout.form, callout.code, view, user)
        self._times[events.SIMULATED] += time.perf_counter_ns() - started
        if useful is None:
            return False
        page = view.code.get(callout.eip >> PAGE_SHIFT)
        if page is not None and self._simulator.settle(page, callout.eip & 0xFFF, useful):
            self._counts[events.ADAPTED] += 1
        return True
