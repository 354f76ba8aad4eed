# SPDX-License-Identifier: GPL-2.0-or-later
"""Which translations the guest's state of the moment calls for."""

from __future__ import annotations

from vmm.bt.decode import CS, FS, GS, SS
from vmm.bt.mode import Mode
from vmm.bt.native.block import OFFSETS
from vmm.silicon import layout as at
from vmm.silicon.registers import Registers
from vmm.x86.flags import (
    CR0_AM,
    CR0_EM,
    CR0_PE,
    CR0_TS,
    CR4_OSFXSR,
    CR4_SMAP,
    EFER_LMA,
    MASK32,
    RFLAGS_AC,
    RFLAGS_TF,
    RFLAGS_VM,
)

_FIRST, _LAST = 8 * at.SEGMENTS, 8 * (at.SEGMENTS + 18)
# of a descriptor's upper half: type, S, P, D/B
_PRESENT, _CODE_DATA, _CODE, _BIG = 1 << 15, 1 << 12, 1 << 11, 1 << 22
_WRITABLE_OR_READABLE, _EXPAND_DOWN = 1 << 9, 1 << 10
_MOST_KNOWN = 256
_BASES, _SELECTORS = OFFSETS["segment_base"] // 4, OFFSETS["selector"] // 4

_Key = tuple[bytes, int, int, int, int, int]


class Modes:
    """The mode of the guest whose registers are in `regs`."""

    def __init__(self, regs: Registers) -> None:
        self._image = regs.image
        self._q, self._d = regs.q, regs.d
        self._known: dict[_Key, Mode | None] = {}
        self._interned: dict[Mode, Mode] = {}
        self._last: _Key | None = None
        self._mode: Mode | None = None
        self._loaded: _Key | None = None

    def now(self) -> Mode | None:
        """The mode; None when the guest's code is not translated in it.  Equal modes are the same object."""
        q = self._q
        key = (bytes(self._image[_FIRST:_LAST]), q[at.CR], q[at.CR + 4] & (CR4_OSFXSR | CR4_SMAP),
               q[at.EFER] & EFER_LMA, self._d[at.HFLAGS] & 3,
               q[at.RFLAGS] & (RFLAGS_TF | RFLAGS_VM | RFLAGS_AC))
        if key == self._last:
            return self._mode
        self._last = key
        if key in self._known:
            self._mode = self._known[key]
            return self._mode
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        mode = self._work_out(key)
        if mode is not None:
            mode = self._interned.setdefault(mode, mode)
        self._mode = self._known[key] = mode
        return mode

    def _work_out(self, key: _Key) -> Mode | None:
        _, cr0, cr4, lma, cpl, rflags = key
        if (not cr0 & CR0_PE or lma or rflags & (RFLAGS_TF | RFLAGS_VM) or cpl in (1, 2)
                or (cpl == 3 and cr0 & CR0_AM and rflags & RFLAGS_AC) or (cr4 & CR4_SMAP and cpl == 0)):
            return None
        flat = based = 0
        for index in range(6):
            if not self.spans(index):
                continue
            if self._q[at.SEGMENTS + 3 * index + 1]:
                based |= 1 << index
            else:
                flat |= 1 << index
        if cpl == 0:
            # a kernel that does not use GS keeps whatever its user had there: not worth a mode of its own
            flat &= ~(1 << GS)
            based &= ~(1 << GS)
        if not flat >> CS & 1 or not self._flags(CS) & _BIG or not self._flags(SS) & _BIG:
            return None
        fpu = not cr0 & (CR0_EM | CR0_TS)
        return Mode(True, True, flat, based, fpu, fpu and bool(cr4 & CR4_OSFXSR), cpl == 3)

    def _flags(self, index: int) -> int:
        return self._q[at.SEGMENTS + 3 * index + 2] >> 32

    def spans(self, index: int) -> bool:
        """Whether a segment register allows every access to 4 GiB (CS: every fetch and read)."""
        if self._q[at.SEGMENTS + 3 * index + 2] & MASK32 != MASK32:
            return False
        flags = self._flags(index)
        needed = _PRESENT | _CODE_DATA | _WRITABLE_OR_READABLE
        if flags & needed != needed:
            return False
        if index == CS:
            return bool(flags & _CODE)
        return not flags & (_CODE | _EXPAND_DOWN)

    @property
    def fpu_usable(self) -> bool:
        """Whether an x87 or SSE instruction would execute."""
        return not self._q[at.CR] & (CR0_EM | CR0_TS)

    def load_segments(self, block: memoryview) -> None:
        """Put bases and selectors into a state block, given as doublewords, unless they are there.

        They are as they were when the mode was last asked for.
        """
        if self._last is self._loaded:
            return
        self._loaded = self._last
        q = self._q
        for index in range(6):
            block[_SELECTORS + index] = q[at.SEGMENTS + 3 * index] & 0xFFFF
            block[_BASES + index] = q[at.SEGMENTS + 3 * index + 1] & MASK32


assert FS < GS
