# SPDX-License-Identifier: GPL-2.0-or-later
"""What users ask of migration and are told of it: the requests and views of the API."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from hostd.model import Monitor, Request, Timeout, View

DEFAULT_PORT = 9178
DEFAULT_DOWNTIME_MS = 50.0

#: how memory goes: before the guest stops, after it, or whichever suits
Mode = Literal["auto", "precopy", "postcopy"]
MODES: tuple[Mode, ...] = get_args(Mode)
Phase = Literal["connecting", "offering", "copying", "stopping", "handing over", "in doubt", "fetching",
                "recovering", "done", "failed", "cancelled"]
PHASES: tuple[Phase, ...] = get_args(Phase)
#: why a page took the bytes it took: its contents, what changed in them, nothing (zeroes), a name
Kind = Literal["full", "delta", "zero", "deduplicated"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Peer = Annotated[str, Meta(min_length=1, max_length=261, pattern=r"^[^\x00-\x20\x7f]+\Z",
                           description="HOST or HOST:PORT; an IPv6 address in brackets")]
Milliseconds = Annotated[float, Meta(ge=1, le=60_000, description="milliseconds")]
Bandwidth = Annotated[int, Meta(ge=64 << 10, description="bytes a second")]
Connections = Annotated[int, Meta(ge=1, le=16)]


class MigrateRequest(Request):
    """Body of POST /vms/{name}/migrate.  What is None is as the configuration's [migration] says."""

    to: Peer
    mode: Mode = "auto"
    #: the longest the guest may stand still
    downtime_ms: Milliseconds | None = None
    bandwidth: Bandwidth | None = None
    #: give up after so many seconds, if the guest was not handed over by then; None: never
    timeout: Timeout | None = None
    connections: Connections | None = None
    #: the monitor that is to run it there; None: as here
    vmm: Monitor | None = None
    #: ask the other host only
    dry_run: bool = False


class EvacuateRequest(Request):
    """Body of POST /evacuate: all guests that run or are paused, some at a time."""

    to: Peer
    mode: Mode = "auto"
    downtime_ms: Milliseconds | None = None
    #: of all together
    bandwidth: Bandwidth | None = None
    timeout: Timeout | None = None
    parallel: Annotated[int, Meta(ge=1, le=64)] = 4
    dry_run: bool = False


class SwitchRequest(Request):
    """Body of POST /vms/{name}/switch."""

    vmm: Monitor


class MigrationView(View, frozen=True):
    """One migration, under way or over, as either end sees it.  Sizes are bytes, times seconds."""

    token: str
    vm: str
    direction: Literal["out", "in"]
    peer: str
    mode: Mode
    phase: Phase
    #: why it failed
    reason: str = ""
    round: int = 0
    pages: dict[str, int] = msgspec.field(default_factory=dict)
    #: by Kind, and "other"
    bytes: dict[str, int] = msgspec.field(default_factory=dict)
    remaining_pages: int = 0
    #: pages a second that the guest writes to
    dirty_rate: float = 0.0
    #: bytes a second
    throughput: float = 0.0
    expected_downtime: float | None = None
    #: percent of a CPU the guest is held to, so that it converges; None: not held
    throttle: int | None = None
    downtime: float | None = None
    elapsed: float = 0.0


class EvacuatedView(View, frozen=True):
    """The result of an evacuation: by VM where it went, and why others did not."""

    moved: list[str]
    failed: dict[str, str]
    seconds: float


class SwitchedView(View, frozen=True):
    """The result of a change of monitor."""

    vmm: str
    pause_s: float
