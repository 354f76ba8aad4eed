# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest has exactly one owner, whatever goes wrong while it changes hosts: real daemons, faults at words.

All faults at all words take half an hour: `python -m tests.migration_soak --every`.
"""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import msgspec
import pytest

from hostd.definition import Definition
from tests.migration_faults import FAULTS, Case, cases, run
from tests.migration_proxy import Trap
from tests.migration_soak import random_case
from tests.migration_world import GUEST, Side, World, world_in
from tests.private_daemon import SOON


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world_in(tmp_path_factory.mktemp("world")) as world:
        yield world


@pytest.fixture
def world(shared: World) -> Iterator[World]:
    """Two hosts and no guest, before and after."""
    shared.kind, shared.vmm = "witness", "hw"
    yield shared
    shared.restart()
    shared.clear(forgotten=False)


def held(world: World, word: str, **request: Any) -> Trap:
    """A migration that has come as far as before this word."""
    world.ensure_guest()
    trap = Trap(word)
    world.line.arm(trap)
    world.begin(**request)
    assert trap.reached.wait(SOON)
    return trap


def until(side: Side, what: Callable[[Any], object]) -> Any:
    """The guest's view, once it is so."""
    deadline = time.monotonic() + SOON
    while not what(vm := side.vm()):
        assert time.monotonic() < deadline, vm
        time.sleep(0.01)
    return vm


def ended(side: Side, operation: Any) -> Any:
    return side.daemon.get(f"/operations/{operation['id']}", wait=SOON)


# --- one case after the other

@pytest.mark.parametrize(("mode", "kind", "vmm"), [("auto", "idle", "bt"), ("postcopy", "witness", "hw")])
def test_a_line_that_breaks_at_any_word(world: World, mode: str, kind: Any, vmm: str) -> None:
    world.kind, world.vmm = kind, vmm
    for case in cases(["cut"], [mode]):
        run(world, case)
    world.clear()                                   # nobody waits for a word of anybody


def test_a_user_who_calls_it_off(world: World) -> None:
    for word in "Accept", "Ready", "Committed":
        run(world, Case("cancel", word))
    run(world, Case("cancel", "Complete", mode="postcopy"))


@pytest.mark.parametrize(("fault", "words"), [
    ("lose source", ("Ready", "Commit")), ("lose target", ("Final", "Commit")),
    ("down", ("Commit", "Committed"))], ids=["lose source", "lose target", "down"])
def test_words_that_are_lost(world: World, fault: str, words: tuple[str, ...]) -> None:
    for case in *(Case(fault, word, "after") for word in words), Case(fault, "Pages", mode="postcopy"):
        run(world, case)
    world.clear()


def test_full_disks(world: World) -> None:
    for fault, word in ("full source", "Accept"), ("full target", "Accept"), ("full target", "Commit"):
        run(world, Case(fault, word))


@pytest.mark.parametrize("fault", ["power off", "reset", "crash"])
def test_a_guest_that_ends_meanwhile(world: World, fault: str) -> None:
    world.kind = "obedient"
    for word in "Hello", "Pages", "Ready":
        run(world, Case(fault, word))


@pytest.mark.parametrize(("fault", "word"), [
    ("worker source", "Pages"), ("worker source", "Ready"), ("worker target", "Commit")])
def test_workers_that_die(world: World, fault: str, word: str) -> None:
    run(world, Case(fault, word))


@pytest.mark.parametrize("case", [
    Case("kill source", "Commit"), Case("kill target", "Commit", "after"),
    Case("kill source", "Complete", mode="postcopy"), Case("end target", "Ready")],
    ids=lambda case: f"{case.fault} {case.when} {case.word}")
def test_daemons_that_end(world: World, case: Case) -> None:
    run(world, case)


def test_some_of_the_soak(world: World) -> None:
    random = Random(1)
    every = (random_case(random) for _ in itertools.count())
    for case in itertools.islice((case for case in every if not FAULTS[case.fault].restarts), 6):
        run(world, case)


# --- hosts that do not come back

def test_the_target_is_gone_for_good(world: World) -> None:
    trap = held(world, "Commit")
    source = world.source
    world.target.kill()
    trap.release()
    vm = until(source, lambda vm: "hostctl recover" in vm["reason"])
    assert vm["state"] == "migrating"
    assert source.daemon.client.post(f"/vms/{GUEST}/stop", json={}).is_success
    assert source.daemon.post(f"/vms/{GUEST}/recover")["state"] == "running"
    assert world.outcome(SOON) == "failed" and world.error is not None and "took it back" in world.error
    world.restart()
    world.judge("failed", may_end=False)


