# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that change their monitor, back and forth, at any moment: nothing is lost, or happens twice."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hostd.translations import Translations
from tests import hw_modes as m
from tests.bt_values import fx_image
from tests.hw_rig import Machine, Rig, machines
from tests.test_monitor_kernels import GOOD, MIX, PRIMES, boot, last_line
from tests.test_monitor_paging import DATA, HLT, word
from vmm.bt.native.block import LIVE_FLAGS
from vmm.monitor import Stop, StopReason
from vmm.silicon import layout as at
from vmm.state import CpuState, decode, encode
from vmm.vmcb import Event, EventType
from vmm.x86.flags import CR4_OSFXSR, CR4_PAE, EFER_NXE, RFLAGS_AF, RFLAGS_IF

OTHER = {"hw": "bt", "bt": "hw"}
#: constants, and the number of rounds left
FIXED, COUNT = DATA + 0x100, DATA + 0x800
AROUND = b"\xeb\xfe"                                        # jmp to itself


def switched(rig: Rig, machine: Machine) -> Machine:
    """The machine under its other monitor, as the daemon has it changed."""
    state = decode(encode(machine.capture()))
    state.monitor = OTHER[state.monitor]
    Translations(rig.cpu).forget_guest(machine.block.leaf(), 0)
    printed = machine.printed
    machines.remove(machine)
    machine = rig.again(machine, state)
    machine.printed[:0] = printed
    return machine


def for_a_while(us: int) -> int:
    return time.monotonic_ns() + us * 1000


# --- kernels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["hw", "bt"])
@pytest.mark.parametrize(("name", "append"), [MIX, PRIMES])
def test_kernels_come_to_the_same_end(rig: Rig, name: str, append: str, first: str) -> None:
    undisturbed = boot(rig, name, append)
    assert undisturbed.go() == GOOD
    rig.monitor = first
    machine = boot(rig, name, append)
    turns = random.Random(5)
    switches = 0
    while not (stop := machine.run(for_a_while(turns.randrange(200, 3000)))).reason.final:
        if switches < 40:
            machine = switched(rig, machine)
            switches += 1
    assert (stop, machine.text.splitlines()[-1]) == (GOOD, last_line(undisturbed))
    assert switches > 3


# --- states ------------------------------------------------------------------------------------------------


def _pae() -> m.Setup:
    setup = m.protected(AROUND, paging=True)
    setup.cpu.cr3, setup.cpu.efer = 0x3_0000, EFER_NXE
    setup.cpu.cr4 |= CR4_PAE
    setup.put(0x3_0000, struct.pack("<4Q", 0x3_1001, 0, 0, 0))
    setup.put(0x3_1000, struct.pack("<2Q", 0x87, 0x20_0087))
    return setup


MODES: dict[str, Callable[[], m.Setup]] = {
    "real": lambda: m.real(AROUND),
    "protected": lambda: m.protected(AROUND),
    "user": lambda: m.protected(AROUND, 3, paging=True),
    "16-bit": lambda: m.protected(AROUND, wide=False),
    "paging": lambda: m.protected(AROUND, paging=True),
    "pae": _pae,
    "v86": lambda: m.v86(AROUND),
    "long": lambda: m.long_mode(AROUND),
    "compatibility": lambda: m.long_mode(AROUND, 3, compatibility=True),
}


def filled(mode: str, seed: int) -> m.Setup:
    """A processor in this mode, with something in everything."""
    chance = random.Random(seed)
    setup = MODES[mode]()
    cpu = setup.cpu
    for register in (0, 1, 2, 3, 5, 6, 7):
        cpu.gpr[register] = chance.getrandbits(32)
    cpu.rflags |= chance.getrandbits(12) & LIVE_FLAGS
    cpu.fxsave = _with_error_summary(fx_image(chance))
    cpu.cr2 = chance.getrandbits(32)
    cpu.dr[:4] = [chance.getrandbits(32) for _ in range(4)]
    cpu.dr[6] |= chance.getrandbits(4)
    cpu.dr[7] |= chance.getrandbits(8)
    cpu.msrs = {0x174: chance.getrandbits(16), 0x175: chance.getrandbits(32), 0x176: chance.getrandbits(32),
                0xC0000081: chance.getrandbits(32) << 32, 0xC0000100: cpu.fs.base, 0xC0000101: cpu.gs.base}
    cpu.nmi_masked, cpu.interrupt_shadow = chance.random() < 0.5, chance.random() < 0.5
    return setup


