# SPDX-License-Identifier: GPL-2.0-or-later
"""Instructions that leave the guest, or that the silicon leaves to us: system calls, MSRs, registers."""

from __future__ import annotations

import copy
import re
import struct
import time

import pytest

from tests import hw_modes as m
from tests.hw_rig import Refusing, Rig, frame, halted, vector_of
from vmm.exitcodes import ExitCode
from vmm.monitor import Stop, StopReason
from vmm.silicon import layout as at
from vmm.state import CpuState, StateError
from vmm.x86.flags import (
    CR4_DE,
    CR4_PAE,
    CR4_PGE,
    EFER_SCE,
    RFLAGS_IF,
    RFLAGS_RF,
    RFLAGS_TF,
    RFLAGS_VM,
)

MONITORS = ("hw", "bt")
DB, UD, GP, PF = 1, 6, 13, 14
HALT = b"\xf4"
TARGET = 0x9000
RAX, RCX, RDX, RBX, RSP, RSI, RDI, R11 = 0, 1, 2, 3, 4, 6, 7, 11
STAR, LSTAR, CSTAR, SFMASK, SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP = (
    0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0x174, 0x175, 0x176)


# -- SYSCALL, SYSENTER --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compatibility", [False, True])
def test_syscall_in_long_mode(rig: Rig, compatibility: bool) -> None:
    setup = m.long_mode(b"\x90\x0f\x05", 3, compatibility=compatibility)
    setup.cpu.rflags = RFLAGS_IF | 0x8D7
    setup.cpu.msrs = {STAR: 0x28 << 32, LSTAR: TARGET, CSTAR: TARGET + 0x10, SFMASK: RFLAGS_IF | 0x800}
    setup.put(TARGET, HALT * 32)
    machine = halted(rig, setup)
    q, regs = machine.processor.q, machine.processor.regs
    assert q[at.RIP] == (TARGET + 0x10 if compatibility else TARGET) + 1
    assert (q[RCX], q[R11]) == (m.CODE + 3, RFLAGS_IF | 0x8D7)
    assert regs.rflags() == 0x0D7 and regs.cpl == 0
    assert (q[at.CS] & 0xFFFF, q[at.SS] & 0xFFFF, q[RSP]) == (0x28, 0x30, m.STACK)
    assert regs.segment(at.CS).attributes == 0xA9B


def test_syscall_and_back(rig: Rig) -> None:
    """SYSRET is the silicon's: it finds what SYSCALL left."""
    setup = m.long_mode(b"\x0f\x05\xf4", 3)
    setup.cpu.rflags = RFLAGS_IF | 2
    setup.cpu.msrs = {STAR: 0x28 << 32 | 0x23 << 48, LSTAR: TARGET, SFMASK: RFLAGS_IF}
    setup.put(TARGET, b"\x48\x0f\x07")                              # sysretq
    machine = halted(rig, setup)
    assert vector_of(machine) == GP                                 # HLT in ring 3
    assert frame(machine, "4Q") == [0, m.CODE + 2, 0x33, RFLAGS_RF | RFLAGS_IF | 2]


def test_syscall_in_legacy_mode(rig: Rig) -> None:
    setup = m.protected(b"\x0f\x05", 3)
    setup.cpu.efer, setup.cpu.rflags = EFER_SCE, RFLAGS_IF | 0x43
    setup.cpu.msrs = {STAR: 0x08 << 32 | TARGET}
    setup.put(TARGET, HALT)
    machine = halted(rig, setup)
    q = machine.processor.q
    assert (q[at.RIP], q[RCX], q[at.CS] & 0xFFFF) == (TARGET + 1, m.CODE + 2, m.CODE32)
    assert machine.processor.regs.rflags() == 0x43


