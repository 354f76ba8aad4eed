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
from typing import NamedTuple

from vmm.bt.verify_automaton import Rejected
from vmm.bt.verify_scan import JUMPS, LENGTH, STOPS, Stems, scan

__all__ = ["Layout", "Rejected", "Verifier"]

#: what a byte of the arena is: of no unit; inside one; where one begins; where the displacement of a direct
#: jump begins; where the jump at the end of a unit begins (but for a unit that is nothing else)
_FREE, _INSIDE, _ENTRY, _SITE, _TRAILING = range(5)
_TRAILING_JUMP = bytes((_TRAILING, _SITE, _INSIDE, _INSIDE, _INSIDE))
_JMP_BYTES = len(_TRAILING_JUMP)
_LONGEST_UNIT = 4096
_UNIT = bytes((_ENTRY,)) + bytes((_INSIDE,)) * (_LONGEST_UNIT - 1)
_REL32 = struct.Struct("<i")
_rel32 = _REL32.unpack_from


class Layout(NamedTuple):
    """Where units and exit stubs are."""

    units: int
    units_bytes: int
    stubs: int
    stub_bytes: int
    stub_count: int

    def is_stub(self, address: int) -> bool:
        """Whether an exit stub begins at `address`."""
        number, rest = divmod(address - self.stubs, self.stub_bytes)
        return not rest and 0 <= number < self.stub_count


class Verifier:
    """Knows the accepted units: where they are, where they begin, which of their jumps can be patched.

    Invariant: accepted units do not overlap, so no byte of one changes but by `patch`.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._units, self._size, self._stubs, self._stub_bytes, stub_count = layout
        self._stubs_size = stub_count * layout.stub_bytes
        #: what each byte among the units is; of memory it takes what units have used of theirs
        self._map = mmap.mmap(-1, layout.units_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._stems = Stems()

    def accept(self, code: bytes, address: int, cuts: bytes = b"") -> None:
        """Accept the unit `code`, which will be at `address`, or raise Rejected.

        It may take the place of the trailing jump of the unit before it, which then falls through into it.
        `cuts` are a hint, which decides nothing: the lengths of the stems (`vmm.bt.verify_scan`) of its
        parts, from the first one on.
        """
        length, begin, marks = len(code), address - self._units, self._map
        if not 0 < length <= _LONGEST_UNIT or not 0 <= begin <= self._size - length:
            raise Rejected("unit outside the arena, or of no possible length")
        place = marks[begin:begin + length]
        if place.strip(b"\0") and place != _TRAILING_JUMP.ljust(length, b"\0"):
            raise Rejected("over another unit")
        unit = bytearray(_UNIT[:length])
        at, ended = 0, -1
        targets: list[int] = []
        stems = self._stems
        for stem in cuts:
            known = stems[code[at:at + stem]]
            if known <= LENGTH:
                at += known
                continue
            at += known & LENGTH
            if at > length:
                break
            if known & JUMPS:
                unit[at - 4] = _SITE
                targets.append(at + _rel32(code, at - 4)[0])
            if known & STOPS:
                ended = at
        starts: set[int] = set()
        if at != length:
            rest = scan(code, at)
            starts = rest.starts
            targets += rest.targets
            for site in rest.sites:
                unit[site] = _SITE
            ended = max(ended, rest.ended)
        if ended != length and not self._is_entry(address + length):
            raise Rejected("runs over its end", length)
        for target in targets:
            apart = address + target - self._stubs
            if 0 <= apart < self._stubs_size and not apart % self._stub_bytes:
                continue
            there = begin + target
            if 0 <= target < length:
                if target and target not in starts and target not in scan(code).starts:
                    raise Rejected("jump into an instruction", target)
            elif not 0 <= there < self._size or marks[there] != _ENTRY:
                raise Rejected("jump to where no instruction is known to begin", target)
        if ended == length > _JMP_BYTES and unit[length - 4] == _SITE:
            unit[length - _JMP_BYTES] = _TRAILING
        marks[begin:begin + length] = unit

    def patch(self, site: int, target: int) -> bytes:
        """The four bytes that make the accepted jump with its displacement at `site` go to `target`."""
        if self._mark(site) != _SITE:
            raise Rejected("no jump of an accepted unit", site)
        if not self._is_entry(target) and not self.layout.is_stub(target):
            raise Rejected("jump to where no instruction is known to begin", site)
        return _REL32.pack(target - site - 4)

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
