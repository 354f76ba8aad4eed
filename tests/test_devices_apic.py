# SPDX-License-Identifier: GPL-2.0-or-later
"""Local APIC and I/O APIC: delivery, priorities, modes, and what raises #GP."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.devices_rig import Rig
from vmm.x86.faults import GeneralProtection

ID, VERSION, TPR, PPR, EOI, LDR, DFR, SVR = 2, 3, 8, 0xA, 0xB, 0xD, 0xE, 0xF
ISR, TMR, IRR, ESR, ICR, ICR_HIGH = 0x10, 0x18, 0x20, 0x28, 0x30, 0x31
LVT_LINT0, LVT_ERROR, SELF_IPI = 0x35, 0x37, 0x3F
LEVEL, LOGICAL, MASKED = 1 << 15, 1 << 11, 1 << 16
APIC_BASE = 0x1B


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    rig.enable_apic()
    return rig


def test_firmware_leaves_virtual_wire_mode() -> None:
    """`nolapic`: a kernel that never touches the APIC gets the 8259's interrupts through it."""
    rig = Rig()
    rig.setup_pics()
    rig.interrupts.isa_line(4)(True)
    assert rig.interrupts.acknowledge() == 0x34


def test_a_masked_lint0_shuts_the_8259_out(rig: Rig) -> None:
    rig.setup_pics()
    rig.interrupts.isa_line(4)(True)
    assert not rig.interrupts.output
    rig.apic_write(LVT_LINT0, 0x700)
    assert rig.interrupts.acknowledge() == 0x34


def test_lint0_can_be_a_fixed_interrupt(rig: Rig) -> None:
    """Linux's "Virtual Wire IRQ" fallback for the timer."""
    rig.setup_pics()
    rig.apic_write(LVT_LINT0, 0x52)
    rig.interrupts.isa_line(0)(True)
    assert rig.interrupts.acknowledge() == 0x52


def test_identity(rig: Rig) -> None:
    assert rig.apic_read(ID) == 0
    assert rig.apic_read(VERSION) == 0x50014
    assert rig.ioapic_read(0) == 1 << 24
    assert rig.ioapic_read(1) == 0x170011


def test_edge_interrupt_through_the_ioapic(rig: Rig) -> None:
    rig.route(4, 0x44)
    line = rig.interrupts.isa_line(4)
    line(True)
    assert rig.apic_read(IRR + 2) == 1 << 4
    assert rig.interrupts.acknowledge() == 0x44
    assert rig.apic_read(ISR + 2) == 1 << 4
    assert rig.apic_read(PPR) == 0x40
    rig.apic_write(EOI, 0)
    assert rig.interrupts.acknowledge() is None
    line(False)
    line(True)
    assert rig.interrupts.acknowledge() == 0x44


def test_the_timer_interrupt_is_on_pin_2(rig: Rig) -> None:
    rig.route(2, 0x30)
    rig.interrupts.isa_line(0)(True)
    assert rig.interrupts.acknowledge() == 0x30


def test_an_edge_at_a_masked_pin_is_lost(rig: Rig) -> None:
    rig.route(4, MASKED | 0x44)
    rig.interrupts.isa_line(4)(True)
    rig.route(4, 0x44)
    assert not rig.interrupts.output


def test_level_interrupt_comes_again_until_released(rig: Rig) -> None:
    rig.route(9, LEVEL | 0x49)
    line = rig.interrupts.isa_line(9)
    line(True)
    assert rig.interrupts.acknowledge() == 0x49
    assert rig.ioapic_read(0x10 + 18) & 1 << 14
    assert rig.apic_read(TMR + 2) == 1 << 9
    rig.apic_write(EOI, 0)
    assert rig.interrupts.acknowledge() == 0x49
    line(False)
    rig.apic_write(EOI, 0)
    assert not rig.interrupts.output
    assert not rig.ioapic_read(0x10 + 18) & 1 << 14


def test_a_level_interrupt_masked_while_asserted_waits(rig: Rig) -> None:
    rig.route(9, LEVEL | MASKED | 0x49)
    rig.interrupts.isa_line(9)(True)
    assert not rig.interrupts.output
    rig.route(9, LEVEL | 0x49)
    assert rig.interrupts.acknowledge() == 0x49


