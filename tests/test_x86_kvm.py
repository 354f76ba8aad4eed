# SPDX-License-Identifier: GPL-2.0-or-later
"""The KVM paravirtual interface: clock arithmetic, records in guest memory, hypercalls."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.plain_memory import PlainMemory
from vmm.x86 import kvm
from vmm.x86.faults import GeneralProtection
from vmm.x86.kvm import Instant, KvmInterface

NOW = Instant(tsc=5_000_000, time_ns=2_000_000_000, wall_ns=1_700_000_000_123_456_789)


@given(st.integers(100_000, 10_000_000))
def test_scale_has_full_precision(tsc_khz: int) -> None:
    scale = kvm.clock_scale(tsc_khz)
    assert 1 << 31 <= scale.multiplier < 1 << 32
    # a day of ticks, against exact arithmetic
    ticks = tsc_khz * 1000 * 86400
    assert abs(scale.to_ns(ticks) - 86400 * 10**9) < 86400 * 10**9 / 2**30


@pytest.mark.parametrize(("tsc_khz", "multiplier", "shift"), [
    (1_000_000, 0x80000000, 1),  # what Linux's kvm_get_time_scale gives for these
    (2_500_000, 0xCCCCCCCC, -1),
    (1_500_000, 0xAAAAAAAA, 0),
])
def test_known_scales(tsc_khz: int, multiplier: int, shift: int) -> None:
    assert kvm.clock_scale(tsc_khz) == (multiplier, shift)


def guest_clock(memory: PlainMemory, at: int, tsc: int) -> int:
    """What a guest computes from the record (Documentation/virt/kvm/x86/msr.rst)."""
    version, _, stamp, system, multiplier, shift, flags = struct.unpack_from("<IIQQIbB", memory.data, at)
    assert version % 2 == 0 and flags == 1
    ticks = tsc - stamp
    ticks = ticks << shift if shift >= 0 else ticks >> -shift
    return (ticks * multiplier >> 32) + system


def test_the_guest_reads_its_clock() -> None:
    memory = PlainMemory(0x4000)
    interface = KvmInterface(memory, 2_000_000)
    interface.write_msr(kvm.MSR_SYSTEM_TIME, 0x1FF0 | 1, NOW)  # the record lies on two pages
    assert guest_clock(memory, 0x1FF0, NOW.tsc) == NOW.time_ns
    assert guest_clock(memory, 0x1FF0, NOW.tsc + 2_000_000) == NOW.time_ns + 1_000_000
    assert interface.read_msr(kvm.MSR_SYSTEM_TIME) == 0x1FF1


def test_refreshing_gives_a_new_version() -> None:
    memory = PlainMemory(0x4000)
    interface = KvmInterface(memory, 2_000_000)
    interface.refresh_clock(NOW)
    assert not any(memory.data)
    interface.write_msr(kvm.MSR_SYSTEM_TIME, 0x1001, NOW)
    before = memory.read_u32(0x1000)
    interface.refresh_clock(Instant(1, 3_000_000_000, 0))
    assert memory.read_u32(0x1000) == before + 2
    assert guest_clock(memory, 0x1000, 1) == 3_000_000_000
    interface.write_msr(kvm.MSR_SYSTEM_TIME, 0x1000, NOW)  # disabled
    memory.data[0x1000:0x1020] = bytes(32)
    interface.refresh_clock(NOW)
    assert not any(memory.data)


def test_a_version_never_ends_odd() -> None:
    memory = PlainMemory(0x4000)
    memory.write_u32(0x1000, 0xFFFFFFFF)
    KvmInterface(memory, 2_000_000).write_msr(kvm.MSR_SYSTEM_TIME, 0x1001, NOW)
    assert memory.read_u32(0x1000) == 0


def test_wall_clock_is_that_of_power_on() -> None:
    memory = PlainMemory(0x4000)
    KvmInterface(memory, 2_000_000).write_msr(kvm.MSR_WALL_CLOCK, 0x2000, NOW)
    version, seconds, ns = struct.unpack_from("<III", memory.data, 0x2000)
    assert version == 2
    assert seconds * 10**9 + ns + NOW.time_ns == NOW.wall_ns


def test_steal_time_adds_up() -> None:
    memory = PlainMemory(0x4000)
    interface = KvmInterface(memory, 2_000_000)
    interface.add_steal(7)
    interface.write_msr(kvm.MSR_STEAL_TIME, 0x3000 | 1, NOW)
    interface.add_steal(100)
    interface.add_steal(23)
    steal, version, flags, preempted = struct.unpack_from("<QIIB", memory.data, 0x3000)
    assert (steal, version, flags, preempted) == (123, 6, 0, 0)
    interface.write_msr(kvm.MSR_STEAL_TIME, 0, NOW)
    interface.add_steal(1000)
    assert memory.read_u64(0x3000) == 123


@given(st.sampled_from([kvm.MSR_SYSTEM_TIME, kvm.MSR_WALL_CLOCK, kvm.MSR_STEAL_TIME]),
       st.integers(0, 2**64 - 1) | st.integers(0x3FC0, 0x4040), st.integers(0, 2**70))
def test_no_address_hurts(number: int, value: int, tsc: int) -> None:
    interface = KvmInterface(PlainMemory(0x4000), 2_000_000)
    interface.write_msr(number, value, Instant(tsc, 1, 0))
    interface.refresh_clock(NOW)
    interface.add_steal(5)
    assert interface.read_msr(number) == value


def test_other_msrs_are_not_ours() -> None:
    interface = KvmInterface(PlainMemory(0x4000), 2_000_000)
    with pytest.raises(GeneralProtection):
        interface.read_msr(0x4B564D02)
    with pytest.raises(GeneralProtection):
        interface.write_msr(0x4B564D02, 0, NOW)


@pytest.mark.parametrize(("number", "cpl", "long_mode", "result"), [
    (kvm.HC_VAPIC_POLL_IRQ, 0, True, 0),
    (kvm.HC_KICK_CPU, 0, True, 0),
    (kvm.HC_CLOCK_PAIRING, 0, True, -95),
    (2, 0, True, -1000),
    (0xDEAD_BEEF_0000_0001, 0, True, -1000),
    (0xDEAD_BEEF_0000_0001, 0, False, 0),
    (kvm.HC_KICK_CPU, 3, True, -1),
    (12345, 1, False, -1),
])
def test_hypercalls(number: int, cpl: int, long_mode: bool, result: int) -> None:
    assert kvm.hypercall(number, cpl, long_mode) == result % (1 << (64 if long_mode else 32))
