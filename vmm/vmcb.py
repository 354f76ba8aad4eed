# SPDX-License-Identifier: GPL-2.0-or-later
"""The virtual machine control block: 4 KiB that hold a guest's processor while it is not running, and
say how it is to be run (AMD64 APM vol. 2, 15.5 and appendix B).

`Vmcb` gives names to the bytes of a page; reading or writing an attribute reads or writes the page.
Offsets are those of tables B-1 (control area) and B-2 (state save area, at 0x400).  The host's state
is saved in a page of its own (VM_HSAVE_PA) in the layout of the state save area: `SaveArea`.

Every field belongs to one of six areas, `Area`: guest state, host state, execution control, exit control,
entry control and exit information.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from vmm.exitcodes import INTERCEPT_BITS, ExitCode
from vmm.state import Segment, Table

PAGE = 4096
SAVE = 0x400  # offset of the state save area

#: sizes of the permission maps VMCB fields point to (APM vol. 2, 15.10.1 and 15.11)
IOPM_BYTES = 3 * PAGE
MSRPM_BYTES = 2 * PAGE


class Area(Enum):
    """The parts of a control block by what they are for."""

    GUEST_STATE = "guest state"
    HOST_STATE = "host state"
    EXECUTION_CONTROL = "execution control"
    EXIT_CONTROL = "exit control"
    ENTRY_CONTROL = "entry control"
    EXIT_INFORMATION = "exit information"


class Field(property):
    """A named integer in the page.

    A property over one of the page's typed views: an access is one index into it (about 0.1 us).
    """

    def __init__(self, offset: int, size: int, area: Area,
                 get: Callable[[SaveArea], int], put: Callable[[SaveArea, int], None]) -> None:
        super().__init__(get, put)
        self.offset = offset
        self.size = size
        self.area = area

    if TYPE_CHECKING:  # what the type checker shall believe; the work is done by `property`
        def __get__(self, instance: Any, owner: type | None = None) -> Any: ...
        def __set__(self, instance: Any, value: int) -> None: ...


def _field8(offset: int, area: Area) -> Field:
    def get(block: SaveArea) -> int:
        return block.page[offset]

    def put(block: SaveArea, value: int) -> None:
        block.page[offset] = value
    return Field(offset, 1, area, get, put)


def _field16(offset: int, area: Area) -> Field:
    index = offset // 2

    def get(block: SaveArea) -> int:
        return block.words[index]

    def put(block: SaveArea, value: int) -> None:
        block.words[index] = value
    return Field(offset, 2, area, get, put)


def _field32(offset: int, area: Area) -> Field:
    index = offset // 4

    def get(block: SaveArea) -> int:
        return block.dwords[index]

    def put(block: SaveArea, value: int) -> None:
        block.dwords[index] = value
    return Field(offset, 4, area, get, put)


def _field64(offset: int, area: Area) -> Field:
    index = offset // 8

    def get(block: SaveArea) -> int:
        return block.qwords[index]

    def put(block: SaveArea, value: int) -> None:
        block.qwords[index] = value
    return Field(offset, 8, area, get, put)


def _bits(offset: int, shift: int, width: int, area: Area) -> Field:
    """`width` bits from `shift` up of the 32-bit word at `offset`."""
    index = offset // 4
    top = (1 << width) - 1
    clear = 0xFFFFFFFF ^ top << shift

    def get(block: SaveArea) -> int:
        return block.dwords[index] >> shift & top

    def put(block: SaveArea, value: int) -> None:
        if not 0 <= value <= top:
            raise ValueError(f"{value} does not fit {width} bits")
        block.dwords[index] = block.dwords[index] & clear | value << shift
    return Field(offset, 4, area, get, put)


_SEGMENT = struct.Struct("<HHIQ")


class SegmentField(property):
    """A segment register: selector, attributes, limit and base in 16 bytes."""

    area = Area.GUEST_STATE
    size = 16

    def __init__(self, offset: int) -> None:
        unpack, pack = _SEGMENT.unpack_from, _SEGMENT.pack_into

        def get(block: SaveArea) -> Segment:
            return Segment(*unpack(block.page, offset))

        def put(block: SaveArea, value: Segment) -> None:
            pack(block.page, offset, value.selector, value.attributes, value.limit, value.base)
        super().__init__(get, put)
        self.offset = offset

    if TYPE_CHECKING:
        def __get__(self, instance: Any, owner: type | None = None) -> Any: ...
        def __set__(self, instance: Any, value: Segment) -> None: ...


class TableField(property):
    """GDTR or IDTR: a segment register of which only limit and base are used."""

    area = Area.GUEST_STATE
    size = 16

    def __init__(self, offset: int) -> None:
        def get(block: SaveArea) -> Table:
            return Table(block.dwords[offset // 4 + 1], block.qwords[offset // 8 + 1])

        def put(block: SaveArea, value: Table) -> None:
            block.dwords[offset // 4 + 1] = value.limit
            block.qwords[offset // 8 + 1] = value.base
        super().__init__(get, put)
        self.offset = offset

    if TYPE_CHECKING:
        def __get__(self, instance: Any, owner: type | None = None) -> Any: ...
        def __set__(self, instance: Any, value: Table) -> None: ...


def _state(offset: int) -> Field:
    return _field64(SAVE + offset, Area.GUEST_STATE)


class SaveArea:
    """A processor's state in the second quarter of a page (APM vol. 2, table B-2)."""

    es = SegmentField(SAVE + 0x00)
    cs = SegmentField(SAVE + 0x10)
    ss = SegmentField(SAVE + 0x20)
    ds = SegmentField(SAVE + 0x30)
    fs = SegmentField(SAVE + 0x40)
    gs = SegmentField(SAVE + 0x50)
    gdtr = TableField(SAVE + 0x60)
    ldtr = SegmentField(SAVE + 0x70)
    idtr = TableField(SAVE + 0x80)
    tr = SegmentField(SAVE + 0x90)
    cpl = _field8(SAVE + 0xCB, Area.GUEST_STATE)
    efer = _state(0xD0)
    cr4 = _state(0x148)
    cr3 = _state(0x150)
    cr0 = _state(0x158)
    dr7 = _state(0x160)
    dr6 = _state(0x168)
    rflags = _state(0x170)
    rip = _state(0x178)
    rsp = _state(0x1D8)
    s_cet = _state(0x1E0)
    ssp = _state(0x1E8)
    isst_addr = _state(0x1F0)
    rax = _state(0x1F8)
    star = _state(0x200)
    lstar = _state(0x208)
    cstar = _state(0x210)
    sfmask = _state(0x218)
    kernel_gs_base = _state(0x220)
    sysenter_cs = _state(0x228)
    sysenter_esp = _state(0x230)
    sysenter_eip = _state(0x238)
    cr2 = _state(0x240)
    g_pat = _state(0x268)
    dbgctl = _state(0x270)
    br_from = _state(0x278)
    br_to = _state(0x280)
    last_excp_from = _state(0x288)
    last_excp_to = _state(0x290)

    __slots__ = ("dwords", "page", "qwords", "words")

    def __init__(self, page: memoryview) -> None:
        self.page = page.cast("B")
        if len(self.page) != PAGE:
            raise ValueError(f"a control block is {PAGE} bytes, not {len(self.page)}")
        self.words = self.page.cast("H")
        self.dwords = self.page.cast("I")
        self.qwords = self.page.cast("Q")

    def clear(self) -> None:
        self.page[:] = bytes(PAGE)


