# SPDX-License-Identifier: GPL-2.0-or-later
"""The live register file of the emulated CPU, read and written where it lies.

`q` and `d` are the register file as quadwords and doublewords, indexed by the constants of
`vmm.silicon.layout`; hot code uses them directly (40 ns an access).  The arithmetic flags and DF are kept
apart by the silicon (lazily), so RFLAGS goes through `rflags` and `set_rflags` only.
"""

from __future__ import annotations

import ctypes
import struct

from unicorn import x86_const
from unicorn.unicorn_py3.unicorn import uclib

from vmm.silicon import layout as at
from vmm.state import CpuState, Segment, Table
from vmm.vmcb import SAVE
from vmm.x86.flags import RFLAGS_VM

# QEMU's hflags
HF_CPL, HF_CS32, HF_SS32, HF_ADDSEG, HF_PE = 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7
HF_LMA, HF_CS64 = 1 << 14, 1 << 15
#: flags kept lazily: OF SF ZF AF PF CF, and DF
_CC = 0x8D5
_DF = 0x400
_CC_OP_EFLAGS = 1
#: FS_BASE and GS_BASE: the segments carry them
_BASES = (0xC000_0100, 0xC000_0101)
_DESC_B = 1 << 22
_DESC_L = 1 << 21

_SEGMENTS = struct.Struct("<HHIQHHIQHHIQHHIQ")      # ES CS SS DS
_TABLE = struct.Struct("<HHIQ")
_CONTROL = struct.Struct("<7Q")                     # CR4 CR3 CR0 DR7 DR6 RFLAGS RIP
_QUAD = struct.Struct("<Q")
_CPL_AT, _EFER_AT, _CR4_AT = SAVE + 0xCB, SAVE + 0xD0, SAVE + 0x148
_RSP_AT, _RAX_AT, _CR2_AT = SAVE + 0x1D8, SAVE + 0x1F8, SAVE + 0x240


def attributes_of(flags: int) -> int:
    """Segment attributes in the VMCB's form from the descriptor's upper doubleword."""
    return flags >> 8 & 0xFF | flags >> 12 & 0xF00


def flags_of(attributes: int) -> int:
    """The inverse of `attributes_of`."""
    return (attributes & 0xFF) << 8 | (attributes & 0xF00) << 12


