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

from bisect import bisect_left
from typing import NamedTuple

from vmm.bt.verify_automaton import Node, Rejected, Unit, root

__all__ = ["Layout", "Rejected", "Verifier"]

_JMP_BYTES = 5


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
        #: addresses where an accepted unit begins
        self.entries: set[int] = set()
        #: addresses of the 32-bit displacements of direct jumps in accepted units
        self.sites: set[int] = set()
        self._begins: list[int] = []         # of all units, ascending
        self._ends: dict[int, int] = {}      # beginning -> end
        self._trailing: set[int] = set()     # where the `jmp rel32` at the end of a unit begins
        self._root = root()

    def accept(self, code: bytes, address: int) -> None:
        """Accept the unit `code`, which will be at `address`, or raise Rejected.

        It may take the place of the trailing jump of the unit before it, which then falls through into it.
        """
        layout = self.layout
        if not layout.units <= address <= layout.units + layout.units_bytes - len(code):
            raise Rejected("unit outside the arena")
        before, index = self._neighbours(address, len(code))
        unit = Unit(code)
        starts = self.scan(unit)
        if unit.ended != len(code) and address + len(code) not in self.entries:
            raise Rejected("runs over its end", len(code))
        for site, target in unit.jumps:
            if target not in starts and not self._reachable(address + target):
                raise Rejected("jump to where no instruction is known to begin", site)
        if before is not None:
            self._ends[before] = address
            self._trailing.discard(address)
            self.sites.discard(address + 1)
        self._begins.insert(index, address)
        self._ends[address] = address + len(code)
        self.entries.add(address)
        self.sites.update([address + site for site in unit.sites])
        if unit.ended == len(code) and unit.sites and unit.sites[-1] == len(code) - 4:
            self._trailing.add(address + len(code) - _JMP_BYTES)

    def _neighbours(self, address: int, length: int) -> tuple[int | None, int]:
        """The unit whose trailing jump is to be replaced, if any; the place among `_begins`."""
        begins = self._begins
        index = bisect_left(begins, address)
        if index < len(begins) and begins[index] < address + length:
            raise Rejected("over another unit")
        if not index or self._ends[begins[index - 1]] <= address:
            return None, index
        before = begins[index - 1]
        if self._ends[before] != address + _JMP_BYTES or address not in self._trailing:
            raise Rejected("over another unit")
        return before, index

    def scan(self, unit: Unit) -> set[int]:
        """Go over all instructions; where they begin."""
        code, first = unit.code, self._root
        at, end = 0, len(unit.code)
        starts: set[int] = set()
        start = starts.add
        begin = 0
        try:
            while at < end:
                begin = at
                start(at)
                step = first[code[at]]
                at += 1
                while step.__class__ is Node:    # sooner than isinstance
                    step = step[code[at]]
                    at += 1
                at = at + step if isinstance(step, int) else step(unit, at)    # type: ignore[operator]
        except IndexError:
            raise Rejected("cut short", begin) from None
        except Rejected as rejected:
            raise Rejected(rejected.reason, begin) from None
        if at != end or not code:
            raise Rejected("cut short", begin)
        return starts

    def patch(self, site: int, target: int) -> bytes:
        """The four bytes that make the accepted jump with its displacement at `site` go to `target`."""
        if site not in self.sites:
            raise Rejected("no jump of an accepted unit", site)
        if not self._reachable(target):
            raise Rejected("jump to where no instruction is known to begin", site)
        return (target - site - 4).to_bytes(4, "little", signed=True)

    def retract(self, address: int, length: int) -> None:
        """The units in a range are gone.

        Before a guest runs again the caller has patched the jumps to them, and has had something accepted
        where a unit before the range falls through into it.
        """
        span = range(address, address + length)
        begins = self._begins
        first, last = bisect_left(begins, span.start), bisect_left(begins, span.stop)
        for begin in begins[first:last]:
            del self._ends[begin]
        self.entries.difference_update(begins[first:last])
        del begins[first:last]
        for known in (self.sites, self._trailing):
            if len(known) < length:
                known.difference_update([at for at in known if at in span])
            else:
                known.difference_update(span)

    def _reachable(self, address: int) -> bool:
        return address in self.entries or self.layout.is_stub(address)
