# SPDX-License-Identifier: GPL-2.0-or-later
"""The values the host takes and gives: requests are checked here, views are what the API prints.

Every limit of a request is a `msgspec.Meta` constraint on its type, so that the HTTP API, its OpenAPI
document and the inventory files (hostd/definition.py) obey the same ones.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from hostd.lifecycle import Policy, State

PAGE = 4096
MIN_MEMORY = 1 << 20
#: guest RAM stays below the devices at 0xFE000000 and the 32-bit hole (vmm/boot/e820.py)
MAX_MEMORY = 3 << 30

VmName = Annotated[str, Meta(min_length=1, max_length=63, pattern=r"^[a-z0-9][a-z0-9.-]*\Z",
                             description="1-63 characters of a-z 0-9 . -, starting with a letter or digit")]
ImageName = Annotated[str, Meta(min_length=1, max_length=63, pattern=r"^[a-z0-9][a-z0-9._-]*\Z",
                                description="1-63 of a-z 0-9 . _ -, starting with a letter or digit")]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z", description="SHA-256 of a blob, in hexadecimal")]
#: the boot protocol's limit (Documentation/x86/boot.rst, cmdline_size), printable characters only
Append = Annotated[str, Meta(max_length=2047, pattern=r"^[^\x00-\x1f\x7f]*\Z",
                             description="at most 2047 characters, none of them a control character")]
Memory = Annotated[int, Meta(ge=MIN_MEMORY, le=MAX_MEMORY, description="bytes, a multiple of 4096")]
Reservation = Annotated[int, Meta(ge=0, le=MAX_MEMORY, description="bytes, a multiple of 4096")]
MemoryShares = Annotated[int, Meta(ge=1, le=1_000_000, description="against others; 10 per MiB is normal")]
Weight = Annotated[int, Meta(ge=1, le=10000)]
Cap = Annotated[int, Meta(ge=0, le=100, description="percent of one CPU; 0 = no cap")]
FilePath = Annotated[str, Meta(min_length=1, max_length=4096, pattern=r"^/[^\x00]*\Z",
                               description="an absolute path")]
Timeout = Annotated[float, Meta(ge=0, le=86400, description="seconds")]

DEFAULT_MEMORY = 128 << 20

DEFAULT_CACHE = 32 << 20

MonitorName = Literal["hw", "bt"]
MONITORS: tuple[MonitorName, ...] = get_args(MonitorName)
Monitor = Annotated[MonitorName, Meta(description="hw: by hardware assistance, or bt: by binary translation")]
#: what executes translated code: the processor of this machine, or the emulated one
BtCpu = Literal["native", "unicorn"]
BT_CPUS: tuple[BtCpu, ...] = get_args(BtCpu)


class Request(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A value that comes from outside."""


class VmSpec(Request):
    """A VM as its owner defines it.  What is None is filled from the configuration's [defaults]."""

    name: VmName
    image: ImageName | None = None
    kernel: Sha256 | None = None
    initrd: Sha256 | None = None
    append: Append | None = None
    memory: Memory | None = None
    reservation: Reservation | None = None
    limit: Memory | None = None
    shares: MemoryShares | None = None
    vmm: Monitor | None = None
    weight: Weight | None = None
    cap: Cap | None = None
    on_crash: Policy | None = None
    on_poweroff: Policy | None = None
    autostart: bool = False


class VmCreate(VmSpec):
    """POST /vms: the definition, and whether to start it at once."""

    start: bool = False


class VmPatch(Request):
    """PATCH /vms/{name}: what may change in the life of a VM.

    `memory` of a VM that is off is its new size; of one that is on it is what the guest may use of the size
    it was started with, and its balloon driver is asked for the rest.
    """

    memory: Memory | None = None
    reservation: Reservation | None = None
    limit: Memory | None = None
    shares: MemoryShares | None = None
    weight: Weight | None = None
    cap: Cap | None = None
    on_crash: Policy | None = None
    on_poweroff: Policy | None = None
    autostart: bool | None = None


class StopRequest(Request):
    """Body of POST /vms/{name}/stop (and reset): `force` cuts the power at once, `timeout` is how long the
    guest may take after the power button before it is cut."""

    force: bool = False
    timeout: Timeout | None = None


class CloneRequest(Request):
    """Body of POST /vms/{name}/clone."""

    names: Annotated[list[VmName], Meta(min_length=1, max_length=1000)]
    start: bool = False


class SnapshotRequest(Request):
    """Body of POST /vms/{name}/snapshot: the file to write, and the snapshot beside it that this one is to
    be based on.  The daemon reads and writes them."""

    to: FilePath | None = None
    base: FilePath | None = None


class RestoreRequest(Request):
    """Body of POST /restore: the snapshot, and a name for the VM other than the one in it."""

    file: FilePath
    name: VmName | None = None


class ImageSpec(Request):
    """A named kernel with its initrd and command line."""

    name: ImageName
    kernel: Sha256
    initrd: Sha256 | None = None
    append: Append = ""


class View(msgspec.Struct, kw_only=True, frozen=True):
    """A value that goes out."""


class BlobView(View, frozen=True):
    sha256: str
    size: int


class ImageView(View, frozen=True):
    name: str
    kernel: str
    initrd: str | None
    append: str
    kind: str
    size: int
    created: float


class CpuTimes(View, frozen=True):
    """Seconds of a vCPU's life since the VM was defined: executing, ready but waiting (steal), halted."""

    run: float = 0.0
    wait: float = 0.0
    sleep: float = 0.0


