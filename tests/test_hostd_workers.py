# SPDX-License-Identifier: GPL-2.0-or-later
"""Workers that die, hang, refuse and break the protocol, and what becomes of their guests."""

from __future__ import annotations

import os
import signal

import pytest
import trio
import trio.testing

from hostd import workers
from hostd.errors import Failed
from hostd.scheduler import LATENCY_BOUNDS_NS
from tests.told_host import SOON, ToldHost


async def test_a_paused_guest_survives_all_workers(told: ToldHost) -> None:
    await told.running("web")
    await told.tell("web", "hello")
    await told.host.pause("web").outcome()
    for pid in await told.ready_workers():
        os.kill(pid, signal.SIGKILL)
    await told.host.resume("web").outcome()
    await told.tell("web", "state")
    await told.prints("web", "typed:hello")


async def test_a_worker_that_dies_does_not_hold_up_the_check(told: ToldHost,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    pids = await told.ready_workers()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    monkeypatch.setattr(told.host.overview, "check_memory", lambda: ["frame 1 is odd"])
    with trio.fail_after(SOON):
        assert (await told.host.overview.checked_memory()).wrong == ["frame 1 is odd"]
    monkeypatch.undo()


async def test_a_refused_guest_is_crashed_with_the_worker_s_reason(told: ToldHost) -> None:
    await told.running("web")
    await told.host.pause("web").outcome()
    told.host._guests.vms["web"].parked = b"refuse"
    with pytest.raises(Failed, match="it does not look well"):
        await told.host.resume("web").outcome()
    assert (told.host.get("web").state, told.host.get("web").reason) == ("crashed", "it does not look well")


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
    assert [worker.restarts for worker in told.host.overview.workers()] == [1, 0]
    assert told.host.overview.check_memory() == []
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
        while told.host.overview.latency() != ([2, 4] + [0] * (len(LATENCY_BOUNDS_NS) - 1), 6e-6):
            await trio.sleep(0.05)


async def test_what_a_worker_is_asked_after_it_was_told_to_quit_fails(told: ToldHost) -> None:
    """Nobody waits for an answer that will not come: a host that goes down would not end."""
    await told.ready_workers()
    await told.running("web")
    told.host._workers.quit()
    pause = told.host.pause("web")
    with trio.fail_after(SOON), pytest.raises(Failed, match="VM web was lost"):
        await pause.outcome()
