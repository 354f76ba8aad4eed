# SPDX-License-Identifier: GPL-2.0-or-later
"""Clones on the host: state, memory, names, and that all are made or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from hostd.errors import Conflict, Failed, Invalid
from hostd.model import CloneRequest, StopRequest
from hostd.operations import Operation
from tests.told_host import ToldHost


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
    assert told.definitions() == {"template.json", "a.json", "b.json", "c.json"}


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
    before = told.host.overview.frames()
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
    assert told.definitions() == {"template.json"}
    assert told.host.overview.frames().overhead == before.overhead
    assert told.host.get("template").state == "running"
    monkeypatch.undo()
    await told.clone("template", "a")


def at_the_start(monkeypatch: pytest.MonkeyPatch, act: Callable[[Operation], object]) -> None:
    """Do something when the clones are there, and none has had its turn."""
    real = Operation.step

    def step(operation: Operation, phase: str, progress: float) -> None:
        real(operation, phase, progress)
        if operation.kind == "clone" and phase == "starting":
            act(operation)

    monkeypatch.setattr(Operation, "step", step)


async def test_clones_that_are_called_off_while_they_start_are_not_made(
        told: ToldHost, monkeypatch: pytest.MonkeyPatch) -> None:
    await told.running("template")
    at_the_start(monkeypatch, lambda operation: told.host.operations.cancel(operation.id))
    clone = told.host.clone("template", CloneRequest(names=["a", "b", "c"], start=True))
    await clone.wait()
    assert clone.status == "cancelled"
    assert [(view.name, view.state) for view in told.host.views()] == [("template", "running")]
    assert told.definitions() == {"template.json"}
    await told.host.destroy("template", force=True).outcome()
    assert told.host.overview.frames().overhead == 1 and told.host.overview.frames().shared == 0


async def test_clones_that_no_worker_takes_are_paused(told: ToldHost,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    async def none() -> None:
        raise Failed("no worker process is ready")

    await told.running("template")
    await told.host.pause("template").outcome()
    monkeypatch.setattr(told.host._workers, "wait_ready", none)
    with pytest.raises(Failed, match="no worker process is ready"):
        await told.clone("template", "a", "b")
    monkeypatch.undo()
    for name in "a", "b":
        view = told.host.get(name)
        assert (view.state, view.reason) == ("paused", "no worker process is ready")
        await told.host.resume(name).outcome()


async def test_a_clone_whose_turn_has_not_come_can_be_stopped_but_not_started(
        told: ToldHost, monkeypatch: pytest.MonkeyPatch) -> None:
    stopping = []

    def act(operation: Operation) -> None:
        with pytest.raises(Conflict, match="VM a is starting: start is not possible now"):
            told.host.start("a")
        stopping.append(told.host.stop("b", StopRequest(force=True)))

    await told.running("template")
    at_the_start(monkeypatch, act)
    await told.clone("template", "a", "b")
    await stopping[0].outcome()
    assert (told.host.get("a").state, told.host.get("b").state) == ("running", "halted")


async def test_names_of_clones_are_checked(told: ToldHost) -> None:
    await told.running("template")
    await told.create("taken")
    with pytest.raises(Conflict, match="VM taken exists already"):
        await told.clone("template", "fresh", "taken")
    with pytest.raises(Invalid, match="given twice"):
        await told.clone("template", "fresh", "fresh")
    with pytest.raises(Conflict, match="must be paused or running"):
        await told.clone("taken", "fresh")
