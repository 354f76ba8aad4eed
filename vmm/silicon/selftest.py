# SPDX-License-Identifier: GPL-2.0-or-later
"""What this monitor counts on in the silicon, tried out before the first guest runs (a few milliseconds).

    from vmm.silicon import selftest
    cpu = Cpu(pool)
    selftest.run(cpu)       # SiliconError on a unicorn that does not behave as the pinned one

Two guests of one page of code each run on memory of the test's own, above the CPU's host area; the pool,
which other processes may be using already, is not touched.  They are in protected mode without paging, so
that their linear addresses are guest-physical.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import time
from collections.abc import Callable

from unicorn import unicorn_const

from vmm.exitcodes import ExitCode
from vmm.memory.pool import PAGE, PAGE_SHIFT
from vmm.silicon import layout as at
from vmm.silicon import tsc
from vmm.silicon.cpu import Cpu, CpuShutdown, EngineFault, Guest, InstructionAborted
from vmm.silicon.hostarea import DEVICE_WINDOW, HOST_AREA
from vmm.silicon.layout import SiliconError
from vmm.state import CpuState, Segment, Table
from vmm.vmcb import Event, EventType
from vmm.x86.faults import Vector
from vmm.x86.flags import CR0_ET, CR0_PE, EFER_SCE, RFLAGS_IF

_SCRATCH = HOST_AREA + (1 << 30)
# pages of the scratch memory
_CODE, _VMCB, _DATA, _TABLES = 0, 1, 3, 5
_PAGES = 13
# guest-physical addresses: code, data, nothing, a device, data that must not be written
CODE, DATA, ABSENT, DEVICE, READ_ONLY = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000
_MAP, _MAP_READ_ONLY = 7, 5
_CODE_SEGMENT, _DATA_SEGMENT = Segment(8, 0xC9B, 0xFFFFFFFF), Segment(16, 0xC93, 0xFFFFFFFF)
_SLOT = 128         # bytes a program has: 32 programs in the page

_LEAVE = b"\x0f\x01\xd9"                                     # vmmcall
_LOAD = b"\xa1"                                              # mov eax, [disp32]
_STORE = b"\xc7\x05"                                         # mov dword [disp32], imm32
_INCREMENTS = 16
_STOPS, _STOP_AFTER_NS, _MOST_STOPS = 6, 50_000, 200
_PORT, _REFUSED_PORT = 0x80, 0x81
_ANSWER = 0x5EA50A1C


def _at(address: int) -> bytes:
    return struct.pack("<I", address)


class _Recorder:
    """A monitor that notes what the silicon reports, and lets the guest leave at every intercept."""

    def __init__(self, cpu: Cpu) -> None:
        self.cpu = cpu
        self.seen: list[tuple[object, ...]] = []

    def _note(self, *what: object) -> None:
        self.seen.append((*what, self.cpu.q[at.RIP] - CODE & _SLOT - 1))

    def intercepted(self, code: int) -> bool:
        self._note(ExitCode(code))
        return False

    def software_interrupt(self, vector: int) -> bool:
        self._note("int", vector)
        return True

    def syscall(self) -> None:
        self._note("syscall")
        self.cpu.q[at.RIP] += 1     # and 2 by the silicon: over one byte

    def sysenter(self) -> None:
        self._note("sysenter")

    def port_in(self, port: int, size: int) -> int:
        if port == _REFUSED_PORT:
            raise InstructionAborted
        self._note("in", port, size)
        return _ANSWER & 0xFF

    def port_out(self, port: int, size: int, value: int) -> None:
        self._note("out", port, size, value)

    def mmio_read(self, gpa: int, size: int) -> int:
        self._note("read", gpa, size)
        return _ANSWER

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        self._note("write", gpa, size, value)

    def aborted(self) -> bool:
        self._note("aborted")
        return False


class _Bench:
    """Two guests, A and B, that share their code page and nothing else."""

    def __init__(self, cpu: Cpu) -> None:
        self.cpu = cpu
        self._map = mmap.mmap(-1, _PAGES * PAGE)
        self.view = memoryview(self._map)
        cpu.uc.mem_map_ptr(_SCRATCH, _PAGES * PAGE, unicorn_const.UC_PROT_ALL,
                           ctypes.addressof(ctypes.c_char.from_buffer(self._map)))
        self.recorder = _Recorder(cpu)
        self._programs = 0
        self.guests = tuple(self._guest(index) for index in range(2))

    def close(self) -> None:
        """Leave no trace in the CPU; it must not be in a guest whose exit cannot be completed."""
        self.cpu.invalidate(_SCRATCH >> PAGE_SHIFT, _PAGES)
        self.cpu.uc.mem_unmap(_SCRATCH, _PAGES * PAGE)

    def _guest(self, index: int) -> Guest:
        tables = _TABLES + 4 * index
        for level in range(3):
            self._entry(tables + level, 0, self.address(tables + level + 1))
        self.map(index, CODE, self.address(_CODE), _MAP_READ_ONLY)
        self.map(index, DATA, self.address(_DATA + index))
        self.map(index, DEVICE, DEVICE_WINDOW + DEVICE)
        self.map(index, READ_ONLY, self.address(_DATA + index), _MAP_READ_ONLY)
        page = self.view[(_VMCB + index) * PAGE:(_VMCB + index + 1) * PAGE]
        guest = Guest(self.address(_VMCB + index), page, self.recorder, self.cpu.host_image)
        vmcb = guest.vmcb
        vmcb.intercept(ExitCode.VMRUN, ExitCode.VMMCALL, ExitCode.INTR, ExitCode.VINTR, ExitCode.MSR)
        vmcb.intercept_exceptions = 0xFFFF_FFFF
        vmcb.iopm_base_pa, vmcb.msrpm_base_pa = self.cpu.area.iopm_pa, self.cpu.area.msrpm_pa
        vmcb.guest_asid = vmcb.np_enable = vmcb.v_intr_masking = vmcb.v_ign_tpr = 1
        vmcb.v_intr_prio = 0xF
        vmcb.n_cr3 = self.address(tables)
        return guest

    @staticmethod
    def address(page: int) -> int:
        return _SCRATCH + page * PAGE

    def _entry(self, table: int, index: int, value: int, bits: int = _MAP) -> None:
        struct.pack_into("<Q", self.view, table * PAGE + 8 * index, value | bits)

    def map(self, index: int, gpa: int, machine: int, bits: int = _MAP) -> None:
        """One page of guest number `index`."""
        self._entry(_TABLES + 4 * index + 3, gpa >> PAGE_SHIFT, machine, bits)

    def data(self, index: int) -> int:
        """The first doubleword of a guest's data."""
        return int(struct.unpack_from("<I", self.view, (_DATA + index) * PAGE)[0])

    def load(self, program: bytes, index: int = 0, *, eax: int = 0, rflags: int = 2, shadow: bool = False,
             window: bool = False) -> Guest:
        """A guest about to run `program`."""
        start = self._programs * _SLOT
        self._programs += 1
        self.view[start:start + len(program)] = program
        state = CpuState(
            rip=CODE + start, rflags=rflags, cs=_CODE_SEGMENT, ss=_DATA_SEGMENT, ds=_DATA_SEGMENT,
            es=_DATA_SEGMENT, gdtr=Table(0, 0), cr0=CR0_PE | CR0_ET, efer=EFER_SCE, interrupt_shadow=shadow)
        state.gpr[0] = eax
        guest = self.guests[index]
        self.cpu.states.load(guest, state)
        guest.vmcb.v_irq = 1 if window else 0
        self.recorder.seen.clear()
        return guest

    def run(self, program: bytes, index: int = 0, *, eax: int = 0, rflags: int = 2, shadow: bool = False,
            window: bool = False) -> list[tuple[object, ...]]:
        """What is reported until `program` leaves."""
        self.cpu.vmrun(self.load(program, index, eax=eax, rflags=rflags, shadow=shadow, window=window))
        return self.recorder.seen