def test_switching_to_edge_drops_remote_irr(rig: Rig) -> None:
    """How kernels unwedge a level interrupt without an EOI register."""
    rig.route(9, LEVEL | 0x49)
    rig.interrupts.isa_line(9)(True)
    rig.route(9, MASKED | 0x49)
    assert not rig.ioapic_read(0x10 + 18) & 1 << 14


def test_read_only_bits_of_an_entry_stay(rig: Rig) -> None:
    rig.route(3, 0xFFFF_FFFF_FFFF_FFFF)
    assert rig.ioapic_read(0x10 + 6) == 0x1_AFFF
    assert rig.ioapic_read(0x10 + 7) == 0xFF00_0000
    assert rig.ioapic_read(0x10 + 48) == 0


@pytest.mark.parametrize(("destination", "dfr", "ldr", "accepted"), [
    (0x01, 0xFFFF_FFFF, 0x01, True), (0x02, 0xFFFF_FFFF, 0x01, False), (0xFF, 0xFFFF_FFFF, 0x80, True),
    (0x21, 0x0FFF_FFFF, 0x21, True), (0x31, 0x0FFF_FFFF, 0x21, False), (0xF1, 0x0FFF_FFFF, 0x21, True),
    (0x22, 0x0FFF_FFFF, 0x21, False)])
def test_logical_destinations(rig: Rig, destination: int, dfr: int, ldr: int, accepted: bool) -> None:
    rig.apic_write(DFR, dfr)
    rig.apic_write(LDR, ldr << 24)
    rig.route(4, destination << 56 | LOGICAL | 0x44)
    rig.interrupts.isa_line(4)(True)
    assert rig.interrupts.output == accepted


def test_a_higher_class_interrupts_a_lower(rig: Rig) -> None:
    rig.lapic.accept(0x45)
    assert rig.interrupts.acknowledge() == 0x45
    rig.lapic.accept(0x4F)
    assert not rig.interrupts.output
    rig.lapic.accept(0x51)
    assert rig.interrupts.acknowledge() == 0x51
    rig.apic_write(EOI, 0)
    assert not rig.interrupts.output
    rig.apic_write(EOI, 0)
    assert rig.interrupts.acknowledge() == 0x4F


def test_task_priority_and_cr8(rig: Rig) -> None:
    rig.lapic.accept(0x45)
    rig.apic_write(TPR, 0x40)
    assert not rig.interrupts.output
    assert rig.lapic.cr8 == 4
    rig.lapic.cr8 = 3
    assert rig.interrupts.output
    assert rig.apic_read(TPR) == 0x30


def test_self_interrupts(rig: Rig) -> None:
    rig.apic_write(ICR, 1 << 18 | 0x61)
    assert rig.interrupts.acknowledge() == 0x61
    rig.apic_write(EOI, 0)
    rig.apic_write(ICR_HIGH, 0)
    rig.apic_write(ICR, 0x62)
    assert rig.interrupts.acknowledge() == 0x62
    rig.apic_write(EOI, 0)
    rig.apic_write(ICR_HIGH, 5 << 24)
    rig.apic_write(ICR, 0x63)
    rig.apic_write(ICR, 3 << 18 | 0x64)
    assert not rig.interrupts.output


def test_nmi_to_self(rig: Rig) -> None:
    called: list[bool] = []
    rig.interrupts.on_output = lambda: called.append(rig.interrupts.nmi_pending)
    rig.apic_write(ICR, 1 << 18 | 4 << 8)
    assert rig.interrupts.nmi_pending and called == [True]
    assert not rig.interrupts.output


def test_start_up_messages_mean_nothing_to_a_lone_processor(rig: Rig) -> None:
    for mode in (5, 6):
        rig.apic_write(ICR, 3 << 18 | mode << 8 | 0x9A)
        rig.apic_write(ICR, 2 << 18 | mode << 8 | 0x9A)
    assert not rig.interrupts.output


