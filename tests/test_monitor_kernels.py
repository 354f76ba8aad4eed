# SPDX-License-Identifier: GPL-2.0-or-later
"""Our own guest kernels under either monitor, to their ends: alone, moved about, cloned, and short of frames
all the time."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

from hostd.translations import Translations
from tests.hw_rig import Machine, Refusing, Rig
from vmm import guests
from vmm.boot import image
from vmm.memory.frames import FrameSource
from vmm.monitor import Stop, StopReason
from vmm.silicon.cpu import Cpu
from vmm.state import MachineState, decode, encode

MONITORS = ("hw", "bt")
MEMORY = 24 << 20
GOOD = Stop(StopReason.EXIT, "wrote 1 to the debug-exit port", 1)
MIX, PRIMES = ("mix", "rounds=1 tasks=4"), ("primes", "limit=8000")


def boot(rig: Rig, name: str, append: str = "", frames: FrameSource | None = None) -> Machine:
    loaded = image.load(guests.read(name), append=append, memory_bytes=MEMORY)
    return rig.machine(MachineState(MEMORY, cpu=loaded.cpu), loaded.writes, frames)


def last_line(machine: Machine) -> str:
    return machine.text.splitlines()[-1]


@pytest.fixture(scope="module")
def other_cpu(silicon: Rig) -> Iterator[Cpu]:
    cpu = Cpu(silicon.pool)
    yield cpu
    cpu.close()


@pytest.fixture(scope="module")
def results(silicon: Rig) -> dict[str, str]:
    """The last lines of undisturbed runs."""
    lines = {}
    for name, append in (MIX, PRIMES):
        machine = boot(silicon, name, append)
        assert machine.go() == GOOD
        lines[name] = last_line(machine)
    silicon.clear()
    return lines


def test_primes_are_right(results: dict[str, str]) -> None:
    below = 8000
    sieve = [False, False] + [True] * (below - 2)
    for number in range(2, below):
        if sieve[number]:
            sieve[2 * number::number] = [False] * len(sieve[2 * number::number])
    assert results["primes"] == f"primes: {sum(sieve)} below {below}"


def test_mix(results: dict[str, str]) -> None:
    assert re.fullmatch("mix: checksum [0-9a-f]+", results["mix"])


def test_idle_sleeps_between_its_ticks(rig: Rig) -> None:
    machine = boot(rig, "idle", "ticks=3 ms=20")
    sleeps = 0
    while (stop := machine.run(time.monotonic_ns() + 10**10)).reason is StopReason.HALTED:
        sleeps += 1
        wake = machine.next_wake()
        assert wake is not None
        time.sleep(max(0, wake - time.monotonic_ns()) / 1e9)
    assert stop == GOOD
    assert sleeps >= 3
    assert machine.text.splitlines()[1:] == [f"idle: tick {n}" for n in (1, 2, 3)]


def test_triple_fault(rig: Rig) -> None:
    stop = boot(rig, "triple").go()
    assert stop.reason is StopReason.CRASHED
    assert stop.detail == "triple fault: #GP(0x43) while delivering a double fault"


def test_fuzz_breaks_nothing(rig: Rig) -> None:
    machine = boot(rig, "fuzz", "seed=7 rounds=100")
    assert machine.go() == GOOD
    assert "survived" in last_line(machine)


def test_fuzz_of_what_ends_a_machine(rig: Rig) -> None:
    """With the ports for it, a guest may end itself in any way but by breaking its worker."""
    for seed in range(4):
        machine = boot(rig, "fuzz", f"seed={seed} rounds=50 all")
        assert machine.go().reason.final


def test_two_guests_take_turns(rig: Rig, results: dict[str, str]) -> None:
    machines = {"mix": boot(rig, *MIX), "primes": boot(rig, *PRIMES)}
    while machines:
        for name, machine in list(machines.items()):
            stop = machine.run(time.monotonic_ns() + 300_000)
            if stop.reason.final:
                assert (stop, last_line(machine)) == (GOOD, results[name])
                del machines[name]


@pytest.mark.parametrize(("name", "append"), [MIX, PRIMES])
def test_captured_and_moved_all_the_time(rig: Rig, other_cpu: Cpu, results: dict[str, str], name: str,
                                         append: str) -> None:
    """Every millisecond or so: capture, encode, decode, go on as another machine on the other CPU."""
    machine = boot(rig, name, append)
    cpus = [rig.cpu, other_cpu]
    moves = 0
    while not (stop := machine.run(time.monotonic_ns() + 1_000_000)).reason.final:
        state = decode(encode(machine.capture()))
        moves += 1
        cpu = cpus[moves % 2]
        Translations(cpu).forget_guest(machine.block.leaf(), 0)
        printed = machine.printed
        machine = rig.again(machine, state, cpu)
        machine.printed[:0] = printed
    other_cpu.evict()
    assert (stop, last_line(machine)) == (GOOD, results[name])
    assert moves > 5


def test_capture_of_a_capture_is_the_same(rig: Rig) -> None:
    machine = boot(rig, *MIX)
    for _ in range(10):
        if machine.run(time.monotonic_ns() + 1_500_000).reason.final:
            break
        first = machine.capture()
        machine = rig.again(machine, decode(encode(first)))
        second = machine.capture()
        first.cpu.tsc_offset = second.cpu.tsc_offset
        assert second == first


def test_clones_of_a_running_guest(rig: Rig, results: dict[str, str]) -> None:
    """Clones taken in the middle, and the guest itself, all come to the same end, each in its own memory."""
    machine = boot(rig, *MIX)
    machine.run(time.monotonic_ns() + 8_000_000)
    state = encode(machine.capture())
    family = [rig.clone(machine, decode(state)) for _ in range(3)]
    family.append(rig.again(machine, decode(state)))
    going = list(family)
    while going:
        for member in list(going):
            stop = member.run(time.monotonic_ns() + 500_000)
            if stop.reason.final:
                assert (stop, last_line(member)) == (GOOD, results["mix"])
                going.remove(member)
    for member in family:
        rig.allocator.drop(member.take_dropped())
        assert member.block.accounting.cow_breaks > 0


@pytest.mark.parametrize("period", [2, 3, 7])
def test_short_of_frames_all_the_time(rig: Rig, results: dict[str, str], period: int) -> None:
    """Each time a frame is missing the guest stops, and goes on as if nothing had been."""
    frames = Refusing(rig.frames(), period)
    machine = boot(rig, *MIX, frames=frames)
    while (stop := machine.go()).reason is StopReason.NO_FRAMES:
        pass
    assert (stop, last_line(machine)) == (GOOD, results["mix"])
    assert frames.refused > 10


def test_clone_short_of_frames(rig: Rig, results: dict[str, str]) -> None:
    """Every page of a clone is shared: whatever is written for or by it may lack a frame."""
    machine = boot(rig, *MIX)
    machine.run(time.monotonic_ns() + 8_000_000)
    state = machine.capture()
    clone = rig.clone(machine, state)
    frames = Refusing(clone.frames, 2)
    clone = Machine(rig.cpu, clone.block, frames, state, rig.khz)
    while (stop := clone.go()).reason is StopReason.NO_FRAMES:
        pass
    assert (stop, last_line(clone)) == (GOOD, results["mix"])
    assert frames.refused > 10
    rig.allocator.drop(clone.take_dropped())
