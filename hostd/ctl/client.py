# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon as hostctl sees it: HTTP over its Unix socket, answers decoded into the daemon's own types."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import msgspec

from hostd.ctl.errors import TIMEOUT, CtlError
from hostd.migration.views import MigrationView
from hostd.model import (
    BlobView,
    Event,
    ExitRow,
    HostView,
    ImageView,
    MemoryView,
    OperationView,
    TranslationsView,
    VmView,
)

#: for answers the daemon gives at once; what waits says so itself
PATIENCE = 30.0
#: how long one request stays with the daemon for an operation to end
_ROUND = 10.0
#: and if somebody looks at how it goes
_LOOK = 0.5


def vm_path(name: str, *rest: str) -> str:
    """The address of a VM, or of something of it, whatever the name looks like."""
    return "/".join(("/vms", quote(name, safe=""), *rest))


class Client:
    """One connection (opened on first use).  Every failure is a CtlError with one sentence."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        transport = httpx.HTTPTransport(uds=str(socket))
        self._http = httpx.Client(transport=transport, base_url="http://hostd", timeout=PATIENCE)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # --- asking ---
    def call(self, method: str, path: str, answer: Any = None, *, body: Any = None, content: Any = None,
             query: dict[str, Any] | None = None, patience: float | None = PATIENCE) -> Any:
        """One request.  `body` goes as JSON, `content` as it is; None in `query` means not given."""
        if body is not None:
            content = msgspec.json.encode(body)
        parameters = {key: value for key, value in (query or {}).items() if value is not None}
        with self._failures():
            response = self._http.request(method, path, content=content, params=parameters, timeout=patience)
            _check(response)
            return msgspec.json.decode(response.content, type=answer) if answer is not None else None

    @contextmanager
    def stream(self, path: str, query: dict[str, Any] | None = None) -> Iterator[httpx.Response]:
        """An answer that goes on for ever."""
        timeout = httpx.Timeout(PATIENCE, read=None)
        with self._failures(), self._http.stream("GET", path, params=query, timeout=timeout) as response:
            if response.is_error:
                response.read()
                _check(response)
            yield response

    def vms(self) -> list[VmView]:
        vms: list[VmView] = self.call("GET", "/vms", list[VmView])
        return vms

    def vm(self, name: str) -> VmView:
        vm: VmView = self.call("GET", vm_path(name), VmView)
        return vm

    def host(self) -> HostView:
        host: HostView = self.call("GET", "/host", HostView)
        return host

    def memory(self, check: bool = False) -> MemoryView:
        query = {"check": "true"} if check else None
        memory: MemoryView = self.call("GET", "/memory", MemoryView, query=query)
        return memory

    def exits(self, name: str) -> list[ExitRow]:
        rows: list[ExitRow] = self.call("GET", vm_path(name, "exits"), list[ExitRow])
        return rows

    def translations(self, name: str, address: str | None) -> TranslationsView:
        listing: TranslationsView = self.call("GET", vm_path(name, "translations"), TranslationsView,
                                              query={"address": address})
        return listing

    def images(self) -> list[ImageView]:
        images: list[ImageView] = self.call("GET", "/images", list[ImageView])
        return images

    def operations(self) -> list[OperationView]:
        operations: list[OperationView] = self.call("GET", "/operations", list[OperationView])
        return operations

    def migrations(self) -> list[MigrationView]:
        migrations: list[MigrationView] = self.call("GET", "/migrations", list[MigrationView])
        return migrations

    def events(self) -> Iterator[Event]:
        """What happens from now on, until the daemon goes."""
        with self.stream("/events") as response:
            for line in response.iter_lines():
                yield msgspec.json.decode(line, type=Event)

    # --- doing ---
    def upload(self, path: Path) -> str:
        """Hand a file to the daemon; its SHA-256."""
        try:
            with path.open("rb") as file:
                blob: BlobView = self.call("PUT", "/blobs", BlobView, content=file, patience=None)
        except OSError as error:
            raise CtlError(f"cannot read {path}: {error.strerror}") from None
        return blob.sha256

    def begin(
        self, method: str, path: str, body: Any = None, query: dict[str, Any] | None = None
    ) -> OperationView:
        """Start long work."""
        operation: OperationView = self.call(method, path, OperationView, body=body, query=query)
        return operation

    def finish(self, operation: OperationView, look: Callable[[OperationView], None] | None = None) -> Any:
        """Wait for the end of an operation; its result, or its error raised.  `look` is shown how it goes.

        Whoever interrupts the waiting interrupts the work.
        """
        patience = _ROUND if look is None else _LOOK
        try:
            while operation.status == "running":
                if look is not None:
                    look(operation)
                operation = self.call("GET", f"/operations/{operation.id}", OperationView,
                                      query={"wait": patience}, patience=patience + PATIENCE)
        except KeyboardInterrupt:
            self.call("DELETE", f"/operations/{operation.id}")
            raise
        if operation.status == "done":
            return operation.result
        raise CtlError(operation.error or f"{operation.kind} of {operation.target} was cancelled")

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn what a transport says into a sentence about the daemon."""
        try:
            yield
        except httpx.ConnectError as error:
            raise CtlError(f"cannot reach hostd at {self.socket}: {_reason(error)}; is it running?") from None
        except httpx.TimeoutException:
            raise CtlError(f"hostd at {self.socket} does not answer", TIMEOUT) from None
        except httpx.TransportError as error:
            raise CtlError(f"hostd at {self.socket} broke off: {_reason(error)}") from None
        except msgspec.DecodeError as error:
            raise CtlError(f"hostd at {self.socket} gave an answer of another version: {error}") from None


def _reason(error: Exception) -> str:
    """`[Errno 2] No such file or directory` without the number."""
    return str(error).rpartition("] ")[2] or type(error).__name__


def _check(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        sentence = msgspec.json.decode(response.content, type=dict[str, str])["error"]
    except (msgspec.DecodeError, KeyError):
        sentence = f"the daemon answered {response.status_code} {response.reason_phrase}"
    raise CtlError.of_status(response.status_code, sentence)
