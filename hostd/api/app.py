# SPDX-License-Identifier: GPL-2.0-or-later
"""The ASGI application: Starlette's routing around the table, and the place where errors become answers."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from itertools import groupby

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route as HttpRoute
from starlette.routing import WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from hostd.api import openapi
from hostd.api.call import Call
from hostd.api.console import ConsoleSocket
from hostd.api.handlers import location
from hostd.api.routes import JSON, ROUTES, Route
from hostd.api.schema import ErrorView
from hostd.errors import HostError
from hostd.host import Host
from hostd.operations import Operation

log = logging.getLogger(__name__)

_UPGRADE = "this is a WebSocket: ask for it with an Upgrade header"

MAX_SENTENCE = 500


def make_app(host: Host) -> ASGIApp:
    """The API of this host, for any ASGI server that runs on trio."""
    document = msgspec.json.encode(openapi.document(ROUTES, host.overview.view().version))

    async def send_document(request: HttpRequest) -> Response:
        return Response(document, media_type=JSON)

    resources = [
        HttpRoute(path, _Resource(host, {route.method: route for route in group}))
        for path, group in groupby(sorted(ROUTES, key=lambda route: route.path), lambda route: route.path)
    ]
    app = Starlette(
        routes=[
            HttpRoute("/openapi.json", send_document, methods=["GET"]),
            *resources,
            WebSocketRoute("/vms/{name}/console", ConsoleSocket(host)),
        ],
        exception_handlers={HTTPException: _refuse_unknown},
    )
    app.router.redirect_slashes = False
    return app


class _Resource:
    """All methods of one path."""

    def __init__(self, host: Host, methods: Mapping[str, Route]) -> None:
        self._host = host
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self._respond(HttpRequest(scope, receive))
            await response(scope, receive, send)
        except ClientDisconnect:
            log.debug("the client of %s went away", scope["path"])

    async def _respond(self, request: HttpRequest) -> Response:
        """Answer, whatever happens: refusals are sentences, the unexpected is logged with its trace."""
        try:
            route = self._methods.get(request.method)
            if route is None:
                raise HTTPException(405, headers={"Allow": ", ".join(sorted(self._methods))})
            if route.handler is None:
                return _error(426, _UPGRADE, {"Upgrade": "websocket"})
            call = Call(request)
            if route.query is not None:
                call.decode_query(route.query)
            if route.body is not None:
                await call.decode_body(route.body)
            return _answer(route, await route.handler(self._host, call))
        except HostError as error:
            return _error(error.status, str(error))
        except (HTTPException, ClientDisconnect):
            raise
        except Exception as error:
            log.exception("%s %s failed unexpectedly", request.method, request.url.path)
            return _error(500, f"internal error: {type(error).__name__}: {error}")


def _answer(route: Route, value: object) -> Response:
    if value is None:
        return Response(status_code=route.status)
    if isinstance(value, AsyncIterator):
        return StreamingResponse(value, route.status, media_type=route.media)
    where = location(value)
    headers = {"Location": where} if where and route.status in (201, 202) else None
    if isinstance(value, Operation):
        value = value.view()
    content = value if isinstance(value, bytes) else msgspec.json.encode(value)
    return Response(content, route.status, headers, route.media)


def _error(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Response:
    """A refusal.  It may quote what the client sent, so it is bounded and kept on one line of a terminal."""
    if len(sentence) > MAX_SENTENCE:
        sentence = sentence[:MAX_SENTENCE] + "..."
    sentence = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in sentence)
    return Response(msgspec.json.encode(ErrorView(error=sentence)), status, headers, JSON)


async def _refuse_unknown(request: HttpRequest, error: Exception) -> Response:
    """Paths and methods that are not in the table."""
    assert isinstance(error, HTTPException)
    sentences = {
        404: f"there is nothing at {request.url.path[:200]}",
        405: f"{request.method} is not possible at {request.url.path[:200]}",
    }
    return _error(error.status_code, sentences.get(error.status_code, error.detail), error.headers)
