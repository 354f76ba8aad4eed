# SPDX-License-Identifier: GPL-2.0-or-later
"""The OpenAPI document: valid, complete, and of the same table as the routes."""

from __future__ import annotations

import json

import msgspec
from openapi_spec_validator import OpenAPIV31SpecValidator

from hostd.api import openapi
from hostd.api.routes import ROUTES

DOCUMENT = json.loads(msgspec.json.encode(openapi.document(ROUTES, "1.2.3")))


def test_the_document_is_valid() -> None:
    OpenAPIV31SpecValidator(DOCUMENT).validate()


def test_every_route_is_in_the_document_once() -> None:
    documented = {(method.upper(), path) for path, item in DOCUMENT["paths"].items() for method in item}
    assert documented == {(route.method, route.path) for route in ROUTES}
    assert len(documented) == len(ROUTES)


def test_operation_ids_are_unique() -> None:
    ids = [operation["operationId"] for item in DOCUMENT["paths"].values() for operation in item.values()]
    assert len(set(ids)) == len(ids)


def test_every_refusal_is_an_error_object() -> None:
    for item in DOCUMENT["paths"].values():
        for operation in item.values():
            assert "400" in operation["responses"]
            for status, answer in operation["responses"].items():
                if status >= "400":
                    schema = answer["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ErrorView"}


def test_the_limits_of_the_model_are_in_the_document() -> None:
    properties = DOCUMENT["components"]["schemas"]["VmCreate"]["properties"]
    assert properties["name"]["maxLength"] == 63
    assert properties["name"]["pattern"].endswith("*$")
    assert any(option.get("minimum") == 1 << 20 for option in properties["memory"]["anyOf"])


def test_queries_are_parameters() -> None:
    parameters = DOCUMENT["paths"]["/vms/{name}/wait"]["get"]["parameters"]
    places = {parameter["name"]: parameter["in"] for parameter in parameters}
    assert places == {"name": "path", "state": "query", "console": "query", "timeout": "query"}
