# SPDX-License-Identifier: GPL-2.0-or-later
"""What every VM is entitled to: min-funding revocation with an idle-memory tax (OSDI 2002, 5.1 and 5.2).

Revocation takes each page from the VM that pays the fewest shares per page,

    S / (P (f + k (1 - f)))  =  S / (A + k (P - A)),        k = 1 / (1 - tax),

with S shares and P pages of which A = f P are active: an idle page costs k times an active one.  Taken page
by page until what is left fits, this ends where all who still could give pay the same.  That point is found
directly here, from below: a level of money per share rises, every VM buys pages with its shares' worth of it,
the active ones first, and the level stops when the memory is sold.

A is held constant while P changes.  Idle pages go first, so that is what happens in the guest; and the answer
is the same before and after the VMs have followed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

#: parts of a page by which sums of floating-point pages may be off
_EPSILON = 1e-6


class Claim(NamedTuple):
    """One VM's claim on memory, in pages: at least `low`, at most `high`, between them by `shares`."""

    shares: int
    active: int
    low: int
    high: int


def entitlements(claims: Sequence[Claim], capacity: int, tax: float) -> list[int]:
    """Divide `capacity` pages; the answers are in the order of the claims.

    They add up to `capacity` less one page a claim at most, or to all the highs if that is less.  The lows
    are never cut: together they must fit (`admit` sees to that), and if they do not, they are the answer.
    """
    if sum(claim.high for claim in claims) <= capacity:
        return [claim.high for claim in claims]
    k = 1 / (1 - tax)
    level = _level(claims, capacity - sum(claim.low for claim in claims), k)
    return [_bought(claim, level, k) for claim in claims]


def _level(claims: Sequence[Claim], left: float, k: float) -> float:
    """Where the level stops that sells `left` pages beyond the lows."""
    bends: list[tuple[float, float]] = []       # at this level, so many more pages are sold per level
    for shares, active, low, high in claims:
        knee = min(max(active, low), high)
        for start, end, price in ((low, knee, 1), (knee, high, k)):
            if start < end:
                bends += ((_price(start, active, k) / shares, shares / price),
                          (_price(end, active, k) / shares, -shares / price))
    level = rate = 0.0
    for bend, change in sorted(bends):
        sold = rate * (bend - level)
        if sold >= left:
            return level + left / rate if rate else level
        left -= sold
        level = bend
        rate += change
    return level


def _price(pages: int, active: int, k: float) -> float:
    return pages if pages <= active else active + k * (pages - active)


def _bought(claim: Claim, level: float, k: float) -> int:
    money = level * claim.shares
    pages = money if money <= claim.active else claim.active + (money - claim.active) / k
    return min(max(int(pages - _EPSILON), claim.low), claim.high)