def _expect(good: object, promise: str) -> None:
    if not good:
        raise SiliconError(f"the installed unicorn does not behave as 2.1.4: it was to {promise}; "
                           "install unicorn==2.1.4 from PyPI")


def _pending_word(bench: _Bench) -> None:
    """First of all: #VMEXIT writes this word, and must not write another one."""
    cpu = bench.cpu
    word = ctypes.c_uint32.from_address(cpu.regs.place.interrupt_request)
    guest = bench.load(_LEAVE, window=True)
    before = word.value
    code = cpu.vmrun(guest)
    good = not before & at.INTERRUPT_VIRQ and word.value == before | at.INTERRUPT_VIRQ
    if not good:
        cpu.resident = None
        cpu.regs.image[:] = cpu.host_image
    _expect(good, "keep a virtual interrupt (V_IRQ) in the pending-interrupt word")
    _expect(code == ExitCode.VMMCALL and cpu.d[at.HFLAGS] & at.HF_GUEST, "run a guest by vmrun")
    _expect(cpu.q[cpu.regs.place.nested_cr3] == guest.vmcb.n_cr3, "keep nCR3 beside the debug registers")
    cpu.evict()
    _expect(not word.value & at.INTERRUPT_VIRQ and guest.vmcb.v_irq, "take a virtual interrupt back")


