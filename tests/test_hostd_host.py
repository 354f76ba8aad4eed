# SPDX-License-Identifier: GPL-2.0-or-later
"""The host with guests that do what they are told: lives, policies, dying workers, clones, bad requests."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from hostd import workers
from hostd.errors import Conflict, Failed, HostError, Invalid, NotFound, TimedOut
from hostd.host import Host
from hostd.model import MIN_MEMORY, ImageSpec, StopRequest, VmPatch
from hostd.scheduler import LATENCY_BOUNDS_NS
from tests.told_host import MEMORY, SOON, ToldHost


def definitions(told: ToldHost) -> set[str]:
    return {path.name for path in (told.host.config.state_dir / "vms").iterdir()}


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
    assert host.views() == [] and definitions(told) == set()


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
    assert told.host.frames().private == 0


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


async def test_a_paused_guest_survives_all_workers(told: ToldHost) -> None:
    await told.running("web")
    await told.tell("web", "hello")
    await told.host.pause("web").outcome()
    for pid in await told.ready_workers():
        os.kill(pid, signal.SIGKILL)
    await told.host.resume("web").outcome()
    await told.tell("web", "state")
    await told.prints("web", "typed:hello")


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


@pytest.mark.parametrize(("patch", "sentence"), [
    (VmPatch(reservation=MEMORY + 4096), r"the reservation of .* is more than the limit of 2 MiB"),
    (VmPatch(limit=2 * MEMORY), "the limit of 4 MiB is not above 0 and at most the VM's memory of 2 MiB"),
    (VmPatch(limit=MIN_MEMORY, reservation=MEMORY), "is more than the limit of 1 MiB"),
    (VmPatch(reservation=1000), "reservation of 1000 bytes is not a whole number of 4 KiB pages"),
    (VmPatch(memory=MEMORY + 1), "memory of 2097153 bytes is not a whole number of 4 KiB pages"),
    (VmPatch(memory=64 << 20), "memory of 64 MiB is more than the host's pool of 64 MiB holds"),
    (VmPatch(memory=MIN_MEMORY), r"the kernel needs memory .* and the machine has only 1 MiB"),
])
async def test_settings_that_cannot_be_change_nothing(told: ToldHost, patch: VmPatch, sentence: str) -> None:
    await told.create("web")
    before = told.host.get("web")
    with pytest.raises(Invalid, match=sentence):
        await told.host.update("web", patch)
    assert told.host.get("web") == before


async def test_the_host_promises_no_more_than_it_may(told: ToldHost) -> None:
    """A pool of 64 MiB, of which VMs may have twice as much between them."""
    await told.create("large", memory=60 << 20, reservation=50 << 20)
    with pytest.raises(Conflict, match="VM other is not admitted: a reservation of 20 MiB with"):
        await told.create("other", memory=60 << 20, reservation=20 << 20)
    await told.create("other", memory=60 << 20)
    with pytest.raises(Conflict, match="than the 128 MiB that an overcommit ratio of 2 allows"):
        await told.create("third", memory=9 << 20)
    await told.create("third", memory=2 << 20)
    with pytest.raises(Conflict, match="VM third is not admitted"):
        await told.host.update("third", VmPatch(memory=9 << 20))
    with pytest.raises(Conflict, match="VM other is not admitted"):
        await told.host.update("other", VmPatch(reservation=20 << 20))
    await told.host.update("large", VmPatch(reservation=0))
    await told.host.update("other", VmPatch(reservation=20 << 20))
    assert definitions(told) == {"large.json", "other.json", "third.json"}


async def test_what_is_in_the_making_counts(told: ToldHost) -> None:
    """Of two requests at once that fit one at a time, one is refused."""
    kernel = await told.blob()
    outcomes: list[str] = []

    async def attempt(name: str) -> None:
        try:
            await told.create(name, kernel=kernel, memory=40 << 20, reservation=40 << 20)
            outcomes.append("made")
        except Conflict:
            outcomes.append("refused")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt, "one")
        nursery.start_soon(attempt, "two")
    assert sorted(outcomes) == ["made", "refused"]
    assert len(definitions(told)) == 1


async def test_a_lower_ratio_leaves_what_there_is(told: ToldHost) -> None:
    await told.create("web", memory=60 << 20)
    memory = msgspec.structs.replace(told.host.config.memory, overcommit_ratio=0.5)
    told.host.reload(msgspec.structs.replace(told.host.config, memory=memory))
    assert (await told.host.update("web", VmPatch(weight=7, memory=40 << 20))).memory == 40 << 20
    with pytest.raises(Conflict, match=r"an overcommit ratio of 0\.5 allows"):
        await told.create("other")


async def test_clones_have_reservations_of_their_own(told: ToldHost) -> None:
    await told.running("web", memory=20 << 20, reservation=16 << 20)
    with pytest.raises(Conflict, match=r"VM four is not admitted: a reservation of 16 MiB"):
        await told.clone("web", "two", "three", "four")
    await told.clone("web", "two", "three")
    assert told.host.get("three").reservation == 16 << 20


async def test_machine_memory_adds_up_and_is_right(told: ToldHost) -> None:
    await told.running("web")
    await told.clone("web", "twin")
    memory = await told.host.checked_memory()
    assert memory.pool == 64 << 20 == (
        memory.free + memory.lent + memory.private + memory.shared + memory.overhead)
    assert memory.wrong == []
    assert memory.saved == memory.shared > 0            # two have what is there once
    assert (memory.state, memory.waiting, memory.swap.limit) == ("high", 0, 4 << 30)


async def test_only_what_stays_wrong_is_wrong(told: ToldHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """What workers had on their tongues while the books were checked is not."""
    await told.ready_workers()
    said = [["frame 1 is odd", "frame 2 is odd"], ["frame 2 is odd", "frame 3 is odd"]]
    monkeypatch.setattr(told.host, "check_memory", lambda: said.pop(0))
    assert (await told.host.checked_memory()).wrong == ["frame 2 is odd"]
    assert said == []
    monkeypatch.undo()


async def test_a_worker_that_dies_does_not_hold_up_the_check(told: ToldHost,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    pids = await told.ready_workers()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    monkeypatch.setattr(told.host, "check_memory", lambda: ["frame 1 is odd"])
    with trio.fail_after(SOON):
        assert (await told.host.checked_memory()).wrong == ["frame 1 is odd"]
    monkeypatch.undo()


async def test_a_refused_guest_is_crashed_with_the_worker_s_reason(told: ToldHost) -> None:
    await told.running("web")
    await told.host.pause("web").outcome()
    told.host._guests.vms["web"].parked = b"refuse"
    with pytest.raises(Failed, match="it does not look well"):
        await told.host.resume("web").outcome()
    assert (told.host.get("web").state, told.host.get("web").reason) == ("crashed", "it does not look well")


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
    assert told.host.views() == [] and definitions(told) == set()


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


# --- workers ---------------------------------------------------------------------------------------------


async def test_a_dead_worker_takes_only_its_own_guests_and_is_replaced(told: ToldHost) -> None:
    pids = await told.ready_workers()
    for number in range(4):
        await told.running(f"vm{number}")
    homes = {view.name: view.worker for view in told.host.views()}
    assert sorted(homes.values()) == [0, 0, 1, 1]
    os.kill(pids[0], signal.SIGKILL)
    for name, worker in homes.items():
        if worker == 0:
            view = await told.becomes(name, "crashed")
            assert view.reason == "worker 0 died: killed by SIGKILL"
    assert {view.state for view in told.host.views() if homes[view.name] == 1} == {"running"}
    replaced = await told.ready_workers()
    assert replaced[0] != pids[0] and replaced[1] == pids[1]
    assert [worker.restarts for worker in told.host.workers()] == [1, 0]
    assert told.host.check_memory() == []
    await told.host.start("vm0").outcome()


async def test_guests_of_a_dead_worker_are_restarted_by_policy(told: ToldHost) -> None:
    await told.running("web", on_crash="restart")
    await told.tell("web", "die")
    await told.becomes("web", "crashed")
    assert (await told.becomes("web", "running")).boots == 2


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are taken for dead after a second and a half."""
    monkeypatch.setattr(workers, "HANG_S", 1.5)
    monkeypatch.setattr(workers, "HEARTBEAT_S", 0.05)