def _with_error_summary(fxsave: bytes) -> bytes:
    """ES and B of the x87 status word are what its other bits and the control word make them."""
    control, status = struct.unpack_from("<HH", fxsave)
    status = status & 0x7F7F | (0x8080 if status & ~control & 0x3F else 0)
    return fxsave[:2] + struct.pack("<H", status) + fxsave[4:]


def timeless(machine: Machine) -> CpuState:
    cpu = machine.capture().cpu
    cpu.tsc = cpu.tsc_offset = 0
    return cpu


def test_a_state_is_the_same_after_running_under_either_monitor(rig: Rig) -> None:
    @settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(st.sampled_from(sorted(MODES)), st.integers(0, 1 << 32))
    def check(mode: str, seed: int) -> None:
        setup = filled(mode, seed)
        cpu = setup.cpu
        machine = rig.machine(setup.state, setup.writes)
        untouched, ran = [timeless(machine)], []
        for _ in range(2):
            machine = switched(rig, machine)
            untouched.append(timeless(machine))
        assert untouched[1:] == untouched[:1] * 2 and untouched[0].interrupt_shadow == cpu.interrupt_shadow
        for _ in range(4):
            assert machine.run(for_a_while(200)).reason is StopReason.SLICE
            ran.append(timeless(machine))
            ran[-1].interrupt_shadow = False                # an instruction was executed, or was not
            machine = switched(rig, machine)
        assert ran[1:] == ran[:1] * 3
        assert ran[0].gpr == cpu.gpr and ran[0].dr == cpu.dr
        rig.clear()

    check()


@pytest.mark.parametrize("first", ["hw", "bt"])
def test_what_a_guest_waits_for_comes_under_the_other(rig: Rig, first: str) -> None:
    """Halted, with an interrupt accepted, or one in the controller, an NMI, and in the shadow of STI."""
    rig.monitor = first
    setup = m.protected(b"\xfb\xf4" + b"\x40\xf4")          # sti; hlt; inc eax; hlt
    setup.cpu.gpr[0] = 0
    machine = rig.machine(setup.state, setup.writes)
    machine.board.lapic.write(0xF0, 4, 0x1FF)
    assert machine.go() == Stop(StopReason.HALTED)
    machine = switched(rig, machine)
    assert machine.halted and not machine.wake_pending()
    machine.board.lapic.accept(0x40)
    machine = switched(rig, machine)
    assert machine.wake_pending()
    assert machine.go() == Stop(StopReason.HALTED)
    assert machine.processor.q[at.RIP] == m.handler(0x40) + 1
    assert machine.processor.q[0] == 0

    accepted = m.protected(AROUND)
    accepted.cpu.rflags |= RFLAGS_IF
    accepted.cpu.pending_event = Event(0x41, EventType.INTR).encode()
    machine = switched(rig, rig.machine(accepted.state, accepted.writes))
    assert machine.go() == Stop(StopReason.HALTED)
    assert machine.processor.q[at.RIP] == m.handler(0x41) + 1

    shadow = m.protected(b"\x40" + AROUND)
    shadow.cpu.gpr[0] = 0
    shadow.cpu.rflags |= RFLAGS_IF
    shadow.cpu.interrupt_shadow = True
    machine = rig.machine(shadow.state, shadow.writes)
    machine.board.lapic.write(0xF0, 4, 0x1FF)
    machine.board.lapic.accept(0x42)
    machine = switched(rig, machine)
    machine.board.interrupts.nmi_pending = True
    machine = switched(rig, machine)
    assert machine.go() == Stop(StopReason.HALTED)
    assert machine.processor.q[0] == 1                      # the shadow's one instruction came first
    assert machine.processor.q[at.RIP] == m.handler(2) + 1 and not machine.board.interrupts.nmi_pending


# --- programs ----------------------------------------------------------------------------------------------

_REGISTERS = st.sampled_from((0, 1, 2, 3, 5, 6, 7))         # all but ESP
_CELLS = st.integers(0, 63).map(lambda cell: word(DATA + 4 * cell))


