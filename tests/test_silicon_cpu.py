# SPDX-License-Identifier: GPL-2.0-or-later
"""vmrun and #VMEXIT on one CPU with many guests: illegal states, lost hosts, registers kept apart."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import hw_modes as m
from tests.hw_rig import Rig
from vmm.exitcodes import ExitCode
from vmm.memory.block import VmBlock
from vmm.memory.physical import GuestMemory
from vmm.memory.pool import Pool
from vmm.silicon import kick
from vmm.silicon import layout as at
from vmm.silicon.cpu import VMEXIT_INVALID, Cpu, CpuShutdown, EngineFault, Guest
from vmm.silicon.hostarea import HOST_AREA
from vmm.state import CpuState, MachineState, Segment, Table, decode, encode
from vmm.vmcb import EVENT_VALID, Event, EventType, Vmcb

VMMCALL = b"\x0f\x01\xd9"
SPIN = b"\xeb\xfe"


class Leaver:
    """A monitor that lets the guest leave at each intercept; `act` may do something else."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.act: Callable[[int], bool] = lambda code: False

    def intercepted(self, code: int) -> bool:
        self.codes.append(code)
        return self.act(code)

    def software_interrupt(self, vector: int) -> bool:
        return self.act(-vector)

    def syscall(self) -> None: ...
    def sysenter(self) -> None: ...

    def port_in(self, port: int, size: int) -> int:
        self.act(port)
        return 0

    def port_out(self, port: int, size: int, value: int) -> None:
        self.act(port)

    def mmio_read(self, gpa: int, size: int) -> int:
        return 0

    def mmio_write(self, gpa: int, size: int, value: int) -> None: ...

    def aborted(self) -> bool:
        return False


def new_guest(rig: Rig, setup: m.Setup) -> tuple[Guest, Leaver, VmBlock]:
    """A guest by hand: block, memory, VMCB."""
    block = rig.block(m.MEMORY)
    block.p2m.build()
    frames = rig.frames()
    memory = GuestMemory(block.p2m, frames)
    for gpa in range(0, 0x20000, 4096):
        memory.write(gpa, b"\0")
    for gpa, data in setup.writes:
        memory.write(gpa, data)
    monitor = Leaver()
    guest = rig.cpu.new_guest(block.vmcb_pa, monitor)
    control(guest.vmcb, rig.cpu, block)
    rig.cpu.states.load(guest, setup.cpu)
    return guest, monitor, block


def control(vmcb: Vmcb, cpu: Cpu, block: VmBlock) -> None:
    vmcb.intercept(ExitCode.VMRUN, ExitCode.VMMCALL, ExitCode.HLT, ExitCode.INTR)
    vmcb.intercept_exceptions = 0xFFFF_FFFF
    vmcb.iopm_base_pa, vmcb.msrpm_base_pa = cpu.area.iopm_pa, cpu.area.msrpm_pa
    vmcb.guest_asid = vmcb.np_enable = vmcb.v_intr_masking = 1
    vmcb.n_cr3 = block.p2m.root


# -- vmrun --------------------------------------------------------------------------------------------------


def test_exit_information(rig: Rig) -> None:
    guest, monitor, _ = new_guest(rig, m.protected(b"\x40" + VMMCALL))
    vmcb = guest.vmcb
    assert rig.cpu.vmrun(guest) == ExitCode.VMMCALL == vmcb.exitcode
    assert rig.cpu.resident is guest
    rig.cpu.evict()
    assert (vmcb.rip, vmcb.rax, vmcb.exitintinfo, vmcb.eventinj) == (m.CODE + 1, 1, 0, 0)
    assert monitor.codes == [ExitCode.VMMCALL]

    guest, _, _ = new_guest(rig, m.protected(b"\xb8\xf8\x07\x00\x00\x8e\xd8"))
    assert rig.cpu.vmrun(guest) == ExitCode.EXCP_GP
    assert guest.vmcb.exitinfo1 == 0x7F8


