# SPDX-License-Identifier: GPL-2.0-or-later
"""Types that only the API has: query parameters, empty bodies, and answers about the API itself."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from hostd.lifecycle import State
from hostd.model import Request, Timeout, View

#: the API's version: it grows when a client written for the old one could be misled
API_VERSION = 1

Position = Annotated[int, Meta(ge=0, description="bytes of the console since the VM was defined")]


class Nothing(Request):
    """The body of a request that says everything in its path: empty, or an empty object."""


class LogQuery(Request):
    follow: Annotated[bool, Meta(description="go on with what the guest writes from now on")] = False
    since: Position | None = None


class ConsoleQuery(Request):
    since: Position | None = None


class TranslationsQuery(Request):
    address: Annotated[
        str, Meta(pattern=r"^(0x)?[0-9a-fA-F]{1,8}\Z", description="a linear address: 1-8 hexadecimal digits")
    ] | None = None


class WaitQuery(Request):
    state: Annotated[State, Meta(description="until the VM is in this state")] | None = None
    console: Annotated[
        str, Meta(min_length=1, max_length=1000, description="until a regular expression matches its console")
    ] | None = None
    timeout: Timeout | None = None


class MemoryQuery(Request):
    check: Annotated[bool, Meta(description="check the books, too")] = False


class OperationQuery(Request):
    wait: Annotated[Timeout, Meta(description="answer when it has ended, or after so many seconds")] = 0.0


class DestroyQuery(Request):
    force: Annotated[bool, Meta(description="also a VM that is running or paused")] = False


class ErrorView(View, frozen=True):
    """What every refusal looks like."""

    error: Annotated[str, Meta(description="one sentence for the user")]


class VersionView(View, frozen=True):
    name: str
    version: str
    api: int


def explain(error: msgspec.ValidationError, model: type) -> str:
    """Turn what msgspec says about a value into a sentence that names the field and what it should be."""
    text, _, path = str(error).partition(" - at `$.")
    text = text.replace("`", "")
    field = path.rstrip("`")
    if not field:
        return text[:1].lower() + text[1:]
    description = _description(model, field)
    if description and ("regex" in text or "of length" in text):
        return f"{field}: expected {description}"
    return f"{field}: {text[:1].lower() + text[1:]}" + (f" ({description})" if description else "")


def _description(model: type, path: str) -> str | None:
    """What the model says about the field at `path` (`names[3]` is an element of the list `names`)."""
    name, _, rest = path.partition("[")
    components = msgspec.json.schema_components([model])[1]
    schema = components.get(model.__name__, {}).get("properties", {}).get(name, {})
    for option in (schema, *schema.get("anyOf", ())):
        option = option.get("items", {}) if rest else option
        if "description" in option:
            return str(option["description"])
    return None