def _round_trip(bench: _Bench) -> None:
    cpu = bench.cpu
    seen = bench.run(b"\x40" + _LEAVE, eax=0x1233)                          # inc eax
    _expect(seen == [(ExitCode.VMMCALL, 1)] and cpu.q[0] == 0x1234,
            "leave a guest at the intercepted instruction")
    cpu.evict()
    vmcb = bench.guests[0].vmcb
    _expect((vmcb.rax, vmcb.exitcode) == (0x1234, ExitCode.VMMCALL),
            "give a guest's registers back at #VMEXIT")
    _expect(not cpu.d[at.HFLAGS] & at.HF_GUEST, "be the host's after #VMEXIT")


def _events(bench: _Bench) -> None:
    cpu, place = bench.cpu, bench.cpu.regs.place
    seen = bench.run(b"\xcd\x30" + _LEAVE)                                  # int 0x30
    _expect(seen == [("int", 0x30, 2), (ExitCode.VMMCALL, 2)], "report INT n with RIP behind it")
    seen = bench.run(b"\x8e\xd8" + _LEAVE, eax=0x1234)                      # mov ds, ax
    _expect(seen == [(ExitCode.EXCP_GP, 0)] and cpu.d[place.error_code] == 0x1234 and not cpu.d[place.is_int],
            "report an exception at its instruction with its error code")
    seen = bench.run(b"\x0f\x30" + _LEAVE)                                  # wrmsr
    _expect(seen == [(ExitCode.MSR, 0)] and cpu.d[place.error_code] == 1, "intercept WRMSR")
    guest = bench.load(b"\x40" + _LEAVE)
    guest.vmcb.eventinj = Event(Vector.NMI, EventType.NMI).encode()
    cpu.vmrun(guest)
    _expect(bench.recorder.seen == [(ExitCode.EXCP_NMI, 0)],
            "report an injected NMI before the first instruction")
    seen = bench.run(b"\x0f\x05\x40\x40" + _LEAVE)                          # syscall; inc eax; inc eax
    _expect(seen[:1] == [("syscall", 0)] and cpu.q[0] == 1, "leave SYSCALL to its callback")


def _window(bench: _Bench) -> None:
    cpu = bench.cpu
    seen = bench.run(b"\xfb\x40\x40" + _LEAVE, window=True)                 # sti; inc eax; inc eax
    _expect(seen == [(ExitCode.VINTR, 2)] and cpu.q[0] == 1,
            "open the interrupt window one instruction after STI")
    seen = bench.run(b"\x40\x40" + _LEAVE, rflags=RFLAGS_IF, shadow=True, window=True)
    _expect(seen == [(ExitCode.VINTR, 1)] and cpu.q[0] == 1, "keep the shadow of STI over vmrun")


def _memory(bench: _Bench) -> None:
    cpu = bench.cpu
    seen = bench.run(_LOAD + _at(ABSENT) + _LEAVE)
    vmcb = bench.guests[0].vmcb
    _expect(seen == [(ExitCode.NPF, 0)] and vmcb.exitinfo2 == ABSENT and not vmcb.exitinfo1 & 2,
            "report an absent page as a nested page fault")
    seen = bench.run(_STORE + _at(READ_ONLY) + _at(1) + _LEAVE)
    _expect(seen == [(ExitCode.NPF, 0)] and vmcb.exitinfo1 & 2,
            "report a write to a read-only page as a nested page fault")
    seen = bench.run(_LOAD + _at(DEVICE + 8) + _LEAVE)
    _expect(seen[:1] == [("read", DEVICE + 8, 4, 0)] and cpu.q[0] == _ANSWER, "call back for a device page")