async def test_a_worker_that_hangs_is_replaced(impatient: None, told: ToldHost) -> None:
    pids = await told.ready_workers()
    await told.running("web", on_crash="restart")
    os.kill(pids[told.host.get("web").worker or 0], signal.SIGSTOP)
    await told.becomes("web", "crashed")
    await told.becomes("web", "running")


async def test_a_worker_that_breaks_the_protocol_is_replaced(told: ToldHost) -> None:
    await told.running("web")
    await told.tell("web", "nonsense")
    await told.becomes("web", "crashed")
    await told.ready_workers()


async def test_whoever_waits_for_a_worker_that_dies_is_told(told: ToldHost) -> None:
    pids = await told.ready_workers()
    await told.running("web")
    os.kill(pids[told.host.get("web").worker or 0], signal.SIGSTOP)
    pause = told.host.pause("web")
    await trio.testing.wait_all_tasks_blocked(0.01)
    os.kill(pids[told.host.get("web").worker or 0], signal.SIGKILL)
    with pytest.raises(Failed, match=r"VM web was lost: worker \d died: killed by SIGKILL"):
        await pause.outcome()


async def test_a_guest_moves_with_its_state(told: ToldHost) -> None:
    await told.ready_workers()
    await told.running("web")
    await told.tell("web", "hello ")
    vm = told.host._guests.vms["web"]
    target = next(worker for worker in told.host._workers.ready if worker is not vm.worker)
    await told.host._guests.move(vm, target)
    assert told.host.get("web").worker == target.index
    await told.tell("web", "state")
    await told.prints("web", "typed:hello state")