def test_sysenter_in_legacy_mode(rig: Rig) -> None:
    setup = m.protected(b"\x0f\x34", 3)
    setup.cpu.rflags = RFLAGS_IF | 0x43
    setup.cpu.msrs = {SYSENTER_CS: m.CODE32, SYSENTER_ESP: 0xA000, SYSENTER_EIP: TARGET}
    setup.put(TARGET, HALT)
    machine = halted(rig, setup)
    q = machine.processor.q
    assert (q[at.RIP], q[RSP], q[at.CS] & 0xFFFF, q[at.SS] & 0xFFFF) == (TARGET + 1, 0xA000, m.CODE32, m.DATA)
    assert machine.processor.regs.rflags() == 0x43 and machine.processor.regs.cpl == 0


# -- one instruction, one exception -------------------------------------------------------------------------


def long(code: bytes, cpl: int = 0, **registers: int) -> m.Setup:
    return _with(m.long_mode(code, cpl), registers)


def legacy(code: bytes, cpl: int = 0, **registers: int) -> m.Setup:
    return _with(m.protected(code, cpl), registers)


def _with(setup: m.Setup, registers: dict[str, int]) -> m.Setup:
    for name, value in registers.items():
        if name in ("cr4", "efer"):
            setattr(setup.cpu, name, value)
        else:
            setup.cpu.gpr[("rax", "rcx", "rdx", "rbx").index(name)] = value
    return setup


