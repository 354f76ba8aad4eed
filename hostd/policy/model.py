# SPDX-License-Identifier: GPL-2.0-or-later
"""What the policy is told.  All sizes are pages of 4 KiB."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

PAGES_PER_MIB = 256
#: "normal" of ESX's three presets, which are 5, 10 and 20 shares per MiB of memory
SHARES_PER_MIB = 10


class Settings(NamedTuple):
    """A VM's claim on memory, complete."""

    reservation: int
    limit: int
    shares: int


def settle(memory: int, reservation: int | None = None, limit: int | None = None,
           shares: int | None = None) -> Settings:
    """The settings of a VM of `memory` pages; what is None has ESX's default: reservation 0, limit its
    memory, ten shares per MiB.

    Raises ValueError, with one sentence, if they contradict each other.
    """
    reservation = 0 if reservation is None else reservation
    limit = memory if limit is None else limit
    shares = max(1, memory * SHARES_PER_MIB // PAGES_PER_MIB) if shares is None else shares
    if reservation < 0:
        raise ValueError(f"a reservation cannot be negative, and {in_mib(reservation)} is")
    if not 0 < limit <= memory:
        raise ValueError(f"the limit of {in_mib(limit)} is not above 0 and at most the VM's memory of "
                         f"{in_mib(memory)}")
    if reservation > limit:
        raise ValueError(f"the reservation of {in_mib(reservation)} is more than the limit of "
                         f"{in_mib(limit)}")
    if shares < 1:
        raise ValueError(f"shares must be 1 or more, and {shares} is not")
    return Settings(reservation, limit, shares)


def in_mib(pages: int) -> str:
    """A size as users write it."""
    return f"{pages / PAGES_PER_MIB:.10g} MiB"


@dataclass(frozen=True, slots=True)
class VmMemory:
    """One VM as it stands."""

    name: str
    #: what the guest sees
    memory: int
    reservation: int
    limit: int
    shares: int
    #: machine frames it is charged with: `private`, and its part of those it shares
    resident: int
    private: int
    #: guest-physical pages that share their frames, which nobody writes
    shared: int = 0
    #: those of them that share with nobody, or nobody any more
    sole: int = 0
    #: given back by its balloon driver, and not taken again
    ballooned: int = 0
    swapped: int = 0
    #: the part of `memory`, 0 to 1, that it actively uses (`WorkingSet.estimate`)
    working_set: float = 1.0
    #: a balloon driver is there
    balloon_able: bool = False
    #: what the guest could use without hardship, by its own statistics: what it calls available (free pages,
    #: and cache that it can drop), or, where the driver does not tell, its free pages; None: no statistics
    guest_free: int | None = None

    @property
    def active(self) -> int:
        """Pages it actively uses: they cost it one share price each, all others a multiple."""
        return round(self.working_set * self.memory)

    @property
    def swappable(self) -> int:
        """Pages that free a frame each when they are swapped out."""
        return self.private + self.sole

    @property
    def unbacked(self) -> int:
        """Pages without a frame that the guest may touch: never used, or reported free.  A balloon finds them
        first, and has to take them before it gets the first frame."""
        return max(0, self.memory - self.ballooned - self.swapped - self.private - self.shared)


@dataclass(frozen=True, slots=True)
class HostMemory:
    """The host's pool as it stands."""

    pool: int
    free: int
    #: frames that are no guest's memory: page tables, control blocks
    overhead: int = 0
    #: frames that workers with none left ask for now
    demanded: int = 0
    #: when this was so, in seconds on any clock that does not go back
    now: float = 0.0


@dataclass(frozen=True, slots=True)
class Tuning:
    """The constants of the policy.  Fractions are of the pool or, where it says so, of a VM's memory."""

    #: parts of the pool that are free where the states high, soft, hard and low begin (OSDI 2002, 6.3)
    thresholds: tuple[float, float, float, float] = (0.06, 0.04, 0.02, 0.01)
    #: the idle-memory tax rate: the most of its idle pages that a VM can lose by being idle (5.2)
    tax: float = 0.75
    #: what a guest keeps beyond what it needs, of its memory
    margin: float = 1 / 8
    #: pages that every guest keeps
    floor: int = 16 * PAGES_PER_MIB
    #: the most a balloon takes, of a VM's memory, from a guest that gives no statistics (ESX's
    #: Mem.CtlMaxPercent)
    blind: float = 0.65
    #: how far a balloon's target is from where the balloon is, of the VM's memory
    step: float = 1 / 16
    #: what a VM must lack, of its memory, to be given some while others want it too
    patience: float = 1 / 32
    #: seconds that a balloon driver may let pass without a page before it counts as deaf
    deaf: float = 5.0
    #: swapped out per decision at most, of the pool: where balloons cannot help, and when frames are short
    trickle: float = 1 / 256
    torrent: float = 1 / 32

    def __post_init__(self) -> None:
        high, soft, hard, low = self.thresholds
        if not 1 > high > soft > hard > low > 0:
            raise ValueError(f"the thresholds {self.thresholds} do not fall from below 1 to above 0")
        if not 0 <= self.tax < 1:
            raise ValueError(f"the idle-memory tax rate of {self.tax} is not at least 0 and below 1")