def test_completed_exit_stays_on_the_cpu(rig: Rig) -> None:
    guest, monitor, _ = new_guest(rig, m.protected(VMMCALL * 5 + b"\xf4"))

    def complete(code: int) -> bool:
        if code == ExitCode.VMMCALL:
            rig.cpu.q[at.RIP] += 3
        return code == ExitCode.VMMCALL

    monitor.act = complete
    switches = rig.cpu.switches
    assert rig.cpu.vmrun(guest) == ExitCode.HLT
    assert monitor.codes == [ExitCode.VMMCALL] * 5 + [ExitCode.HLT]
    assert rig.cpu.switches == switches + 1


def test_reentry_of_the_resident_guest_is_no_switch(rig: Rig) -> None:
    guest, _, _ = new_guest(rig, m.protected(VMMCALL))
    rig.cpu.vmrun(guest)
    switches = rig.cpu.switches
    rig.cpu.vmrun(guest)
    assert rig.cpu.switches == switches


ILLEGAL: dict[str, Callable[[Vmcb], object]] = {
    "SVME": lambda v: setattr(v, "efer", v.efer & ~0x1000),
    "EFER": lambda v: setattr(v, "efer", v.efer | 1 << 20),
    "NW without CD": lambda v: setattr(v, "cr0", v.cr0 | 1 << 29),
    "CR0": lambda v: setattr(v, "cr0", v.cr0 | 1 << 32),
    "CR3": lambda v: setattr(v, "cr3", 1 << 52),
    "CR4": lambda v: setattr(v, "cr4", 1 << 30),
    "DR6": lambda v: setattr(v, "dr6", 1 << 32),
    "DR7": lambda v: setattr(v, "dr7", 1 << 32),
    "long mode without PAE": lambda v: [setattr(v, "efer", v.efer | 0x100),
                                        setattr(v, "cr0", v.cr0 | 1 << 31)],
    "VMRUN not intercepted": lambda v: v.pass_through(ExitCode.VMRUN),
    "ASID 0": lambda v: setattr(v, "guest_asid", 0),
    "MSR map": lambda v: setattr(v, "msrpm_base_pa", 1 << 40),
    "I/O map": lambda v: setattr(v, "iopm_base_pa", (1 << 40) - 4096),
    "nCR3": lambda v: setattr(v, "n_cr3", 1 << 50),
    "event of a reserved type": lambda v: setattr(v, "eventinj", EVENT_VALID | 1 << 8),
    "exception that is none": lambda v: setattr(v, "eventinj", Event(2, EventType.EXCEPTION).encode()),
    "PAT": lambda v: setattr(v, "g_pat", 2),
}


@pytest.mark.parametrize("case", ILLEGAL)
def test_illegal_state(rig: Rig, case: str) -> None:
    """VMEXIT_INVALID, at once; put right, the same guest runs."""
    guest, monitor, _ = new_guest(rig, m.protected(VMMCALL))
    good = bytes(guest.page)
    ILLEGAL[case](guest.vmcb)
    assert rig.cpu.vmrun(guest) == VMEXIT_INVALID == guest.vmcb.exitcode
    assert rig.cpu.resident is None and monitor.codes == []
    guest.page[:] = good
    assert rig.cpu.vmrun(guest) == ExitCode.VMMCALL


def test_inconsistent_host_state_shuts_the_cpu_down(rig: Rig) -> None:
    guest, _, _ = new_guest(rig, m.protected(VMMCALL))
    rig.cpu.vmrun(guest)
    host = rig.cpu.area._hsave
    saved = bytes(host)
    Vmcb(host).cr3 = 1 << 60
    with pytest.raises(CpuShutdown, match="inconsistent host state after #VMEXIT: a must-be-zero bit of CR3"):
        rig.cpu.evict()
    host[:] = saved
    rig.cpu.regs.image[:] = rig.cpu.host_image
    assert rig.cpu.vmrun(new_guest(rig, m.protected(VMMCALL))[0]) == ExitCode.VMMCALL


