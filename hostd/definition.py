# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's definition: what the inventory, a snapshot and a migration keep of it, complete."""

from __future__ import annotations

import msgspec

from hostd.lifecycle import Policy
from hostd.model import (
    PAGE,
    Append,
    Cap,
    ImageName,
    Memory,
    MemoryShares,
    Monitor,
    Reservation,
    Sha256,
    VmName,
    Weight,
)
from hostd.policy.model import settle


class Definition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A VM as the inventory keeps it: a VmSpec with every default filled in."""

    name: VmName
    memory: Memory
    weight: Weight
    cap: Cap
    on_crash: Policy
    on_poweroff: Policy
    #: what the guest may use of `memory` while it is on; None: all
    memory_target: Memory | None = None
    reservation: Reservation = 0
    #: None: all its memory
    limit: Memory | None = None
    #: None: the normal ones for its memory (hostd/policy/model.py)
    shares: MemoryShares | None = None
    vmm: Monitor = "hw"
    autostart: bool = False
    image: ImageName | None = None
    kernel: Sha256 | None = None
    initrd: Sha256 | None = None
    #: None: the image's own command line
    append: Append | None = None
    #: the VM it was cloned from
    template: str | None = None
    created: float = 0.0

    @property
    def memory_target_bytes(self) -> int:
        """What the guest may use while it is on: it is asked to give back the rest."""
        return self.memory if self.memory_target is None else self.memory_target

    @property
    def limit_bytes(self) -> int:
        """The most machine memory it gets."""
        return self.memory if self.limit is None else self.limit

    @property
    def memory_shares(self) -> int:
        """Its claim beside others on what is between reservation and limit."""
        return settle(self.memory // PAGE, shares=self.shares).shares