async def test_wake_up_latencies_are_added_up(told: ToldHost) -> None:
    await told.ready_workers()
    with trio.fail_after(20):
        while told.host.latency() != ([2, 4] + [0] * (len(LATENCY_BOUNDS_NS) - 1), 6e-6):
            await trio.sleep(0.05)


# --- clones ----------------------------------------------------------------------------------------------


async def test_clones_of_a_paused_vm_have_its_state_and_share_its_memory(told: ToldHost) -> None:
    await told.ready_workers()
    await told.running("template")
    await told.tell("template", "hello ")
    await told.host.pause("template").outcome()
    await told.clone("template", "a", "b", "c")
    assert told.host.get("template").state == "paused"
    for name in "a", "b", "c":
        view = told.host.get(name)
        assert (view.state, view.template, view.boots) == ("running", "template", 1)
        assert view.memory_usage.private == 0 and view.memory_usage.shared > 0
        await told.tell(name, "state")
        await told.prints(name, "typed:hello state")
        assert b"hello \n" not in told.host.console(name).scrollback()
    assert {told.host.get(name).worker for name in "abc"} == {0, 1}
    assert definitions(told) == {"template.json", "a.json", "b.json", "c.json"}


async def test_a_running_vm_goes_on_after_it_was_cloned(told: ToldHost) -> None:
    await told.running("template")
    await told.clone("template", "copy", start=False)
    assert told.host.get("template").state == "running"
    assert told.host.get("copy").state == "paused"
    await told.host.resume("copy").outcome()
    await told.tell("copy", "state")
    await told.prints("copy", "typed:")


async def test_a_vm_on_the_move_is_cloned_when_it_has_arrived(told: ToldHost) -> None:
    await told.ready_workers()
    await told.running("template")
    vm = told.host._guests.vms["template"]
    target = next(worker for worker in told.host._workers.ready if worker is not vm.worker)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(told.host._guests.move, vm, target)
        while vm.state == "running":
            await trio.lowlevel.checkpoint()
        assert vm.state == "migrating"
        await told.clone("template", "copy", start=False)
    assert vm.state == "running"
    assert told.host.get("copy").state == "paused"


