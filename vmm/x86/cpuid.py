# SPDX-License-Identifier: GPL-2.0-or-later
"""The processor our guests see, as CPUID describes it (APM vol. 3, appendix E).

An AMD family 17h processor with one core.  A feature is listed only if the silicon really executes it
(tests/test_x86_cpuid.py runs a sample of each) or the machine around it really provides it.  Left out
on purpose: MTRR, MCE, MCA, VME, XSAVE and AVX, RDTSCP, PCID, RDRAND, RDSEED, 1 GiB pages, SVM and MWAIT;
and ERMS, since the silicon repeats string instructions one element at a time: a guest that believes in fast
byte-wise ones clears its pages eight times slower than with quadwords.
"""

from __future__ import annotations

from vmm.x86 import kvm
from vmm.x86.flags import LINEAR_BITS, PHYSICAL_BITS

Registers = tuple[int, int, int, int]  # eax, ebx, ecx, edx

#: family 17h, model 31h, stepping 0; also in EDX after reset.  A later model than the one the silicon calls
#: itself: operating systems work around faults of the early ones that the silicon does not have.
SIGNATURE = 0x00830F10
VENDOR = b"AuthenticAMD"
BRAND = b"hostd virtual x86 processor"

#: the local APIC timer and its bus count nanoseconds
APIC_BUS_KHZ = 1_000_000

# Feature bits by name (Linux's names), one table for each register that holds features.
LEAF_1_ECX = {
    "pni": 0, "pclmulqdq": 1, "ssse3": 9, "cx16": 13, "sse4_1": 19, "sse4_2": 20, "x2apic": 21,
    "movbe": 22, "popcnt": 23, "tsc_deadline_timer": 24, "aes": 25, "hypervisor": 31,
}
LEAF_1_EDX = {
    "fpu": 0, "de": 2, "pse": 3, "tsc": 4, "msr": 5, "pae": 6, "cx8": 8, "apic": 9, "sep": 11,
    "pge": 13, "cmov": 15, "pat": 16, "pse36": 17, "clflush": 19, "mmx": 23, "fxsr": 24, "sse": 25,
    "sse2": 26,
}
LEAF_6_EAX = {"arat": 2}
LEAF_7_EBX = {"fsgsbase": 0, "bmi1": 3, "smep": 7, "bmi2": 8, "adx": 19, "smap": 20}
LEAF_80000001_ECX = {"lahf_lm": 0, "cr8_legacy": 4, "abm": 5, "sse4a": 6, "3dnowprefetch": 8}
LEAF_80000001_EDX = {
    "fpu": 0, "de": 2, "pse": 3, "tsc": 4, "msr": 5, "pae": 6, "cx8": 8, "apic": 9, "syscall": 11,
    "pge": 13, "cmov": 15, "pat": 16, "pse36": 17, "nx": 20, "mmxext": 22, "mmx": 23, "fxsr": 24, "lm": 29,
}
LEAF_80000007_EDX = {"invariant_tsc": 8}
LEAF_80000021_EAX = {"lfence_rdtsc": 2, "null_sel_clr_base": 6}

_APIC = 1 << LEAF_1_EDX["apic"]
_ZERO: Registers = (0, 0, 0, 0)


def _bits(table: dict[str, int], without: frozenset[str] = frozenset()) -> int:
    return sum(1 << bit for name, bit in table.items() if name not in without)


def _words(text: bytes) -> list[int]:
    """Text as little-endian 32-bit registers."""
    return [int.from_bytes(text[at:at + 4], "little") for at in range(0, len(text), 4)]


class CpuidTable:
    """CPUID of one guest.

    SMAP is offered on request only: every copy to or from user memory would pay for STAC and CLAC.
    """

    def __init__(self, tsc_khz: int, *, smap: bool = False) -> None:
        vendor = _words(VENDOR)
        name = (vendor[0], vendor[2], vendor[1])  # ebx, ecx, edx spell ebx-edx-ecx
        brand = _words(BRAND.ljust(48, b"\0"))
        hidden = frozenset[str]() if smap else frozenset({"smap"})
        #: leaf -> registers; a leaf that is not here reads as zero
        self._leaves: dict[int, Registers] = {
            0x00000000: (7, *name),
            # CLFLUSH line of 8 quadwords, one logical processor, APIC ID 0
            0x00000001: (SIGNATURE, 1 << 16 | 8 << 8, _bits(LEAF_1_ECX), _bits(LEAF_1_EDX)),
            0x00000006: (_bits(LEAF_6_EAX), 0, 0, 0),
            0x00000007: (0, _bits(LEAF_7_EBX, hidden), 0, 0),
            0x80000000: (0x80000021, *name),
            0x80000001: (SIGNATURE, 0, _bits(LEAF_80000001_ECX), _bits(LEAF_80000001_EDX)),
            0x80000002: (brand[0], brand[1], brand[2], brand[3]),
            0x80000003: (brand[4], brand[5], brand[6], brand[7]),
            0x80000004: (brand[8], brand[9], brand[10], brand[11]),
            # fully associative TLBs of 64 entries; 32 KiB 8-way data and 64 KiB 4-way code cache
            0x80000005: (0xFF40FF40, 0xFF40FF40, 32 << 24 | 8 << 16 | 1 << 8 | 64,
                         64 << 24 | 4 << 16 | 1 << 8 | 64),
            # 512 KiB 8-way (code 6) second and 8 MiB 16-way (code 8) third level
            0x80000006: (0, 0, 512 << 16 | 6 << 12 | 1 << 8 | 64, 16 << 18 | 8 << 12 | 1 << 8 | 64),
            0x80000007: (0, 0, 0, _bits(LEAF_80000007_EDX)),
            0x80000008: (LINEAR_BITS << 8 | PHYSICAL_BITS, 0, 0, 0),
            0x80000021: (_bits(LEAF_80000021_EAX), 0, 0, 0),
            **kvm.cpuid_leaves(tsc_khz, APIC_BUS_KHZ),
        }
        self._get = self._leaves.get

    def lookup(self, leaf: int, subleaf: int) -> Registers:
        """What CPUID gives for EAX=leaf, ECX=subleaf; undefined leaves read as zero, as AMD's do."""
        if leaf == 7 and subleaf:
            return _ZERO
        return self._get(leaf, _ZERO)

    def set_apic(self, enabled: bool) -> None:
        """Show or hide the local APIC, as APIC_BASE.AE does (APM vol. 2, 16.3.1)."""
        for leaf in (0x00000001, 0x80000001):
            eax, ebx, ecx, edx = self._leaves[leaf]
            self._leaves[leaf] = (eax, ebx, ecx, edx | _APIC if enabled else edx & ~_APIC)