class TlbControl(IntEnum):
    """What vmrun does to the TLB first (APM vol. 2, 15.16.1)."""

    KEEP = 0
    FLUSH_ALL = 1
    FLUSH_ASID = 3
    FLUSH_ASID_LOCAL = 7


class Vmcb(SaveArea):
    """A guest's control block: the control area (APM vol. 2, table B-1) before the guest's saved state."""

    # the intercept vector: 192 bits, see `intercept`
    intercept_cr_read = _field16(0x000, Area.EXECUTION_CONTROL)
    intercept_cr_write = _field16(0x002, Area.EXECUTION_CONTROL)
    intercept_dr_read = _field16(0x004, Area.EXECUTION_CONTROL)
    intercept_dr_write = _field16(0x006, Area.EXECUTION_CONTROL)
    intercept_exceptions = _field32(0x008, Area.EXECUTION_CONTROL)
    intercept_misc1 = _field32(0x00C, Area.EXECUTION_CONTROL)
    intercept_misc2 = _field32(0x010, Area.EXECUTION_CONTROL)
    intercept_misc3 = _field32(0x014, Area.EXECUTION_CONTROL)
    # which of the intercepted PAUSE, IN/OUT and RDMSR/WRMSR really leave
    pause_filter_threshold = _field16(0x03C, Area.EXIT_CONTROL)
    pause_filter_count = _field16(0x03E, Area.EXIT_CONTROL)
    iopm_base_pa = _field64(0x040, Area.EXIT_CONTROL)
    msrpm_base_pa = _field64(0x048, Area.EXIT_CONTROL)
    tsc_offset = _field64(0x050, Area.EXECUTION_CONTROL)
    guest_asid = _field32(0x058, Area.ENTRY_CONTROL)
    tlb_control = _field8(0x05C, Area.ENTRY_CONTROL)
    # virtual interrupts: the whole word, then its fields
    int_ctl = _field32(0x060, Area.EXECUTION_CONTROL)
    v_tpr = _bits(0x060, 0, 4, Area.EXECUTION_CONTROL)
    v_irq = _bits(0x060, 8, 1, Area.EXECUTION_CONTROL)
    v_gif = _bits(0x060, 9, 1, Area.EXECUTION_CONTROL)
    v_intr_prio = _bits(0x060, 16, 4, Area.EXECUTION_CONTROL)
    v_ign_tpr = _bits(0x060, 20, 1, Area.EXECUTION_CONTROL)
    v_intr_masking = _bits(0x060, 24, 1, Area.EXECUTION_CONTROL)
    v_gif_enable = _bits(0x060, 25, 1, Area.EXECUTION_CONTROL)
    v_intr_vector = _field8(0x064, Area.EXECUTION_CONTROL)
    interrupt_shadow = _bits(0x068, 0, 1, Area.GUEST_STATE)
    guest_interrupt_mask = _bits(0x068, 1, 1, Area.GUEST_STATE)
    exitcode = _field64(0x070, Area.EXIT_INFORMATION)
    exitinfo1 = _field64(0x078, Area.EXIT_INFORMATION)
    exitinfo2 = _field64(0x080, Area.EXIT_INFORMATION)
    exitintinfo = _field64(0x088, Area.EXIT_INFORMATION)
    np_enable = _bits(0x090, 0, 1, Area.EXECUTION_CONTROL)
    eventinj = _field64(0x0A8, Area.ENTRY_CONTROL)
    n_cr3 = _field64(0x0B0, Area.EXECUTION_CONTROL)
    lbr_virtualization = _bits(0x0B8, 0, 1, Area.EXECUTION_CONTROL)
    clean = _field32(0x0C0, Area.ENTRY_CONTROL)
    nrip = _field64(0x0C8, Area.EXIT_INFORMATION)
    fetched_bytes = _field8(0x0D0, Area.EXIT_INFORMATION)

    __slots__ = ()

    @property
    def instruction(self) -> bytes:
        """Bytes of the exiting instruction as far as the processor fetched them (data page faults)."""
        return bytes(self.page[0xD1:0xD1 + min(self.page[0xD0], 15)])

    def intercept(self, *codes: int) -> None:
        """Make the guest leave for these exit codes."""
        for code in codes:
            self.dwords[_intercept_word(code)] |= 1 << (code & 31)

    def pass_through(self, *codes: int) -> None:
        """Let these happen in the guest."""
        for code in codes:
            self.dwords[_intercept_word(code)] &= ~(1 << (code & 31))

    def intercepts(self, code: int) -> bool:
        return bool(self.dwords[_intercept_word(code)] >> (code & 31) & 1)


