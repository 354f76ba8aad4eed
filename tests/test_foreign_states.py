# SPDX-License-Identifier: GPL-2.0-or-later
"""States that may be anybody's work: they are refused, or they run, and nobody else pays for it."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostd import protocol, turns
from hostd.errors import Failed
from hostd.translator import Translator
from hostd.turns import WorkerLoop
from tests.hw_rig import Machine, Rig
from tests.test_monitor_kernels import boot
from tests.told_host import ToldHost, real_host
from vmm import guests, loadable
from vmm.memory.block import free_block
from vmm.monitor import StopReason
from vmm.state import CpuState, MachineState, Segment, StateError, decode, encode

MONITORS = ("hw", "bt")

Path_ = tuple[Any, ...]

#: what no register of that width, and none at all, can hold
WRONG: dict[Path_, Any] = {
    ("cpu", "cs", "selector"): 0x12345, ("cpu", "ss", "attributes"): 0x1000, ("cpu", "tr", "limit"): 1 << 32,
    ("cpu", "gdtr", "limit"): -1, ("cpu", "gdtr", "base"): "0", ("cpu", "rip"): -5, ("cpu", "cr3"): 1.0,
    ("cpu", "gpr"): [0] * 15, ("cpu", "gpr", 3): -1, ("cpu", "dr", 7): None, ("cpu", "dr"): [0] * 9,
    ("cpu", "msrs"): {0xC000_0081: -1}, ("cpu", "fxsave"): bytes(511), ("cpu", "halted"): 1,
    ("time_ns",): 1 << 62, ("memory_bytes",): -1, ("version",): 2}
#: what registers hold, and no CPU runs with
UNFIT: dict[Path_, Any] = {
    ("cpu", "cr0"): 1 << 40, ("cpu", "cr3"): 1 << 60, ("cpu", "efer"): 1 << 20, ("cpu", "dr", 7): 1 << 32,
    ("cpu", "msrs"): {0x174: 1 << 32}}


def plain(state: MachineState) -> Any:
    return msgspec.msgpack.decode(encode(state))


def changed(state: Any, path: Path_, value: Any) -> bytes:
    """The state, as bytes, with another value at `path`."""
    copy = msgspec.msgpack.decode(msgspec.msgpack.encode(state))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return msgspec.msgpack.encode(copy)


def at(state: Any, path: Path_) -> Any:
    for key in path:
        state = state[key]
    return state


def name(path: Path_) -> str:
    return ".".join(map(str, path))


@pytest.mark.parametrize("path", WRONG, ids=name)
def test_what_no_register_can_hold_is_refused(path: Path_) -> None:
    with pytest.raises(StateError):
        decode(changed(plain(MachineState(4 << 20)), path, WRONG[path]))


def test_what_registers_can_hold_is_taken() -> None:
    most = Segment(0xFFFF, 0xFFF, 0xFFFF_FFFF, (1 << 64) - 1)
    cpu = CpuState(gpr=[(1 << 64) - 1] * 16, cs=most, msrs={0xC000_0102: (1 << 64) - 1}, fxsave=bytes(512))
    assert decode(encode(MachineState(4 << 20, cpu))).cpu == cpu


def ran(machine: Machine) -> Machine:
    """For a moment, off the CPU then."""
    machine.run(time.monotonic_ns() + 2_000_000)
    machine.leave_cpu()
    return machine


@pytest.mark.parametrize("path", UNFIT, ids=name)
def test_a_cpu_that_cannot_run_is_refused_before_it_is_tried(rig: Rig, path: Path_) -> None:
    machine = ran(boot(rig, "primes"))
    data = changed(plain(machine.capture()), path, UNFIT[path])
    with pytest.raises(StateError, match="a CPU that cannot run"):
        loadable.check(data, machine.block, rig.monitor, rig.khz)
    with pytest.raises(StateError, match="a CPU that cannot run"):
        rig.again(machine, decode(data))


def test_a_state_that_breaks_off_leaves_the_cpu_as_it_was(rig: Rig) -> None:
    machine = ran(boot(rig, "primes"))
    state = machine.capture()
    state.cpu.rip = -5                              # which no state that was decoded has
    with pytest.raises(ValueError):
        rig.cpu.states.load(machine.processor.guest, state.cpu)
    assert bytes(rig.cpu.regs.image) == rig.cpu.host_image


# --- any change at all -------------------------------------------------------------------------------------


def places(value: Any, path: Path_ = ()) -> list[Path_]:
    """Of every value in a state, and of every part."""
    inner: Any = ()
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [place for key, part in inner for place in [(*path, key), *places(part, (*path, key))]]


VALUES = st.one_of(
    st.sampled_from([-1, 1 << 16, 1 << 31, 1 << 32, 1 << 40, (1 << 62) - 1, 1 << 63, (1 << 64) - 1, 0x12345]),
    st.integers(-2**63, 2**64 - 1), st.integers(0, 0xFFF), st.booleans(), st.none(), st.floats(),
    st.text(max_size=3), st.binary(max_size=8), st.binary(min_size=512, max_size=512),
    st.lists(st.integers(0, 255), max_size=17), st.dictionaries(st.integers(0, 2**32), st.integers(0, 255)))


def live(machine: Machine) -> None:
    """All that a worker does with a guest."""
    for _ in range(2):
        machine.add_steal(1000)
        machine.feed(b"x")
        machine.wake_pending()
        machine.next_wake()
        ran(machine)
    machine.power_button()
    encode(machine.capture())
    machine.close()


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_changed_state_is_refused_or_runs_and_nobody_else_knows(rig: Rig, data: st.DataObject) -> None:
    neighbour, victim = boot(rig, "primes", "loop limit=5000"), ran(boot(rig, "mix", "rounds=9 tasks=4"))
    state = plain(victim.capture())
    everywhere = places(state)
    of_the_cpu = [place for place in everywhere if place[0] == "cpu"]
    bits = st.integers(0, 63).map(lambda bit: lambda old: old ^ 1 << bit)
    others = VALUES.map(lambda value: lambda old: value)
    change = st.tuples(st.sampled_from(of_the_cpu) | st.sampled_from(everywhere), bits | others)
    for changes in data.draw(st.lists(st.lists(change, min_size=1, max_size=3), max_size=12)):
        ran(neighbour)
        bad = state
        for where, value in changes:
            # what is no number, too large a one, or in a part that was changed before
            with suppress(LookupError, TypeError, OverflowError):
                bad = msgspec.msgpack.decode(changed(bad, where, value(at(bad, where))))
        count = len(rig.blocks)
        with suppress(StateError):
            live(rig.clone(victim, decode(msgspec.msgpack.encode(bad))))
        rig.cpu.evict()
        while len(rig.blocks) > count:
            free_block(rig.allocator, rig.blocks.pop())
    told = neighbour.text.count("below")
    while neighbour.text.count("below") < told + 2:
        assert neighbour.run(time.monotonic_ns() + 10_000_000).reason in (StopReason.SLICE, StopReason.KICKED)
    rounds = re.findall(r"round (\d+): (\d+) below 5000\r?\n", neighbour.text)
    assert rounds == [(str(number + int(rounds[0][0])), "669") for number in range(len(rounds))]
    rig.clear()


# --- in workers --------------------------------------------------------------------------------------------


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[ToldHost]:
    """A host in this process with real workers."""
    async with real_host(tmp_path) as told:
        yield told


@pytest.mark.parametrize("monitor", MONITORS)
async def test_a_worker_refuses_a_state_and_lives_on(host: ToldHost, monitor: str) -> None:
    kernel = await host.blob(guests.read("primes"))
    for name in "bad", "good":
        await host.create(name, kernel=kernel, append="loop limit=5000", vmm=monitor, memory=16 << 20)
        await host.host.start(name).outcome()
    pids = await host.ready_workers()
    vm = host.host._guests.vms["bad"]
    for path, value in ((("cpu", "cs", "selector"), 0x12345), (("cpu", "cr0"), 1 << 40),
                        (("devices", "pit"), 7)):
        await host.host.pause("bad").outcome()
        vm.parked = changed(plain(decode(vm.parked)), path, value)
        with pytest.raises(Failed, match="its state cannot be loaded"):
            await host.host.resume("bad").outcome()
        assert vm.state == "crashed"
        await host.host.start("bad").outcome()
    await host.prints("bad", "round 2: .*\n")
    lived = len(host.host.console("good").scrollback())
    await host.prints("good", f"(?s).{{{lived + 200}}}")
    assert await host.ready_workers() == pids and host.host.get("good").boots == 1


def test_a_worker_refuses_what_nobody_thought_of(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state whose loading fails in a way of its own costs nobody else anything."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        translator = Translator(rig.pool, rig.cpu.kicker, "auto", 8 << 20)
        loop = WorkerLoop(theirs, rig.pool, rig.cpu, translator, rig.khz, 1_000_000, 64)
        block = rig.block()
        adopt = protocol.Adopt("vm#1", block.first, block.memory_bytes, b"", 0, 0, 100, 0)
        monkeypatch.setattr(turns, "Resident", lambda *_: {}["nothing"])
        ours.sendall(protocol.encode(adopt) + protocol.encode(protocol.Quit()))
        ours.shutdown(socket.SHUT_WR)
        loop.run()
        refused, *_ = protocol.Splitter[protocol.ToDaemon](protocol.ToDaemon).feed(ours.recv(65536))
    assert refused == protocol.Refused("vm#1", "adopt", "its state cannot be loaded: KeyError: 'nothing'")
