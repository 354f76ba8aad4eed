# SPDX-License-Identifier: GPL-2.0-or-later
"""Consoles, events and operations: what readers get, and what slow readers lose."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from hostd import console as console_module
from hostd import events as events_module
from hostd import operations as operations_module
from hostd.console import SCROLLBACK, Console
from hostd.errors import Conflict, HostError, NotFound
from hostd.events import Events
from hostd.operations import Operation, Operations


def test_the_scrollback_is_bounded_and_keeps_the_end() -> None:
    console = Console()
    for number in range(20_000):
        console.write(b"%07d\n" % number)
    text = console.scrollback()
    assert len(text) == SCROLLBACK and text.endswith(b"0019999\n")
    assert console.written == 160_000


def test_scrollback_since_a_position() -> None:
    console = Console()
    console.write(b"first boot\n")
    console.mark_boot()
    console.write(b"second boot\n")
    assert console.scrollback(console.boot) == b"second boot\n"
    assert console.scrollback(10**9) == b""


async def test_a_reader_gets_everything_from_its_beginning_to_the_end() -> None:
    console = Console()
    console.write(b"before")
    with console.listen() as reader:
        assert console.scrollback() == b"before"
        console.write(b"after ")
        console.write(b"that")
        assert await reader.receive() == b"after that"
        console.write(b".")
        console.close()
        assert [data async for data in reader] == [b"."]


async def test_a_slow_reader_loses_the_oldest_bytes_and_no_other_does(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "BACKLOG", 10)
    console = Console()
    with console.listen() as slow, console.listen() as quick:
        for _ in range(5):
            console.write(b"12345")
            assert await quick.receive() == b"12345"
        assert (await slow.receive(), slow.lost) == (b"1234512345", 15)
        assert quick.lost == 0


async def test_events_come_in_order() -> None:
    events = Events()
    with events.subscribe() as reader:
        events.publish("vm.state", "a", state="running")
        events.publish("operation", id="1")
        events.close()
        received = [event async for event in reader]
    assert [(event.type, event.vm) for event in received] == [("vm.state", "a"), ("operation", None)]
    assert received[0].data == {"state": "running"}


async def test_a_slow_reader_is_told_how_many_events_it_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "QUEUE", 3)
    events = Events()
    with events.subscribe() as reader:
        for number in range(10):
            events.publish("worker", index=number)
        lost = await reader.receive()
        assert (lost.type, lost.data) == ("lost", {"count": 7})
        assert (await reader.receive()).data == {"index": 7}


async def test_an_operation_is_followed_to_its_result(nursery: trio.Nursery) -> None:
    operations = Operations(nursery, Events())
    gate = trio.Event()

    async def work(operation: Operation) -> list[str]:
        operation.step("working", 0.5)
        await gate.wait()
        return ["done"]

    operation = operations.start("clone", "vm", work)
    assert not await operation.wait(timeout=0)
    await trio.testing.wait_all_tasks_blocked()
    view = operation.view()
    assert (view.status, view.progress, view.phase) == ("running", 0.5, "working")
    gate.set()
    assert await operation.wait()
    view = operations.get(operation.id).view()
    assert (view.status, view.progress, view.result, view.error) == ("done", 1.0, ["done"], None)


async def test_an_operation_fails_with_its_sentence(nursery: trio.Nursery) -> None:
    async def work(operation: Operation) -> None:
        raise Conflict("not now")

    operation = Operations(nursery, Events()).start("start", "vm", work)
    with pytest.raises(Conflict, match="not now"):
        await operation.outcome()
    assert (operation.view().status, operation.view().error) == ("failed", "not now")


async def test_a_bug_in_an_operation_ends_only_the_operation(nursery: trio.Nursery) -> None:
    async def work(operation: Operation) -> None:
        raise ZeroDivisionError("oops")

    operation = Operations(nursery, Events()).start("start", "vm", work)
    with pytest.raises(HostError, match="internal error: ZeroDivisionError: oops"):
        await operation.outcome()


async def test_an_operation_is_cancelled(nursery: trio.Nursery) -> None:
    operations = Operations(nursery, Events())
    undone = []

    async def work(operation: Operation) -> None:
        try:
            await trio.sleep_forever()
        finally:
            undone.append(True)

    operation = operations.start("start", "vm", work)
    await trio.testing.wait_all_tasks_blocked()
    operations.cancel(operation.id)
    await operation.wait()
    assert (operation.view().status, undone) == ("cancelled", [True])


async def test_the_history_is_bounded_but_running_operations_stay(
        nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations_module, "HISTORY", 5)
    operations = Operations(nursery, Events())

    async def forever(operation: Operation) -> None:
        await trio.sleep_forever()

    async def nothing(operation: Operation) -> None:
        pass

    running = operations.start("start", "long", forever)
    first = operations.start("start", "short", nothing)
    for _ in range(10):
        await operations.start("start", "short", nothing).wait()
    assert operations.get(running.id) is running
    assert len(operations.list()) == 5
    with pytest.raises(NotFound, match="no operation"):
        operations.get(first.id)
    operations.cancel(running.id)