def _intercept_word(code: int) -> int:
    if not 0 <= code < INTERCEPT_BITS:
        raise ValueError(f"exit code {code:#x} has no intercept")
    return code >> 5


#: what vmrun saves in the page at VM_HSAVE_PA and #VMEXIT loads from there (APM vol. 2, 15.5.1)
HOST_STATE = ("cs", "ss", "ds", "es", "gdtr", "idtr", "rip", "rsp", "rax", "rflags",
              "cr0", "cr3", "cr4", "efer")


def _areas() -> dict[Area, tuple[str, ...]]:
    fields = [(name, field) for owner in (Vmcb, SaveArea) for name, field in vars(owner).items()
              if isinstance(field, Field | SegmentField | TableField)]
    areas = {area: tuple(name for name, field in fields if field.area is area) for area in Area}
    areas[Area.HOST_STATE] = HOST_STATE
    return areas


#: the names of the fields of each area; host state means fields of the `SaveArea` at VM_HSAVE_PA
AREAS = _areas()


class EventType(IntEnum):
    """Kinds of event in EVENTINJ and EXITINTINFO (APM vol. 2, table 15-14)."""

    INTR = 0
    NMI = 2
    EXCEPTION = 3
    SOFTWARE = 4


EVENT_ERROR_VALID = 1 << 11
EVENT_VALID = 1 << 31


class Event(NamedTuple):
    """An event to inject, or one whose delivery an exit interrupted (APM vol. 2, 15.20 and 15.7.2).

    `type` is an EventType, or a reserved number when decoded from a bad field.
    """

    vector: int
    type: int
    error_code: int | None = None

    def encode(self) -> int:
        """The event as an EVENTINJ or EXITINTINFO value."""
        value = self.vector | self.type << 8 | EVENT_VALID
        if self.error_code is not None:
            value |= EVENT_ERROR_VALID | self.error_code << 32
        return value

    @classmethod
    def decode(cls, value: int) -> Event | None:
        """The event in an EVENTINJ or EXITINTINFO value; None when there is none."""
        if not value & EVENT_VALID:
            return None
        error_code = value >> 32 if value & EVENT_ERROR_VALID else None
        return cls(value & 0xFF, value >> 8 & 7, error_code)


__all__ = ["AREAS", "HOST_STATE", "Area", "Event", "EventType", "ExitCode", "SaveArea", "TlbControl", "Vmcb"]
