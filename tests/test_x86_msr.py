# SPDX-License-Identifier: GPL-2.0-or-later
"""The MSR table and the rules of EFER."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.x86 import flags, kvm, msr
from vmm.x86.faults import GeneralProtection

#: what Linux accesses on family 17h, by the version and the machine it finds, not expecting a fault
LINUX_TOUCHES = (0x10, 0x1B, 0x8B, 0xFE, 0x277, 0x2FF, 0xC0000080, 0xC0000081, 0xC0000082, 0xC0000083,
                 0xC0000084, 0xC0000100, 0xC0000101, 0xC0000102, 0x174, 0x175, 0x176, 0xC0010010, 0xC0010015,
                 0xC001001F, 0xC0010055, 0xC0010058, 0xC0010112, 0xC0011020, 0xC0011022, 0xC0011023,
                 0xC0011029, 0xC001102A, kvm.MSR_WALL_CLOCK, kvm.MSR_SYSTEM_TIME, kvm.MSR_STEAL_TIME)


@pytest.mark.parametrize("number", LINUX_TOUCHES)
def test_what_linux_touches_is_there_and_takes_its_reset_value_back(number: int) -> None:
    register = msr.find(number)
    assert msr.check_write(number, register.reset) is register


def test_the_table_is_consistent() -> None:
    for register in msr.MSRS.values():
        assert register.name
        assert register.reset & ~register.writable == 0
        assert register.valid is None or register.valid(register.reset)
    names = [register.name for register in msr.MSRS.values()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("number", [
    0x11, 0x12, 0x48, 0x49, 0x179, 0x1A0, 0x7FF, 0x900, 0xC0000103, 0xC0000104, 0xC0010000, 0xC0010117,
    0x40000000, 0x4B564D02, 0xFFFFFFFF])
def test_registers_of_hidden_features_are_not_there(number: int) -> None:
    with pytest.raises(GeneralProtection):
        msr.find(number)
    with pytest.raises(GeneralProtection):
        msr.check_write(number, 0)


@pytest.mark.parametrize(("number", "value"), [
    (msr.LSTAR, 1 << 47), (msr.CSTAR, 1 << 62), (msr.FS_BASE, 1 << 47), (msr.GS_BASE, 0x8000_00000000),
    (msr.KERNEL_GS_BASE, 0xFFFF7FFF_FFFFFFFF), (msr.SFMASK, 1 << 32), (msr.SYSENTER_CS, 1 << 32),
    (msr.PAT, 2), (msr.PAT, 8 << 56), (msr.EFER, flags.EFER_SVME), (msr.EFER, 1 << 1), (0x2FF, 1 << 8),
    (kvm.MSR_STEAL_TIME, 0x1002)])
def test_values_that_give_a_fault(number: int, value: int) -> None:
    with pytest.raises(GeneralProtection) as caught:
        msr.check_write(number, value)
    assert caught.value.error_code == 0


@given(st.sampled_from(sorted(msr.MSRS)), st.integers(0, flags.MASK64))
def test_a_write_is_taken_or_faults(number: int, value: int) -> None:
    try:
        register = msr.check_write(number, value)
    except GeneralProtection:
        assert msr.MSRS[number].kind != "const"
    else:
        assert register is msr.MSRS[number]


PAGED = flags.CR0_PG | flags.CR0_PE
LONG = flags.EFER_LME | flags.EFER_LMA


@pytest.mark.parametrize(("current", "value", "cr0", "after"), [
    (0, flags.EFER_LME, 0, flags.EFER_LME),
    (0, flags.EFER_SCE | flags.EFER_NXE, PAGED, flags.EFER_SCE | flags.EFER_NXE),
    # LMA is the processor's: neither set nor cleared by a write
    (0, flags.EFER_LMA, 0, 0),
    (LONG, flags.EFER_LME, PAGED, LONG),
    (LONG, LONG | flags.EFER_SCE, PAGED, LONG | flags.EFER_SCE),
    # the host's SVME below a guest stays
    (LONG | flags.EFER_SVME, LONG, PAGED, LONG | flags.EFER_SVME),
])
def test_writing_efer(current: int, value: int, cr0: int, after: int) -> None:
    assert msr.efer_after_write(current, value, cr0) == after


@pytest.mark.parametrize(("current", "value", "cr0"), [
    (0, flags.EFER_LME, PAGED),
    (LONG, 0, PAGED),
    (0, flags.EFER_SVME, 0),
    (0, flags.EFER_FFXSR, 0),
    (0, 1 << 63, 0),
])
def test_efer_faults(current: int, value: int, cr0: int) -> None:
    with pytest.raises(GeneralProtection):
        msr.efer_after_write(current, value, cr0)
