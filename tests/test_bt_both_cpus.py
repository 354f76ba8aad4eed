# SPDX-License-Identifier: GPL-2.0-or-later
"""The same translations on both CPUs: instructions, sequences of them and programs have the same results."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.bt_guest import Guest, Stop
from tests.test_bt_differential import (
    CODE,
    CODE_BYTES,
    DATA,
    DATA_BYTES,
    Both,
    State,
    difference,
    instructions,
    states,
)
from tests.test_bt_programs import BASE, MEMORY, PROGRAMS, Built, build, run
from vmm.bt.decode import decode
from vmm.bt.emulated.cpu import EmulatedCpu
from vmm.bt.native.block import LIVE_FLAGS
from vmm.bt.table import Kind, Unit
from vmm.x86.flags import RFLAGS_CF, RFLAGS_OF


class EmulatedGuest(Guest):
    """A guest on the emulated CPU."""

    new_cpu = EmulatedCpu


class Runner(Both):
    """Programs and states on one CPU."""

    def __init__(self, guest: type[Guest]) -> None:
        self.guest = guest(memory=DATA + DATA_BYTES)
        self.guest.window.clear()
        self.guest.window.map(CODE >> 12, CODE >> 12, CODE_BYTES >> 12)
        self.guest.window.map(DATA >> 12, DATA >> 12, DATA_BYTES >> 12, writable=True)

    def run(self, code: bytes, state: State) -> tuple[State, Stop]:
        return self.native(code, state)


@pytest.fixture(scope="module")
def runners() -> Iterator[tuple[Runner, Runner]]:
    pair = Runner(Guest), Runner(EmulatedGuest)
    yield pair
    for runner in pair:
        runner.guest.close()


def _integer(code: bytes) -> bool:
    return decode(code + bytes(16), 0, True).entry.unit is Unit.INTEGER


def _undefined(code: bytes) -> int:
    entry = decode(code + bytes(16), 0, True).entry
    # of counts beyond the operand
    return entry.flags_undefined | (RFLAGS_CF if entry.mnemonic in ("shl", "shr", "sar") else 0)


def _changed_by_fault(code: bytes, at: int) -> int:
    """The flags the emulated processor does not keep when an instruction faults."""
    mnemonic = decode(code + bytes(16), at, True).entry.mnemonic
    if mnemonic[:4] in ("cmps", "scas"):
        return LIVE_FLAGS        # repeated ones have the flags of their last step
    return RFLAGS_CF | RFLAGS_OF if mnemonic in ("rcl", "rcr") else 0


def compare(runners: tuple[Runner, Runner], code: bytes, state: State, mask: int) -> None:
    (native, stop), (emulated, other) = (runner.run(code, state) for runner in runners)
    assert stop == other
    assert native.registers == emulated.registers
    if stop.why == "fault":
        mask &= ~_changed_by_fault(code, stop.eip - CODE)
    assert native.eflags & mask == emulated.eflags & mask, (hex(native.eflags), hex(emulated.eflags))
    assert difference(native.memory, emulated.memory) is None
    assert native.xmm == emulated.xmm


def test_one_instruction(runners: tuple[Runner, Runner]) -> None:
    @settings(max_examples=800, deadline=None, derandomize=True)
    @given(instructions().filter(_integer), states())
    def check(code: bytes, state: State) -> None:
        compare(runners, code, state, LIVE_FLAGS & ~_undefined(code))
    check()


def _sequential(code: bytes) -> bool:
    entry = decode(code + bytes(16), 0, True).entry
    return (entry.unit is Unit.INTEGER and not _undefined(code) and entry.mnemonic != "cmpxchg8b"
            and entry.kind not in (Kind.JCC, Kind.LOOP, Kind.JMP, Kind.CALL))


def test_sequences_of_instructions(runners: tuple[Runner, Runner]) -> None:
    @settings(max_examples=400, deadline=None, derandomize=True,
              suppress_health_check=[HealthCheck.filter_too_much])
    @given(st.lists(instructions().filter(_sequential), min_size=2, max_size=20), states())
    def check(codes: list[bytes], state: State) -> None:
        compare(runners, b"".join(codes), state, LIVE_FLAGS)
    check()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("programs"))


def results(built: Built, guest: Guest, divisor: int = 1) -> list[int]:
    guest.write(BASE, built.image)
    try:
        return [run(guest, built.entry, number, argument // divisor + 5)
                for number, (_, argument) in enumerate(PROGRAMS)]
    finally:
        guest.close()


def test_programs(built: Built) -> None:
    assert results(built, EmulatedGuest(MEMORY)) == results(built, Guest(MEMORY))


def test_programs_in_a_cache_whose_code_is_replaced_all_the_time(built: Built) -> None:
    """The emulated processor must not run what it had translated from code that was there before."""
    small = EmulatedGuest(MEMORY, arena=0x3000, stubs=64)
    assert results(built, small, 8) == results(built, Guest(MEMORY), 8)
    assert small.cache.counters.evicted > 10
