# SPDX-License-Identifier: GPL-2.0-or-later
"""The control block: where its fields lie, what its areas are, what vmrun refuses."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.consistency import (
    CONTROL_CHECKS,
    STATE_CHECKS,
    Processor,
    consistency_errors,
    is_consistent,
    state_errors,
)
from vmm.exitcodes import INTERCEPT_BITS, exit_name
from vmm.state import Segment, Table
from vmm.vmcb import AREAS, HOST_STATE, Area, Event, EventType, ExitCode, Field, SaveArea, Vmcb
from vmm.x86 import flags
from vmm.x86.faults import Vector

U64 = st.integers(0, flags.MASK64)


def blank() -> Vmcb:
    return Vmcb(memoryview(bytearray(4096)))


def good() -> Vmcb:
    """A 64-bit guest that may run."""
    vmcb = blank()
    vmcb.intercept(ExitCode.VMRUN)
    vmcb.guest_asid = 1
    vmcb.np_enable = 1
    vmcb.g_pat = flags.PAT_RESET
    vmcb.efer = flags.EFER_SVME | flags.EFER_LME | flags.EFER_LMA
    vmcb.cr0 = flags.CR0_PG | flags.CR0_PE
    vmcb.cr4 = flags.CR4_PAE
    vmcb.cs = Segment(0x10, 0xA9B, 0xFFFFFFFF, 0)
    return vmcb


# offsets as AMD64 APM vol. 2, tables B-1 and B-2 have them
OFFSETS = {
    "intercept_cr_read": 0x000, "intercept_cr_write": 0x002, "intercept_exceptions": 0x008,
    "intercept_misc1": 0x00C, "intercept_misc2": 0x010, "iopm_base_pa": 0x040, "msrpm_base_pa": 0x048,
    "tsc_offset": 0x050, "guest_asid": 0x058, "tlb_control": 0x05C, "int_ctl": 0x060, "v_intr_vector": 0x064,
    "exitcode": 0x070, "exitinfo1": 0x078, "exitinfo2": 0x080, "exitintinfo": 0x088, "eventinj": 0x0A8,
    "n_cr3": 0x0B0, "clean": 0x0C0, "nrip": 0x0C8,
    "es": 0x400, "cs": 0x410, "ss": 0x420, "ds": 0x430, "fs": 0x440, "gs": 0x450, "gdtr": 0x460,
    "ldtr": 0x470, "idtr": 0x480, "tr": 0x490, "cpl": 0x4CB, "efer": 0x4D0, "cr4": 0x548, "cr3": 0x550,
    "cr0": 0x558, "dr7": 0x560, "dr6": 0x568, "rflags": 0x570, "rip": 0x578, "rsp": 0x5D8, "rax": 0x5F8,
    "star": 0x600, "lstar": 0x608, "cstar": 0x610, "sfmask": 0x618, "kernel_gs_base": 0x620,
    "sysenter_cs": 0x628, "sysenter_esp": 0x630, "sysenter_eip": 0x638, "cr2": 0x640, "g_pat": 0x668,
}


@pytest.mark.parametrize(("name", "offset"), OFFSETS.items())
def test_fields_lie_where_the_manual_has_them(name: str, offset: int) -> None:
    assert getattr(Vmcb, name).offset == offset


def test_integer_fields_are_little_endian_and_touch_only_their_bytes() -> None:
    for name, field in [*vars(Vmcb).items(), *vars(SaveArea).items()]:
        if not isinstance(field, Field) or name in _BIT_FIELDS:
            continue
        vmcb = blank()
        value = 0x1122334455667788 & ((1 << 8 * field.size) - 1)
        setattr(vmcb, name, value)
        assert getattr(vmcb, name) == value
        page = bytes(vmcb.page)
        assert page[field.offset:field.offset + field.size] == value.to_bytes(field.size, "little")
        assert page.count(0) >= 4096 - field.size
        with pytest.raises(ValueError):
            setattr(vmcb, name, 1 << 8 * field.size)


_BIT_FIELDS = {
    "v_tpr": (0x060, 0, 4), "v_irq": (0x060, 8, 1), "v_gif": (0x060, 9, 1), "v_intr_prio": (0x060, 16, 4),
    "v_ign_tpr": (0x060, 20, 1), "v_intr_masking": (0x060, 24, 1), "v_gif_enable": (0x060, 25, 1),
    "interrupt_shadow": (0x068, 0, 1), "guest_interrupt_mask": (0x068, 1, 1), "np_enable": (0x090, 0, 1),
    "lbr_virtualization": (0x0B8, 0, 1),
}


@pytest.mark.parametrize(("name", "place"), _BIT_FIELDS.items())
def test_bit_fields_keep_their_neighbours(name: str, place: tuple[int, int, int]) -> None:
    offset, shift, width = place
    vmcb = blank()
    vmcb.dwords[offset // 4] = 0xFFFFFFFF
    setattr(vmcb, name, 0)
    assert vmcb.dwords[offset // 4] == 0xFFFFFFFF ^ ((1 << width) - 1) << shift
    assert getattr(vmcb, name) == 0
    setattr(vmcb, name, (1 << width) - 1)
    assert vmcb.dwords[offset // 4] == 0xFFFFFFFF
    with pytest.raises(ValueError):
        setattr(vmcb, name, 1 << width)


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFF), st.integers(0, 0xFFFFFFFF), U64)
def test_segments_and_tables(selector: int, attributes: int, limit: int, base: int) -> None:
    vmcb = blank()
    for name in ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr"):
        segment = Segment(selector, attributes, limit, base)
        setattr(vmcb, name, segment)
        assert getattr(vmcb, name) == segment
        at = OFFSETS[name]
        assert struct.unpack_from("<HHIQ", vmcb.page, at) == (selector, attributes, limit, base)
    for name in ("gdtr", "idtr"):
        setattr(vmcb, name, Table(limit, base))
        assert getattr(vmcb, name) == Table(limit, base)


def test_a_block_is_one_page() -> None:
    with pytest.raises(ValueError, match="4096"):
        Vmcb(memoryview(bytearray(4095)))


def test_clear_and_views_share_the_page() -> None:
    page = bytearray(4096)
    vmcb = Vmcb(memoryview(page))
    vmcb.rip = 0x1234
    assert page[0x578:0x57A] == b"\x34\x12"
    assert SaveArea(memoryview(page)).rip == 0x1234
    vmcb.clear()
    assert not any(page)


def test_every_field_belongs_to_one_area() -> None:
    own = [name for area in Area if area is not Area.HOST_STATE for name in AREAS[area]]
    assert len(own) == len(set(own))
    fields = {name for owner in (Vmcb, SaveArea) for name, field in vars(owner).items()
              if isinstance(field, property) and hasattr(field, "offset")}
    assert set(own) == fields
    assert all(AREAS.values())
    assert set(HOST_STATE) <= set(AREAS[Area.GUEST_STATE])
    # the registers the paper lists (section 4.3)
    assert {"cr0", "cr3", "cr4", "dr7", "rsp", "rip", "rflags", "cs", "ss", "ds", "es", "fs", "gs", "ldtr",
            "tr", "gdtr", "idtr"} <= set(AREAS[Area.GUEST_STATE])


def test_control_fields_do_not_overlap() -> None:
    taken: dict[int, str] = {}
    for owner in (Vmcb, SaveArea):
        for name, field in vars(owner).items():
            if hasattr(field, "offset") and name not in {*_BIT_FIELDS, "int_ctl"}:
                for byte in range(field.offset, field.offset + field.size):
                    assert byte not in taken, f"{name} lies on {taken.get(byte)}"
                    taken[byte] = name


def test_intercepts_are_numbered_as_the_exit_codes() -> None:
    """The bit of each intercept, from the tables of the manual, against the exit code it gives."""
    places = {
        ExitCode.CR0_READ: (0x000, 0), ExitCode.CR3_WRITE: (0x000, 19), ExitCode.DR7_WRITE: (0x004, 23),
        ExitCode.EXCP_PF: (0x008, 14), ExitCode.INTR: (0x00C, 0), ExitCode.VINTR: (0x00C, 4),
        ExitCode.RDTSC: (0x00C, 14), ExitCode.CPUID: (0x00C, 18), ExitCode.HLT: (0x00C, 24),
        ExitCode.IOIO: (0x00C, 27), ExitCode.MSR: (0x00C, 28), ExitCode.SHUTDOWN: (0x00C, 31),
        ExitCode.VMRUN: (0x010, 0), ExitCode.VMMCALL: (0x010, 1), ExitCode.XSETBV: (0x010, 13),
        ExitCode.EFER_WRITE_TRAP: (0x010, 15), ExitCode.CR0_WRITE_TRAP: (0x010, 16),
        ExitCode.INVLPGB: (0x014, 0), ExitCode.BUSLOCK: (0x014, 5),
    }
    for code, (offset, bit) in places.items():
        vmcb = blank()
        vmcb.intercept(code)
        assert vmcb.dwords[offset // 4] == 1 << bit
        assert vmcb.intercepts(code)
        vmcb.pass_through(code)
        assert not any(vmcb.page)
    assert not [code for code in ExitCode if INTERCEPT_BITS <= code < ExitCode.NPF]


@pytest.mark.parametrize("code", [-1, INTERCEPT_BITS, ExitCode.NPF, ExitCode.INVALID])
def test_codes_without_intercept(code: int) -> None:
    with pytest.raises(ValueError, match="no intercept"):
        blank().intercept(code)


def test_exit_names() -> None:
    assert ExitCode.CR15_WRITE == 0x1F and ExitCode.DR15_WRITE == 0x3F and ExitCode.EXCP_31 == 0x5F
    assert ExitCode.CR15_WRITE_TRAP == 0x9F
    assert [ExitCode.EXCP_DE + v for v in Vector] == [ExitCode[f"EXCP_{v.name}"] for v in Vector]
    assert exit_name(0x7B) == "ioio" and exit_name(0x400) == "npf" and exit_name(2**64 - 1) == "invalid"
    assert exit_name(0x7777) == "unknown"


@given(st.integers(0, 255), st.sampled_from(EventType), st.none() | st.integers(0, 2**32 - 1))
def test_events_survive_encoding(vector: int, kind: EventType, error_code: int | None) -> None:
    event = Event(vector, kind, error_code)
    vmcb = blank()
    vmcb.eventinj = event.encode()
    assert Event.decode(vmcb.eventinj) == event


def test_event_bits() -> None:
    assert Event(14, EventType.EXCEPTION, 5).encode() == 0x5_80000B0E
    assert Event.decode(0x7FFFFFFF) is None


# one way to break a good block for each check: what is wrong -> how to make it so
BREAK: dict[str, Callable[[Vmcb], None]] = {
    "EFER.SVME is zero": lambda v: setattr(v, "efer", v.efer & ~flags.EFER_SVME),
    "CR0.CD is zero and CR0.NW is set": lambda v: setattr(v, "cr0", v.cr0 | flags.CR0_NW),
    "CR0[63:32] are not zero": lambda v: setattr(v, "cr0", v.cr0 | 1 << 32),
    "a must-be-zero bit of CR3 is set": lambda v: setattr(v, "cr3", 1 << flags.PHYSICAL_BITS),
    "a must-be-zero bit of CR4 is set": lambda v: setattr(v, "cr4", v.cr4 | 1 << 15),
    "DR6[63:32] are not zero": lambda v: setattr(v, "dr6", 1 << 32),
    "DR7[63:32] are not zero": lambda v: setattr(v, "dr7", 1 << 63),
    "a must-be-zero bit of EFER is set": lambda v: setattr(v, "efer", v.efer | 1 << 1),
    "EFER.LME and CR0.PG are set and CR4.PAE is zero": lambda v: setattr(v, "cr4", 0),
    "EFER.LME and CR0.PG are set and CR0.PE is zero": lambda v: setattr(v, "cr0", flags.CR0_PG),
    "EFER.LME, CR0.PG, CR4.PAE, CS.L and CS.D are all set":
        lambda v: setattr(v, "cs", Segment(0x10, 0xE9B)),
    "the VMRUN intercept is clear": lambda v: v.pass_through(ExitCode.VMRUN),
    "the MSR permission map reaches past the physical address space":
        lambda v: setattr(v, "msrpm_base_pa", (1 << flags.PHYSICAL_BITS) - 0x1000),
    "the I/O permission map reaches past the physical address space":
        lambda v: setattr(v, "iopm_base_pa", (1 << flags.PHYSICAL_BITS) - 0x2000),
    "the event to inject is illegal":
        lambda v: setattr(v, "eventinj", Event(2, EventType.EXCEPTION).encode()),
    "the guest's ASID is zero": lambda v: setattr(v, "guest_asid", 0),
    "nested paging is enabled and a must-be-zero bit of nCR3 is set":
        lambda v: setattr(v, "n_cr3", 1 << flags.PHYSICAL_BITS),
    "nested paging is enabled and the guest's PAT has a reserved memory type":
        lambda v: setattr(v, "g_pat", 0x0007040600070402),
}
#: checks that depend on the processor rather than on the block
OF_THE_PROCESSOR = {
    "EFER.LMA or EFER.LME is set and the processor has no long mode": Processor(long_mode=False),
    "nested paging is enabled and the host does not page": Processor(host_paging=False),
}


def test_a_good_block_may_run() -> None:
    assert consistency_errors(good()) == []
    assert is_consistent(good())


def test_every_check_has_its_own_test() -> None:
    sentences = [sentence for sentence, _ in (*STATE_CHECKS, *CONTROL_CHECKS)]
    assert sorted(sentences) == sorted([*BREAK, *OF_THE_PROCESSOR])


@pytest.mark.parametrize("sentence", BREAK)
def test_each_illegal_state_gives_its_own_sentence(sentence: str) -> None:
    vmcb = good()
    BREAK[sentence](vmcb)
    assert consistency_errors(vmcb) == [sentence]
    assert not is_consistent(vmcb)


@pytest.mark.parametrize("sentence", OF_THE_PROCESSOR)
def test_checks_of_the_processor(sentence: str) -> None:
    assert consistency_errors(good(), OF_THE_PROCESSOR[sentence]) == [sentence]


@given(st.sets(st.sampled_from(sorted(BREAK))))
def test_faults_are_found_together(broken: set[str]) -> None:
    vmcb = good()
    for sentence in sorted(broken):
        BREAK[sentence](vmcb)
    found = consistency_errors(vmcb)
    assert bool(found) == bool(broken)
    assert is_consistent(vmcb) == (not broken)


def test_host_state_is_checked_without_the_control_checks() -> None:
    host = SaveArea(good().page)
    assert state_errors(host) == []
    host.cr0 = flags.CR0_PG
    assert state_errors(host) == ["EFER.LME and CR0.PG are set and CR0.PE is zero"]


@pytest.mark.parametrize(("event", "legal"), [
    (Event(0x20, EventType.INTR), True),
    (Event(2, EventType.NMI), True),
    (Event(0x80, EventType.SOFTWARE), True),
    (Event(14, EventType.EXCEPTION, 0), True),
    (Event(14, 1), False),
    (Event(14, 5), False),
    (Event(14, 6), False),
    (Event(14, 7), False),
    (Event(2, EventType.EXCEPTION), False),
    (Event(9, EventType.EXCEPTION), False),
    (Event(15, EventType.EXCEPTION), False),
    (Event(32, EventType.EXCEPTION), False),
    (Event(5, EventType.EXCEPTION), False),
    (Event(4, EventType.EXCEPTION), False),
])
def test_event_injection_in_64_bit_mode(event: Event, legal: bool) -> None:
    vmcb = good()
    vmcb.eventinj = event.encode()
    assert is_consistent(vmcb) == legal
    assert (consistency_errors(vmcb) == []) == legal
    vmcb.eventinj &= ~(1 << 31)
    assert is_consistent(vmcb)


def test_bound_and_into_exist_outside_64_bit_mode() -> None:
    vmcb = good()
    vmcb.cs = Segment(0x10, 0xC9B)  # compatibility mode
    for vector in (4, 5):
        vmcb.eventinj = Event(vector, EventType.EXCEPTION).encode()
        assert is_consistent(vmcb)


_REGISTER_BITS = st.one_of(
    st.just(0), U64, st.integers(0, 63).map(lambda bit: 1 << bit),
    st.sampled_from([0x1D01, 0x80050033, 0x6F0, 0x20, 0x11, 0x1000]))


@given(st.lists(st.tuples(
    st.sampled_from(["efer", "cr0", "cr3", "cr4", "dr6", "dr7", "n_cr3", "iopm_base_pa", "msrpm_base_pa",
                     "eventinj", "g_pat"]), _REGISTER_BITS, st.booleans()), max_size=4),
    st.integers(0, 0xFFF), st.booleans())
def test_the_quick_answer_is_that_of_the_table(
        writes: list[tuple[str, int, bool]], cs: int, nested: bool) -> None:
    vmcb = good()
    vmcb.np_enable = nested
    vmcb.cs = Segment(8, cs)
    for name, value, toggle in writes:
        setattr(vmcb, name, getattr(vmcb, name) ^ value if toggle else value)
    assert is_consistent(vmcb) == (not consistency_errors(vmcb))