def test_failures_of_handlers_come_out_of_vmrun(rig: Rig) -> None:
    """From every kind of callback; the CPU is usable afterwards."""

    def fail(code: int) -> bool:
        raise ZeroDivisionError(code)

    for code in (VMMCALL, b"\xcd\x30", b"\xe4\x80", b"\xe6\x80"):
        guest, monitor, _ = new_guest(rig, m.protected(code + SPIN))
        monitor.act = fail
        with pytest.raises(ZeroDivisionError):
            rig.cpu.vmrun(guest)
    assert rig.cpu.vmrun(new_guest(rig, m.protected(VMMCALL))[0]) == ExitCode.VMMCALL


def test_code_where_no_memory_can_be(rig: Rig) -> None:
    guest, monitor, block = new_guest(rig, m.protected(b"\xb8\x00\x00\x00\xd0\xff\xe0"))

    def map_device(code: int) -> bool:
        block.p2m.map_device(0xD000_0000, (1 << 39) + 0xD000_0000)
        return code == ExitCode.NPF

    monitor.act = map_device
    with pytest.raises(EngineFault, match="at rip 0xd0000000"):
        rig.cpu.vmrun(guest)


# -- many guests, one CPU -----------------------------------------------------------------------------------


def number(bits: int = 64) -> st.SearchStrategy[int]:
    return st.integers(0, (1 << bits) - 1)


@st.composite
def register_files(draw: st.DrawFn) -> CpuState:
    """A 64-bit guest with anything in the registers that programs use."""
    cpu = m.long_mode(b"").cpu
    cpu.gpr = [draw(number()) for _ in range(16)]
    cpu.gpr[4] = m.STACK
    cpu.rflags = draw(st.integers(0, (1 << 22) - 1)) & 0x2C0ED5 & ~0x100 | 2
    cpu.fs = Segment(draw(number(16)), 0xC93, 0xFFFFFFFF, draw(st.integers(0, (1 << 47) - 1)))
    cpu.gs = Segment(draw(number(16)), 0xC93, 0xFFFFFFFF, draw(st.integers(0, (1 << 47) - 1)))
    cpu.ldtr = Segment(0x18, 0x82, draw(number(16)), draw(number(47)))
    cpu.gdtr, cpu.idtr = Table(draw(number(16)), draw(number(47))), Table(draw(number(16)), m.IDT)
    cpu.cr2 = draw(number())
    cpu.dr[:4] = [draw(number(47)) for _ in range(4)]
    cpu.dr[6] = 0xFFFF0FF0 | draw(st.integers(0, 15))
    cpu.msrs = {msr: draw(number(32)) for msr in (
        0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000102, 0x174, 0x175, 0x176)}
    cpu.fxsave = fxsave(draw)
    return cpu


def fxsave(draw: st.DrawFn) -> bytes:
    """The image FXSAVE64 writes: control words, eight 80-bit and sixteen 128-bit registers."""
    image = bytearray(512)
    control, status = 0x37F | draw(st.integers(0, 3)) << 10, draw(st.integers(0, 7)) << 11
    struct.pack_into("<HHB", image, 0, control, status, draw(number(8)))
    struct.pack_into("<II", image, 24, 0x1F80 | draw(st.integers(0, 63)), 0xFFFF)
    for index in range(8):
        image[32 + 16 * index:42 + 16 * index] = draw(st.binary(min_size=10, max_size=10))
    image[160:416] = draw(st.binary(min_size=256, max_size=256))
    return bytes(image)


def comparable(state: CpuState) -> CpuState:
    """Without the reserved and unused bytes of the FPU image."""
    image = bytearray(state.fxsave)
    image[6:24] = bytes(18)
    image[28:32] = bytes(4)
    image[416:] = bytes(96)
    for index in range(8):
        image[42 + 16 * index:48 + 16 * index] = bytes(6)
    state.fxsave = bytes(image)
    return state


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.lists(register_files(), min_size=2, max_size=3),
       order=st.lists(st.integers(0, 2), max_size=8))