def test_errors_are_latched_and_interrupt(rig: Rig) -> None:
    rig.apic_write(LVT_ERROR, 0xFE)
    rig.apic_write(ICR, 1 << 18 | 0x05)
    assert rig.interrupts.acknowledge() == 0xFE
    assert rig.apic_read(ESR) == 0
    rig.apic_write(ESR, 0)
    assert rig.apic_read(ESR) == 0x20
    assert rig.apic_read(0x3D) == 0
    rig.apic_write(ESR, 0)
    assert rig.apic_read(ESR) == 0x80


def test_an_error_interrupt_with_an_illegal_vector_is_an_error_too(rig: Rig) -> None:
    rig.apic_write(LVT_ERROR, 0x03)
    rig.apic_write(ICR, 1 << 18 | 0x05)
    rig.apic_write(ESR, 0)
    assert rig.apic_read(ESR) == 0x60


def test_a_software_disabled_apic_masks_and_refuses() -> None:
    rig = Rig()
    rig.route(4, 0x44)
    rig.interrupts.isa_line(4)(True)
    assert rig.apic_read(IRR + 2) == 0
    rig.apic_write(0x37, 0xFE)
    assert rig.apic_read(0x37) == 0x100FE


def test_spurious_acknowledge_gives_nothing(rig: Rig) -> None:
    rig.lapic.accept(0x45)
    rig.apic_write(TPR, 0xFF)
    assert rig.interrupts.acknowledge() is None


def test_modes_change_only_as_the_manual_allows() -> None:
    rig = Rig()
    xapic, x2apic, off, invalid = 0xFEE0_0900, 0xFEE0_0D00, 0xFEE0_0100, 0xFEE0_0500
    lapic = rig.lapic
    assert lapic.msr_read(APIC_BASE) == xapic
    lapic.msr_write(APIC_BASE, xapic)
    for refused in (invalid, xapic | 1, 1 << 40 | xapic):
        with pytest.raises(GeneralProtection):
            lapic.msr_write(APIC_BASE, refused)
    lapic.msr_write(APIC_BASE, x2apic)
    with pytest.raises(GeneralProtection):
        lapic.msr_write(APIC_BASE, xapic)
    lapic.msr_write(APIC_BASE, off)
    with pytest.raises(GeneralProtection):
        lapic.msr_write(APIC_BASE, x2apic)
    lapic.msr_write(APIC_BASE, xapic)


def test_a_disabled_apic_lets_the_8259_through(rig: Rig) -> None:
    rig.setup_pics()
    rig.lapic.msr_write(APIC_BASE, 0xFEE0_0100)
    assert rig.apic_read(VERSION) == 0xFFFF_FFFF
    rig.interrupts.isa_line(4)(True)
    assert rig.interrupts.acknowledge() == 0x34


def test_the_registers_move_with_the_base(rig: Rig) -> None:
    rig.lapic.msr_write(APIC_BASE, 0xFED4_0900)
    assert rig.mmio_read(0xFED4_0030) == 0x50014
    assert rig.apic_read(VERSION) == 0xFFFF_FFFF
    rig.lapic.msr_write(APIC_BASE, 0xFEC0_0900)
    assert rig.ioapic_read(1) == 0x170011
    rig.lapic.msr_write(APIC_BASE, 0xFEE0_0900)
    assert rig.apic_read(VERSION) == 0x50014


def test_x2apic_registers(rig: Rig) -> None:
    rig.enable_x2apic()
    lapic = rig.lapic
    assert rig.apic_read(VERSION) == 0xFFFF_FFFF
    identity = [lapic.msr_read(0x800 + register) for register in (ID, VERSION, LDR, SVR)]
    assert identity == [0, 0x50014, 1, 0x1FF]
    lapic.msr_write(0x808, 0x20)
    assert lapic.msr_read(0x80A) == 0x20
    lapic.msr_write(0x83F, 0x71)
    assert rig.interrupts.acknowledge() == 0x71
    lapic.msr_write(0x80B, 0)
    lapic.msr_write(0x830, 0x72)
    assert lapic.msr_read(0x830) == 0x72
    assert rig.interrupts.acknowledge() == 0x72
    lapic.msr_write(0x80B, 0)
    lapic.msr_write(0x830, 9 << 32 | 0x73)
    assert not rig.interrupts.output


