# SPDX-License-Identifier: GPL-2.0-or-later
"""The host with guests that do what they are told: lives, policies, waiting, the end of the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from hostd.errors import Conflict, Failed, Invalid, NotFound, TimedOut
from hostd.host import Host
from hostd.model import StopRequest, VmPatch
from tests.told_host import MEMORY, ToldHost

# --- lives -----------------------------------------------------------------------------------------------


async def test_a_vm_from_definition_to_destruction(told: ToldHost) -> None:
    host = told.host
    with host.events.subscribe() as events:
        view = await told.create("web")
        assert (view.state, view.memory, view.weight, view.worker) == ("defined", MEMORY, 100, None)
        await host.start("web").outcome()
        assert host.get("web").state == "running"
        await told.prints("web", "adopted")
        await told.stop("web")
        assert b"the button was pressed" in host.console("web").scrollback()
        await host.destroy("web").outcome()
        host.events.close()
        states = [event.data["state"] for event in [e async for e in events] if event.type == "vm.state"]
    assert states == ["starting", "running", "halted"]
    assert host.views() == [] and told.definitions() == set()


async def test_a_started_vm_has_memory_and_a_halted_one_has_none(told: ToldHost) -> None:
    await told.running("web")
    view = told.host.get("web")
    assert view.memory_usage.assigned == MEMORY
    assert view.memory_usage.resident == view.memory_usage.private > 0
    assert view.boots == 1 and view.worker is not None and view.uptime_s >= 0
    await told.stop("web", force=True)
    view = told.host.get("web")
    assert (view.state, view.reason, view.worker) == ("halted", "power cut", None)
    assert view.memory_usage.resident == 0
    assert told.host.overview.frames().private == 0


async def test_a_guest_keeps_its_state_over_a_pause(told: ToldHost) -> None:
    await told.running("web")
    await told.tell("web", "hello ")
    await told.host.pause("web").outcome()
    assert told.host.get("web").state == "paused" and told.host.get("web").worker is None
    with pytest.raises(Conflict, match="VM web is paused: nothing reads its console"):
        await told.tell("web", "anybody?")
    await told.host.resume("web").outcome()
    await told.tell("web", "state")
    await told.prints("web", "typed:hello state")


async def test_stop_cuts_the_power_of_a_guest_that_does_not_listen(told: ToldHost) -> None:
    await told.running("web")
    await told.tell("web", "stubborn")
    await told.prints("web", "stubborn")
    await told.stop("web", timeout=0.01)
    assert (told.host.get("web").state, told.host.get("web").reason) == ("halted", "power cut")


async def test_stop_while_a_stubborn_guest_is_waited_for_can_be_forced(told: ToldHost) -> None:
    await told.running("web")
    await told.tell("web", "stubborn")
    await told.prints("web", "stubborn")
    patient = told.host.stop("web", StopRequest(timeout=1000))
    await told.stop("web", force=True)
    await patient.outcome()
    assert told.host.get("web").state == "halted"


async def test_stop_and_reset_of_a_paused_guest(told: ToldHost) -> None:
    await told.running("web")
    await told.host.pause("web").outcome()
    await told.host.reset("web").outcome()
    assert (told.host.get("web").state, told.host.get("web").boots) == ("running", 2)
    await told.host.pause("web").outcome()
    await told.stop("web")
    assert told.host.get("web").state == "halted"


async def test_reset_starts_from_the_first_instruction(told: ToldHost) -> None:
    await told.running("web")
    await told.tell("web", "something")
    await told.host.reset("web").outcome()
    await told.tell("web", "state")
    await told.prints("web", "typed:state")
    assert told.host.get("web").boots == 2


async def test_what_a_state_does_not_allow_is_refused_at_once(told: ToldHost) -> None:
    await told.create("web")
    for change in told.host.pause, told.host.resume, told.host.reset:
        with pytest.raises(Conflict, match=r"VM web is defined: .* is not possible now"):
            change("web")
    with pytest.raises(Conflict):
        told.host.stop("web", StopRequest())
    await told.host.start("web").outcome()
    with pytest.raises(Conflict, match="VM web is running: start is not possible now"):
        told.host.start("web")
    with pytest.raises(Conflict, match="stop it first, or destroy it by force"):
        told.host.destroy("web")
    await told.host.destroy("web", force=True).outcome()
    with pytest.raises(NotFound, match="no VM web"):
        told.host.get("web")


async def test_a_changed_share_reaches_the_guest_and_the_disk(told: ToldHost) -> None:
    await told.running("web")
    view = await told.host.update("web", VmPatch(weight=300, cap=50))
    assert (view.weight, view.cap) == (300, 50)
    await told.prints("web", "share 300 50")
    assert '"weight": 300' in (told.host.config.state_dir / "vms" / "web.json").read_text()


async def test_memory_of_a_running_guest_is_what_it_may_use_and_of_a_halted_one_its_size(
        told: ToldHost) -> None:
    await told.running("web")
    view = await told.host.update("web", VmPatch(memory=MEMORY // 2, reservation=1 << 20, shares=7))
    assert (view.memory, view.memory_target, view.reservation, view.shares) == (
        MEMORY, MEMORY // 2, 1 << 20, 7)
    saved = msgspec.json.decode((told.host.config.state_dir / "vms" / "web.json").read_bytes())
    assert (saved["memory"], saved["memory_target"], saved["reservation"]) == (MEMORY, MEMORY // 2, 1 << 20)
    with pytest.raises(Conflict, match="stop it to give it 4 MiB"):
        await told.host.update("web", VmPatch(memory=2 * MEMORY))
    assert (await told.host.update("web", VmPatch(memory=MEMORY))).memory_target is None
    await told.stop("web", force=True)
    view = await told.host.update("web", VmPatch(memory=2 * MEMORY))
    assert (view.memory, view.memory_target, view.limit) == (2 * MEMORY, None, 2 * MEMORY)
    await told.host.start("web").outcome()
    assert told.host.get("web").memory_usage.assigned == 2 * MEMORY


async def test_machine_memory_adds_up_and_is_right(told: ToldHost) -> None:
    await told.running("web")
    await told.clone("web", "twin")
    memory = await told.host.overview.checked_memory()
    assert memory.pool == 64 << 20 == (
        memory.free + memory.lent + memory.private + memory.shared + memory.overhead)
    assert memory.wrong == []
    assert memory.saved == memory.shared > 0            # two have what is there once
    assert (memory.state, memory.waiting, memory.swap.limit) == ("high", 0, 4 << 30)


async def test_only_what_stays_wrong_is_wrong(told: ToldHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """What workers had on their tongues while the books were checked is not."""
    await told.ready_workers()
    said = [["frame 1 is odd", "frame 2 is odd"], ["frame 2 is odd", "frame 3 is odd"]]
    monkeypatch.setattr(told.host.overview, "check_memory", lambda: said.pop(0))
    assert (await told.host.overview.checked_memory()).wrong == ["frame 2 is odd"]
    assert said == []
    monkeypatch.undo()


# --- ends, and what follows ------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "state", "reason", "status"), [
    ("poweroff", "halted", "powered off", None),
    ("exit 7", "halted", "ended itself by the debug exit port", 7),
    ("crash triple fault", "crashed", "triple fault", None),
])
async def test_how_a_guest_ended_is_told(told: ToldHost, words: str, state: str, reason: str,
                                         status: int | None) -> None:
    await told.running("web")
    await told.tell("web", words)
    view = await told.becomes("web", state)
    assert (view.reason, view.exit_status, view.crashes) == (reason, status, int(state == "crashed"))


@pytest.mark.parametrize(("words", "policy"), [("poweroff", "on_poweroff"), ("crash it", "on_crash")])
async def test_policy_restart(told: ToldHost, words: str, policy: str) -> None:
    await told.running("web", **{policy: "restart"})
    await told.tell("web", words)
    await told.becomes("web", "starting")
    view = await told.becomes("web", "running")
    assert view.boots == 2


@pytest.mark.parametrize(("words", "policy"), [("poweroff", "on_poweroff"), ("crash it", "on_crash")])
async def test_policy_destroy(told: ToldHost, words: str, policy: str) -> None:
    await told.running("web", **{policy: "destroy"})
    with told.host.events.subscribe() as events:
        await told.tell("web", words)
        while (await events.receive()).type != "vm.destroyed":
            pass
    assert told.host.views() == [] and told.definitions() == set()


async def test_a_guest_s_own_reset_is_a_new_boot(told: ToldHost) -> None:
    await told.running("web")
    await told.tell("web", "reset")
    await told.becomes("web", "starting")
    assert (await told.becomes("web", "running")).boots == 2


async def test_a_guest_that_keeps_crashing_is_restarted_ever_more_slowly(told: ToldHost) -> None:
    await told.running("web", on_crash="restart")
    await told.tell("web", "crash at once")
    await told.becomes("web", "starting")
    await told.becomes("web", "running")
    await told.tell("web", "crash at once")
    view = await told.becomes("web", "crashed")
    assert (view.crashes, view.boots) == (2, 2)
    # the next start is due in a second: a user need not wait for it, and can call it off
    await told.stop("web")
    assert told.host.get("web").state == "crashed"
    await told.host.start("web").outcome()
    assert told.host.get("web").boots == 3


async def test_a_user_s_stop_is_not_undone_by_a_policy(told: ToldHost) -> None:
    await told.running("web", on_poweroff="restart", on_crash="restart")
    await told.stop("web")
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert (told.host.get("web").state, told.host.get("web").boots) == ("halted", 1)


async def test_a_start_without_memory_leaves_a_defined_vm(
        told: ToldHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostd.memory.ROOM_S", 0.5)
    for name in "a", "b":
        await told.create(name, memory=30 << 20)
    frames = told.host._memory.books.lend(1, told.host.overview.frames().free - 3)
    with pytest.raises(Failed, match="not enough machine memory"):
        await told.host.start("a").outcome()
    view = told.host.get("a")
    assert view.state == "defined" and view.reason.startswith("not started: not enough machine memory")
    assert frames


async def test_a_start_that_is_given_up_leaves_a_defined_vm(
        told: ToldHost, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never() -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(told.host._workers, "wait_ready", never)
    await told.create("web")
    start = told.host.start("web")
    with trio.fail_after(20):
        while start.view().phase != "waiting for a worker":
            await trio.sleep(0.01)
    told.host.operations.cancel(start.id)
    await start.wait()
    assert start.view().status == "cancelled"
    assert (told.host.get("web").state, told.host.overview.frames().private) == ("defined", 0)


async def test_stop_calls_off_a_start(told: ToldHost, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never() -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(told.host._workers, "wait_ready", never)
    await told.create("web")
    start = told.host.start("web")
    await told.becomes("web", "starting")
    await told.stop("web")
    with pytest.raises(Conflict, match="the start of VM web was given up"):
        await start.outcome()
    assert told.host.get("web").state == "defined"


# --- waiting ---------------------------------------------------------------------------------------------


async def test_waiting_for_what_does_not_come(told: ToldHost) -> None:
    await told.running("web")
    with pytest.raises(TimedOut, match=r"VM web did not become halted within 0\.01 seconds; it is running"):
        await told.host.wait("web", state="halted", timeout=0.01)
    with pytest.raises(TimedOut, match="did not print"):
        await told.host.wait("web", console="login:", timeout=0.01)


async def test_waiting_for_what_cannot_come_any_more(told: ToldHost) -> None:
    await told.running("web")
    async with trio.open_nursery() as nursery:
        for wanted in {"console": "login:"}, {"state": "halted"}:
            nursery.start_soon(expect_conflict, told, wanted)
        await trio.testing.wait_all_tasks_blocked()
        await told.tell("web", "crash for a test")


async def expect_conflict(told: ToldHost, wanted: dict[str, Any]) -> None:
    with pytest.raises(Conflict, match="crashed"):
        await told.host.wait("web", **wanted)


async def test_a_wait_ends_with_its_vm(told: ToldHost) -> None:
    await told.create("web")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect_gone, told, {"console": "login:"})
        nursery.start_soon(expect_gone, told, {"state": "running"})
        await trio.testing.wait_all_tasks_blocked()
        await told.host.destroy("web").outcome()


async def expect_gone(told: ToldHost, wanted: dict[str, Any]) -> None:
    with pytest.raises(NotFound, match="VM web was destroyed"):
        await told.host.wait("web", **wanted)


async def test_what_was_printed_before_the_present_boot_does_not_count(told: ToldHost) -> None:
    await told.running("web")
    await told.tell("web", "login:")
    await told.prints("web", "login:")
    await told.host.reset("web").outcome()
    with pytest.raises(TimedOut):
        await told.host.wait("web", console="login:", timeout=0.01)
    assert b"login:" in told.host.console("web").scrollback()


@pytest.mark.parametrize(("wanted", "sentence"), [
    ({"console": "("}, "not a regular expression"),
    ({"console": "x" * 2000}, "may have 1024 characters"),
    ({"state": "happy"}, "'happy' is none of defined, starting"),
])
async def test_waits_that_make_no_sense(told: ToldHost, wanted: dict[str, str], sentence: str) -> None:
    await told.create("web")
    with pytest.raises(Invalid, match=sentence):
        await told.host.wait("web", **wanted)


async def test_a_wait_that_would_keep_the_daemon_from_its_work(told: ToldHost) -> None:
    await told.running("web")
    await told.tell("web", "a" * 60)
    with pytest.raises(Invalid, match="takes too long to match"):
        await told.host.wait("web", console="(a+)+b")


# --- the end of the host ---------------------------------------------------------------------------------


async def test_shutting_down_stops_guests_by_the_power_button_and_then_by_force(told: ToldHost) -> None:
    await told.running("polite", on_poweroff="restart")
    await told.running("stubborn", on_crash="restart")
    await told.tell("stubborn", "stubborn")
    await told.prints("stubborn", "stubborn")
    await told.running("still")
    await told.host.pause("still").outcome()
    told.host.config = with_shutdown_timeout(told, 0.2)
    await told.host.shut_down()
    reasons = {view.name: (view.state, view.reason) for view in told.host.views()}
    assert reasons == {"polite": ("halted", "powered off"), "stubborn": ("halted", "power cut"),
                       "still": ("halted", "power cut")}
    with pytest.raises(Conflict, match="the host is shutting down"):
        told.host.start("polite")


def with_shutdown_timeout(told: ToldHost, seconds: float) -> Any:
    config = told.host.config
    section = msgspec.structs.replace(config.host, shutdown_timeout=seconds)
    return msgspec.structs.replace(config, host=section)


async def test_the_inventory_survives(told: ToldHost, nursery: trio.Nursery, tmp_path: Path) -> None:
    await told.running("web", weight=7, on_crash="restart")
    await told.stop("web")
    told.host.close()
    heir = Host(told.host.config, nursery)
    view = heir.get("web")
    assert (view.state, view.weight, view.on_crash) == ("defined", 7, "restart")
    told.host._inventory = heir._inventory
