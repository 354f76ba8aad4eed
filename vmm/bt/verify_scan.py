# SPDX-License-Identifier: GPL-2.0-or-later
"""Code gone over instruction by instruction, and what is remembered of that.

Whether instructions are allowed depends on nothing before or behind them, and the value of a displacement or
immediate is no matter to most.  So instructions that were gone over once need not be again wherever they come
up: they are known by their *stem*, all their bytes but for a displacement or immediate at the very end that
may be anything, the *operand*.  Where a jump leads is not remembered: that is looked at each time.
"""

from __future__ import annotations

from typing import NamedTuple

from vmm.bt.verify_automaton import Jump, Node, Rejected, root

#: stems known before all are forgotten: what a guest can make us keep is bounded
_MOST_STEMS = 20_000
#: what a stem stands for: the length of the operand behind it; whether that is the displacement of a direct
#: jump; whether what is behind it is not executed
OPERAND, JUMPS, STOPS = 0xFF, 0x100, 0x200
#: a stem of which that cannot be said: no length
UNKNOWN = -1

_ROOT = root()


class Scan(NamedTuple):
    """What was found.  Offsets count from the beginning of the code."""

    #: where instructions begin
    starts: set[int]
    #: the 32-bit displacements of direct jumps
    sites: list[int]
    #: where direct jumps lead
    targets: list[int]
    #: where the last instruction ends behind which execution does not go on
    ended: int


def scan(code: bytes, at: int = 0) -> Scan:
    """Go over all instructions from the one at `at` on.  Raises Rejected."""
    end, begin, ended = len(code), at, -1
    starts: set[int] = set()
    sites: list[int] = []
    targets: list[int] = []
    try:
        while at < end:
            begin = at
            starts.add(at)
            step: object = _ROOT
            while isinstance(step, Node):
                step = step[code[at]]
                at += 1
            if isinstance(step, int):
                at += step
            elif isinstance(step, Jump):
                width, stops = step
                site, at = at, at + width
                if at > end:
                    break
                if width:
                    targets.append(at + int.from_bytes(code[site:at], "little", signed=True))
                if width == 4:
                    sites.append(site)
                if stops:
                    ended = at
            else:
                at = step(code, at)     # type: ignore[operator]
    except IndexError:
        raise Rejected("cut short", begin) from None
    except Rejected as rejected:
        raise Rejected(rejected.reason, begin) from None
    if at != end or not code:
        raise Rejected("cut short", begin)
    return Scan(starts, sites, targets, ended)


class Stems(dict[bytes, int]):
    """What each stem stands for, worked out when it is asked for.

    Invariant: a known stem with as many bytes behind it as is noted, whatever they are, is whole instructions
    that may be executed.  The last of them alone, and only if so noted, is a jump that leads elsewhere; any
    other leads to one of these instructions or to what is behind them.
    """

    def __missing__(self, stem: bytes) -> int:
        found = _work_out(stem)
        if found != UNKNOWN:
            if len(self) >= _MOST_STEMS:
                self.clear()
            self[stem] = found
        return found


def _work_out(stem: bytes) -> int:
    """Go over a stem: of what it does not have, nothing may matter."""
    at, end = 0, len(stem)
    flags = 0
    starts: set[int] = set()
    inside: set[int] = set()
    try:
        while at < end:
            if flags:       # there is more behind a jump that leads elsewhere, or that is always taken
                return UNKNOWN
            starts.add(at)
            step: object = _ROOT
            while isinstance(step, Node):
                step = step[stem[at]]
                at += 1
            if isinstance(step, int):
                at += step
            elif isinstance(step, Jump):
                width, stops = step
                site, at = at, at + width
                if width == 1 and not stops and at <= end:
                    inside.add(at + int.from_bytes(stem[site:at], "little", signed=True))
                elif width == 1 or site != end:
                    return UNKNOWN
                else:
                    flags = (JUMPS if width else 0) | (STOPS if stops else 0)
            else:
                at = step(stem, at)     # type: ignore[operator]
                if at > end:
                    return UNKNOWN
    except (IndexError, Rejected):
        return UNKNOWN
    if not stem or not inside <= starts | {at}:
        return UNKNOWN
    if at in inside:        # what is behind it is executed
        flags &= ~STOPS
    return at - end | flags
