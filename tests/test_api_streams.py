# SPDX-License-Identifier: GPL-2.0-or-later
"""Answers that go on (events, a followed console, waiting), and what becomes of them without a client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import trio

from hostd.lifecycle import State
from hostd.model import VmCreate
from tests.memory_host import Guest
from tests.served_host import ServedHost, served_host


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedHost]:
    with served_host(tmp_path) as served:
        served.host.guests["a"] = Guest(VmCreate(name="a"), State.RUNNING)
        yield served


def http(served: ServedHost) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(served.socket)), base_url="http://hostd")


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        pass


def test_events_arrive_as_lines_once_the_headers_have(served: ServedHost) -> None:
    with http(served) as client, client.stream("GET", "/events") as answer:
        assert answer.headers["content-type"] == "application/x-ndjson"
        served.do(served.host.pause, "a")
        lines = answer.iter_lines()
        types = [json.loads(next(lines))["type"] for _ in range(3)]
    assert sorted(types) == ["operation", "operation", "vm.state"]


def test_a_followed_log_goes_on_with_what_is_written(served: ServedHost) -> None:
    console = served.host.guests["a"].console
    served.do(console.write, b"before ")
    with http(served) as client, client.stream("GET", "/vms/a/log?follow=true") as answer:
        chunks = answer.iter_bytes()
        seen = next(chunks)
        served.do(console.write, b"after")
        served.do(console.close)
        seen += b"".join(chunks)
    assert seen == b"before after"


def test_who_hangs_up_is_no_reader_any_more(served: ServedHost) -> None:
    console = served.host.guests["a"].console
    with http(served) as client:
        with client.stream("GET", "/vms/a/log?follow=true"), client.stream("GET", "/events"):
            assert console._readers
            assert served.host.events._readers
        until(lambda: not console._readers and not served.host.events._readers)


def test_waiting_ends_when_the_client_hangs_up(served: ServedHost) -> None:
    waiting: list[str] = []

    async def wait(name: str, **what: object) -> None:
        waiting.append("begun")
        try:
            await trio.sleep_forever()
        finally:
            waiting.append("ended")

    served.host.wait = wait  # type: ignore[assignment, method-assign]
    with http(served) as client, pytest.raises(httpx.ReadTimeout):
        client.get("/vms/a/wait?state=halted", timeout=0.3)
    until(lambda: waiting == ["begun", "ended"])
