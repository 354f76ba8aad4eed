# SPDX-License-Identifier: GPL-2.0-or-later
"""CPUID: what it says, and that the silicon does what it says."""

from __future__ import annotations

import struct
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unicorn import UC_ARCH_X86, UC_HOOK_INTR, UC_MODE_64, Uc, UcError
from unicorn.x86_const import (
    UC_CPU_X86_EPYC,
    UC_X86_REG_CR4,
    UC_X86_REG_GDTR,
    UC_X86_REG_RAX,
    UC_X86_REG_RCX,
    UC_X86_REG_RDI,
    UC_X86_REG_RDX,
    UC_X86_REG_RSI,
    UC_X86_REG_XMM0,
    UC_X86_REG_XMM1,
)

from vmm.state import RDX, CpuState, Segment
from vmm.x86 import cpuid, flags
from vmm.x86.cpuid import CpuidTable
from vmm.x86.descriptors import encode_segment

TABLE = CpuidTable(2_500_000)

ANY_LEAF = st.one_of(
    st.integers(0, 0x20), st.integers(0x40000000, 0x40000020), st.integers(0x80000000, 0x80000020),
    st.integers(0, 2**32 - 1))


@given(ANY_LEAF, st.integers(0, 2**32 - 1))
def test_every_leaf_is_four_registers(leaf: int, subleaf: int) -> None:
    registers = TABLE.lookup(leaf, subleaf)
    assert len(registers) == 4
    assert all(0 <= register < 1 << 32 for register in registers)
    # AMD's undefined leaves are zero, and the highest leaf of each range is told
    ranges = (range(TABLE.lookup(base, 0)[0] + 1) for base in (0, 0x40000000, 0x80000000))
    if not any(leaf in known for known in ranges):
        assert registers == (0, 0, 0, 0)


def test_identity() -> None:
    _, ebx, ecx, edx = TABLE.lookup(0, 0)
    assert struct.pack("<III", ebx, edx, ecx) == b"AuthenticAMD"
    eax, ebx, _, _ = TABLE.lookup(1, 0)
    family = (eax >> 8 & 0xF) + (eax >> 20 & 0xFF)
    assert family == 0x17
    assert eax == TABLE.lookup(0x80000001, 0)[0] == CpuState().gpr[RDX]
    assert ebx >> 16 & 0xFF == 1 and (ebx >> 8 & 0xFF) * 8 == 64
    brand = b"".join(struct.pack("<4I", *TABLE.lookup(0x80000002 + n, 0)) for n in range(3))
    assert brand.rstrip(b"\0") == cpuid.BRAND


def test_hypervisor_leaves() -> None:
    top, ebx, ecx, edx = TABLE.lookup(0x40000000, 0)
    assert struct.pack("<III", ebx, ecx, edx) == b"KVMKVMKVM\0\0\0"
    assert top == 0x40000010
    features = TABLE.lookup(0x40000001, 0)[0]
    assert features >> 3 & 1 and features >> 5 & 1 and features >> 24 & 1
    assert TABLE.lookup(0x40000010, 0) == (2_500_000, 1_000_000, 0, 0)


def test_address_sizes_are_those_of_the_page_walk() -> None:
    assert TABLE.lookup(0x80000008, 0)[0] == flags.LINEAR_BITS << 8 | flags.PHYSICAL_BITS


def test_hidden_features() -> None:
    _, _, ecx, edx = TABLE.lookup(1, 0)
    for bit in (3, 12, 17, 26, 27, 28, 30):  # MONITOR FMA PCID XSAVE OSXSAVE AVX RDRAND
        assert not ecx >> bit & 1
    for bit in (1, 7, 12, 14):  # VME MCE MTRR MCA
        assert not edx >> bit & 1
    ebx = TABLE.lookup(7, 0)[1]
    for bit in (5, 18, 20):  # AVX2 RDSEED SMAP
        assert not ebx >> bit & 1
    _, _, ecx, edx = TABLE.lookup(0x80000001, 0)
    assert not ecx >> 2 & 1  # SVM
    assert not edx >> 26 & 1 and not edx >> 27 & 1  # 1 GiB pages, RDTSCP


def test_smap_on_request() -> None:
    assert CpuidTable(1_000_000, smap=True).lookup(7, 0)[1] >> 20 & 1


def test_leaf_7_has_one_subleaf() -> None:
    assert TABLE.lookup(7, 0)[1]
    assert TABLE.lookup(7, 1) == (0, 0, 0, 0)


def test_the_apic_bit_follows_apic_base() -> None:
    table = CpuidTable(1_000_000)
    before = table.lookup(1, 0), table.lookup(0x80000001, 0)
    table.set_apic(False)
    assert not table.lookup(1, 0)[3] >> 9 & 1 and not table.lookup(0x80000001, 0)[3] >> 9 & 1
    table.set_apic(True)
    assert (table.lookup(1, 0), table.lookup(0x80000001, 0)) == before


