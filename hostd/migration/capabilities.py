# SPDX-License-Identifier: GPL-2.0-or-later
"""What two hosts must have in common: a version, capabilities, and for a guest a host that it fits.

A hostd speaks its version of the protocol and the one before.  A capability is a thing that one version can
do or leave: it is used where both ends name it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hostd.migration.messages import Leaf, Offer
from hostd.migration.wire import ProtocolError, Spoken
from hostd.model import MonitorName
from vmm.state import STATE_VERSION
from vmm.x86 import cpuid, kvm
from vmm.x86.cpuid import CpuidTable

#: versions this hostd speaks: N and N-1 (there is none before 1)
SPOKEN = Spoken(highest=1, lowest=1)
#: "hw" and "bt" are the monitors a host has
CAPABILITIES = ("zstd", "delta", "dedup", "postcopy", "connections", "hw", "bt")
#: guests were told the frequency when they booted, and reckon with it
TSC_TOLERANCE_PPM = 500


def common_version(ours: Spoken, theirs: Spoken) -> int:
    """The highest version both speak.  Raises ProtocolError if there is none."""
    version = min(ours.highest, theirs.highest)
    if version < max(ours.lowest, theirs.lowest):
        raise ProtocolError(f"the other host speaks {_versions(theirs)} of the migration protocol, and this "
                            f"one {_versions(ours)}: update the older of them")
    return version


def _versions(spoken: Spoken) -> str:
    if spoken.lowest == spoken.highest:
        return f"version {spoken.highest}"
    return f"versions {spoken.lowest} to {spoken.highest}"


@dataclass(frozen=True)
class HostProfile:
    """What a guest that arrives finds at the target."""

    monitors: frozenset[MonitorName]
    tsc_khz: int
    state_version: int = STATE_VERSION


def shown(monitor: MonitorName) -> list[Leaf]:
    """The features of the processor that guests of a monitor see, as an Offer has them."""
    table = _PROCESSORS[monitor](tsc_khz=0)
    leaves = []
    for (leaf, subleaf), registers in _FEATURES.items():
        eax, ebx, ecx, edx = (word & _mask(names)
                              for word, names in zip(table.lookup(leaf, subleaf), registers))
        leaves.append((leaf, subleaf, eax, ebx, ecx, edx))
    return leaves


def unfit(offer: Offer, host: HostProfile) -> str | None:
    """Why a guest cannot run at a target, as a sentence, or None if it can."""
    if offer.monitor not in host.monitors:
        return f"the target does not have monitor {offer.monitor}: choose another with --vmm"
    if offer.state_version != host.state_version:
        return (f"the guest's machine state has version {offer.state_version}, and the target reads version "
                f"{host.state_version}: update the older of the two hosts")
    missing = _missing_features(offer.cpu, shown(offer.monitor))
    if missing:
        return f"the guest was shown a processor with {', '.join(missing)}, which the target does not have"
    off = abs(offer.tsc_khz - host.tsc_khz) * 1_000_000
    if off > TSC_TOLERANCE_PPM * offer.tsc_khz:
        return (f"the time stamp counter runs at {offer.tsc_khz} kHz here and at {host.tsc_khz} kHz at the "
                f"target, and a guest bears a difference of {TSC_TOLERANCE_PPM} ppm")
    return None


def _missing_features(guest: list[Leaf], host: list[Leaf]) -> list[str]:
    """Features in `guest` and not in `host`, by name, or by their place where they have none here."""
    words = {leaf[:2]: leaf[2:] for leaf in host}
    missing = []
    for leaf, subleaf, *registers in guest:
        names = _FEATURES.get((leaf, subleaf), _NAMELESS)
        for register, has, needed, table in zip(_REGISTERS, words.get((leaf, subleaf), (0,) * 4),
                                                registers, names):
            by_bit = {bit: name for name, bit in table.items()}
            missing += [by_bit.get(bit, f"CPUID {leaf:#x}.{register}[{bit}]")
                        for bit in range(32) if needed & ~has & 1 << bit]
    return missing


def _mask(names: Mapping[str, int]) -> int:
    return sum(1 << bit for bit in names.values())


_REGISTERS = ("eax", "ebx", "ecx", "edx")
_NONE: Mapping[str, int] = {}
_NAMELESS = (_NONE,) * 4
#: names of features and their bits, for EAX, EBX, ECX and EDX of each leaf that has some
_FEATURES: Mapping[tuple[int, int], tuple[Mapping[str, int], ...]] = {
    (0x00000001, 0): (_NONE, _NONE, cpuid.LEAF_1_ECX, cpuid.LEAF_1_EDX),
    (0x00000006, 0): (cpuid.LEAF_6_EAX, _NONE, _NONE, _NONE),
    (0x00000007, 0): (_NONE, cpuid.LEAF_7_EBX, _NONE, _NONE),
    (kvm.FEATURES_LEAF, 0): (kvm.FEATURES, _NONE, _NONE, _NONE),
    (0x80000001, 0): (_NONE, _NONE, cpuid.LEAF_80000001_ECX, cpuid.LEAF_80000001_EDX),
    (0x80000007, 0): (_NONE, _NONE, _NONE, cpuid.LEAF_80000007_EDX),
    (0x80000021, 0): (cpuid.LEAF_80000021_EAX, _NONE, _NONE, _NONE),
}
#: both monitors show their guests the same processor
_PROCESSORS: Mapping[MonitorName, type[CpuidTable]] = {"hw": CpuidTable, "bt": CpuidTable}
