# SPDX-License-Identifier: GPL-2.0-or-later
"""The decision: from how the host and its VMs stand to what each of them is to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from hostd.policy.model import HostMemory, Tuning, VmMemory
from hostd.policy.pressure import State, next_state
from hostd.policy.revocation import Claim, entitlements


@dataclass(frozen=True, slots=True)
class VmPlan:
    """What one VM is to do, in pages."""

    #: the frames that it should have; those of all VMs fit the pool together
    target: int
    #: what its driver should have given back, altogether
    balloon: int
    #: to be swapped out now
    evict: int
    #: it gets no more frames until the next decision
    blocked: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What the host is to do until the next decision."""

    state: State
    #: scan for pages to share at full rate
    share: bool
    vms: Mapping[str, VmPlan]


class _Asked(NamedTuple):
    """How far a driver that is asked to inflate has come, and since when."""

    ballooned: int
    since: float


class Policy:
    """The host's memory policy.  `decide` is called about once a second, and at once when a worker starves.

    It remembers two things only: the state, for hysteresis, and since when drivers have not answered.  The
    same arguments again give the same plan again.
    """

    def __init__(self, tuning: Tuning | None = None) -> None:
        self.tuning = tuning or Tuning()
        self.state = State.HIGH
        self._asked: dict[str, _Asked] = {}

    def decide(self, host: HostMemory, vms: Sequence[VmMemory]) -> Plan:
        """The plan for now.

        Invariants: targets add up to at most the pool less overhead, if reservations do; no VM is asked for a
        page that its reservation covers; `evict` and inflation together take no VM below its target, if its
        balloon is first filled with pages that have no frame.
        """
        thresholds = self._thresholds(host.pool)
        available = host.free - host.demanded
        self.state = next_state(self.state, available, thresholds)

        # what is asked for is theirs who ask: the guests there are have that much less between them
        capacity = min(host.pool - host.overhead, sum(vm.resident for vm in vms) + host.free)
        capacity -= thresholds[0] + host.demanded
        claims = [_claim(vm) for vm in vms]
        targets = entitlements(claims, capacity, self.tuning.tax)
        contended = sum(claim.high for claim in claims) > capacity

        kept = targets if self.state else [vm.limit for vm in vms]
        excess = [max(0, vm.resident - most) for vm, most in zip(vms, kept)]
        room = [self._room(vm) for vm in vms]
        deaf = [self._is_deaf(vm, host.now) for vm in vms]
        helped = [0 if deaf[i] else max(0, room[i] - vm.unbacked) for i, vm in enumerate(vms)]
        evict = self._evictions(host.pool, thresholds[1] - available, vms, excess, helped)
        growth = self._growth(available - thresholds[1], vms, targets, contended)
        plans = {}
        for i, vm in enumerate(vms):
            # a deaf driver is still asked for all of it: so it is noticed when it answers
            wanted = excess[i] if deaf[i] else excess[i] - evict[i]
            balloon = self._balloon(vm, min(wanted + vm.unbacked, room[i]) if wanted else 0, growth[i])
            plans[vm.name] = VmPlan(targets[i], balloon, evict[i],
                                    self.state is State.LOW and vm.resident > targets[i])
        self._asked = {vm.name: self._asked_of(vm, host.now) for vm in vms
                       if plans[vm.name].balloon > vm.ballooned}
        return Plan(self.state, self.state is not State.HIGH, plans)

    def _thresholds(self, pool: int) -> tuple[int, int, int, int]:
        high, soft, hard, low = (ceil(part * pool) for part in self.tuning.thresholds)
        return high, soft, hard, low

    # --- balloons

    def _margin(self, vm: VmMemory) -> int:
        return round(self.tuning.margin * vm.memory)

    def _room(self, vm: VmMemory) -> int:
        """Pages by which the balloon of this VM may grow."""
        if not vm.balloon_able:
            return 0
        deepest = vm.memory - self.tuning.floor
        if vm.guest_free is None:
            deepest = min(deepest, int(self.tuning.blind * vm.memory))
        return max(0, min(deepest - vm.ballooned, _spare_inside(vm) - self._margin(vm)))

    def _balloon(self, vm: VmMemory, wanted: int, growth: int) -> int:
        """The target of its balloon, to take `wanted` more or to give `growth` back; from where it is."""
        if not vm.balloon_able:
            return 0
        step = max(1, round(self.tuning.step * vm.memory))
        target = vm.ballooned + min(wanted, step) - min(growth, step)
        margin, spare = self._margin(vm), _spare_inside(vm)
        if spare < margin // 2:         # the guest is short: no step and no pressure counts beside that
            target = min(target, vm.ballooned - (margin - spare))
        return max(0, min(target, vm.memory - vm.reservation))

    def _growth(self, budget: int, vms: Sequence[VmMemory], targets: Sequence[int],
                contended: bool) -> list[int]:
        """How far each balloon deflates.  What is given back may be touched at once, so all together is kept
        within the `budget`; small differences are not worth it while others have to pay."""
        lacks = []
        for vm, target in zip(vms, targets):
            lack = min(target - vm.resident, vm.ballooned)
            least = self.tuning.patience * vm.memory if contended else 1
            lacks.append(lack if lack >= least else 0)
        return _within(budget, lacks)

    # --- drivers that do not answer

    def _asked_of(self, vm: VmMemory, now: float) -> _Asked:
        before = self._asked.get(vm.name)
        return _Asked(vm.ballooned, now) if before is None or vm.ballooned > before.ballooned else before

    def _is_deaf(self, vm: VmMemory, now: float) -> bool:
        before = self._asked.get(vm.name)
        return (before is not None and vm.ballooned <= before.ballooned
                and now - before.since >= self.tuning.deaf)

    # --- swap

    def _evictions(self, pool: int, missing: int, vms: Sequence[VmMemory], excess: Sequence[int],
                   helped: Sequence[int]) -> list[int]:
        """How many pages each VM swaps out now: `missing` are those that make the state soft again, `helped`
        how many frames each VM's balloon can get."""
        if self.state >= State.HARD:
            wanted = [min(over, vm.swappable) for vm, over in zip(vms, excess)]
            return _within(min(missing, ceil(self.tuning.torrent * pool)), wanted)
        wanted = [min(max(0, over - inside), vm.swappable) for vm, over, inside in zip(vms, excess, helped)]
        return _within(ceil(self.tuning.trickle * pool), wanted)


def _claim(vm: VmMemory) -> Claim:
    """A VM can use what it has and what its balloon took.  Pages it never touched, or that are swapped out,
    count once it touches them: until then others use the frames."""
    high = min(vm.limit, vm.memory, vm.resident + vm.ballooned)
    return Claim(vm.shares, min(vm.active, high), min(vm.reservation, high), high)


def _spare_inside(vm: VmMemory) -> int:
    """What the guest has beyond what it needs: by its own word, or else by what it touches.

    Its word is taken even where it touches the pages: cache that is in use is better dropped by the guest,
    which can choose, than swapped by the host, which cannot.  If the word is false, the guest harms itself.
    """
    has = vm.memory - vm.ballooned
    return has - vm.active if vm.guest_free is None else min(max(vm.guest_free, 0), has)


def _within(budget: int, wanted: Sequence[int]) -> list[int]:
    """Each its part of the budget, if all together are more; rounded up, or the last pages would never go."""
    total = sum(wanted)
    if total <= budget:
        return list(wanted)
    return [ceil(want * budget / total) if budget > 0 else 0 for want in wanted]
