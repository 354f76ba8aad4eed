# SPDX-License-Identifier: GPL-2.0-or-later
"""Saving and loading a whole board in the middle of anything."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.devices_rig import SECOND, Rig
from vmm.state import StateError
from vmm.x86.faults import GeneralProtection

PORTS = [0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1, 0x40, 0x42, 0x43, 0x60, 0x61, 0x64, 0x70, 0x71, 0xE0, 0xE9,
         0x3F8, 0x3F9, 0x3FA, 0x3FB, 0x3FC, 0x3FD, 0x3FE, 0x510, 0x511, 0x600, 0x602, 0x603, 0x604, 0x608,
         0x2004, 0x2009]
MSRS = [0x6E0, 0x808, 0x80B, 0x80F, 0x830, 0x832, 0x835, 0x838, 0x839, 0x83E, 0x83F]

#: things a guest and its host do to a board
STEP = st.one_of(
    st.tuples(st.just("out"), st.sampled_from(PORTS), st.integers(0, 0xFFFF_FFFF),
              st.sampled_from([1, 2, 4])),
    st.tuples(st.just("in"), st.sampled_from(PORTS), st.just(0), st.sampled_from([1, 2, 4])),
    st.tuples(st.just("apic"), st.integers(0, 0x3F), st.integers(0, 0xFFFF_FFFF), st.just(4)),
    st.tuples(st.just("route"), st.integers(0, 23), st.integers(0, 2**64 - 1), st.just(8)),
    st.tuples(st.just("msr"), st.sampled_from(MSRS), st.integers(0, 2**64 - 1), st.just(8)),
    st.tuples(st.just("base"), st.sampled_from([0x100, 0x900, 0xD00]), st.just(0), st.just(8)),
    st.tuples(st.just("feed"), st.integers(0, 40), st.just(0), st.just(1)),
    st.tuples(st.just("button"), st.just(0), st.just(0), st.just(1)),
    st.tuples(st.just("acknowledge"), st.just(0), st.just(0), st.just(1)),
    st.tuples(st.just("virtio"), st.integers(0, 0x140).map(lambda n: (n & 1) << 12 | (n & ~1) * 2),
              st.one_of(st.integers(0, 0xF), st.integers(0, 0x3_0000)), st.just(4)),
    st.tuples(st.just("target"), st.integers(0, 1 << 15), st.just(0), st.just(1)),
    st.tuples(st.just("serve"), st.just(0), st.just(0), st.just(1)),
    st.tuples(st.just("time"), st.integers(0, SECOND), st.just(0), st.just(1)))
STEPS = st.lists(STEP, max_size=40)


def do(rig: Rig, step: tuple[str, int, int, int]) -> object:
    """One step, and all that can be seen of its effect."""
    what, where, value, size = step
    seen: object = None
    try:
        if what == "out":
            rig.board.ports.write(where, size, value & (1 << 8 * size) - 1)
        elif what == "in":
            seen = rig.board.ports.read(where, size)
        elif what == "apic":
            rig.apic_write(where, value)
            seen = rig.apic_read(where)
        elif what == "route":
            rig.route(where, value)
            seen = rig.ioapic_read(0x10 + 2 * where)
        elif what == "msr":
            rig.lapic.msr_write(where, value)
            seen = rig.lapic.msr_read(where)
        elif what == "base":
            rig.lapic.msr_write(0x1B, 0xFEE0_0000 | where)
        elif what == "feed":
            rig.board.uart.feed(bytes(where))
        elif what == "button":
            rig.board.acpi.power_button()
        elif what == "virtio":
            rig.mmio_write(0xFEB0_0000 | where, value)
            seen = rig.mmio_read(0xFEB0_0000 | where)
        elif what == "target":
            rig.board.balloon.target_pages = where
            seen = rig.board.balloon.request_statistics()
        elif what == "serve":
            rig.board.virtio.serve()
            seen = rig.ram.take_written()
        elif what == "acknowledge":
            seen = rig.interrupts.acknowledge()
        else:
            rig.stall(where)
    except GeneralProtection:
        seen = "#GP"
    return (seen, rig.interrupts.output, rig.interrupts.nmi_pending, rig.board.timers.next)


def through_a_stream(state: dict[str, Any]) -> Any:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(state))


def started() -> Rig:
    rig = Rig()
    rig.setup_pics()
    rig.enable_apic()
    return rig


@given(STEPS, STEPS)
@settings(max_examples=150, deadline=None)
def test_a_loaded_board_goes_on_as_if_nothing_had_been(before: list, after: list) -> None:
    original = started()
    for step in before:
        do(original, step)
    state = through_a_stream(original.board.save())
    copy = Rig(now=original.now)
    copy.board.load(state)
    copy.ram.data[:] = original.ram.data
    assert through_a_stream(copy.board.save()) == state
    assert copy.interrupts.output == original.interrupts.output
    assert copy.board.timers.next == original.board.timers.next
    original.console.clear()
    for step in after:
        assert do(copy, step) == do(original, step), step
    assert through_a_stream(copy.board.save()) == through_a_stream(original.board.save())
    assert copy.console == original.console


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every plain value in a state."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, (*path, key))]
    if isinstance(value, list):
        return [leaf for index, inner in enumerate(value) for leaf in leaves(inner, (*path, index))]
    return [path]


def replaced(state: Any, path: tuple[Any, ...], value: Any) -> Any:
    copy = through_a_stream(state)
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


LEAVES = leaves(Rig().board.save())


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: ".".join(map(str, path)))
def test_a_value_of_the_wrong_kind_is_refused(path: tuple[Any, ...]) -> None:
    state = Rig().board.save()
    for wrong in (None, "text", 1.5, -(1 << 63), {}, [0] * 3):
        with pytest.raises(StateError):
            Rig().board.load(replaced(state, path, wrong))


@pytest.mark.parametrize("wrong", [None, [], {}, {"pit": {}}, 7])
def test_what_is_no_board_is_refused(wrong: Any) -> None:
    with pytest.raises(StateError):
        Rig().board.load(wrong)


def test_unknown_and_missing_fields_are_refused() -> None:
    state = Rig().board.save()
    with pytest.raises(StateError, match="Uart16550: expected"):
        Rig().board.load(replaced(state, ("uart", "speed"), 1))
    del state["uart"]["lcr"]
    with pytest.raises(StateError, match="Uart16550: expected"):
        Rig().board.load(state)


HOSTILE = st.lists(st.tuples(st.sampled_from(LEAVES), st.one_of(
    st.integers(-2**63, 2**64 - 1), st.integers(0, 255), st.booleans(), st.binary(max_size=32),
    st.binary(min_size=32, max_size=32))), min_size=1, max_size=6)


@given(HOSTILE, STEPS)
@settings(max_examples=150, deadline=None)
def test_a_hostile_state_is_refused_or_does_no_harm(changes: list, after: list) -> None:
    """What passes the checks may be nonsense, but it neither raises nor leaves the range of a saved state."""
    state = Rig().board.save()
    for path, value in changes:
        state = replaced(state, path, value)
    rig = Rig(now=3 * SECOND)
    try:
        rig.board.load(state)
    except StateError:
        return
    for step in after:
        do(rig, step)
    through_a_stream(rig.board.save())