def test_read_only_lvt_bits_are_ignored(rig: Rig) -> None:
    """Linux's disconnect_bsp_APIC sets them on its way to power-off."""
    rig.enable_x2apic()
    rig.lapic.msr_write(0x835, 0x5700)
    assert rig.lapic.msr_read(0x835) == 0x0700


def test_x2apic_physical_destination_through_the_ioapic(rig: Rig) -> None:
    rig.enable_x2apic()
    rig.route(4, 0x44)
    rig.interrupts.isa_line(4)(True)
    assert rig.interrupts.acknowledge() == 0x44


@pytest.mark.parametrize(("number", "value"), [
    (0x802, 0), (0x803, 0), (0x80A, 0), (0x80B, 1), (0x80D, 0), (0x80E, 0), (0x808, 0x100), (0x828, 1),
    (0x830, 1 << 12), (0x831, 0), (0x832, 1 << 13), (0x838, 1 << 32), (0x83E, 4), (0x83F, 0x100), (0x840, 0),
    (0x8FF, 0), (0x810, 0)])
def test_x2apic_writes_that_fault(rig: Rig, number: int, value: int) -> None:
    rig.enable_x2apic()
    with pytest.raises(GeneralProtection):
        rig.lapic.msr_write(number, value)


@pytest.mark.parametrize("number", [0x800, 0x809, 0x80B, 0x80C, 0x80E, 0x831, 0x83F, 0x840, 0x8FF])
def test_x2apic_reads_that_fault(rig: Rig, number: int) -> None:
    rig.enable_x2apic()
    with pytest.raises(GeneralProtection):
        rig.lapic.msr_read(number)


def test_x2apic_msrs_fault_in_xapic_mode(rig: Rig) -> None:
    with pytest.raises(GeneralProtection):
        rig.lapic.msr_read(0x802)
    with pytest.raises(GeneralProtection):
        rig.lapic.msr_write(0x80B, 0)


STEPS = st.lists(st.one_of(
    st.tuples(st.just("register"), st.integers(0, 0x3F), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("msr"), st.sampled_from([0x1B, 0x6E0, *range(0x800, 0x840)]),
              st.integers(0, 2**64 - 1)),
    st.tuples(st.just("mode"), st.sampled_from([0x100, 0x900, 0xD00]), st.just(0)),
    st.tuples(st.just("route"), st.integers(0, 23), st.integers(0, 2**64 - 1)),
    st.tuples(st.just("line"), st.integers(0, 23), st.integers(0, 1)),
    st.tuples(st.just("acknowledge"), st.just(0), st.just(0)),
    st.tuples(st.just("advance"), st.integers(0, 10**9), st.just(0))), max_size=50)


@given(STEPS, st.booleans())
def test_output_says_what_acknowledge_will_do(steps: list[tuple[str, int, int]], enabled: bool) -> None:
    """Whatever a guest writes: nothing but #GP comes out, and readiness is always up to date."""
    rig = Rig()
    rig.setup_pics()
    if enabled:
        rig.enable_apic()
    for what, where, value in steps:
        try:
            if what == "register":
                rig.apic_write(where, value)
                rig.apic_read(where)
            elif what == "msr":
                rig.lapic.msr_write(where, value)
                rig.lapic.msr_read(where)
            elif what == "mode":
                rig.lapic.msr_write(APIC_BASE, 0xFEE0_0000 | where)
        except GeneralProtection:
            pass
        if what == "route":
            rig.route(where, value)
        elif what == "line" and where != 2:
            rig.interrupts.isa_line(where)(bool(value))
        elif what == "advance":
            rig.stall(where)
        elif what == "acknowledge":
            ready = rig.interrupts.output
            vector = rig.interrupts.acknowledge()
            assert (vector is not None) == ready
            assert vector is None or vector >= 16 or not enabled
        ready, extint = rig.lapic.ready, rig.lapic.accepts_extint
        rig.lapic._prioritize()
        rig.lapic._reroute()
        assert (rig.lapic.ready, rig.lapic.accepts_extint) == (ready, extint)
        assert rig.interrupts.output == (ready or (rig.interrupts.pic.master.output and extint))
