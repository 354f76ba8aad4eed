# SPDX-License-Identifier: GPL-2.0-or-later
"""The API over a host in memory: what is asked is done, what is wrong is refused with a sentence."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import trio

from hostd.api import make_app
from hostd.lifecycle import State
from tests.memory_host import MemoryHost


class Api:
    """A client of a fresh application."""

    def __init__(self, host: MemoryHost, http: httpx.AsyncClient) -> None:
        self.host = host
        self.http = http

    async def __call__(self, method: str, path: str, body: Any = None, *, status: int = 200) -> Any:
        answer = await self.http.request(method, path, json=body)
        assert answer.status_code == status, answer.text
        return answer.json() if answer.content else None

    async def refused(self, method: str, path: str, body: Any = None, *, status: int) -> str:
        error = await self(method, path, body, status=status)
        assert set(error) == {"error"}
        return str(error["error"])

    async def done(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """Start an operation and wait for its end."""
        operation = await self(method, path, body, status=202)
        ended: dict[str, Any] = await self("GET", f"/operations/{operation['id']}?wait=5")
        assert ended["status"] == "done"
        return ended


@asynccontextmanager
async def serving() -> AsyncIterator[Api]:
    async with trio.open_nursery() as nursery:
        host = MemoryHost(nursery)
        transport = httpx.ASGITransport(make_app(host))
        async with httpx.AsyncClient(transport=transport, base_url="http://hostd") as http:
            yield Api(host, http)
        nursery.cancel_scope.cancel()


async def test_a_vm_is_defined_changed_run_cloned_and_destroyed() -> None:
    async with serving() as api:
        made = await api("POST", "/vms", {"name": "one", "memory": 64 << 20}, status=201)
        assert (made["name"], made["state"], made["memory"]) == ("one", "defined", 64 << 20)
        assert (await api("PATCH", "/vms/one", {"weight": 300}))["weight"] == 300
        await api.done("POST", "/vms/one/start")
        await api.done("POST", "/vms/one/pause")
        await api.done("POST", "/vms/one/clone", {"names": ["two", "three"], "start": True})
        states = {vm["name"]: (vm["state"], vm["template"]) for vm in await api("GET", "/vms")}
        assert states == {"one": ("paused", None), "two": ("running", "one"), "three": ("running", "one")}
        assert "running" in await api.refused("DELETE", "/vms/two", status=409)
        await api.done("DELETE", "/vms/two?force=true")
        await api.refused("GET", "/vms/two", status=404)


async def test_new_things_say_where_they_are() -> None:
    async with serving() as api:
        created = await api.http.post("/vms", json={"name": "a"})
        assert created.headers["location"] == "/vms/a"
        started = await api.http.post("/vms/a/start")
        assert started.headers["location"] == f"/operations/{started.json()['id']}"


async def test_an_operation_can_be_listed_and_cancelled() -> None:
    async with serving() as api:
        operation = api.host.operations.start("sleep", "a", lambda operation: trio.sleep_forever())
        assert [row["id"] for row in await api("GET", "/operations")] == [operation.id]
        assert (await api("GET", f"/operations/{operation.id}?wait=0"))["status"] == "running"
        await api("DELETE", f"/operations/{operation.id}")
        assert (await api("GET", f"/operations/{operation.id}?wait=5"))["status"] == "cancelled"
        assert "no operation" in await api.refused("GET", "/operations/none", status=404)


async def test_images_are_made_of_uploads() -> None:
    async with serving() as api:
        blob = (await api.http.put("/blobs", content=b"kernel")).json()
        assert blob["size"] == 6
        image = {"name": "tiny", "kernel": blob["sha256"], "append": "quiet"}
        await api("POST", "/images", image, status=201)
        assert [image["name"] for image in await api("GET", "/images")] == ["tiny"]
        await api("DELETE", "/images/tiny", status=204)
        await api.refused("DELETE", "/images/tiny", status=404)
        await api.refused("POST", "/images", {"name": "tiny", "kernel": "0" * 64}, status=404)


async def test_what_is_typed_appears_in_the_log() -> None:
    async with serving() as api:
        await api("POST", "/vms", {"name": "a", "start": True}, status=201)
        assert (await api.http.post("/vms/a/input", content=b"hello\xff")).status_code == 204
        assert (await api.http.get("/vms/a/log")).content == b"hello\xff"
        assert (await api.http.get("/vms/a/log?since=3")).content == b"lo\xff"
        await api("GET", "/vms/a/wait?console=h.llo&state=running&timeout=5")
        assert [row["name"] for row in await api("GET", "/vms/a/exits")] == ["HLT", "CPUID"]


async def test_memory_is_shown_and_changed() -> None:
    async with serving() as api:
        claim = {"memory": 64 << 20, "reservation": 8 << 20, "limit": 32 << 20, "shares": 7}
        made = await api("POST", "/vms", {"name": "a", **claim}, status=201)
        assert {key: made[key] for key in claim} == claim
        changed = await api("PATCH", "/vms/a", {"memory": 48 << 20, "reservation": 0})
        assert (changed["memory"], changed["reservation"], changed["limit"]) == (48 << 20, 0, 32 << 20)
        assert set(made["memory_usage"]) >= {"ballooned", "swapped", "working_set", "target", "guest_free"}
        shown = await api("GET", "/memory")
        assert shown["pool"] == sum(shown[what] for what in ("free", "lent", "private", "shared", "overhead"))
        assert (shown["state"], shown["wrong"]) == ("soft", None)
        assert (await api("GET", "/memory?check=0"))["wrong"] is None
        assert (await api("GET", "/memory?check=1"))["wrong"] == []
        api.host.overview.faults = ["frame 7 is lost"]
        assert (await api("GET", "/memory?check=true"))["wrong"] == ["frame 7 is lost"]
        assert "check: " in await api.refused("GET", "/memory?check=perhaps", status=400)


async def test_waiting_in_vain_ends_with_a_timeout() -> None:
    async with serving() as api:
        await api("POST", "/vms", {"name": "a"}, status=201)
        sentence = await api.refused("GET", "/vms/a/wait?state=running&timeout=0", status=408)
        assert "did not get there" in sentence


async def test_the_api_describes_itself() -> None:
    async with serving() as api:
        assert (await api("GET", "/version"))["api"] == 1
        assert (await api("GET", "/host"))["workers"][0]["pid"] == 2
        assert (await api("GET", "/openapi.json"))["openapi"].startswith("3.1")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "body: object missing required field name"),
        ({"name": "Big"}, "name: expected 1-63 characters of a-z 0-9 . -, starting with a letter or digit"),
        ({"name": "a" * 64}, "name: expected 1-63 characters"),
        ({"name": "a", "memory": 0}, "memory: expected int >= 1048576 (bytes, a multiple of 4096)"),
        ({"name": "a", "memory": -5}, "memory: expected int >= 1048576"),
        ({"name": "a", "memory": 1 << 40}, "memory: expected int <= 3221225472"),
        ({"name": "a", "reservation": -1}, "reservation: expected int >= 0 (bytes, a multiple of 4096)"),
        ({"name": "a", "limit": 0}, "limit: expected int >= 1048576"),
        ({"name": "a", "shares": 0}, "shares: expected int >= 1 (against others; 10 per MiB is normal)"),
        ({"name": "a", "memory_target": 1 << 20}, "object contains unknown field memory_target"),
        ({"name": "a", "cap": 101}, "cap: expected int <= 100 (percent of one CPU; 0 = no cap)"),
        ({"name": "a", "vmm": "kvm"},
         "vmm: invalid enum value 'kvm' (hw: by hardware assistance, or bt: by binary translation)"),
        ({"name": "a", "on_crash": "dance"}, "on_crash: invalid enum value 'dance'"),
        ({"name": "a", "append": "x\ny"}, "append: expected at most 2047 characters, none of them a control"),
        ({"name": "a", "color": "red"}, "object contains unknown field color"),
        ([], "expected object, got array"),
    ],
)
async def test_a_bad_definition_is_refused_with_a_sentence(body: Any, sentence: str) -> None:
    async with serving() as api:
        assert sentence in await api.refused("POST", "/vms", body, status=400)
        assert api.host.guests == {}


async def test_bad_names_in_a_list_are_explained() -> None:
    async with serving() as api:
        sentence = await api.refused("POST", "/vms/a/clone", {"names": ["ok", "No"]}, status=400)
        assert sentence == (
            "body: names[1]: expected 1-63 characters of a-z 0-9 . -, starting with a letter or digit"
        )


@pytest.mark.parametrize("query", ["timeout=nan", "timeout=-1", "timeout=x", "state=odd", "z=1", "console="])
async def test_a_bad_query_is_refused(query: str) -> None:
    async with serving() as api:
        assert (await api.refused("GET", f"/vms/a/wait?{query}", status=400)).startswith("query: ")


@pytest.mark.parametrize("address", ["", "0x", "main", "-1", "0x1234567890", "1\n"])
async def test_an_address_is_hexadecimal(address: str) -> None:
    async with serving() as api:
        sentence = await api.refused("GET", f"/vms/a/translations?address={address!r}", status=400)
        assert sentence == "query: address: expected a linear address: 1-8 hexadecimal digits"


async def test_a_parameter_given_twice_is_refused() -> None:
    async with serving() as api:
        assert "twice" in await api.refused("GET", "/vms/a/wait?timeout=1&timeout=2", status=400)


async def test_what_does_not_fit_the_state_is_a_conflict() -> None:
    async with serving() as api:
        await api("POST", "/vms", {"name": "a"}, status=201)
        assert "already" in await api.refused("POST", "/vms", {"name": "a"}, status=409)
        assert "is defined" in await api.refused("POST", "/vms/a/pause", status=409)
        await api.refused("POST", "/vms/none/start", status=404)
        await api.refused("POST", "/vms", {"name": "b", "image": "none"}, status=404)


async def test_unknown_paths_and_methods_are_refused() -> None:
    async with serving() as api:
        assert "nothing at /nowhere" in await api.refused("GET", "/nowhere", status=404)
        answer = await api.http.put("/vms/a")
        assert answer.status_code == 405
        assert answer.headers["allow"] == "DELETE, GET, PATCH"
        assert "WebSocket" in await api.refused("GET", "/vms/a/console", status=426)


async def test_an_action_without_parameters_takes_none() -> None:
    async with serving() as api:
        await api("POST", "/vms", {"name": "a"}, status=201)
        assert "unknown field" in await api.refused("POST", "/vms/a/start", {"force": True}, status=400)
        assert api.host.guests["a"].state == State.DEFINED


async def test_a_body_has_a_limit() -> None:
    async with serving() as api:
        await api("POST", "/vms", {"name": "a", "start": True}, status=201)
        for path in ("/vms", "/vms/a/input"):
            answer = await api.http.post(path, content=b" " * (2 << 20))
            assert answer.status_code == 413
            assert "larger" in answer.json()["error"]


async def test_a_bug_is_answered_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as api:
        api.host.exits = lambda name: [][1]  # type: ignore[assignment]
        assert "IndexError" in await api.refused("GET", "/vms/a/exits", status=500)
        assert "failed unexpectedly" in caplog.text


async def test_every_answer_is_json_the_document_promises() -> None:
    async with serving() as api:
        paths = (await api("GET", "/openapi.json"))["paths"]
        await api("POST", "/vms", {"name": "a"}, status=201)
        for path in ("/version", "/host", "/vms", "/vms/{name}", "/vms/{name}/exits", "/operations"):
            answer = await api.http.get(path.replace("{name}", "a"))
            promised = paths[path]["get"]["responses"][str(answer.status_code)]["content"]
            assert answer.headers["content-type"] in promised
            json.loads(answer.content)
