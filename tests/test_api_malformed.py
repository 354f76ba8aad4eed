# SPDX-License-Identifier: GPL-2.0-or-later
"""Thousands of malformed requests: each is refused with one sentence, none breaks anything."""

from __future__ import annotations

import json
from urllib.parse import quote

import httpx
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostd.api import make_app
from hostd.api.routes import ROUTES
from tests.memory_host import MemoryHost

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=80),
    st.sampled_from(["a", "template", "A", "", "..", "a/b", "ä", "x" * 70, -1, 0, 4096, 1 << 63, 1e308]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)
FIELDS = sorted({field for route in ROUTES if route.body for field in route.body.__struct_fields__})
OBJECTS = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=10), VALUES, max_size=6)
#: never right: not JSON, not an object, or with a field that does not exist
BODIES = st.one_of(
    st.binary(min_size=1, max_size=200).filter(lambda data: bool(data.strip()) and data.strip() != b"{}"),
    VALUES.filter(lambda value: not isinstance(value, dict)).map(lambda value: json.dumps(value).encode()),
    OBJECTS.map(lambda value: json.dumps({**value, "nonsense": 1}).encode()),
    st.sampled_from([b"[" * 5000, b'{"name":' * 5000, b'{"name":"\\ud800"}', b'{"name":"a\\u0000"}', b"NaN",
                     b'{"name":"a","name":5}', b'{"name":"a"}garbage', b'{"name":"a","memory":1e999}']),
)
NAMES = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), min_size=1, max_size=70)
QUERIES = st.dictionaries(
    st.sampled_from(["timeout", "state", "wait", "follow", "since", "force", "bad"]), st.text(max_size=12),
    min_size=1, max_size=3,
).map(lambda query: {**query, "nonsense": "1"})


@st.composite
def malformed(draw: st.DrawFn) -> tuple[str, str, bytes]:
    """A request of some route of the table that is wrong in its body or its query, or of no route at all."""
    route = draw(st.sampled_from([route for route in ROUTES if route.body or route.query]))
    path = "/".join(
        quote(draw(NAMES), safe="") if part[:1] == "{" else part for part in route.path.split("/")
    )
    method = draw(st.sampled_from([route.method] * 8 + ["PUT", "TRACE"]))
    query = f"?{httpx.QueryParams(draw(QUERIES))}" if route.query else ""
    return method, path + query, draw(BODIES) if route.body else b""


HOST = MemoryHost(None)  # no operation must ever be started
TRANSPORT = httpx.ASGITransport(make_app(HOST))


async def send(method: str, path: str, body: bytes) -> httpx.Response:
    async with httpx.AsyncClient(transport=TRANSPORT, base_url="http://hostd") as http:
        return await http.request(method, path, content=body)


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(malformed())
def test_malformed_requests_are_refused(request: tuple[str, str, bytes]) -> None:
    answer = trio.run(send, *request)
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()
    assert set(error) == {"error"}
    assert 5 < len(error["error"]) <= 600
    assert error["error"].isprintable()
    assert not HOST.guests and not HOST.images
