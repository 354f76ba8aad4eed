# SPDX-License-Identifier: GPL-2.0-or-later
"""What is not translated runs on the emulated silicon: single instructions, and whole interludes.

One instruction is run with the trap flag; an interlude, in modes whose code is not translated, lasts until
the guest has to leave or is back in a mode whose code is.

Invariant: the silicon never runs code that was written since it last translated it.  A page of code it steps
through is in `_clean`, and traced; before an interlude it forgets everything, if translated code ran since.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vmm.bt import events
from vmm.exitcodes import ExitCode
from vmm.memory.errors import OutOfFrames
from vmm.silicon import layout as at
from vmm.x86.faults import GuestFault
from vmm.x86.flags import MASK32, RFLAGS_TF

if TYPE_CHECKING:
    from vmm.bt.processor import TranslatingProcessor

_FETCHES_AHEAD = 15
#: a turn on the silicon before the mode is looked at again
_INTERLUDE_NS = 200_000


class OnSilicon:
    """The untranslated life of the guest on `vcpu`."""

    def __init__(self, vcpu: TranslatingProcessor) -> None:
        self._vcpu = vcpu
        self._cpu = vcpu.cpu
        self._q = vcpu.q
        self._counts, self._times = vcpu.counts, vcpu.times
        #: guest-physical pages of code that the silicon knows as it is; each is traced
        self._clean: set[int] = set()
        #: translated code ran since the last interlude, and may have written code
        self.native_ran = False
        #: the guest ran in an interlude, and the shadow has not followed yet
        self.shadow_stale = False
        self.in_interlude = False
        #: one instruction is to be run; it has been
        self.stepping = self.stepped = False
        #: DR6 before the step: the silicon tells of it there
        self.dr6 = 0

    def step(self, fpu: bool = False) -> int | None:
        """One instruction on the silicon; an exit code when the guest has to leave, else None."""
        self._counts[events.SILICON] += 1
        started = time.perf_counter_ns()
        try:
            return self._step(fpu)
        finally:
            self._times[events.SILICON] += time.perf_counter_ns() - started

    def _step(self, fpu: bool) -> int | None:
        if fpu and self._vcpu.modes.fpu_usable:
            self._vcpu.fpu.to_silicon()
            self._vcpu.settle()
        code = self._clean_code()
        if code is not None:
            return code
        q, cpu = self._q, self._cpu
        cpu.window(False)
        cpu.flush_tlb()
        self._vcpu.regs.show_flags()
        q[at.RFLAGS] |= RFLAGS_TF
        self.dr6 = q[self._vcpu.place.dr + 6]
        self.stepping, self.stepped = True, False
        try:
            while True:
                code = cpu.vmrun(self._vcpu.guest)
                if self.stepped:
                    break
                if code == ExitCode.INTR and self._vcpu.verdict is None and not self._vcpu.halted:
                    if self._vcpu.rose:
                        self._vcpu.rose = False
                        continue
                    return int(ExitCode.INTR)
                return code
        finally:
            self.stepping = False
            if not self.stepped:
                q[at.RFLAGS] &= ~RFLAGS_TF
        return None if self._vcpu.verdict is None and not self._vcpu.halted else code

    def _clean_code(self) -> int | None:
        """The silicon translates the code at EIP from what it is now, not from what it was."""
        eip = self._q[at.RIP] + self._q[at.CS + 1]
        try:
            for address in {eip & MASK32, eip + _FETCHES_AHEAD & MASK32}:
                source = self._vcpu.shadow.source_of_code(address, self._vcpu.regs.cpl == 3)
                if source is not None and source not in self._clean:
                    self._clean.add(source)
                    frame = self._vcpu.shadow.frame_number(source)
                    self._cpu.invalidate(frame, 1)
                    self._vcpu.settle()
        except GuestFault:
            return None         # the silicon raises it again, if the instruction is there at all
        except OutOfFrames as failure:
            self._vcpu.give_up(failure)
            return int(ExitCode.INTR)
        return None

    def interlude(self) -> int | None:
        """An interlude: untranslated modes, until the guest has to leave or its code is translated again."""
        self._counts[events.SILICON] += 1
        cpu, vcpu = self._cpu, self._vcpu
        if self._vcpu.reenter:
            cpu.evict()             # the VMCB changed, and counts from the next entry on
            self._vcpu.reenter = False
        self._vcpu.fpu.to_silicon()
        if self.native_ran:
            self.native_ran = False
            cpu.invalidate_all()
            self._clean.clear()
        self._vcpu.ask_window()
        cpu.flush_tlb()
        if cpu.resident is vcpu.guest:
            vcpu.regs.show_flags()
        self.in_interlude = True
        try:
            while True:
                until = min(self._vcpu.armed, time.monotonic_ns() + _INTERLUDE_NS)
                cpu.kicker.at(until)
                code = cpu.vmrun(self._vcpu.guest)
                now = time.monotonic_ns()
                if (code != ExitCode.INTR or vcpu.verdict is not None or vcpu.halted or vcpu.reenter
                        or now >= vcpu.armed or now < until):
                    return code
                if self._vcpu.modes.now() is not None:
                    return None
        finally:
            self.in_interlude = False
            self.shadow_stale = True
            cpu.kicker.at(self._vcpu.armed)

    def code_changed(self, source: int) -> None:
        """A traced guest-physical page is written."""
        self._clean.discard(source)

    def ends_step(self, code: int) -> bool:
        """An exit came: whether it ends a step.  The trap flag is not the guest's to see."""
        if not self.stepping or code in (ExitCode.NPF, ExitCode.VINTR):
            return False
        self._q[at.RFLAGS] &= ~RFLAGS_TF
        self.stepped = True
        return True
