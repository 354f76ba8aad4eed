# SPDX-License-Identifier: GPL-2.0-or-later
"""The verifier: what translated code may be, checked before it becomes reachable.

It shares nothing with the decoder and the translator: it reads the emitted 64-bit bytes by itself, against
an allow-list (verify_table), and rejects whatever is not on it.  What it accepts keeps these properties,
whatever the translator meant:

    registers    r12, r14, r15 and the segment bases are never written.  No instruction writes more than
                 32 bits of a register, so the upper halves of rax-rdi and r8-r11 stay the zeros they are
                 entered with; a string sequence is the one exception and ends by clearing what it set.
    memory       `gs` with a 32-bit address (65 67), which begins in the window; [r12 + r] with such an r,
                 the same; a string sequence, which moves from there in steps smaller than the guards;
                 [r14 + d], a field of the state block that units may use; the jump table's jump.
    control      direct jumps to instructions of the unit, to known entries, and to exit stubs; the jump
                 `jmp [r15 + r8*8]`, whose r8 is an address below 4 GiB.  The end of a unit is not reached,
                 unless there begins another.
    instructions nothing privileged, nothing that enters the kernel, no stack instruction (the guest's esp
                 is no host address), nothing that changes hidden state (segments, xsave areas, gs base).
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Collection, Sequence
from typing import NamedTuple

from vmm.bt.verify_automaton import Rejected
from vmm.bt.verify_scan import JUMPS, OPERAND, STOPS, Stems, scan

__all__ = ["Layout", "Rejected", "Verifier"]

#: what a byte of the arena is: of no unit; inside one; where one begins; where the displacement of a direct
#: jump begins; where the jump at the end of a unit begins (but for a unit that is nothing else)
_FREE, _INSIDE, _ENTRY, _SITE, _TRAILING = range(5)
_TRAILING_JUMP = bytes((_TRAILING, _SITE, _INSIDE, _INSIDE, _INSIDE))
#: what a unit may be put over, free bytes behind that aside
_REPLACEABLE = b"", _TRAILING_JUMP
_JMP_BYTES = len(_TRAILING_JUMP)
_LONGEST_UNIT = 4096
_UNIT = bytes((_ENTRY,)) + bytes((_INSIDE,)) * (_LONGEST_UNIT - 1)
_rel32 = struct.Struct("<i").pack
_displacement = struct.Struct("<i").unpack_from
#: a stem of a conditional jump, among others
_BRANCH = JUMPS | 4


class Layout(NamedTuple):
    """Where units and exit stubs are."""

    units: int
    units_bytes: int
    stubs: int
    stub_bytes: int
    stub_count: int

    @property
    def all_stubs(self) -> range:
        """Where exit stubs begin."""
        return range(self.stubs, self.stubs + self.stub_count * self.stub_bytes, self.stub_bytes)


class Verifier:
    """Knows the accepted units: where they are, where they begin, which of their jumps can be patched.

    Invariant: accepted units do not overlap, so no byte of one changes but by `patch`.
    """

    def __init__(self, layout: Layout) -> None:
        self._units, self._size = layout.units, layout.units_bytes
        self._stubs = layout.all_stubs
        #: what each byte among the units is; of memory it takes what units have used of theirs
        self._map = mmap.mmap(-1, layout.units_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._stems = Stems()
        self._stem = self._stems.__getitem__

    def accept(self, parts: Sequence[bytes], address: int) -> bytes:
        """Accept the unit made of these parts, which will be at `address`; its code.  Raises Rejected.

        It may take the place of the trailing jump of the unit before it, which then falls through into it.
        How it is cut into parts decides nothing, but if they are stems and operands (`vmm.bt.verify_scan`) in
        turns, less has to be gone over.
        """
        code = b"".join(parts)
        length, begin, marks = len(code), address - self._units, self._map
        if not 0 < length <= _LONGEST_UNIT or not 0 <= begin <= self._size - length:
            raise Rejected("unit outside the arena, or of no possible length")
        if marks[begin:begin + length].rstrip(b"\0") not in _REPLACEABLE:
            raise Rejected("over another unit")
        starts: Collection[int] = ()
        sites: list[int] = []
        targets: list[int] = []
        end = -1
        # at most two jumps at the end aside, a stem stands for the length of its operand and for no more
        found = [*map(self._stem, parts[::2])]
        last = found[-1]
        if last > OPERAND:
            found[-1] = last & OPERAND
            if last & STOPS:
                end = length
            if last & JUMPS:
                site = length - 4
                sites.append(site)
                if len(found) > 1 and found[-2] == _BRANCH:
                    found[-2] &= OPERAND
                    sites.append(site - len(parts[-2]) - 4)
        if found == [*map(len, parts[1::2])]:
            for site in sites:
                targets.append(site + 4 + _displacement(code, site)[0])
        else:
            starts, sites, targets, end = scan(code)
        if end != length and not self._is_entry(address + length):
            raise Rejected("runs over its end", length)
        stubs = self._stubs
        for target in targets:
            there = address + target
            if there in stubs:
                continue
            if 0 <= target < length:
                if target and target not in (starts or scan(code).starts):
                    raise Rejected("jump into an instruction", target)
            elif not self._is_entry(there):
                raise Rejected("jump to where no instruction is known to begin", target)
        marks[begin:begin + length] = _UNIT[:length]
        for site in sites:
            marks[begin + site] = _SITE
        if end == length > _JMP_BYTES and length - 4 in sites:
            marks[begin + length - _JMP_BYTES] = _TRAILING
        return code

    def patch(self, site: int, target: int) -> bytes:
        """The four bytes that make the accepted jump with its displacement at `site` go to `target`."""
        if self._mark(site) != _SITE:
            raise Rejected("no jump of an accepted unit", site)
        if target not in self._stubs and self._mark(target) != _ENTRY:
            raise Rejected("jump to where no instruction is known to begin", site)
        return _rel32(target - site - 4)

    def retract(self, address: int, length: int) -> None:
        """The units in a range, which begins where one does and ends where one or several end, are gone.

        Before a guest runs again the caller has patched the jumps to them, and has had something accepted
        where a unit before the range falls through into it.
        """
        if not self._is_entry(address) or self._mark(address + length) not in (_FREE, _ENTRY):
            raise Rejected("no range of units", address)
        begin = address - self._units
        self._map[begin:begin + length] = bytes(length)

    @property
    def entries(self) -> set[int]:
        """Addresses where an accepted unit begins."""
        return self._marked(_ENTRY)

    @property
    def sites(self) -> set[int]:
        """Addresses of the 32-bit displacements of direct jumps in accepted units."""
        return self._marked(_SITE)

    def _marked(self, mark: int) -> set[int]:
        return {self._units + found.start() for found in re.finditer(bytes([mark]), self._map)}

    def _mark(self, address: int) -> int:
        at = address - self._units
        return self._map[at] if 0 <= at < self._size else _FREE

    def _is_entry(self, address: int) -> bool:
        return self._mark(address) == _ENTRY
