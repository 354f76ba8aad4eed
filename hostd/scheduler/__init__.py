# SPDX-License-Identifier: GPL-2.0-or-later
"""Which guest runs where, and for how long.

Two schedulers with one aim.  In every worker a `RunQueue` shares one physical CPU by weight, guest by guest
and slice by slice.  In the daemon a `Balancer` compares what each guest got with what it is entitled to on
the whole host, and moves guests between workers.  Both are pure: time comes in as integer nanoseconds with
every call, so that a test can run an hour of scheduling in a second.
"""

from hostd.scheduler.balancer import Balancer, Load, Move
from hostd.scheduler.entitlement import CPU, entitlements
from hostd.scheduler.runqueue import LATENCY_BOUNDS_NS, MAX_WEIGHT, Latency, Pick, RunQueue, Usage

__all__ = [
    "CPU", "LATENCY_BOUNDS_NS", "MAX_WEIGHT",
    "Balancer", "Latency", "Load", "Move", "Pick", "RunQueue", "Usage", "entitlements",
]