class Sample(NamedTuple):
    """Code that needs a feature, and what it must leave behind.

    It starts with RSI and RDI at `SCRATCH` and `SCRATCH + 64`, RAX, RCX, RDX and XMM0, XMM1 as given.
    """

    code: str
    rcx: int = 0
    rdx: int = 0
    rax: int = 0
    memory: bytes = b""
    xmm0: int = 0
    xmm1: int = 0
    #: RAX, RDX, XMM0, memory at RSI and RDI afterwards, where told
    then_rax: int | None = None
    then_rdx: int | None = None
    then_xmm0: int | None = None
    then_rsi: bytes = b""
    then_rdi: bytes = b""


U64 = (1 << 64) - 1
SAMPLES: dict[str, tuple[Sample, ...]] = {
    "fpu": (Sample("d9e8 df3e", then_rsi=(1).to_bytes(8, "little")),),  # fld1; fistp [rsi]
    "tsc": (Sample("0f31"),),
    "msr": (Sample("b9800000c0 0f32", then_rax=0x500),),  # rdmsr EFER: LME, LMA
    "cx8": (Sample("f00fc70e", rcx=7, memory=bytes(8), then_rsi=struct.pack("<II", 0, 7)),),
    "cmov": (Sample("31d2 480f44c1", rcx=5, then_rax=5),),
    "clflush": (Sample("0fae3e"),),
    "mmx": (Sample("480f6ec1 0ffec0 480f7ec0", rcx=3 << 32 | 2, then_rax=6 << 32 | 4),),  # paddd mm0,mm0
    "fxsr": (Sample("dbe3 0fae06", then_rsi=b"\x7f\x03"),),  # fninit; fxsave
    "sse": (Sample("0f58c1", xmm0=0x3F800000, xmm1=0x40000000, then_xmm0=0x40400000),),  # addps
    "sse2": (Sample("660fd4c1", xmm0=U64, xmm1=2, then_xmm0=1),),  # paddq
    "pni": (Sample("f20f12c1", xmm1=1 << 64 | 7, then_xmm0=7 << 64 | 7),),  # movddup
    "pclmulqdq": (Sample("660f3a44c100", xmm0=3, xmm1=3, then_xmm0=5),),
    "ssse3": (Sample("660f3800c1", xmm0=0xAB, then_xmm0=0xABABABAB_ABABABAB_ABABABAB_ABABABAB),),  # pshufb
    "cx16": (Sample("f0480fc70e", rcx=9, memory=bytes(16), then_rsi=struct.pack("<QQ", 0, 9)),),
    "sse4_1": (Sample("66480f3a16c001", xmm0=0x1234 << 64, then_rax=0x1234),),  # pextrq
    "sse4_2": (
        Sample("f20f38f0c1", rax=0xFFFFFFFF, rcx=0x61, then_rax=0x3E2FBCCF),  # crc32 of b"a", not inverted
        Sample("660f3a63c10c 4889c8", xmm0=int.from_bytes(b"lo", "little"),
               xmm1=int.from_bytes(b"hello", "little"), then_rax=3),  # pcmpistri: find "lo"
    ),
    "movbe": (Sample("480f38f006", memory=bytes(range(8)), then_rax=0x0001020304050607),),
    "popcnt": (Sample("f3480fb8c1", rcx=0xF0F0, then_rax=8),),
    "aes": (Sample("660f38ddc1", then_xmm0=int.from_bytes(b"\x63" * 16, "little")),),  # aesenclast of zero
    "fsgsbase": (Sample("f3480faed1 f3480faec0", rcx=0x1234_56789ABC, then_rax=0x1234_56789ABC),),
    "bmi1": (
        Sample("c4e2f0f2c2", rcx=0xF0, rdx=0xFF, then_rax=0x0F),  # andn
        Sample("c4e2f8f3c9", rcx=0b1100, then_rax=0b1000),  # blsr
        Sample("f3480fbcc1", rcx=0, then_rax=64),  # tzcnt, which gives 64 where bsf gives nothing
    ),
    "bmi2": (
        Sample("c4e2f3f5c2", rcx=0b101, rdx=0b111000, then_rax=0b101000),  # pdep
        Sample("c4e2f1f7c2", rcx=4, rdx=0xF, then_rax=0xF0),  # shlx
        Sample("c4e2fbf6c1", rcx=U64, rdx=2, then_rax=1),  # mulx: the high half
    ),
    "adx": (Sample("f9 66480f38f6c1", rax=1, rcx=1, then_rax=3),),  # stc; adcx
    "lahf_lm": (Sample("f9 9f", then_rax=0x4700),),  # stc; lahf, with ZF and PF from SET_FLAGS
    "cr8_legacy": (Sample("f00f20c0"),),  # lock mov eax, cr0; what CR8 holds is the monitor's
    "abm": (Sample("f3480fbdc1", rcx=0, then_rax=64), Sample("f3480fbdc1", rcx=1, then_rax=63)),  # lzcnt
    "sse4a": (Sample("660f78c00804", xmm0=0xABC0, then_xmm0=0xBC),),  # extrq: 8 bits from bit 4
    "lfence_rdtsc": (Sample("0faee8 0f31"),),
    # mov ecx, 16; mov gs, ecx (a segment based at 2 MiB); xor ecx, ecx; mov gs, ecx; rdgsbase rax
    "null_sel_clr_base": (Sample("b910000000 8ee9 f3480faec8 4889c2 31c9 8ee9 f3480faec8",
                                 rax=1, then_rax=0, then_rdx=0x200000),),
    "3dnowprefetch": (Sample("0f0d0e"),),
    "mmxext": (Sample("480f6ec1 0f70c000 480f7ec0", rcx=7, then_rax=0x0007_0007_0007_0007),),  # pshufw
}

