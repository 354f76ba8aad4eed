# SPDX-License-Identifier: GPL-2.0-or-later
"""How many frames workers keep in stock: guests seldom wait for one, and few lie idle beside the pool."""

from __future__ import annotations

#: frames asked for at once; for all workers together that is about one of so many of the pool
_MOST, _LEAST, _PART = 2048, 16, 32
#: more are asked for when fewer than one of so many of these are left
_LOW = 4


def refill(pool: int, workers: int) -> int:
    """Frames that a worker asks for at once, of a pool of so many."""
    return max(_LEAST, min(_MOST, pool // (_PART * workers)))


def low(refill: int) -> int:
    """More are asked for when fewer than this are in stock."""
    return refill // _LOW


def most(refill: int) -> int:
    """The most that a worker can have in stock."""
    return low(refill) - 1 + refill
