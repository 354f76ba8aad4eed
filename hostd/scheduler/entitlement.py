# SPDX-License-Identifier: GPL-2.0-or-later
"""What every guest is entitled to: weighted max-min fairness, by water filling.

CPU time is a rate here, in nanoseconds per second; one CPU is `CPU` of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

#: one whole CPU
CPU = 1_000_000_000


class Claim(NamedTuple):
    """One guest's claim: its weight, and the most it can use."""

    weight: int
    limit: int


def fill(claims: Sequence[Claim], capacity: int) -> list[int]:
    """Divide the capacity by weight; what a claim cannot use goes to the others by their weights.

    The claims are satisfied in the order in which a rising water level meets their limits: once one of them
    gets its weighted part of what is left and not its limit, so do all that follow.
    """
    given = [0] * len(claims)
    weight_left = sum(claim.weight for claim in claims)
    for i in sorted(range(len(claims)), key=lambda i: claims[i].limit / claims[i].weight):
        weight, limit = claims[i]
        given[i] = min(limit, capacity * weight // weight_left)
        capacity -= given[i]
        weight_left -= weight
    return given


def limit_of(cap: int, demand: int = CPU) -> int:
    """The most one guest can use: it has one virtual CPU, a cap in percent (0: none), and a demand."""
    return min(CPU, demand, cap * CPU // 100 if cap else CPU)


def entitlements(weights: Mapping[str, int], caps: Mapping[str, int], cpus: int) -> dict[str, int]:
    """What each of these guests should get on `cpus` CPUs if all of them want to run all the time."""
    claims = [Claim(weight, limit_of(caps.get(id, 0))) for id, weight in weights.items()]
    return dict(zip(weights, fill(claims, cpus * CPU), strict=True))