#: features without an instruction of their own, and who keeps their promise
PROVIDED = {
    "de": "silicon, tested below", "pse": "silicon: page walk", "pae": "silicon: page walk",
    "pge": "silicon: page walk", "pse36": "silicon: page walk", "nx": "silicon: page walk",
    "smep": "silicon: page walk", "smap": "silicon: page walk", "lm": "silicon: every 64-bit guest",
    "pat": "MSR table", "sep": "monitor", "syscall": "monitor", "hypervisor": "monitor",
    "apic": "local APIC", "x2apic": "local APIC", "tsc_deadline_timer": "local APIC", "arat": "local APIC",
    "invariant_tsc": "machine",
}

CODE, SCRATCH, GDT = 0x1000, 0x4000, 0x8000
SET_FLAGS = "39c0"  # cmp eax, eax


def silicon() -> Uc:
    uc = Uc(UC_ARCH_X86, UC_MODE_64)
    uc.ctl_set_cpu_model(UC_CPU_X86_EPYC)
    uc.mem_map(0, 0x10000)
    data_at_2_mib = encode_segment(Segment(16, 0xC93, 0xFFFFFFFF, 0x200000))
    uc.mem_write(GDT + 16, data_at_2_mib.to_bytes(8, "little"))
    uc.reg_write(UC_X86_REG_GDTR, (0, GDT, 0x17, 0))
    return uc


def raised(uc: Uc, code: bytes) -> int | None:
    """The exception `code` raises at its start, if any."""
    seen: list[int] = []

    def exception(uc: Uc, vector: int, data: object) -> None:
        seen.append(vector)
        uc.emu_stop()
    uc.hook_add(UC_HOOK_INTR, exception)
    uc.mem_write(CODE, code)
    try:
        uc.emu_start(CODE, CODE + len(code))
    except UcError:
        return 6
    return seen[0] if seen else None


@pytest.mark.parametrize("feature", SAMPLES)
def test_the_silicon_executes(feature: str) -> None:
    for sample in SAMPLES[feature]:
        uc = silicon()
        uc.reg_write(UC_X86_REG_CR4, flags.CR4_OSFXSR | flags.CR4_PAE | flags.CR4_FSGSBASE)
        for register, value in ((UC_X86_REG_RAX, sample.rax), (UC_X86_REG_RCX, sample.rcx),
                                (UC_X86_REG_RDX, sample.rdx), (UC_X86_REG_RSI, SCRATCH),
                                (UC_X86_REG_RDI, SCRATCH + 64), (UC_X86_REG_XMM0, sample.xmm0),
                                (UC_X86_REG_XMM1, sample.xmm1)):
            uc.reg_write(register, value)
        uc.mem_write(SCRATCH, sample.memory)
        assert raised(uc, bytes.fromhex(SET_FLAGS + sample.code)) is None
        if sample.then_rax is not None:
            assert uc.reg_read(UC_X86_REG_RAX) == sample.then_rax
        if sample.then_rdx is not None:
            assert uc.reg_read(UC_X86_REG_RDX) == sample.then_rdx
        if sample.then_xmm0 is not None:
            assert uc.reg_read(UC_X86_REG_XMM0) == sample.then_xmm0
        assert uc.mem_read(SCRATCH, len(sample.then_rsi)) == sample.then_rsi
        assert uc.mem_read(SCRATCH + 64, len(sample.then_rdi)) == sample.then_rdi


def test_debugging_extensions() -> None:
    """With CR4.DE, DR4 is no alias of DR6 any more."""
    uc = silicon()
    uc.reg_write(UC_X86_REG_CR4, flags.CR4_PAE | flags.CR4_DE)
    assert raised(uc, bytes.fromhex("0f21e0")) == 6


def test_an_instruction_nobody_has_is_seen_as_such() -> None:
    assert raised(silicon(), bytes.fromhex("0f38c8c1")) == 6  # sha1nexte


def test_every_feature_offered_is_kept() -> None:
    offered = {name for table in (cpuid.LEAF_1_ECX, cpuid.LEAF_1_EDX, cpuid.LEAF_6_EAX, cpuid.LEAF_7_EBX,
                                  cpuid.LEAF_80000001_ECX, cpuid.LEAF_80000001_EDX, cpuid.LEAF_80000007_EDX,
                                  cpuid.LEAF_80000021_EAX)
               for name in table}
    assert offered == set(SAMPLES) | set(PROVIDED)
    assert not set(SAMPLES) & set(PROVIDED)