#: instruction, the exception it gives; the error code is 0 where there is one
REFUSED = {
    "syscall without SCE": (legacy(b"\x0f\x05", 3), UD),
    "sysenter in long mode": (long(b"\x0f\x34", 3), UD),
    "sysenter without a segment": (legacy(b"\x0f\x34", 3), GP),
    "rdmsr of a number that is none": (long(b"\x0f\x32", rcx=0x12345), GP),
    "wrmsr of a number that is none": (long(b"\x0f\x30", rcx=0x12345), GP),
    "wrmsr to EFER of SVME": (long(b"\x0f\x30", rcx=0xC0000080, rax=0x1D01), GP),
    "wrmsr to EFER of LME while paging": (long(b"\x0f\x30", rcx=0xC0000080, rax=0x001), GP),
    "wrmsr to PAT of a reserved type": (long(b"\x0f\x30", rcx=0x277, rax=2), GP),
    "rdmsr in ring 3": (long(b"\x0f\x32", 3, rcx=0x10), GP),
    "hlt in ring 3": (long(b"\xf4", 3), GP),
    "cli in ring 3": (long(b"\xfa", 3), GP),
    "vmrun": (long(b"\x0f\x01\xd8"), UD),
    "vmload": (long(b"\x0f\x01\xda"), UD),
    "vmsave": (long(b"\x0f\x01\xdb"), UD),
    "stgi": (long(b"\x0f\x01\xdc"), UD),
    "clgi": (long(b"\x0f\x01\xdd"), UD),
    "skinit": (long(b"\x0f\x01\xde"), UD),
    "invlpga": (long(b"\x0f\x01\xdf"), UD),
    "monitor": (long(b"\x0f\x01\xc8"), UD),
    "mwait": (long(b"\x0f\x01\xc9"), UD),
    "xsetbv": (long(b"\x0f\x01\xd1"), UD),
    "rdpmc": (long(b"\x0f\x33"), GP),
    "CR4 with a bit that is none": (long(b"\x0f\x22\xe0", rax=0x8000_0020), GP),
    "CR4 with VME, which CPUID does not offer": (long(b"\x0f\x22\xe0", rax=0x21), GP),
    "CR4 without PAE in long mode": (long(b"\x0f\x22\xe0", rax=0), GP),
    "CR8 beyond 15": (long(b"\x44\x0f\x22\xc0", rax=16), GP),
    "DR7 beyond 32 bits": (long(b"\x0f\x23\xf8", rax=1 << 32), GP),
    "DR6 beyond 32 bits": (long(b"\x0f\x23\xf0", rax=1 << 32), GP),
    "DR5 with debugging extensions": (long(b"\x0f\x23\xe8", cr4=CR4_PAE | CR4_DE), UD),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(rig: Rig, case: str) -> None:
    setup, vector = copy.deepcopy(REFUSED[case])
    code = setup.memory[m.CODE]
    setup.put(m.CODE, b"\x90" + code)
    machine = halted(rig, setup)
    assert vector_of(machine) == vector
    words = frame(machine, "2Q" if setup.cpu.efer & 0x400 else "2I")
    assert words == [0, m.CODE + 1] if vector == GP else words[0] == m.CODE + 1


# -- what is done in their stead ----------------------------------------------------------------------------


def test_cpuid(rig: Rig) -> None:
    setup = long(b"\x0f\xa2\xf4", rax=(0xABCD << 32) | 0x4000_0000)
    machine = halted(rig, setup)
    q = machine.processor.q
    assert struct.pack("<3I", q[RBX], q[RCX], q[RDX]) == b"KVMKVMKVM\0\0\0"
    assert q[RAX] == 0x4000_0010


@pytest.mark.parametrize(("code", "length"), [(b"\x0f\xa2", 2), (b"\x0f\x32", 2), (b"\x0f\x01\xd9", 3),
                                              (b"\x44\x0f\x22\xc0", 4), (b"\x0f\x09", 2)])
def test_single_steps_over_them(rig: Rig, code: bytes, length: int) -> None:
    """With TF set, each is followed by a debug exception like any other instruction."""
    setup = long(code + b"\x90", rcx=0x10)
    setup.cpu.rflags |= RFLAGS_TF
    machine = halted(rig, setup)
    assert vector_of(machine) == DB
    assert frame(machine, "3Q") == [m.CODE + length, m.CODE64, RFLAGS_TF | 2]
    assert machine.processor.q[machine.processor.place.dr + 6] & 1 << 14


@pytest.mark.parametrize(("number", "cpl", "result"), [(5, 0, 0), (999, 0, -1000), (5, 3, -1)])
def test_hypercalls(rig: Rig, number: int, cpl: int, result: int) -> None:
    machine = halted(rig, long(b"\x0f\x01\xd9\xf4", cpl, rax=number))
    assert machine.processor.q[RAX] == result & (1 << 64) - 1
    assert machine.block.accounting.hypercalls == 1


def test_msrs_are_read_and_written(rig: Rig) -> None:
    """A silicon one in place, a plain one by the table, EFER without what is not the guest's."""
    values = (LSTAR, 0x1234), (0x277, 0x0406), (0xC0000080, 0x901)
    writes = b"".join(b"\xb9" + struct.pack("<I", number) + b"\xb8" + struct.pack("<I", value)
                      + b"\x31\xd2\x0f\x30" for number, value in values)
    reads = b"".join(b"\xb9" + struct.pack("<I", number) + b"\x0f\x32\x50"
                     for number in (LSTAR, 0x277, 0xC0000080, 0x8B))
    machine = halted(rig, long(writes + reads + b"\xf4"))
    assert frame(machine, "4Q") == [0x0800126E, 0xD01, 0x0406, 0x1234]
    counts = {code: count for code, count, _ in machine.block.exit_stats.rows()}
    assert counts[ExitCode.MSR] == 5
    assert machine.capture().cpu.msrs[LSTAR] == 0x1234


def test_guest_tsc(rig: Rig) -> None:
    """RDTSC, RDMSR and the clock agree; WRMSR moves all of them."""
    setup = long(b"\x0f\x32\x50\x0f\x31\x50\x31\xc0\x31\xd2\x0f\x30\x0f\x31\xf4", rcx=0x10)
    setup.cpu.tsc = 1 << 30
    machine = halted(rig, setup)
    by_rdtsc, by_rdmsr = frame(machine, "2Q")
    assert 1 << 30 <= by_rdmsr <= by_rdtsc < (1 << 30) + 10 * rig.khz * 1000
    assert machine.processor.q[RAX] < 10 * rig.khz * 1000 and machine.processor.q[RDX] == 0
    assert machine.clock.tsc() < 1 << 30


def test_task_priority(rig: Rig) -> None:
    code = b"\x44\x0f\x22\xc0\x44\x0f\x20\xc3\xf4"                             # mov cr8, rax; mov rbx, cr8
    machine = halted(rig, long(code, rax=9))
    assert (machine.processor.q[RBX], machine.board.lapic.tpr) == (9, 0x90)
    assert machine.capture().cpu.cr8 == 9


def test_instruction_at_the_end_of_what_is_mapped(rig: Rig) -> None:
    """Only the instruction itself is looked at: what follows it need not be there."""
    setup = long(b"", rax=7)
    setup.cpu.rip = m.WINDOW + 0xFFC
    setup.put(m.WINDOW + 0xFFC, b"\x44\x0f\x22\xc0")
    setup.put(m.PAGES + 8, bytes(8))
    machine = halted(rig, setup)
    assert vector_of(machine) == PF
    assert frame(machine, "2Q") == [0x10, m.WINDOW + 0x1000]
    assert machine.board.lapic.cr8 == 7


def test_breakpoints_are_kept_but_never_armed(rig: Rig) -> None:
    """Neither in this order nor the other, nor by the old names of the registers."""
    arm = b"\xb8\x03\x00\x00\x00\x0f\x23\xf8"                                   # mov eax, 3; mov dr7, rax
    place = b"\xb8" + struct.pack("<I", m.CODE + 40) + b"\x0f\x23\xc0"          # ...; mov dr0, rax
    alias = b"\xb8\x03\x00\x00\x00\x0f\x23\xe8"                                 # mov dr5, rax
    for code in (arm + place, place + arm, place + alias):
        machine = halted(rig, long((code + b"\x0f\x21\xfb").ljust(48, b"\x90") + HALT))
        q = machine.processor.q
        assert vector_of(machine) is None
        assert q[RBX] == 0x403 and machine.capture().cpu.dr[0] == m.CODE + 40


def test_cr4_takes_effect(rig: Rig) -> None:
    """SSE becomes legal, and global pages are flushed."""
    setup = legacy(b"\x0f\x22\xe0\x0f\x28\xc1\x0f\x20\xe3\xf4", rax=0x600 | CR4_PGE)
    machine = halted(rig, setup)
    assert vector_of(machine) is None and machine.processor.q[RBX] == 0x600 | CR4_PGE
    assert vector_of(halted(rig, legacy(b"\x0f\x28\xc1"))) == UD


@pytest.mark.parametrize("code", [b"\x0f\x00\xc0", b"\x0f\x00\xc8", b"\x0f\x01\xe0", b"\x0f\x21\xf8",
                                  b"\x0f\x06", b"\x0f\x20\xc0", b"\x0f\x22\xd0"])
def test_flags_are_not_touched(rig: Rig, code: bytes) -> None:
    """SLDT, STR, SMSW, MOV from DR7, CLTS, MOV from CR0, MOV to CR2."""
    # std; cmp eax, eax; stc; what it is; pushfd; pop ebx
    setup = legacy(b"\xfd\x39\xc0\xf9" + code + b"\x9c\x5b" + HALT)
    q = halted(rig, setup).processor.q
    assert q[RBX] & 0xCD5 == 0x445


def test_flags_do_not_outlive_iret(rig: Rig) -> None:
    """IOPL 3 in an interrupted context must not stay for the next."""
    to_ring_3 = b"\x6a\x23\x68" + struct.pack("<I", m.STACK) + b"\x6a\x02\x6a\x33\x68" + struct.pack(
        "<I", 0x9800) + b"\x48\xcf"
    setup = long(b"\x0f\x0b")
    setup.cpu.rflags = 0x3002
    setup.put(m.handler(UD), b"\xe9" + struct.pack("<i", TARGET - m.handler(UD) - 5))
    setup.put(TARGET, to_ring_3)
    setup.put(0x9800, b"\xfa")                                                  # cli
    machine = halted(rig, setup)
    assert vector_of(machine) == GP and frame(machine, "2Q") == [0, 0x9800]


# -- devices by memory --------------------------------------------------------------------------------------


def test_devices_by_memory(rig: Rig) -> None:
    code = (b"\xa1\x30\x00\xe0\xfe"                                 # mov eax, [0xfee00030]: APIC version
            b"\xc7\x05\x00\x00\xc0\xfe\x01\x00\x00\x00"             # mov dword [0xfec00000], 1
            b"\x8b\x1d\x10\x00\xc0\xfe"                             # mov ebx, [0xfec00010]: I/O APIC version
            b"\xc7\x05\x80\x00\xe0\xfe\x50\x00\x00\x00"             # mov dword [0xfee00080], 0x50: TPR
            b"\x8b\x0d\x00\x00\x00\xd0\xf4")                        # mov ecx, [0xd0000000]: nobody
    machine = halted(rig, legacy(code))
    q = machine.processor.q
    assert q[RAX] & 0xFF in range(0x10, 0x16)
    assert q[RBX] >> 16 & 0xFF == 23
    assert (q[RCX], machine.board.lapic.tpr) == (0xFFFFFFFF, 0x50)


def test_code_in_a_device(rig: Rig) -> None:
    """There is none; the guest is stopped with a reason, and the CPU is as good as before."""
    machine = rig.machine(*_start(legacy(b"\xb8\x00\x00\xe0\xfe\xff\xe0")))
    stop = machine.go()
    assert stop.reason is StopReason.CRASHED and stop.detail.startswith("the guest cannot go on")
    assert halted(rig, long(b"\xf4")).processor.q[at.RIP] == m.CODE + 1


def test_page_tables_in_a_device(rig: Rig) -> None:
    setup = long(b"\xf4")
    setup.cpu.cr3 = 0xFEE0_0000
    assert rig.machine(*_start(setup)).go().reason.final


def _start(setup: m.Setup) -> tuple[m.MachineState, list[tuple[int, bytes]]]:
    return setup.state, setup.writes


# -- states and frames --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "sentence"), [
    ({"cr0": 0x2000_0011}, "CR0.CD is zero and CR0.NW is set"),
    ({"cr4": 1 << 31}, "a must-be-zero bit of CR4 is set"),
    ({"efer": 0x2000}, "a must-be-zero bit of EFER is set"),
    ({"cr3": 1 << 45}, "a must-be-zero bit of CR3 is set"),
])
def test_state_no_processor_can_be_in(rig: Rig, change: dict[str, int], sentence: str) -> None:
    setup = legacy(b"\xf4")
    for name, value in change.items():
        setattr(setup.cpu, name, value)
    with pytest.raises(StateError, match=re.escape(sentence)):
        rig.machine(*_start(setup))