def _ports(bench: _Bench) -> None:
    cpu = bench.cpu
    seen = bench.run(b"\xe4\x80\xe7\x80" + _LEAVE)                          # in al, 0x80; out 0x80, eax
    _expect(seen[:2] == [("in", _PORT, 1, 0), ("out", _PORT, 4, _ANSWER & 0xFF, 2)],
            "call back for IN and OUT")
    before = bench.data(0)
    seen = bench.run(b"\x40\xe4\x81" + _STORE + _at(DATA) + _at(~before & 0xFFFFFFFF) + _LEAVE)
    _expect(seen == [("aborted", 1)] and cpu.q[0] == 1 and bench.data(0) == before,
            "undo an IN that is refused, and what follows it")


def _isolation(bench: _Bench) -> None:
    cpu = bench.cpu
    for index in range(2):
        bench.run(_STORE + _at(DATA) + _at(0xA0 + index) + _LEAVE, index)
    _expect((bench.data(0), bench.data(1)) == (0xA0, 0xA1), "store where the nested table says")
    read = _LOAD + _at(DATA) + _LEAVE
    for index in (0, 1, 0):
        bench.run(read, index)
        _expect(cpu.q[0] == 0xA0 + index, "keep the memory of two guests apart")


def _translations(bench: _Bench) -> None:
    cpu = bench.cpu
    guest = bench.load(b"\xb8\x01\0\0\0" + _LEAVE)                          # mov eax, 1
    start = guest.vmcb.rip - CODE
    cpu.vmrun(guest)
    bench.view[start + 1] = 2
    cpu.invalidate(_SCRATCH >> PAGE_SHIFT, _PAGES)
    guest.vmcb.rip = CODE + start
    cpu.vmrun(guest)
    _expect(cpu.q[0] == 2, "drop the translations of code that was written from outside")


def _preemption(bench: _Bench) -> None:
    """A stop between two instructions of a block, or within one, would break the equation."""
    cpu = bench.cpu
    body = (b"\xff\x05" + _at(DATA)) * _INCREMENTS + b"\x41"                # inc dword [DATA] ...; inc ecx
    guest = bench.load(_STORE + _at(DATA) + _at(0) + body + b"\xe9" + _at(-len(body) - 5 & 0xFFFFFFFF))
    moved = stops = last = 0
    while moved < _STOPS and stops < _MOST_STOPS:
        cpu.kicker.at(time.monotonic_ns() + _STOP_AFTER_NS)
        _expect(cpu.vmrun(guest) == ExitCode.INTR, "leave the guest when told to")
        count = cpu.q[1]
        _expect(not count or bench.data(0) == count * _INCREMENTS & 0xFFFFFFFF,
                "stop between two blocks, every instruction done exactly once")
        moved += count != last
        last, stops = count, stops + 1
    cpu.kicker.rest()
    _expect(moved == _STOPS, "make progress between two stops")


def _time(bench: _Bench) -> None:
    cpu = bench.cpu
    guest = bench.load(b"\x0f\x31" + _LEAVE)                                # rdtsc
    guest.vmcb.tsc_offset = offset = 1 << 60
    before = tsc.read()
    cpu.vmrun(guest)
    now = cpu.q[0] | cpu.q[2] << 32
    guest.vmcb.tsc_offset = 0
    _expect(before + offset <= now <= tsc.read() + offset, "give the guest the host's TSC plus its offset")


#: in this order: the first makes the others safe to try
_TESTS: tuple[Callable[[_Bench], None], ...] = (
    _pending_word, _round_trip, _events, _window, _memory, _ports, _isolation, _translations, _preemption,
    _time)


def run(cpu: Cpu) -> None:
    """Try everything on `cpu`, which has not run a guest yet.  Raises SiliconError, with one sentence."""
    bench = _Bench(cpu)
    try:
        for test in _TESTS:
            test(bench)
    except (EngineFault, CpuShutdown) as error:
        raise SiliconError(f"the installed unicorn does not behave as 2.1.4: {error}; "
                           "install unicorn==2.1.4 from PyPI") from error
    finally:
        bench.close()
