# SPDX-License-Identifier: GPL-2.0-or-later
"""The paravirtual interface Linux guests know from KVM: CPUID leaves, kvmclock, steal time, hypercalls.

Linux's Documentation/virt/kvm/x86/{cpuid,msr,hypercalls}.rst describe it.  `KvmInterface` keeps no state
beside the values of its MSRs, so that `msrs` is all a snapshot must carry; the records it maintains lie in
the guest's memory.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from vmm.memory.errors import BadAddress
from vmm.x86.faults import GeneralProtection
from vmm.x86.flags import MASK64

if TYPE_CHECKING:
    from vmm.memory.physical import PhysicalMemory

SIGNATURE_LEAF = 0x40000000
FEATURES_LEAF = 0x40000001
TIMING_LEAF = 0x40000010
SIGNATURE = b"KVMKVMKVM\0\0\0"

#: KVM_FEATURE_ bits we keep our word on
FEATURES = {
    "nop_io_delay": 1,
    "clocksource2": 3,
    "steal_time": 5,
    "clocksource_stable": 24,
}

MSR_WALL_CLOCK = 0x4B564D00
MSR_SYSTEM_TIME = 0x4B564D01
MSR_STEAL_TIME = 0x4B564D03
ENABLED = 1
#: bits 5:1 of MSR_STEAL_TIME must be zero
STEAL_TIME_WRITABLE = MASK64 & ~0x3E

# pvclock_vcpu_time_info: version, pad, tsc_timestamp, system_time, tsc_to_system_mul, tsc_shift, flags, pad
_SYSTEM_TIME = struct.Struct("<IIQQIbB2x")
_TSC_STABLE = 1
# pvclock_wall_clock: version, sec, nsec
_WALL_CLOCK = struct.Struct("<III")
# kvm_steal_time: steal, version, flags, preempted
_STEAL_TIME = struct.Struct("<QIIB")

_SECOND = 1_000_000_000


def cpuid_leaves(tsc_khz: int, apic_bus_khz: int) -> dict[int, tuple[int, int, int, int]]:
    """The hypervisor's CPUID leaves."""
    ebx, ecx, edx = struct.unpack("<III", SIGNATURE)
    features = sum(1 << bit for bit in FEATURES.values())
    return {
        SIGNATURE_LEAF: (TIMING_LEAF, ebx, ecx, edx),
        FEATURES_LEAF: (features, 0, 0, 0),
        TIMING_LEAF: (tsc_khz, apic_bus_khz, 0, 0),
    }


class ClockScale(NamedTuple):
    """How a guest turns TSC ticks into ns: ((ticks << shift) * multiplier) >> 32."""

    multiplier: int
    shift: int

    def to_ns(self, ticks: int) -> int:
        """The guest's own arithmetic."""
        ticks = ticks << self.shift if self.shift >= 0 else ticks >> -self.shift
        return ticks * self.multiplier >> 32


def clock_scale(tsc_khz: int) -> ClockScale:
    """The scale for a TSC of this frequency, with the top bit of its 32-bit multiplier set."""
    hertz = tsc_khz * 1000
    shift = ((_SECOND << 32) // hertz).bit_length() - 32
    multiplier = (_SECOND << 32 - shift) // hertz
    return ClockScale(multiplier, shift)


class Instant(NamedTuple):
    """One moment by the guest's clocks."""

    tsc: int
    #: guest time: ns since power-on
    time_ns: int
    #: ns since 1970, UTC
    wall_ns: int


class KvmInterface:
    """One guest's clock and steal time records.

    A record in memory the guest does not have is not written; that harms only the guest.  The memory may
    raise OutOfFrames from any writer here; the MSR is unchanged then, and the call may be repeated.
    """

    def __init__(self, memory: PhysicalMemory, tsc_khz: int) -> None:
        self._memory = memory
        self._scale = clock_scale(tsc_khz)
        #: number -> value; of the wall clock only what was written last, for it is not kept up to date
        self.msrs = {MSR_WALL_CLOCK: 0, MSR_SYSTEM_TIME: 0, MSR_STEAL_TIME: 0}

    def read_msr(self, number: int) -> int:
        if number not in self.msrs:
            raise GeneralProtection
        return self.msrs[number]

    def write_msr(self, number: int, value: int, now: Instant) -> None:
        """WRMSR by the guest; `value` has passed the table of vmm/x86/msr.py."""
        if number == MSR_SYSTEM_TIME:
            self._write_system_time(value, now)
        elif number == MSR_STEAL_TIME:
            self._write_steal_time(value, 0)
        elif number == MSR_WALL_CLOCK:
            self._write_wall_clock(value, now)
        else:
            raise GeneralProtection
        self.msrs[number] = value

    def refresh_clock(self, now: Instant) -> None:
        """Rewrite the clock record: after anything that moves the TSC against guest time."""
        self._write_system_time(self.msrs[MSR_SYSTEM_TIME], now)

    def add_steal(self, ns: int) -> None:
        """Count time the guest wanted to run and did not."""
        self._write_steal_time(self.msrs[MSR_STEAL_TIME], ns)

    def _write_system_time(self, msr: int, now: Instant) -> None:
        if not msr & ENABLED:
            return
        at = msr & ~ENABLED
        try:
            self._memory.write(at, _SYSTEM_TIME.pack(
                self._next_version(at), 0, now.tsc & MASK64, now.time_ns, *self._scale, _TSC_STABLE))
        except BadAddress:
            return

    def _write_wall_clock(self, at: int, now: Instant) -> None:
        """The wall clock of power-on: guests add their system time to it."""
        seconds, ns = divmod(max(now.wall_ns - now.time_ns, 0), _SECOND)
        try:
            self._memory.write(at, _WALL_CLOCK.pack(self._next_version(at), seconds & 0xFFFFFFFF, ns))
        except BadAddress:
            return

    def _write_steal_time(self, msr: int, ns: int) -> None:
        if not msr & ENABLED:
            return
        at = msr & ~0x3F
        try:
            steal = self._memory.read_u64(at) + ns & MASK64
            self._memory.write(at, _STEAL_TIME.pack(steal, self._next_version(at + 8), 0, 0))
        except BadAddress:
            return

    def _next_version(self, at: int) -> int:
        """The even number after the version at `at`.

        A guest with one CPU never runs while its record is written, and need not see odd versions.
        """
        return (self._memory.read_u32(at) & ~1) + 2 & 0xFFFFFFFF


# hypercalls: numbers and errors (include/uapi/linux/kvm_para.h)
HC_VAPIC_POLL_IRQ = 1
HC_KICK_CPU = 5
HC_CLOCK_PAIRING = 9
HC_SCHED_YIELD = 11
EPERM = 1
EOPNOTSUPP = 95
ENOSYS = 1000

#: hypercall -> result: with one CPU there is nobody to kick or yield to, and no host clock to pair with
_RESULTS = {HC_VAPIC_POLL_IRQ: 0, HC_KICK_CPU: 0, HC_SCHED_YIELD: 0, HC_CLOCK_PAIRING: -EOPNOTSUPP}


def hypercall(number: int, cpl: int, long_mode: bool) -> int:
    """What a VMMCALL leaves in RAX, number being RAX before it.

    Outside 64-bit mode both are 32 bits wide.
    """
    mask = MASK64 if long_mode else 0xFFFFFFFF
    result = -EPERM if cpl else _RESULTS.get(number & mask, -ENOSYS)
    return result & mask