def test_registers_stay_whose_they_are(rig: Rig, files: list[CpuState], order: list[int]) -> None:
    """Loaded, run for one instruction each, in any order, and saved: every register is its guest's."""
    setup = m.long_mode(VMMCALL)
    guests = [new_guest(rig, m.Setup(cpu, setup.memory))[0] for cpu in files]
    for index in (*range(len(guests)), *order):
        if index < len(guests):
            assert rig.cpu.vmrun(guests[index]) == ExitCode.VMMCALL
    for guest, before in zip(guests, files, strict=True):
        after = rig.cpu.states.save(guest)
        before.msrs = after.msrs | before.msrs
        state = MachineState(m.MEMORY, cpu=comparable(after))
        assert decode(encode(state)).cpu == comparable(before)
    rig.clear()


def test_fpu_and_sse_of_two_guests(rig: Rig) -> None:
    """Programs that count in XMM and x87 registers, switched at every step, do not mix their sums."""
    # paddq xmm0, xmm1; fld1; faddp; vmmcall; jmp back
    step = b"\x66\x0f\xd4\xc1\xd9\xe8\xde\xc1" + VMMCALL + b"\xeb\xf3"
    guests = []
    for increment in (3, 5):
        setup = m.long_mode(step)
        image = bytearray(512)
        struct.pack_into("<HH", image, 0, 0x37F, 7 << 11)
        image[4] = 0x80
        struct.pack_into("<I", image, 24, 0x1F80)
        struct.pack_into("<Q", image, 176, increment)
        setup.cpu.fxsave = bytes(image)
        guest, monitor, _ = new_guest(rig, setup)

        def leave(code: int, cpu: Cpu = rig.cpu) -> bool:
            cpu.q[at.RIP] += 3
            return False

        monitor.act = leave
        guests.append(guest)
    for _ in range(50):
        for guest in guests:
            assert rig.cpu.vmrun(guest) == ExitCode.VMMCALL
    sums = [struct.unpack_from("<Q", rig.cpu.states.save(guest).fxsave, 160)[0] for guest in guests]
    assert sums == [150, 250]
    st0 = rig.cpu.states.save(guests[0]).fxsave[32:42]
    assert st0 == struct.pack("<QH", 50 << 58, 0x3FFF + 5)


#: push 2; popf; mov eax, 0xC243FF80; xor ebx, ebx; cmp ebx, eax; cmpxchg8b [0x8000]
_EXCHANGE = b"\x6a\x02\x9d\xb8\x80\xff\x43\xc2\x31\xdb\x39\xc3\x0f\xc7\x0d\x00\x80\x00\x00"
#: the same, but for cmpxchg16b [rsi + 0x8000], rsi being zero
_EXCHANGE_LONG = _EXCHANGE[:12] + b"\x31\xf6\x39\xc3\x48\x0f\xc7\x8e\x00\x80\x00\x00"


@pytest.mark.parametrize("setup", [m.protected(_EXCHANGE + VMMCALL), m.protected(_EXCHANGE + b"\xcd\x30"),
                                   m.protected(_EXCHANGE + b"\xa1\x00\x00\x00\x70"),
                                   m.long_mode(_EXCHANGE_LONG + VMMCALL)])
def test_an_operand_does_not_get_into_the_flags(rig: Rig, setup: m.Setup) -> None:
    """CMPXCHG8B left one there where it came after certain other instructions.  A guest that was interrupted
    there went on in virtual-8086 mode."""
    guest, monitor, _ = new_guest(rig, setup)
    flags = []

    def look(code: int) -> bool:
        flags.append(rig.cpu.regs.rflags())
        return False

    monitor.act = look
    rig.cpu.vmrun(guest)
    rig.cpu.evict()
    assert [seen & ~0x8D5 for seen in (*flags, guest.vmcb.rflags)] == [2, 2]