class Registers:
    """Views and accessors over the env at a layout."""

    def __init__(self, place: at.Layout, handle: int) -> None:
        self.place = place
        self.image = memoryview((ctypes.c_char * place.env_bytes).from_address(place.env)).cast("B")
        self.q = self.image[:place.env_bytes // 8 * 8].cast("Q")
        self.d = self.image[:place.env_bytes // 4 * 4].cast("I")
        read, write = uclib["uc_reg_read"], uclib["uc_reg_write"]
        read.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        read.restype = ctypes.c_int
        write.argtypes, write.restype = read.argtypes, read.restype
        self._read, self._write = read, write
        self._handle = handle
        self._cell = ctypes.c_uint64()
        self._cell_address = ctypes.addressof(self._cell)

    # -- RFLAGS and hidden flags -------------------------------------------------------------------

    def rflags(self) -> int:
        """RFLAGS with the lazily kept flags computed."""
        self._read(self._handle, x86_const.UC_X86_REG_RFLAGS, self._cell_address)
        return self._cell.value

    def settle_flags(self) -> None:
        """Before anybody looks at the flags of a guest that leaves: CMPXCHG8B and CMPXCHG16B, whose helper
        takes an operand for the flags where it is not told what they are, leave the rest of it behind."""
        if self.d[at.CC_OP] == _CC_OP_EFLAGS:
            self.q[at.CC_SRC] &= _CC

    def show_flags(self) -> None:
        """Before the silicon goes on with a guest that is on it already: it takes all flags from RFLAGS then,
        and the lazily kept ones from nowhere else."""
        self.q[at.RFLAGS] = self.rflags()

    def set_rflags(self, value: int) -> None:
        """Set RFLAGS.

        Hidden flags hold none of its bits: the silicon adds them whenever it looks, and one put there would
        outlive it.
        """
        q, d = self.q, self.d
        q[at.CC_SRC] = value & _CC
        d[at.CC_OP] = _CC_OP_EFLAGS
        d[at.DF] = 0xFFFF_FFFF if value & _DF else 1
        q[at.RFLAGS] = value & ~(_CC | _DF) | 2

    def set_cr4(self, value: int) -> None:
        """Set CR4 as MOV does: the TLB and hidden flags follow."""
        self._cell.value = value
        self._write(self._handle, x86_const.UC_X86_REG_CR4, self._cell_address)

    @property
    def cpl(self) -> int:
        """Current privilege level."""
        return self.d[at.HFLAGS] & HF_CPL

    def load_segment(self, index: int, selector: int, attributes: int, limit: int, base: int) -> None:
        """Put a segment register (an index of `layout`) with its hidden part; hidden flags follow with
        `refresh_hidden_flags`."""
        self.q[index] = selector
        self.q[index + 1] = base
        self.q[index + 2] = limit & 0xFFFF_FFFF | flags_of(attributes) << 32

    def refresh_hidden_flags(self, cpl: int) -> None:
        """Recompute what the silicon derives from segments, as its own segment loads do."""
        q, d = self.q, self.d
        hidden = d[at.HFLAGS] & ~(HF_CPL | HF_CS32 | HF_SS32 | HF_ADDSEG | HF_CS64) | cpl
        cs = q[at.CS + 2] >> 32
        if hidden & HF_LMA and cs & _DESC_L:
            hidden |= HF_CS32 | HF_SS32 | HF_CS64
        else:
            hidden |= HF_CS32 if cs & _DESC_B else 0
            hidden |= HF_SS32 if q[at.SS + 2] >> 32 & _DESC_B else 0
            based = q[at.DS + 1] | q[at.ES + 1] | q[at.SS + 1]
            if not hidden & HF_PE or q[at.RFLAGS] & RFLAGS_VM or not hidden & HF_CS32 or based:
                hidden |= HF_ADDSEG
        d[at.HFLAGS] = hidden

    # -- VMCB --------------------------------------------------------------------------------------

    def save_to(self, page: memoryview) -> None:
        """The guest state #VMEXIT saves (APM vol. 2, 15.6), into the save area of the VMCB `page`."""
        q = self.q
        es, cs, ss, ds = q[at.ES + 2], q[at.CS + 2], q[at.SS + 2], q[at.DS + 2]
        _SEGMENTS.pack_into(
            page, SAVE,
            q[at.ES] & 0xFFFF, es >> 40 & 0xFF | es >> 44 & 0xF00, es & 0xFFFF_FFFF, q[at.ES + 1],
            q[at.CS] & 0xFFFF, cs >> 40 & 0xFF | cs >> 44 & 0xF00, cs & 0xFFFF_FFFF, q[at.CS + 1],
            q[at.SS] & 0xFFFF, ss >> 40 & 0xFF | ss >> 44 & 0xF00, ss & 0xFFFF_FFFF, q[at.SS + 1],
            q[at.DS] & 0xFFFF, ds >> 40 & 0xFF | ds >> 44 & 0xF00, ds & 0xFFFF_FFFF, q[at.DS + 1])
        _TABLE.pack_into(page, SAVE + 0x60, 0, 0, q[at.GDTR + 2] & 0xFFFF_FFFF, q[at.GDTR + 1])
        _TABLE.pack_into(page, SAVE + 0x80, 0, 0, q[at.IDTR + 2] & 0xFFFF_FFFF, q[at.IDTR + 1])
        _CONTROL.pack_into(page, _CR4_AT, q[at.CR + 4], q[at.CR + 3], q[at.CR], q[self.place.dr + 7],
                           q[self.place.dr + 6], self.rflags(), q[at.RIP])
        _QUAD.pack_into(page, _EFER_AT, q[at.EFER])
        _QUAD.pack_into(page, _RSP_AT, q[4])
        _QUAD.pack_into(page, _RAX_AT, q[0])
        _QUAD.pack_into(page, _CR2_AT, q[at.CR + 2])
        page[_CPL_AT] = self.d[at.HFLAGS] & HF_CPL

    # -- CpuState ----------------------------------------------------------------------------------

    def segment(self, index: int) -> Segment:
        """A segment register as a value."""
        q = self.q
        return Segment(q[index] & 0xFFFF, attributes_of(q[index + 2] >> 32), q[index + 2] & 0xFFFF_FFFF,
                       q[index + 1])

    def table(self, index: int) -> Table:
        """GDTR or IDTR as a value."""
        return Table(self.q[index + 2] & 0xFFFF_FFFF, self.q[index + 1])

    def msr_cells(self) -> dict[int, tuple[memoryview, int]]:
        """Where the MSRs live that the silicon itself keeps: number -> (view, index)."""
        place, q, d = self.place, self.q, self.d
        return {0xC000_0081: (q, place.star), 0xC000_0082: (q, place.lstar), 0xC000_0083: (q, place.cstar),
                0xC000_0084: (q, place.fmask), 0xC000_0102: (q, place.kernel_gs_base),
                0xC000_0100: (q, at.FS + 1), 0xC000_0101: (q, at.GS + 1), 0x277: (q, place.pat),
                0x174: (d, place.sysenter_cs), 0x175: (q, place.sysenter_esp),
                0x176: (q, place.sysenter_eip)}

    def to_state(self) -> CpuState:
        """Everything of the register file that is the guest's, as a value.

        The FPU image and what the monitor keeps itself (pending events, MSRs, clocks) are added by it.
        """
        q = self.q
        return CpuState(
            gpr=q[:16].tolist(), rip=q[at.RIP], rflags=self.rflags(),
            cs=self.segment(at.CS), ss=self.segment(at.SS), ds=self.segment(at.DS), es=self.segment(at.ES),
            fs=self.segment(at.FS), gs=self.segment(at.GS), ldtr=self.segment(at.LDTR),
            tr=self.segment(at.TR), gdtr=self.table(at.GDTR), idtr=self.table(at.IDTR),
            cr0=q[at.CR], cr2=q[at.CR + 2], cr3=q[at.CR + 3], cr4=q[at.CR + 4], efer=q[at.EFER] & ~0x1000,
            dr=q[self.place.dr:self.place.dr + 8].tolist(),
            msrs={number: view[index] for number, (view, index) in self.msr_cells().items()},
            interrupt_shadow=bool(self.d[at.HFLAGS] & at.HF_INHIBIT_IRQ))

    def load(self, state: CpuState) -> None:
        """Put `state` into the register file, but for the FPU and what is derived (hidden flags)."""
        q = self.q
        for index, value in enumerate(state.gpr):
            q[index] = value
        for index, segment in ((at.ES, state.es), (at.CS, state.cs), (at.SS, state.ss), (at.DS, state.ds),
                               (at.FS, state.fs), (at.GS, state.gs), (at.LDTR, state.ldtr),
                               (at.TR, state.tr)):
            self.load_segment(index, segment.selector, segment.attributes, segment.limit, segment.base)
        for index, table in ((at.GDTR, state.gdtr), (at.IDTR, state.idtr)):
            q[index + 1] = table.base
            q[index + 2] = table.limit
        q[at.RIP] = state.rip
        q[at.CR], q[at.CR + 2], q[at.CR + 3], q[at.CR + 4] = state.cr0, state.cr2, state.cr3, state.cr4
        q[at.EFER] = state.efer
        for index, value in enumerate(state.dr):
            q[self.place.dr + index] = value
        for number, (view, index) in self.msr_cells().items():
            if number in state.msrs and number not in _BASES:
                view[index] = state.msrs[number]
        self.set_rflags(state.rflags)