def test_state_of_reset_runs(rig: Rig) -> None:
    """Where a guest without firmware starts there is nothing: no memory at the reset vector."""
    machine = rig.machine(m.MachineState(m.MEMORY, cpu=CpuState()))
    assert machine.go().reason.final


def test_first_touch_without_a_frame(rig: Rig) -> None:
    setup = legacy(b"\xff\x05\x00\x00\x20\x00\xf4")                 # inc dword [0x200000]
    frames = Refusing(rig.frames(), 1)
    machine = rig.machine(*_start(setup), frames=frames)
    for _ in range(3):
        assert machine.go() == Stop(StopReason.NO_FRAMES)
    frames.period = 1000
    assert machine.go() == Stop(StopReason.HALTED)
    assert machine.memory.read_u32(0x20_0000) == 1


def test_virtual_8086_flag_is_not_the_previous_guests(rig: Rig) -> None:
    """Hidden flags are made anew at each world switch."""
    first = rig.machine(*_start(m.v86(b"\xeb\xfe")))
    assert first.run(_soon()).reason is StopReason.SLICE
    machine = halted(rig, legacy(b"\x0f\x0b"))
    assert not frame(machine, "3I")[2] & RFLAGS_VM
    assert first.run(_soon()).reason is StopReason.SLICE
    assert first.capture().cpu.rflags & RFLAGS_VM


def _soon() -> int:
    return time.monotonic_ns() + 1_000_000
