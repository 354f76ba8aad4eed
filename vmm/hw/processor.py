# SPDX-License-Identifier: GPL-2.0-or-later
"""The hardware-assisted monitor of one guest: its VMCB, its run loop, and what it tells the CPU.

`run` enters the guest by `vmrun` and stays until a deadline, HLT, a kick or an end.  Exits are handled by
the table of `vmm.hw.handlers`, nearly all while the guest is on the CPU.

Interrupts go in at one place: when a controller has one ready, a virtual interrupt (V_IRQ) is asked for,
and the silicon exits with VINTR at the first boundary where the guest takes interrupts.  So IF, the
shadow of STI and MOV SS, and EFLAGS changes inside a block need no second opinion here.
"""

from __future__ import annotations

import time
from contextlib import suppress

from vmm.clock import GuestClock
from vmm.devices.board import Board
from vmm.exitcodes import ExitCode
from vmm.hw.delivery import Delivery, TripleFault, Unsupported
from vmm.hw.exits import decode
from vmm.hw.handlers import HANDLERS, INTERCEPTS
from vmm.hw.linear import Linear
from vmm.hw.msrs import MsrFile
from vmm.hw.ports import port_handlers
from vmm.hw.syscalls import syscall, sysenter
from vmm.memory.block import VmBlock
from vmm.memory.errors import BadAddress, OutOfFrames
from vmm.memory.frames import FrameSource
from vmm.memory.physical import GuestMemory
from vmm.monitor import Stop, StopReason
from vmm.silicon import layout as at
from vmm.silicon import states
from vmm.silicon.cpu import VMEXIT_INVALID, Cpu, EngineFault, InstructionAborted
from vmm.state import CpuState
from vmm.stats import slot_of
from vmm.vmcb import Event, EventType
from vmm.x86 import descriptors, kvm
from vmm.x86.cpuid import CpuidTable
from vmm.x86.faults import GeneralProtection, GuestFault, Vector
from vmm.x86.flags import CR0_PE, RFLAGS_IF, RFLAGS_VM

_NEVER = 1 << 63
_PREFIXES = frozenset({0xF0, 0x66, 0x67, 0x2E, 0x36, 0x3E, 0x26, 0x64, 0x65, 0xF2, 0xF3})
_SWINT = int(ExitCode.SWINT)