def test_interrupt_window_stays_with_its_guest(rig: Rig) -> None:
    waiting, _, _ = new_guest(rig, m.protected(VMMCALL))
    waiting.vmcb.intercept(ExitCode.VINTR)
    rig.cpu.vmrun(waiting)
    rig.cpu.window(True)
    setup = m.protected(b"\x90" * 8 + VMMCALL)
    setup.cpu.rflags = 0x202
    other, monitor, _ = new_guest(rig, setup)
    other.vmcb.intercept(ExitCode.VINTR)
    assert rig.cpu.vmrun(other) == ExitCode.VMMCALL
    assert waiting.vmcb.v_irq and monitor.codes == [ExitCode.VMMCALL]
    rig.cpu.vmrun(waiting)
    rig.cpu.window(False)
    rig.cpu.evict()
    assert not waiting.vmcb.v_irq


def test_translations_are_dropped_for_every_frame_named(rig: Rig) -> None:
    """Code on three pages, changed from outside, one call for all of them."""
    setup = m.protected(b"\xb8\x01\x00\x00\x00\xe9" + struct.pack("<i", 0x1000 - 10))
    setup.put(0x2000, b"\x83\xc0\x10\xe9" + struct.pack("<i", 0x8000 - 0x2008))
    setup.put(0x8000, b"\x05\x00\x01\x00\x00" + VMMCALL)
    guest, _, block = new_guest(rig, setup)
    assert rig.cpu.vmrun(guest) == ExitCode.VMMCALL and rig.cpu.q[0] == 0x111
    for page, offset in ((1, 1), (2, 2), (8, 2)):
        rig.pool.view[block.p2m.for_read(page * 4096 + offset, rig.frames())] += 1
    frames = [block.p2m.leaf[page] >> 12 & 0xFFFFFF for page in (1, 2, 8)]
    rig.cpu.invalidate(min(frames), max(frames) - min(frames) + 1)
    guest.vmcb.rip = m.CODE
    assert rig.cpu.vmrun(guest) == ExitCode.VMMCALL and rig.cpu.q[0] == 2 + 0x11 + 0x200
    rig.cpu.evict()


# -- kicks and lifetimes ------------------------------------------------------------------------------------


def test_kick_by_time(rig: Rig) -> None:
    guest, _, _ = new_guest(rig, m.protected(SPIN))
    when = time.monotonic_ns() + 1_000_000
    rig.cpu.kicker.at(when)
    assert rig.cpu.vmrun(guest) == ExitCode.INTR
    assert time.monotonic_ns() >= when
    # it repeats until it is set again: a guest that is entered late is stopped all the same
    assert rig.cpu.vmrun(guest) == ExitCode.INTR
    rig.cpu.rest()


def test_kick_by_input(rig: Rig) -> None:
    guest, monitor, _ = new_guest(rig, m.protected(b"\xe6\x80" + SPIN))
    near, far = socket.socketpair()
    with near, far:
        rig.cpu.kick_on_readable(near.fileno())
        monitor.act = lambda port: bool(far.send(b"x"))     # at its OUT: from inside the guest
        assert rig.cpu.vmrun(guest) == ExitCode.INTR


@pytest.fixture
def few_signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    left = kick._free_signals[-1:]
    del kick._free_signals[-1:]
    monkeypatch.setattr(kick, "_free_signals", left)
    yield left
    monkeypatch.undo()
    kick._free_signals.extend(left)


def test_signals_are_given_back(few_signals: list[int]) -> None:
    pool = Pool(1 << 20)
    for _ in range(3):
        cpu = Cpu(pool)
        with pytest.raises(OSError, match="no real-time signal is left"):
            Cpu(pool)
        cpu.close()
        cpu.close()
    assert len(few_signals) == 1


def test_host_area_is_out_of_reach(rig: Rig) -> None:
    """No nested table leads above the pool, but to the device window."""
    _, _, block = new_guest(rig, m.protected(b""))
    tables = range(block.p2m.first, block.p2m.leaf_first)
    for frame in tables:
        for entry in rig.pool.page(frame).cast("Q"):
            assert entry & 0x000F_FFFF_FFFF_F000 < rig.pool.size < HOST_AREA
