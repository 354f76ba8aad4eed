# SPDX-License-Identifier: GPL-2.0-or-later
"""The OpenAPI 3.1 document, made from the table of routes and the types it names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import msgspec

from hostd.api.routes import BYTES, JSON, Route
from hostd.api.schema import ErrorView

Json = dict[str, Any]


def document(routes: Sequence[Route], version: str) -> Json:
    """The whole document."""
    named = [route.answer for route in routes if route.answer is not None]
    named += [model for route in routes for model in (route.body, route.query) if model is not None]
    schemas, components = msgspec.json.schema_components(
        [ErrorView, *named], ref_template="#/components/schemas/{name}"
    )
    schema_of = dict(zip([ErrorView, *named], schemas))
    paths: dict[str, Json] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schema_of, components)
    # Queries are not bodies: each of their properties became a parameter.
    for model in {route.query for route in routes if route.query is not None}:
        components.pop(model.__name__, None)
    whole = {
        "openapi": "3.1.0",
        "info": {
            "title": "hostd",
            "version": version,
            "summary": "Virtual machines of one host",
            "license": {"name": "GPL-2.0-or-later", "identifier": "GPL-2.0-or-later"},
        },
        "servers": [{"url": "http://localhost", "description": "over the daemon's Unix socket"}],
        "paths": paths,
        "components": {"schemas": components},
    }
    return _ecma_patterns(whole)


def _operation(route: Route, schema_of: dict[Any, Json], components: dict[str, Json]) -> Json:
    operation: Json = {
        "operationId": route.handler.__name__ if route.handler else "console",
        "summary": route.summary,
        "responses": {str(route.status): _answer(route, schema_of)},
    }
    error = {JSON: {"schema": schema_of[ErrorView]}}
    for status in sorted({400, *route.errors}):
        operation["responses"][str(status)] = {"description": HTTPStatus(status).phrase, "content": error}
    if parameters := [*_path_parameters(route.path), *_query_parameters(route.query, components)]:
        operation["parameters"] = parameters
    if route.upload:
        binary = {"schema": {"type": "string", "contentMediaType": BYTES}}
        operation["requestBody"] = {"required": True, "content": {BYTES: binary}}
    elif route.body is not None:
        required = bool(components[route.body.__name__].get("required"))
        operation["requestBody"] = {
            "required": required, "content": {JSON: {"schema": schema_of[route.body]}}
        }
    return operation


def _answer(route: Route, schema_of: dict[Any, Json]) -> Json:
    answer: Json = {"description": HTTPStatus(route.status).phrase}
    if route.answer is bytes:
        answer["content"] = {route.media: {"schema": {"type": "string"}}}
    elif route.answer is not None:
        answer["content"] = {route.media: {"schema": schema_of[route.answer]}}
    return answer


def _path_parameters(path: str) -> list[Json]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", path)
    ]


def _query_parameters(model: type | None, components: dict[str, Json]) -> list[Json]:
    if model is None:
        return []
    properties: dict[str, Json] = components[model.__name__]["properties"]
    return [{"name": name, "in": "query", "schema": schema} for name, schema in properties.items()]


def _ecma_patterns(value: Any) -> Any:
    """JSON Schema's regular expressions are ECMA-262's: the end of the text is `$`, not Python's `\\Z`."""
    match value:
        case dict():
            return {
                key: item.replace(r"\Z", "$") if key == "pattern" and isinstance(item, str)
                else _ecma_patterns(item)
                for key, item in value.items()
            }
        case list():
            return [_ecma_patterns(item) for item in value]
    return value