class Processor:
    """One guest on the CPU `cpu`."""

    def __init__(self, cpu: Cpu, block: VmBlock, frames: FrameSource, board: Board, clock: GuestClock,
                 state: CpuState) -> None:
        self.cpu = cpu
        self.regs = cpu.regs
        self.q, self.d = cpu.q, cpu.d
        self.place = cpu.regs.place
        self.block = block
        self.p2m = block.p2m
        self.frames = frames
        self.accounting = block.accounting
        self._counts, self._times = block.exit_stats.counts, block.exit_stats.times
        self.board = board
        self.interrupts = board.interrupts
        self.lapic = board.lapic
        self.virtio = board.virtio
        self.clock = clock
        self.memory = GuestMemory(block.p2m, frames)
        self.linear = Linear(self.q, self.memory)
        self.delivery = Delivery(self.regs, self.linear)
        self.cpuid = CpuidTable(clock.tsc_khz)
        self.kvm = kvm.KvmInterface(self.memory, clock.tsc_khz)
        self.halted = state.halted
        self.nmi_masked = state.nmi_masked
        #: why the guest must leave, when a handler decided so
        self.verdict: Stop | None = None
        #: the guest must be entered anew for a changed VMCB
        self.reenter = False
        #: an interrupt acknowledged whose delivery had to wait for a frame
        self._accepted: int | None = None
        self._fault: Exception | None = None
        #: CLOCK_MONOTONIC ns of the next timed stop
        self.armed = _NEVER
        #: the guest was stopped for an interrupt that became ready
        self.rose = False
        self._running = False
        self._clock_record_stale = False
        self.msrs = MsrFile(self)
        block.p2m.build()
        self.guest = cpu.new_guest(block.vmcb_pa, self)
        self._control()
        self._load(state)
        board.interrupts.on_output = self._output_rose
        board.virtio.on_waiting = self._device_waits
        self.port_in, self.port_out = port_handlers(self, block.exit_stats)

    def _control(self) -> None:
        """The VMCB's control area (APM vol. 2, table B-1)."""
        vmcb = self.guest.vmcb
        vmcb.clear()
        vmcb.intercept_exceptions = 0xFFFF_FFFF
        vmcb.intercept(*INTERCEPTS, ExitCode.INTR, ExitCode.IOIO)
        vmcb.iopm_base_pa = self.cpu.area.iopm_pa
        vmcb.msrpm_base_pa = self.cpu.area.msrpm_pa
        vmcb.guest_asid = 1
        vmcb.np_enable = 1
        vmcb.n_cr3 = self.p2m.root
        vmcb.v_intr_masking = 1
        vmcb.v_ign_tpr = 1
        vmcb.v_intr_prio = 0xF

    def _load(self, state: CpuState) -> None:
        states.check(state)
        self.cpu.states.load(self.guest, state)
        self.msrs.load(state.msrs)
        event = Event.decode(state.pending_event)
        if event is not None and event.type == EventType.INTR:
            self._accepted = event.vector
        if self.nmi_masked:
            self.vmcb_intercept(ExitCode.IRET, True)

    # -- running -------------------------------------------------------------------------------------------

    def run(self, deadline_ns: int) -> Stop:
        """Run until CLOCK_MONOTONIC `deadline_ns` at the latest; the clock must be running.

        Nothing a guest does makes this raise; CpuShutdown and failures of our own do.
        """
        cpu, timers, interrupts, virtio = self.cpu, self.board.timers, self.interrupts, self.virtio
        base = self.clock.base_ns
        switches = cpu.switches
        self._running = True
        try:
            while True:
                if self._clock_record_stale:
                    self.kvm.refresh_clock(self.instant())
                    self._clock_record_stale = False
                now = time.monotonic_ns()
                if timers.next <= now - base:
                    timers.run(now - base)
                    cpu.forget_stop()
                if virtio.waiting:
                    self._serve_devices()
                    if virtio.waiting:      # it takes more than one pass
                        if time.monotonic_ns() >= deadline_ns:
                            return Stop(StopReason.SLICE)
                        if cpu.stopping:
                            return Stop(StopReason.KICKED)
                        continue
                if interrupts.nmi_pending and not self.nmi_masked:
                    self._take_nmi()
                if self.halted:
                    if not self.wakes():
                        return Stop(StopReason.HALTED)
                    self.halted = False
                if now >= deadline_ns:
                    return Stop(StopReason.SLICE)
                if self.verdict is not None:
                    return self._leave()
                cpu.size_tlb(now)
                self.ask_window()
                self.armed = min(deadline_ns, base + timers.next)
                cpu.kicker.at(self.armed)
                self.reenter = self.rose = False
                code = self.enter_guest()
                if self.verdict is not None:
                    return self._leave()
                if code == ExitCode.INTR:
                    if self.rose:
                        self.rose = False
                    elif time.monotonic_ns() < self.armed:
                        return Stop(StopReason.KICKED)
                elif code == VMEXIT_INVALID:
                    return Stop(StopReason.CRASHED, "the machine state is not one vmrun accepts")
                elif self.reenter:
                    cpu.evict()
        except OutOfFrames:
            return Stop(StopReason.NO_FRAMES)
        except EngineFault as fault:
            return Stop(StopReason.CRASHED, f"the guest cannot go on: {fault}")
        finally:
            self._running = False
            # whoever called looks at the time and at its input itself: a stop still under way is stale
            cpu.rest()
            cpu.forget_stop()
            self.accounting.world_switches += cpu.switches - switches

    def enter_guest(self) -> int:
        """Let the guest run until it has to leave; its exit code.  A timed stop is armed."""
        return self.cpu.vmrun(self.guest)

    def _leave(self) -> Stop:
        verdict, self.verdict = self.verdict, None
        assert verdict is not None
        return verdict

    def wakes(self) -> bool:
        """Whether there is something a halted guest must be run for."""
        if self.verdict is not None or (self.interrupts.nmi_pending and not self.nmi_masked):
            return True
        return (self.interrupts.output or self._accepted is not None) and self.rflags_if()

    def rflags_if(self) -> bool:
        """The guest's IF, wherever its registers are now."""
        if self.cpu.resident is self.guest:
            return bool(self.q[at.RFLAGS] & RFLAGS_IF)
        return bool(self.guest.vmcb.rflags & RFLAGS_IF)

    def ask_window(self) -> None:
        wanted = self.interrupts.output or self._accepted is not None
        if self.cpu.resident is self.guest:
            self.cpu.window(wanted)
        else:
            self.guest.vmcb.v_irq = 1 if wanted else 0

    def _output_rose(self) -> None:
        """An interrupt became ready: by a device the guest just touched, or by time or input."""
        if not self._running or self.cpu.resident is not self.guest:
            return
        self.cpu.window(True)
        if self.q[at.RFLAGS] & RFLAGS_IF or self.interrupts.nmi_pending:
            self.rose = True
            self.cpu.stop()

    def _device_waits(self) -> None:
        """The guest asked a device for something that is done with the guest off the CPU."""
        if self._running and self.cpu.resident is self.guest:
            self.rose = True
            self.cpu.stop()

    def _serve_devices(self) -> None:
        """Devices read and write the guest's memory, and give pages of it away.

        The guest's next entry flushes its TLB; what the silicon translated from what they wrote it forgets
        here, and translated code hears of it by its traces, as of any write through the P2M.
        """
        self.evict()
        try:
            self.virtio.serve()
        finally:
            for frame in self.virtio.memory.take_written():
                self.cpu.invalidate(frame, 1)

    def rearm(self) -> None:
        """After a device access: a timer may now be due before the CPU would be stopped."""
        when = self.board.timers.next + self.clock.base_ns
        if when < self.armed:
            self.armed = when
            self.cpu.kicker.at(when)

    def take_interrupt(self) -> None:
        """Deliver the interrupt the controllers have ready, if they still have one."""
        vector = self._accepted
        if vector is None:
            vector = self.interrupts.acknowledge()
            if vector is None:
                return
        self._accepted = vector
        self.delivery.interrupt(vector)
        self._accepted = None
        self.accounting.interrupts += 1
        if self.interrupts.output:
            self.cpu.window(True)

    def _take_nmi(self) -> None:
        """Inject an NMI at the next entry (EVENTINJ), which comes back as an exit with the guest in place."""
        self.evict()
        vmcb = self.guest.vmcb
        if not vmcb.interrupt_shadow:      # else one instruction more, after STI or MOV SS
            vmcb.eventinj = Event(Vector.NMI, EventType.NMI).encode()

    def take_nmi(self) -> None:
        """Deliver the NMI; its handler is not interrupted by another."""
        self.delivery.exception(Vector.NMI)
        self.interrupts.nmi_pending = False
        self.nmi_masked = True
        self.vmcb_intercept(ExitCode.IRET, True)

    def vmcb_intercept(self, code: int, wanted: bool) -> None:
        """Change one intercept; it counts from the next entry on."""
        vmcb = self.guest.vmcb
        if wanted:
            vmcb.intercept(code)
        else:
            vmcb.pass_through(code)
        self.reenter = True

    # -- what the CPU asks ---------------------------------------------------------------------------------

    def intercepted(self, code: int) -> bool:
        """An exit: decode, handle, count."""
        started = time.perf_counter_ns()
        slot = slot_of(code)
        self._counts[slot] += 1
        try:
            handler = HANDLERS.get(code)
            if handler is None:
                self.verdict = Stop(StopReason.CRASHED, f"an exit this monitor has no handler for: {code:#x}")
                return False
            return handler(self, decode(code, self.d[self.place.error_code], self.guest.vmcb.exitinfo2))
        except GuestFault as fault:
            return self.give(fault)
        except (OutOfFrames, TripleFault, Unsupported, BadAddress) as failure:
            return self.give_up(failure)
        finally:
            self._times[slot] += time.perf_counter_ns() - started

    def give(self, fault: GuestFault) -> bool:
        """Deliver an exception at the current instruction; False when the guest must leave instead."""
        try:
            self.delivery.exception(fault.vector, fault.error_code, fault.address)
        except (OutOfFrames, TripleFault, Unsupported, BadAddress) as failure:
            return self.give_up(failure)
        return True

    def give_up(self, failure: Exception) -> bool:
        """The guest leaves: for a frame, or for good."""
        if isinstance(failure, OutOfFrames):
            self.verdict = Stop(StopReason.NO_FRAMES)
        else:
            self.verdict = Stop(StopReason.CRASHED, str(failure))
        return False

    def software_interrupt(self, vector: int) -> bool:
        """INT n, INT3, INTO: RIP is behind the instruction."""
        started = time.perf_counter_ns()
        self._counts[_SWINT] += 1
        try:
            self.delivery.software(vector)
        except (OutOfFrames, TripleFault, Unsupported, BadAddress) as failure:
            return self.give_up(failure)
        finally:
            self._times[_SWINT] += time.perf_counter_ns() - started
        return True

    def syscall(self) -> None:
        """SYSCALL: the silicon leaves its semantics to us."""
        syscall(self)

    def sysenter(self) -> None:
        """SYSENTER: the silicon leaves its semantics to us."""
        sysenter(self)

    def check_port(self, port: int, size: int) -> None:
        """IOPL and the task's I/O permission map (APM vol. 2, 12.2.4); the silicon checks neither."""
        flags = self.q[at.RFLAGS]
        if not self.q[at.CR] & CR0_PE:
            return
        if not flags & RFLAGS_VM and self.regs.cpl <= flags >> 12 & 3:
            return
        try:
            if descriptors.io_permitted(self.regs.segment(at.TR), port, size, self.linear.read):
                return
            self._fault = GeneralProtection()
        except (GuestFault, OutOfFrames) as fault:
            self._fault = fault
        except BadAddress:
            self._fault = GeneralProtection()
        raise InstructionAborted

    def aborted(self) -> bool:
        """An I/O instruction must fault; the registers are back at its start."""
        fault, self._fault = self._fault, None
        assert fault is not None
        return self.give(fault) if isinstance(fault, GuestFault) else self.give_up(fault)

    def mmio_read(self, gpa: int, size: int) -> int:
        """A read of a device page."""
        return self.board.mmio.read(gpa, size)

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        """A write to a device page."""
        self.board.mmio.write(gpa, size, value)
        self.rearm()

    # -- for the handlers ----------------------------------------------------------------------------------

    def moved_register(self) -> tuple[int, int]:
        """Length of the MOV to or from a control or debug register at RIP, and its general register."""
        q = self.q
        start = q[at.CS + 1] + q[at.RIP]
        room = 0x1000 - (start & 0xFFF)
        code = self.linear.read(start, min(8, room))
        if room < 8:
            # the instruction has been fetched; what follows it perhaps cannot be
            with suppress(GuestFault, BadAddress):
                code += self.linear.read(start + room, 8 - room)
        length = extend = 0
        while code[length] in _PREFIXES and length < 4:
            length += 1
        if code[length] & 0xF0 == 0x40:
            extend = (code[length] & 1) << 3
            length += 1
        return length + 3, code[length + 2] & 7 | extend

    def instant(self) -> kvm.Instant:
        """This moment by the guest's clocks."""
        return kvm.Instant(self.clock.tsc(), self.clock.now(), time.time_ns())

    # -- state ---------------------------------------------------------------------------------------------

    def sync_clock(self) -> None:
        """The clock was started or set: the VMCB's TSC offset follows, and before the guest runs its clock
        record (which lies in its memory, so that writing it may have to wait for a frame)."""
        self.guest.vmcb.tsc_offset = self.clock.tsc_offset
        self._clock_record_stale = True

    def add_steal(self, ns: int) -> None:
        """Time the guest wanted to run and did not."""
        self.kvm.add_steal(ns)

    def evict(self) -> None:
        """Off the CPU, if on it."""
        if self.cpu.resident is self.guest:
            self.cpu.evict()

    def capture(self) -> CpuState:
        """The state, the guest being off the CPU afterwards; the clock must have been stopped."""
        self.evict()
        state = self.cpu.states.save(self.guest)
        state.msrs.update(self.msrs.save())
        state.cr8 = self.lapic.cr8
        state.halted = self.halted
        state.nmi_masked = self.nmi_masked
        state.tsc = self.clock.tsc()
        state.tsc_offset = self.clock.tsc_offset
        if self._accepted is not None:
            state.pending_event = Event(self._accepted, EventType.INTR).encode()
        return state
