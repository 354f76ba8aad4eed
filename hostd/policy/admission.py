# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the host can take one more VM, or other settings of one it has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from hostd.policy.model import in_mib


class Commitment(NamedTuple):
    """What the host promises a VM, in pages: the memory it sees, the part that is guaranteed, and what the
    host itself needs for it (page tables, control block), which is never reclaimed."""

    memory: int
    reservation: int
    overhead: int


class Kept(NamedTuple):
    """What of the pool is for no guest's memory, in pages: the most that workers have in stock, and what is
    kept for overheads, which may be more."""

    stock: int = 0
    overhead: int = 0


NOTHING = Kept()


def admit(pool: int, ratio: float, others: Iterable[Commitment], request: Commitment,
          kept: Kept = NOTHING) -> str | None:
    """Why the request cannot be met beside the others, in one sentence; None if it can be.

    Reservations and overheads together fit the pool (OSDI 2002, 6.2) and leave what is `kept`, and all the
    memory that guests see is at most `ratio` times the pool.
    """
    others = list(others)
    overhead = sum(other.overhead for other in others)
    unreserved = (pool - kept.stock - max(kept.overhead, overhead)
                  - sum(other.reservation for other in others))
    # the first overheads are in what is kept for them
    more = min(request.overhead, max(0, overhead + request.overhead - kept.overhead))
    if request.reservation + more > unreserved:
        return (f"a reservation of {in_mib(request.reservation)} with {in_mib(request.overhead)} of overhead "
                f"does not fit the {in_mib(max(unreserved, 0))} of the host's {in_mib(pool)} that are "
                f"neither reserved nor kept")
    committed = sum(other.memory for other in others)
    most = pool * ratio
    if committed + request.memory > most:
        return (f"memory of {in_mib(request.memory)} beside the {in_mib(committed)} of other VMs is more "
                f"than the {in_mib(int(most))} that an overcommit ratio of {ratio:g} allows on a host of "
                f"{in_mib(pool)}")
    return None