class MemoryUsage(View, frozen=True):
    """Bytes.  What is None is not known."""

    #: what the guest believes to have
    assigned: int = 0
    #: the part that is in machine memory: private + shared
    resident: int = 0
    shared: int = 0
    private: int = 0
    #: given back by its balloon driver
    ballooned: int = 0
    #: in the swap file, or not read yet from the snapshot it was restored from
    swapped: int = 0
    #: what it actively uses, by samples
    working_set: int | None = None
    #: what it is to have: all but what its balloon driver is asked for
    target: int | None = None
    #: what the guest says, if it has a balloon driver that does: nobody uses it; could be had; there is
    guest_free: int | None = None
    guest_available: int | None = None
    guest_total: int | None = None


class MemoryEvents(View, frozen=True):
    """Pages of a VM to which something happened, since it was defined."""

    #: became the same frame as a page with the same contents; and a frame of their own again, written to
    merged: int = 0
    broken: int = 0
    #: full of zeros, gave up their frames
    zeroed: int = 0
    #: written to the swap file, and read from it
    swapped_out: int = 0
    swapped_in: int = 0
    #: taken into the balloon, and out of it again; reported as free by the guest
    inflated: int = 0
    deflated: int = 0
    reported: int = 0


class ExitRow(View, frozen=True):
    """One line of the exit statistics."""

    code: int
    name: str
    count: int
    seconds: float


class VmView(View, frozen=True):
    name: str
    state: State
    reason: str
    vmm: str
    memory: int
    #: what a guest that is on may use of it; None: all
    memory_target: int | None
    reservation: int
    limit: int
    shares: int
    weight: int
    cap: int
    on_crash: Policy
    on_poweroff: Policy
    autostart: bool
    image: str | None
    kernel: str | None
    initrd: str | None
    append: str | None
    template: str | None
    worker: int | None
    uptime_s: float
    exit_status: int | None
    cpu: CpuTimes
    memory_usage: MemoryUsage
    #: it stands still: it wants memory, and has as much as it may at the moment
    memory_waiting: bool
    memory_events: MemoryEvents
    exits: int
    interrupts: int
    world_switches: int
    boots: int
    crashes: int


class TranslatorView(View, frozen=True):
    """The binary translator of a worker: what it did since the worker started, and what it holds."""

    #: translation units made, and the guest instructions in them
    units: int = 0
    instructions: int = 0
    #: jumps linked to the unit they lead to
    chained: int = 0
    #: units that made room for others, whose guest code changed, and that the verifier did not let pass
    evicted: int = 0
    invalidated: int = 0
    rejected: int = 0
    #: units a guest could use that were translated for another
    shared: int = 0
    #: pages of guest code known now, and bytes of the translation cache in use
    pages: int = 0
    used_bytes: int = 0


class TranslationsView(View, frozen=True):
    """Translated code of a guest as text, guest and host side by side.  Not `complete`: there is more."""

    text: str
    complete: bool


class WorkerView(View, frozen=True):
    index: int
    pid: int
    ready: bool
    vms: int
    silicon: str
    tsc_khz: int
    restarts: int
    translator: TranslatorView = TranslatorView()


class FrameCounts(View, frozen=True):
    """Frames of the machine memory pool by state; they add up to `total`."""

    total: int
    free: int
    granted: int
    private: int
    shared: int
    overhead: int


class SwapUsage(View, frozen=True):
    """Bytes.  used: of guests, that are in the swap file; compressed: what they take there; limit: what they
    may take, 0 without a swap file."""

    used: int = 0
    compressed: int = 0
    limit: int = 0


#: how short of memory the host is (hostd/policy/pressure.py)
Pressure = Literal["high", "soft", "hard", "low"]
PRESSURES: tuple[Pressure, ...] = get_args(Pressure)


class MemoryView(View, frozen=True):
    """Machine memory of the host, in bytes.  pool = free + lent + private + shared + overhead."""

    pool: int
    free: int
    #: with workers, and not used yet
    lent: int
    private: int
    shared: int
    overhead: int
    #: what guests would have beside that if nobody shared
    saved: int
    swap: SwapUsage = SwapUsage()
    state: Pressure = "high"
    #: workers that wait for frames, and with them those of their guests that need some
    waiting: int = 0
    #: page sharing: pages looked at in a second now, and since the daemon started
    scan_rate: float = 0.0
    scanned: int = 0
    #: disagreements in the books, a sentence each; None: they were not checked
    wrong: list[str] | None = None


class HostView(View, frozen=True):
    version: str
    pid: int
    uptime_s: float
    state_dir: str
    socket: str
    metrics: str | None
    memory: int
    frames: FrameCounts
    workers: list[WorkerView]
    vms: dict[str, int]


class ClonesView(View, frozen=True):
    """The result of a clone: its clones, and how long the VM stood still for them."""

    names: list[str]
    pause_s: float


class SnapshotView(View, frozen=True):
    """The result of a snapshot: the file, its bytes, and how long the VM stood still for it."""

    file: str
    size: int
    pause_s: float


class RestoredView(View, frozen=True):
    """The result of a restore."""

    name: str


class OperationView(View, frozen=True):
    id: str
    kind: str
    target: str
    status: Literal["running", "done", "failed", "cancelled"]
    progress: float
    phase: str
    error: str | None
    created: float
    finished: float | None
    result: Any
    #: more of how it goes, if the work tells it: of a migration its MigrationView
    detail: Any = None


class Event(View, frozen=True):
    """One line of GET /events.  `type` is "vm.defined", "vm.state", "vm.destroyed", "vm.moved",
    "operation", "worker", "memory" (how short of it the host is now), "config" or "lost" (this reader was too
    slow, `data.count` events are missing)."""

    type: str
    time: float
    vm: str | None = None
    data: dict[str, Any] = msgspec.field(default_factory=dict)
