# SPDX-License-Identifier: GPL-2.0-or-later
"""What definitions claim of machine memory: checked, changed, promised or not."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.claims import changed, check_admission, check_claim, grows
from hostd.definition import Definition
from hostd.errors import Conflict, Invalid
from hostd.lifecycle import Policy
from hostd.model import MIN_MEMORY, PAGE, VmPatch
from vmm.memory.block import VmBlock

MIB = 1 << 20


def definition(name: str = "vm", memory: int = 64 * MIB, **fields: Any) -> Definition:
    return msgspec.convert({"name": name, "memory": memory, "weight": 100, "cap": 0,
                            "on_crash": Policy.STOP, "on_poweroff": Policy.STOP, **fields}, Definition)


def test_a_file_of_before_there_were_claims_loads_with_the_defaults() -> None:
    old = (b'{"name": "a", "memory": 67108864, "weight": 1, "cap": 0, "on_crash": "stop", '
           b'"on_poweroff": "stop"}')
    loaded = msgspec.json.decode(old, type=Definition)
    assert (loaded.reservation, loaded.limit_bytes, loaded.memory_shares) == (0, 64 * MIB, 640)
    assert loaded.memory_target_bytes == 64 * MIB


def test_defaults_follow_the_memory() -> None:
    larger = changed(definition(), VmPatch(memory=128 * MIB), at_rest=True)
    assert (larger.limit_bytes, larger.memory_shares) == (128 * MIB, 1280)


@pytest.mark.parametrize(("fields", "sentence"), [
    ({"reservation": 65 * MIB}, "the reservation of 65 MiB is more than the limit of 64 MiB"),
    ({"reservation": 33 * MIB, "limit": 32 * MIB},
     "the reservation of 33 MiB is more than the limit of 32 MiB"),
    ({"limit": 65 * MIB}, "the limit of 65 MiB is not above 0 and at most the VM's memory of 64 MiB"),
    ({"reservation": 32 * MIB, "memory_target": 16 * MIB},
     "the reservation of 32 MiB is more than the 16 MiB of its memory that the guest may use"),
    ({"reservation": 4097}, "reservation of 4097 bytes is not a whole number of 4 KiB pages"),
    ({"limit": 2 * MIB + 1}, "limit of 2097153 bytes is not a whole number of 4 KiB pages"),
    ({"memory_target": 2 * MIB + 1}, "memory of 2097153 bytes is not a whole number of 4 KiB pages"),
])
def test_what_contradicts_itself_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Invalid) as refusal:
        check_claim(definition(**fields))
    assert str(refusal.value) == sentence


@given(st.integers(0, 20), st.integers(1, 20), st.integers(1, 20), st.integers(1, 20))
def test_a_claim_stands_exactly_if_it_is_ordered(reservation: int, limit: int, target: int,
                                                 memory: int) -> None:
    made = definition(memory=memory * MIB, reservation=reservation * MIB, limit=limit * MIB,
                      memory_target=target * MIB)
    if reservation <= limit <= memory and reservation <= target:
        check_claim(made)
    else:
        with pytest.raises(Invalid):
            check_claim(made)


def test_memory_of_a_vm_that_is_off_is_its_size() -> None:
    off = changed(definition(memory_target=32 * MIB), VmPatch(memory=96 * MIB), at_rest=True)
    assert (off.memory, off.memory_target) == (96 * MIB, None)


def test_memory_of_a_vm_that_is_on_is_what_its_guest_may_use() -> None:
    less = changed(definition(), VmPatch(memory=48 * MIB), at_rest=False)
    assert (less.memory, less.memory_target, less.memory_target_bytes) == (64 * MIB, 48 * MIB, 48 * MIB)
    assert changed(less, VmPatch(memory=64 * MIB), at_rest=False) == definition()
    with pytest.raises(Conflict, match="VM vm was started with memory of 64 MiB: stop it to give it 65 MiB"):
        changed(less, VmPatch(memory=65 * MIB), at_rest=False)


def test_what_is_not_in_a_patch_stays() -> None:
    before = definition(reservation=8 * MIB, limit=32 * MIB, shares=7)
    after = changed(before, VmPatch(weight=300), at_rest=False)
    assert after == msgspec.structs.replace(before, weight=300)
    assert changed(before, VmPatch(reservation=0), at_rest=False).reservation == 0


@pytest.mark.parametrize(("patch", "more"), [
    (VmPatch(memory=128 * MIB), True), (VmPatch(memory=32 * MIB), False),
    (VmPatch(reservation=9 * MIB), True), (VmPatch(reservation=7 * MIB), False),
    (VmPatch(limit=64 * MIB, shares=9999, weight=9), False),
])
def test_only_memory_and_reservation_are_promises(patch: VmPatch, more: bool) -> None:
    before = definition(reservation=8 * MIB, limit=16 * MIB)
    assert grows(before, changed(before, patch, at_rest=True)) is more


def test_reservations_with_their_overhead_fit_the_pool() -> None:
    first = definition("a", reservation=60 * MIB)
    check_admission(64 * MIB, 100, [], [first])
    with pytest.raises(Conflict, match=r"VM b is not admitted: a reservation of 4 MiB with .* of overhead"):
        check_admission(64 * MIB, 100, [first], [definition("b", reservation=4 * MIB)])


def test_all_memory_is_within_the_ratio() -> None:
    first = definition("a")
    check_admission(64 * MIB, 2, [first], [definition("b")])
    with pytest.raises(Conflict, match="than the 128 MiB that an overcommit ratio of 2 allows"):
        check_admission(64 * MIB, 2, [first], [definition("b"), definition("c", memory=MIN_MEMORY)])


@given(st.lists(st.integers(0, 16), max_size=12))
def test_requests_are_admitted_as_if_they_came_one_by_one(reservations: list[int]) -> None:
    requests = [definition(f"vm{i}", reservation=mib * MIB) for i, mib in enumerate(reservations)]
    pool = 64 * MIB
    admitted: list[Definition] = []
    with suppress(Conflict):
        for request in requests:
            check_admission(pool, 1000, admitted, [request])
            admitted.append(request)
    overhead = VmBlock.frames_for(64 * MIB) * PAGE
    assert sum(one.reservation + overhead for one in admitted) <= pool
    if len(admitted) == len(requests):
        check_admission(pool, 1000, [], requests)
    else:
        with pytest.raises(Conflict, match=f"VM {requests[len(admitted)].name} is not admitted"):
            check_admission(pool, 1000, [], requests)