async def test_a_clone_starts_anew_from_its_template_s_kernel(told: ToldHost) -> None:
    await told.running("template")
    await told.clone("template", "copy")
    await told.stop("copy")
    await told.host.destroy("template", force=True).outcome()
    await told.host.start("copy").outcome()
    assert told.host.get("copy").memory_usage.shared == 0


async def test_clones_are_made_all_or_none(told: ToldHost, monkeypatch: pytest.MonkeyPatch) -> None:
    await told.running("template")
    before = told.host.frames()
    real, left = told.host._memory.books.clone, [2]

    def clone(block: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Failed("not enough machine memory: none")
        return real(block)

    monkeypatch.setattr(told.host._memory.books, "clone", clone)
    with pytest.raises(Failed, match="not enough machine memory"):
        await told.clone("template", "a", "b", "c")
    assert [view.name for view in told.host.views()] == ["template"]
    assert definitions(told) == {"template.json"}
    assert told.host.frames().overhead == before.overhead
    assert told.host.get("template").state == "running"
    monkeypatch.undo()
    await told.clone("template", "a")


async def test_names_of_clones_are_checked(told: ToldHost) -> None:
    await told.running("template")
    await told.create("taken")
    with pytest.raises(Conflict, match="VM taken exists already"):
        await told.clone("template", "fresh", "taken")
    with pytest.raises(Invalid, match="given twice"):
        await told.clone("template", "fresh", "fresh")
    with pytest.raises(Conflict, match="must be paused or running"):
        await told.clone("taken", "fresh")


# --- bad requests ----------------------------------------------------------------------------------------


async def test_bad_definitions_leave_nothing(told: ToldHost) -> None:
    await told.create("web")
    kernel = await told.blob()
    bad: list[tuple[dict[str, Any], type[HostError], str]] = [
        ({"name": "web"}, Conflict, "VM web exists already"),
        ({"kernel": None}, Invalid, "needs an image or a kernel"),
        ({"kernel": kernel, "image": "debian"}, Invalid, "and not both"),
        ({"image": "debian"}, NotFound, "no image debian"),
        ({"image": "debian", "initrd": kernel}, Invalid, "an image has its own"),
        ({"kernel": "0" * 64}, NotFound, "no blob 0000.* for the kernel: upload it first"),
        ({"kernel": kernel, "initrd": "0" * 64}, NotFound, "for the initrd"),
        ({"memory": 1 << 30}, Invalid, "memory of 1024 MiB is more than the host's pool of 64 MiB"),
        ({"memory": (1 << 20) + 1}, Invalid, "not a whole number of 4 KiB pages"),
        ({"kernel": kernel, "initrd": await told.blob(bytes(range(256)) * 8192)}, Invalid, "initrd"),
    ]
    for fields, kind, sentence in bad:
        with pytest.raises(kind, match=sentence) as failure:
            await told.create(**{"name": "new", **fields})
        assert "\n" not in str(failure.value)
    assert [view.name for view in told.host.views()] == ["web"]
    assert definitions(told) == {"web.json"}


async def test_a_kernel_that_is_none_is_not_kept(told: ToldHost) -> None:
    with pytest.raises(Invalid, match="no kind known here"):
        await told.create("web", kernel=await told.blob(b"not a kernel"))
    assert list((told.host.config.state_dir / "blobs").iterdir()) == []


async def test_an_image_in_use_stays(told: ToldHost) -> None:
    await told.host.add_image(ImageSpec(name="idle", kernel=await told.blob()))
    await told.running("web", image="idle")
    with pytest.raises(Conflict, match="image idle is used by VM web"):
        await told.host.remove_image("idle")
    await told.host.destroy("web", force=True).outcome()
    await told.host.remove_image("idle")
    assert told.host.list_images() == []


async def test_a_start_without_memory_leaves_a_defined_vm(
        told: ToldHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostd.memory.ROOM_S", 0.5)
    for name in "a", "b":
        await told.create(name, memory=30 << 20)
    frames = told.host._memory.books.lend(1, told.host.frames().free - 3)
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
    assert (told.host.get("web").state, told.host.frames().private) == ("defined", 0)


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