@st.composite
def instruction(draw: st.DrawFn) -> bytes:
    """One that leaves nothing undefined but AF, and touches no memory but the cells."""
    target, source = draw(_REGISTERS), draw(_REGISTERS)
    both = bytes([0xC0 | source << 3 | target])
    memory = bytes([source << 3 | 5]) + draw(_CELLS)
    operation, condition = draw(st.integers(0, 7)) << 3, draw(st.integers(0, 15))
    return draw(st.sampled_from((
        bytes([operation | 1]) + both,                              # arithmetic and logic
        bytes([operation | 1]) + memory, bytes([operation | 3]) + memory,
        bytes([0x83, 0xC0 | operation | target, draw(st.integers(0, 127))]),
        bytes([0x40 + target]), bytes([0x48 + target]), bytes([0xF7, 0xD8 | target]),
        b"\x87" + both, b"\x87" + memory, b"\x0f\xb6" + memory, bytes([0x0F, 0xC8 + target]),
        bytes([0xC1, 0xC0 | target, 1]),
        bytes([0x0F, 0x40 + condition]) + both, bytes([0x0F, 0x90 + condition, 0xC0]),
        bytes([0x70 + condition, 2]) + b"\xf7\xd0",                 # jcc over not eax
        bytes([0x50 + source, 0x58 + target]), b"\xff\x35" + draw(_CELLS) + bytes([0x58 + target]),
        b"\x9c\x9d", b"\xfa", b"\x0f\x20\xc0\x0f\x22\xc0",          # pushf, popf; cli; CR0
        b"\x0f\x21\xf8", b"\x0f\x01\x0d" + word(FIXED + 32),        # mov eax, dr7; sidt
        b"\x66\x0f\xfe" + both, b"\x66\x0f\xef" + bytes([source << 3 | 5]) + word(FIXED),
        b"\xd9\xe8\xde\xc1", b"\xdc\x05" + word(FIXED + 16),        # fld1, faddp; fadd
    )))


def program(body: bytes, rounds: int) -> m.Setup:
    """Go through `body` so many times, and halt."""
    code = (b"\xdb\xe3\xd9\xee" + b"\xbc" + word(m.STACK) + body + b"\xff\x0d" + word(COUNT) + b"\x74\x05")
    code += b"\xe9" + struct.pack("<i", 4 - len(code) - 5)
    setup = m.protected(code + HLT, paging=True)
    setup.cpu.cr4 |= CR4_OSFXSR
    setup.put(DATA, bytes(range(256)) + struct.pack("<4Id", *range(1, 5), 1.25))
    setup.put(COUNT, word(rounds))
    return setup


def outcome(machine: Machine) -> tuple[list[int], int, bytes, bytes]:
    cpu = machine.capture().cpu
    return (cpu.gpr, cpu.rflags & LIVE_FLAGS & ~RFLAGS_AF, cpu.fxsave[32:288],
            machine.memory.read(DATA, COUNT - DATA))


def compare(rig: Rig, body: bytes, first: str, turns: list[int]) -> int:
    """A program comes to its end with these turns under one monitor and the other as it does under hw alone;
    how many times it changed."""
    setup = program(body, 8_000)
    rig.monitor = "hw"
    undisturbed = rig.machine(setup.state, setup.writes)
    assert undisturbed.go() == Stop(StopReason.HALTED)
    rig.monitor = first
    machine = rig.machine(setup.state, setup.writes)
    switches = 0
    for us in turns:
        if machine.run(for_a_while(us)).reason is not StopReason.SLICE:
            break
        machine = switched(rig, machine)
        switches += 1
    assert machine.go() == Stop(StopReason.HALTED)
    assert outcome(machine) == outcome(undisturbed)
    return switches


def test_programs_have_the_same_result(rig: Rig) -> None:
    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow],
              phases=[Phase.explicit, Phase.generate])
    @given(st.lists(instruction(), min_size=5, max_size=60).map(b"".join), st.sampled_from(["hw", "bt"]),
           st.lists(st.integers(20, 600), min_size=4, max_size=12))
    def check(body: bytes, first: str, turns: list[int]) -> None:
        try:
            switches.append(compare(rig, body, first, turns))
        finally:
            rig.clear()

    switches: list[int] = []
    check()
    assert sum(switches) > 20
