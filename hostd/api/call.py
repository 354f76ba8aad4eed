# SPDX-License-Identifier: GPL-2.0-or-later
"""One request as a handler sees it: checked path, query and body, and nothing of HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec
import trio
from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from hostd.api.schema import explain
from hostd.errors import HostError, Invalid, TooLarge

#: a JSON body is never near this; a thousand names of clones are 64 KiB
MAX_JSON = 1 << 20

T = TypeVar("T")


def decode_query(parameters: QueryParams, model: type[T]) -> T:
    """A query string as a value of `model`; every parameter may be there at most once."""
    pairs = parameters.multi_items()
    values = dict(pairs)
    if len(values) != len(pairs):
        raise Invalid("query: a parameter is given twice")
    try:
        return msgspec.convert(values, model, strict=False)
    except msgspec.ValidationError as error:
        raise Invalid(f"query: {explain(error, model)}") from None


class Call:
    """The request, decoded by what the route's row in the table says."""

    def __init__(self, request: HttpRequest) -> None:
        self._request = request
        self.path: dict[str, str] = request.path_params
        self.query: Any = None
        self.body: Any = None

    @property
    def name(self) -> str:
        """The {name} of the path."""
        return self.path["name"]

    def decode_query(self, model: type) -> None:
        """Read the query string."""
        self.query = decode_query(self._request.query_params, model)

    async def decode_body(self, model: type) -> None:
        """Read a JSON body.  An empty one stands for `{}`, since most bodies are optional as a whole."""
        data = await self.read(MAX_JSON)
        try:
            self.body = msgspec.json.decode(data or b"{}", type=model)
        except msgspec.ValidationError as error:
            raise Invalid(f"body: {explain(error, model)}") from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Invalid(f"body: {error}") from None

    async def read(self, limit: int) -> bytes:
        """The whole body as bytes, of which there may be `limit`."""
        data = bytearray()
        async for chunk in self.chunks():
            data += chunk
            if len(data) > limit:
                raise TooLarge(f"the body is larger than the {limit} bytes allowed here")
        return bytes(data)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body piece by piece, for uploads of any size."""
        async for chunk in self._request.stream():
            if chunk:
                yield chunk

    async def while_connected(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do work that may take long, and stop doing it when the client has hung up."""
        outcome: list[T] = []
        failure: HostError | None = None

        async def watch() -> None:
            while (await self._request.receive())["type"] != "http.disconnect":
                pass
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            try:
                outcome.append(await work())
            except HostError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if not outcome:
            raise ClientDisconnect
        return outcome[0]
