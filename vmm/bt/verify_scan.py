# SPDX-License-Identifier: GPL-2.0-or-later
"""Code gone over instruction by instruction, and what is remembered of that.

Whether instructions are allowed depends on nothing before or behind them, and the value of a displacement or
immediate is no matter to most.  So a part of a unit that was gone over once need not be again wherever it
comes up: it is known by its *stem*, all its bytes but for a displacement or immediate at its very end that
may be anything.  Where a jump leads is not remembered: that is looked at each time.
"""

from __future__ import annotations

from typing import NamedTuple

from vmm.bt.verify_automaton import Jump, Node, Rejected, root

#: stems known before all are forgotten: what a guest can make us keep is bounded
_MOST_STEMS = 20_000
#: what a stem stands for: the length of the part that begins like this; whether it ends in a direct jump with
#: a 32-bit displacement; whether what is behind it is not executed
LENGTH, JUMPS, STOPS = 0xFF, 0x100, 0x200
#: a stem of which that cannot be said
_UNKNOWN = 0

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

    Invariant: code that begins with a known stem is whole instructions for as long as is noted, whatever is
    behind the stem; the last of them alone, and only if so noted, is a jump.
    """

    def __missing__(self, stem: bytes) -> int:
        found = _work_out(stem)
        if found != _UNKNOWN:
            if len(self) >= _MOST_STEMS:
                self.clear()
            self[stem] = found
        return found


def _work_out(stem: bytes) -> int:
    """Go over a stem: of what it does not have, nothing may matter."""
    at, end = 0, len(stem)
    flags = 0
    try:
        while at < end:
            if flags:       # a jump in the middle
                return _UNKNOWN
            step: object = _ROOT
            while isinstance(step, Node):
                step = step[stem[at]]
                at += 1
            if isinstance(step, int):
                at += step
            elif isinstance(step, Jump):
                if step.width not in (0, 4) or at != end:
                    return _UNKNOWN
                at += step.width
                flags = (JUMPS if step.width else 0) | (STOPS if step.stops else 0)
            else:
                at = step(stem, at)     # type: ignore[operator]
                if at > end:
                    return _UNKNOWN
    except (IndexError, Rejected):
        return _UNKNOWN
    return at | flags if at <= LENGTH else _UNKNOWN