def test_both_are_killed_and_one_comes_back(world: World) -> None:
    trap = held(world, "Commit")
    source = world.source
    world.source.kill()
    world.target.kill()
    trap.release()
    source.start()
    # it may run there: not even who is quicker than all else can start it here
    refused = source.daemon.client.post(f"/vms/{GUEST}/start")
    if refused.is_success:
        assert ended(source, refused.json())["status"] == "failed"
    vm = until(source, lambda vm: "hostctl recover" in vm["reason"])
    assert vm["state"] == "defined"
    source.daemon.post(f"/vms/{GUEST}/recover")
    assert ended(source, source.daemon.post(f"/vms/{GUEST}/start"))["status"] == "done"
    world.new_life()
    world.restart()
    world.judge("failed", may_end=False)


def test_the_source_is_gone_while_memory_is_fetched(world: World) -> None:
    trap = held(world, "Pages", mode="postcopy")
    source, target = world.source, world.target
    source.kill()
    trap.release()
    vm = until(target, lambda vm: vm["reason"])
    assert vm["state"] == "running" and "hostctl destroy --force guest" in vm["reason"]
    target.destroy()
    # nothing is left of it, not even its name
    world.source, world.target = target, source
    world.ensure_guest()
    target.destroy()
    until(target, lambda _: target.under_way() == "")
    world.restart()
    until(source, lambda _: source.under_way() == "")
    assert source.vm() is None


def test_the_target_ends_before_the_guest_is_in_its_inventory(world: World) -> None:
    trap = held(world, "Forget")
    target = world.target
    target.kill()
    inventory, directory = target.disk.path / "vms" / f"{GUEST}.json", target.disk.path / "migrations"
    record = max(target.records(), key=lambda record: record.time)
    if inventory.exists():                          # else it was killed in that very moment
        definition = msgspec.json.decode(inventory.read_bytes(), type=Definition)
        (directory / f"{record.token}.json").write_bytes(
            msgspec.json.encode(msgspec.structs.replace(record, definition=definition)))
        inventory.unlink()
    trap.release()
    world.restart()
    assert world.judge("done", may_end=True) == "defined"
    assert inventory.exists()


def test_a_source_that_goes_down_waits_until_memory_is_fetched(world: World) -> None:
    world.ensure_guest()
    daemon = world.source.daemon
    patient = daemon.config.read_text().replace("shutdown_timeout = 0", "shutdown_timeout = 20")
    daemon.config.write_text(patient)
    daemon.process.send_signal(signal.SIGHUP)
    while "configuration reloaded" not in daemon.said():
        time.sleep(0.01)
    trap = held(world, "Pages", mode="postcopy")
    daemon.process.terminate()
    trap.release()
    assert daemon.process.wait(SOON) == 0
    world.restart()
    world.judge("done", may_end=False)


# --- users and policies that do not wait

def test_two_migrations_at_once(world: World) -> None:
    world.ensure_guest()
    source, answers = world.source, []

    def ask() -> None:
        answers.append(source.daemon.client.post(f"/vms/{GUEST}/migrate", json={"to": world.line.address}))

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    ends = [ended(source, answer.json()) for answer in answers if answer.is_success]
    assert [end["status"] for end in ends].count("done") == 1
    assert not [end for end in ends if "internal" in (end["error"] or "")]
    assert {answer.status_code for answer in answers} <= {202, 404, 409}
    world.judge("done", may_end=False)


@pytest.mark.parametrize("verb", ["reset", "stop", "pause"])
def test_a_user_who_does_not_wait_until_memory_is_fetched(world: World, verb: str) -> None:
    world.kind = "obedient"
    trap = held(world, "Pages", mode="postcopy")
    target = world.target
    operation = target.daemon.post(f"/vms/{GUEST}/{verb}", **({"force": True} if verb == "stop" else {}))
    assert ended(target, operation)["status"] == "done"
    trap.release()
    assert world.outcome(SOON) == "done"
    if verb == "reset":
        world.new_life()
    state = world.judge("done", may_end=True)
    assert state == {"reset": "running", "stop": "halted", "pause": "paused"}[verb]
    if verb == "pause":
        assert ended(target, target.daemon.post(f"/vms/{GUEST}/resume"))["status"] == "done"
        world.judge("done", may_end=False)


def test_a_policy_that_destroys_what_is_being_migrated(world: World) -> None:
    world.kind = "obedient"
    world.ensure_guest(on_poweroff="destroy")
    trap = held(world, "Pages")
    world.source.daemon.send(GUEST, "q")
    until(world.source, lambda vm: vm["state"] == "halted")
    trap.release()
    until(world.source, lambda vm: vm is None)
    assert world.outcome(SOON) == "failed"
