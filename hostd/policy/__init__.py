# SPDX-License-Identifier: GPL-2.0-or-later
"""Who gets how much machine memory, and how it is taken back: pure, without clock or input and output.

The model is ESX Server's (C. Waldspurger, Memory Resource Management in VMware ESX Server, OSDI 2002).
Every VM has a *reservation*, which nobody takes, a *limit*, down to which it is reclaimed
even when there is plenty, and *shares*, by which memory between the two is divided when there is too little.

    how short is it?     `State`: high, soft, hard, low, by the part of the pool that is free, with hysteresis
    who should have it?  `entitlements`: whoever pays the fewest shares per page gives, and an idle page costs
                         four active ones, so the idle give first (min-funding revocation, idle-memory tax)
    who is idle?         `WorkingSet`: a few random pages watched per period
    how is it taken?     `Policy.decide`: ask the balloon drivers, share pages at full rate, and swap

    state   free     taken by
    high    >= 6 %   nothing, except from VMs above their limit; balloons deflate into what is spare
    soft    < 4 %    balloons, and sharing at full rate; swap trickles where a balloon cannot help: no driver,
                     a guest that needs what it has left, a driver that does not answer
    hard    < 2 %    swap too, for all who are above their target, until 4 % are free
    low     < 1 %    as hard, and VMs above their target get no frame until it is over

Memory goes back the same way: a balloon deflates, in steps, as far as its VM is below its target and frames
are there; swapped pages come back when they are touched.  Three rules keep this quiet: reclaim begins below
4 % free and ends at 6 %; targets follow from the pages a guest has active, which reclaim does not change, not
from the active part of what it has left; a balloon moves a bounded step from where it *is*, so that a driver
which is late or deaf winds nothing up.

No balloon is meant to make a guest run out of memory: the guest keeps a margin beyond what it needs, and when
it has used up half of that margin it gets the margin back at once, whatever the host's state, and the host
swaps.  Only a guest that grows faster than that between two decisions depends on its driver's
deflate-on-oom.

`Commitment` and `admit` are the door: what is promised fits the pool.  `hostd.policy.victims` (apart, for it
needs numpy) chooses the pages to swap.
"""

from hostd.policy.admission import Commitment, admit
from hostd.policy.decide import Plan, Policy, VmPlan
from hostd.policy.model import HostMemory, Settings, Tuning, VmMemory, settle
from hostd.policy.pressure import State
from hostd.policy.revocation import Claim, entitlements
from hostd.policy.workingset import WorkingSet

__all__ = [
    "Claim", "Commitment", "HostMemory", "Plan", "Policy", "Settings", "State", "Tuning", "VmMemory",
    "VmPlan", "WorkingSet", "admit", "entitlements", "settle",
]
