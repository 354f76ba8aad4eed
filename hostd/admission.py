# SPDX-License-Identifier: GPL-2.0-or-later
"""What may become a VM of this host: requests made complete, checked, and promised their name and memory.

A name and a promise are kept for as long as the VM is in the making, so that two requests at the same moment
do not both get what there is once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from hostd.claims import check_admission, check_claim
from hostd.config import Config
from hostd.definition import Definition
from hostd.errors import Conflict, Invalid
from hostd.guests import Guests
from hostd.memory import MachineMemory
from hostd.model import VmCreate


class Admission:
    """`config` gives the configuration as it is at the moment."""

    def __init__(self, config: Callable[[], Config], guests: Guests, memory: MachineMemory) -> None:
        self._config = config
        self._guests = guests
        self._memory = memory
        #: names of VMs in the making
        self._reserved: set[str] = set()
        #: definitions that were admitted and are not in force yet, by name
        self._promised: dict[str, Definition] = {}

    def define(self, request: VmCreate) -> Definition:
        """The request with every default filled in.  Raises Invalid where it does not fit together."""
        if (request.image is None) == (request.kernel is None):
            raise Invalid("a VM needs an image or a kernel, and not both")
        if request.image is not None and request.initrd is not None:
            raise Invalid("an initrd goes with a kernel; an image has its own")
        defaults = self._config().defaults
        definition = Definition(
            name=request.name, memory=defaults.memory.bytes if request.memory is None else request.memory,
            reservation=request.reservation or 0, limit=request.limit, shares=request.shares,
            vmm=request.vmm or defaults.vmm, autostart=request.autostart,
            image=request.image, kernel=request.kernel, initrd=request.initrd, append=request.append,
            weight=defaults.weight if request.weight is None else request.weight,
            cap=defaults.cap if request.cap is None else request.cap,
            on_crash=defaults.on_crash if request.on_crash is None else request.on_crash,
            on_poweroff=defaults.on_poweroff if request.on_poweroff is None else request.on_poweroff,
            created=time.time())
        self.check_memory(definition)
        return definition

    def check_memory(self, definition: Definition) -> None:
        """Raise Invalid for memory that contradicts itself, or that no host of this size could give."""
        check_claim(definition)
        self._memory.books.check_size(definition.memory)

    def check_open(self) -> None:
        """Raise Conflict when nothing is begun any more."""
        if self._guests.closing:
            raise Conflict("the host is shutting down")

    def check_names(self, names: Sequence[str]) -> None:
        """Raise Conflict for names that are not to be had, Invalid for one that is given twice."""
        self.check_open()
        for name in names:
            if name in self._guests.vms or name in self._reserved:
                raise Conflict(f"VM {name} exists already")
        if len(set(names)) < len(names):
            raise Invalid("a name is given twice")

    @contextmanager
    def reserve(self, names: Sequence[str]) -> Iterator[None]:
        """Keep names for VMs in the making."""
        self.check_names(names)
        self._reserved.update(names)
        try:
            yield
        finally:
            self._reserved.difference_update(names)

    def check_clones(self, clones: Sequence[Definition]) -> None:
        """Raise Conflict unless the host can promise clones of a guest what is reserved for them: they share
        most of what their memory comes to, but each has a reservation of its own."""
        self._check(clones, math.inf)

    @contextmanager
    def promise(self, definitions: Sequence[Definition]) -> Iterator[None]:
        """Raise Conflict unless the host can promise these VMs their memory beside all others, and count them
        until they are in force."""
        self._check(definitions, self._config().memory.overcommit_ratio)
        with self._counting(definitions):
            yield

    @contextmanager
    def promise_clones(self, clones: Sequence[Definition]) -> Iterator[None]:
        """The same for clones, as `check_clones` has it."""
        self.check_clones(clones)
        with self._counting(clones):
            yield

    def _check(self, definitions: Sequence[Definition], ratio: float) -> None:
        others = {vm.name: vm.definition for vm in self._guests.vms.values()} | self._promised
        for definition in definitions:
            others.pop(definition.name, None)
        check_admission(self._memory.pool.size, ratio, others.values(), definitions, self._memory.kept)

    @contextmanager
    def _counting(self, definitions: Sequence[Definition]) -> Iterator[None]:
        promised = {definition.name: definition for definition in definitions}
        self._promised |= promised
        try:
            yield
        finally:
            for name in promised:
                del self._promised[name]
