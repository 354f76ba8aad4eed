# SPDX-License-Identifier: GPL-2.0-or-later
"""The API of migration over a host in memory: what is asked arrives, what is wrong is refused."""

from __future__ import annotations

from typing import Any

import pytest

from hostd.lifecycle import State
from hostd.migration.views import EvacuateRequest, MigrateRequest
from tests.memory_migrations import NOWHERE, SLOW
from tests.test_api_requests import Api, serving


async def running(api: Api, *names: str) -> None:
    for name in names:
        await api("POST", "/vms", {"name": name, "start": True}, status=201)


async def test_a_vm_leaves_and_the_operation_tells_what_it_came_to() -> None:
    async with serving() as api:
        await running(api, "web")
        ended = await api.done("POST", "/vms/web/migrate", {"to": "b:9178"})
        assert (ended["kind"], ended["target"]) == ("migrate", "web")
        assert ended["result"] == ended["detail"]
        assert (ended["detail"]["phase"], ended["detail"]["downtime"]) == ("done", 0.038)
        assert await api("GET", "/migrations") == [ended["result"]]
        await api.refused("GET", "/vms/web", status=404)


async def test_all_that_can_be_asked_arrives() -> None:
    async with serving() as api:
        await running(api, "web")
        wish: dict[str, Any] = {"to": "[::1]:9000", "mode": "postcopy", "downtime_ms": 20.0,
                                "bandwidth": 1 << 20, "timeout": 60.0, "connections": 4, "vmm": "bt",
                                "dry_run": True}
        await api.done("POST", "/vms/web/migrate", wish)
        await api.done("POST", "/evacuate", {"to": "b", "parallel": 8, "bandwidth": 1 << 20})
        assert api.host.migrations.requests == [
            MigrateRequest(**wish), EvacuateRequest(to="b", parallel=8, bandwidth=1 << 20)]
        assert (await api("GET", "/vms/web"))["state"] == "running"


async def test_one_under_way_is_followed_and_cancelled() -> None:
    async with serving() as api:
        await running(api, "web")
        begun = await api("POST", "/vms/web/migrate", {"to": SLOW}, status=202)
        seen = await api("GET", f"/operations/{begun['id']}?wait=0.01")
        assert (seen["status"], seen["phase"]) == ("running", "copying")
        assert (seen["detail"]["round"], seen["detail"]["remaining_pages"]) == (3, 1200)
        await api("DELETE", f"/operations/{begun['id']}")
        ended = await api("GET", f"/operations/{begun['id']}?wait=5")
        assert (ended["status"], ended["detail"]["phase"]) == ("cancelled", "cancelled")


async def test_one_that_fails_says_why() -> None:
    async with serving() as api:
        await running(api, "web")
        begun = await api("POST", "/vms/web/migrate", {"to": NOWHERE}, status=202)
        ended = await api("GET", f"/operations/{begun['id']}?wait=5")
        assert (ended["status"], ended["error"]) == ("failed", f"cannot reach {NOWHERE}: no such host")
        assert ended["detail"]["reason"] == ended["error"]
        assert (await api("GET", "/vms/web"))["state"] == "running"


async def test_a_vm_in_doubt_is_recovered() -> None:
    async with serving() as api:
        await running(api, "web")
        assert "it is this host's" in await api.refused("POST", "/vms/web/recover", status=409)
        api.host.guests["web"].state = State.MIGRATING
        assert (await api("POST", "/vms/web/recover"))["name"] == "web"
        await api.refused("POST", "/vms/none/recover", status=404)


@pytest.mark.parametrize(("path", "body", "sentence"), [
    ("/vms/web/migrate", {}, "body: object missing required field to"),
    ("/vms/web/migrate", {"to": ""}, "to: expected HOST or HOST:PORT; an IPv6 address in brackets"),
    ("/vms/web/migrate", {"to": "a b"}, "to: expected HOST or HOST:PORT"),
    ("/vms/web/migrate", {"to": "b", "mode": "magic"}, "mode: invalid enum value 'magic'"),
    ("/vms/web/migrate", {"to": "b", "bandwidth": 5}, "bandwidth: expected int >= 65536 (bytes a second)"),
    ("/vms/web/migrate", {"to": "b", "downtime_ms": 0}, "downtime_ms: expected float >= 1"),
    ("/vms/web/migrate", {"to": "b", "connections": 17}, "connections: expected int <= 16"),
    ("/vms/web/migrate", {"to": "b", "parallel": 2}, "unknown field parallel"),
    ("/evacuate", {"to": "b", "parallel": 0}, "parallel: expected int >= 1"),
    ("/evacuate", {"to": "b", "vmm": "bt"}, "unknown field vmm"),
    ("/vms/web/recover", {"force": True}, "unknown field force"),
])
async def test_a_bad_wish_is_refused_with_a_sentence(path: str, body: dict[str, Any], sentence: str) -> None:
    async with serving() as api:
        await running(api, "web")
        assert sentence in await api.refused("POST", path, body, status=400)
        assert api.host.migrations.requests == []


async def test_only_guests_that_are_on_can_migrate() -> None:
    async with serving() as api:
        await api("POST", "/vms", {"name": "off"}, status=201)
        assert "is defined" in await api.refused("POST", "/vms/off/migrate", {"to": "b"}, status=409)
        await api.refused("POST", "/vms/none/migrate", {"to": "b"}, status=404)
