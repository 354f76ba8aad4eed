# SPDX-License-Identifier: GPL-2.0-or-later
"""What a definition claims of machine memory, how it is changed, and whether the host can promise it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from hostd.definition import Definition
from hostd.errors import Conflict, Invalid
from hostd.model import PAGE, VmPatch
from hostd.policy.admission import NOTHING, Commitment, Kept, admit
from hostd.policy.model import in_mib, settle


def check_claim(definition: Definition) -> None:
    """Raise Invalid where the sizes contradict each other: reservation <= limit <= memory, and no more is
    reserved than the guest may use."""
    for what in "memory", "memory_target", "reservation", "limit":
        size = getattr(definition, what)
        if size is not None and size % PAGE:
            raise Invalid(f"{what.removesuffix('_target')} of {size} bytes is not a whole number of "
                          "4 KiB pages")
    memory, usable = definition.memory // PAGE, definition.memory_target_bytes // PAGE
    reservation, limit = definition.reservation // PAGE, definition.limit_bytes // PAGE
    try:
        settle(memory, reservation, limit, definition.shares)
    except ValueError as error:
        raise Invalid(str(error)) from None
    if reservation > usable:
        raise Invalid(f"the reservation of {in_mib(reservation)} is more than the {in_mib(usable)} of its "
                      "memory that the guest may use")


def changed(before: Definition, patch: VmPatch, at_rest: bool) -> Definition:
    """The definition as the patch makes it, unchecked but for this: the memory of a VM that is not at rest
    is what it was started with, and its guest may use it or less.  Raises Conflict."""
    given = {field: value for field, value in msgspec.structs.asdict(patch).items() if value is not None}
    memory = given.pop("memory", None)
    if memory is not None and at_rest:
        given |= {"memory": memory, "memory_target": None}
    elif memory is not None:
        if memory > before.memory:
            raise Conflict(f"VM {before.name} was started with memory of {in_mib(before.memory // PAGE)}: "
                           f"stop it to give it {in_mib(memory // PAGE)}")
        given["memory_target"] = None if memory == before.memory else memory
    return msgspec.structs.replace(before, **given)


def grows(before: Definition, after: Definition) -> bool:
    """`after` promises more than `before`."""
    return after.memory > before.memory or after.reservation > before.reservation


def check_admission(pool_bytes: int, ratio: float, others: Iterable[Definition],
                    requests: Sequence[Definition], kept: Kept = NOTHING) -> None:
    """Raise Conflict unless the host can promise all `requests` beside the `others` and what is `kept`."""
    promised = [_commitment(other) for other in others]
    for request in requests:
        wanted = _commitment(request)
        why = admit(pool_bytes // PAGE, ratio, promised, wanted, kept)
        if why is not None:
            raise Conflict(f"VM {request.name} is not admitted: {why}")
        promised.append(wanted)


def _commitment(definition: Definition) -> Commitment:
    # numpy comes with it, for which the daemon's first answer does not wait
    from vmm.memory.block import VmBlock

    return Commitment(definition.memory // PAGE, definition.reservation // PAGE,
                      VmBlock.frames_for(definition.memory))
