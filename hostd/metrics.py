# SPDX-License-Identifier: GPL-2.0-or-later
"""The host as Prometheus sees it.

Nothing is counted here: every scrape reads the host's views, and those read the counters in shared memory;
migrations that are over are added up elsewhere (hostd/migration/totals.py).  So a VM that is gone is gone
from the next scrape, and no label set outlives what it describes.

Cardinality: a VM has a fixed number of series and at most two for each reason of `REASONS`; everything else
is bounded by the number of workers or by tables in this file.  While a VM migrates it has a few more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar

import msgspec
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from hostd.host import Host
from hostd.lifecycle import State
from hostd.migration.totals import UNDER_WAY, Histogram
from hostd.migration.views import MigrationView
from hostd.model import PAGE, PRESSURES, ExitRow, MemoryView, VmView, WorkerView
from hostd.scheduler import LATENCY_BOUNDS_NS
from vmm.exitcodes import ExitCode

#: the VMEXIT_* codes that have a reason of their own; all others are "other"
REASONS: dict[int, str] = {
    **dict.fromkeys(range(ExitCode.CR0_READ, ExitCode.DR0_READ), "control_register"),
    **dict.fromkeys(range(ExitCode.DR0_READ, ExitCode.EXCP_DE), "debug_register"),
    **dict.fromkeys(range(ExitCode.EXCP_DE, ExitCode.INTR), "exception"),
    ExitCode.EXCP_PF: "page_fault",
    ExitCode.INTR: "interrupt",
    ExitCode.NMI: "interrupt",
    ExitCode.VINTR: "interrupt_window",
    ExitCode.SWINT: "software_interrupt",
    ExitCode.IRET: "interrupt_return",
    ExitCode.INVD: "cache_control",
    ExitCode.WBINVD: "cache_control",
    ExitCode.CPUID: "cpuid",
    ExitCode.HLT: "hlt",
    ExitCode.IOIO: "io",
    ExitCode.MSR: "msr",
    ExitCode.SHUTDOWN: "shutdown",
    ExitCode.VMMCALL: "hypercall",
    ExitCode.NPF: "nested_page_fault",
    ExitCode.BT_HIDDEN_FAULT: "hidden_page_fault",
    ExitCode.BT_TRACE: "trace",
    ExitCode.BT_ADAPTED: "adapted",
    ExitCode.BT_SIMULATED: "simulated",
    ExitCode.BT_MISS: "miss",
    ExitCode.BT_CHAIN: "chain",
    ExitCode.BT_SILICON: "silicon",
    ExitCode.INVALID: "invalid",
}
OTHER_REASON = "other"

CONTENT_OF_ROOT = "hostd: the metrics are at /metrics\n"

_Subject = TypeVar("_Subject")
_Sample = tuple[tuple[str, ...], float]
_Family = type[GaugeMetricFamily] | type[CounterMetricFamily]


class _Row(NamedTuple):
    """One metric: its family, and how to read the samples, label values and value, off a subject."""

    family: _Family
    name: str
    help: str
    labels: tuple[str, ...]
    samples: Callable[..., Iterable[_Sample]]


#: of every VM; `name`, the VM's, is the first label of each
VM_METRICS = (
    _Row(GaugeMetricFamily, "hostd_vm_info", "A VM, its monitor and its image.", ("vmm", "image"),
         lambda vm: [((vm.vmm, vm.image or ""), 1)]),
    _Row(GaugeMetricFamily, "hostd_vm_state", "1 for the state the VM is in, 0 for the others.", ("state",),
         lambda vm: [((state.value,), state == vm.state) for state in State]),
    _Row(GaugeMetricFamily, "hostd_vm_uptime_seconds", "Time since the guest was last started.", (),
         lambda vm: [((), vm.uptime_s)]),
    _Row(GaugeMetricFamily, "hostd_vm_worker", "Index of the VM's worker; absent if it has none.", (),
         lambda vm: [] if vm.worker is None else [((), vm.worker)]),
    _Row(GaugeMetricFamily, "hostd_vm_weight", "Share of the CPUs relative to other VMs.", (),
         lambda vm: [((), vm.weight)]),
    _Row(GaugeMetricFamily, "hostd_vm_cap_ratio", "Most the VM may use of a CPU; 1 without a cap.", (),
         lambda vm: [((), vm.cap / 100 if vm.cap else 1)]),
    _Row(CounterMetricFamily, "hostd_vm_cpu_seconds",
         "Life of the virtual CPU: running, waiting for a physical CPU (steal time), or halted.", ("mode",),
         lambda vm: [(("run",), vm.cpu.run), (("wait",), vm.cpu.wait), (("sleep",), vm.cpu.sleep)]),
    _Row(CounterMetricFamily, "hostd_vm_interrupts_injected", "Interrupts injected into the guest.", (),
         lambda vm: [((), vm.interrupts)]),
    _Row(CounterMetricFamily, "hostd_vm_world_switches", "Entries into the guest from another context.", (),
         lambda vm: [((), vm.world_switches)]),
    _Row(GaugeMetricFamily, "hostd_vm_memory_bytes",
         "Memory: assigned to the guest, resident in the pool, and of that shared with others or private; "
         "ballooned, swapped; its working set and its target, once they are known.",
         ("kind",),
         lambda vm: _known(vm.memory_usage, {kind: kind for kind in (
             "assigned", "resident", "shared", "private", "ballooned", "swapped", "working_set", "target")})),
    _Row(GaugeMetricFamily, "hostd_vm_memory_guest_bytes",
         "Memory as the guest says, if it has a balloon driver that does.", ("kind",),
         lambda vm: _known(vm.memory_usage, {"free": "guest_free", "available": "guest_available",
                                             "total": "guest_total"})),
    _Row(GaugeMetricFamily, "hostd_vm_memory_reservation_bytes", "Machine memory that nobody takes from it.",
         (), lambda vm: [((), vm.reservation)]),
    _Row(GaugeMetricFamily, "hostd_vm_memory_limit_bytes", "The most machine memory it gets.", (),
         lambda vm: [((), vm.limit)]),
    _Row(GaugeMetricFamily, "hostd_vm_memory_shares", "Its claim on memory relative to other VMs.", (),
         lambda vm: [((), vm.shares)]),
    _Row(GaugeMetricFamily, "hostd_vm_memory_waiting",
         "1 while the guest stands still: it wants memory, and has as much as it may at the moment.", (),
         lambda vm: [((), vm.memory_waiting)]),
    _Row(CounterMetricFamily, "hostd_vm_memory_pages",
         "Pages merged with others of the same contents, broken from them by a write, given up as zeros, "
         "swapped out and in, inflated into the balloon and deflated from it, reported as free by the guest.",
         ("event",),
         lambda vm: [((event,), count) for event, count in msgspec.structs.asdict(vm.memory_events).items()]),
    _Row(CounterMetricFamily, "hostd_vm_boots", "Starts and resets of the guest.", (),
         lambda vm: [((), vm.boots)]),
    _Row(CounterMetricFamily, "hostd_vm_crashes", "Times the guest broke its machine or lost its worker.", (),
         lambda vm: [((), vm.crashes)]),
)

#: of machine memory
MEMORY_METRICS = (
    _Row(GaugeMetricFamily, "hostd_pool_bytes", "Size of the machine memory pool.", (),
         lambda memory: [((), memory.pool)]),
    _Row(GaugeMetricFamily, "hostd_pool_frames", "Machine frames of 4096 bytes by state.", ("state",),
         lambda memory: [((state,), count // PAGE) for state, count in (
             ("free", memory.free), ("granted", memory.lent), ("private", memory.private),
             ("shared", memory.shared), ("overhead", memory.overhead))]),
    _Row(GaugeMetricFamily, "hostd_memory_saved_bytes", "What guests would have besides if none shared.", (),
         lambda memory: [((), memory.saved)]),
    _Row(GaugeMetricFamily, "hostd_memory_state",
         "1 for the state of the memory policy, from plenty (high) to none (low), 0 for the others.",
         ("state",), lambda memory: [((state,), state == memory.state) for state in PRESSURES]),
    _Row(GaugeMetricFamily, "hostd_memory_waiting_workers", "Workers that wait for machine memory.", (),
         lambda memory: [((), memory.waiting)]),
    _Row(GaugeMetricFamily, "hostd_memory_swap_bytes",
         "In the swap file: memory of guests (used), and what it takes there (compressed).", ("kind",),
         lambda memory: [((kind,), getattr(memory.swap, kind)) for kind in ("used", "compressed")]),
    _Row(GaugeMetricFamily, "hostd_memory_swap_limit_bytes", "The most that swap may take; 0: no swap.", (),
         lambda memory: [((), memory.swap.limit)]),
    _Row(CounterMetricFamily, "hostd_memory_scanned_pages", "Pages looked at for page sharing.", (),
         lambda memory: [((), memory.scanned)]),
)

#: of the workers, all together
WORKER_METRICS = (
    _Row(GaugeMetricFamily, "hostd_workers", "Worker processes by state.", ("state",),
         lambda workers: [(("ready",), sum(worker.ready for worker in workers)),
                          (("starting",), sum(not worker.ready for worker in workers))]),
    _Row(CounterMetricFamily, "hostd_worker_restarts", "Workers replaced after they died.", (),
         lambda workers: [((), sum(worker.restarts for worker in workers))]),
    _Row(GaugeMetricFamily, "hostd_worker_vms", "VMs on a worker.", ("worker",),
         lambda workers: [((str(worker.index),), worker.vms) for worker in workers]),
)

#: of the binary translator of every worker; `worker`, its index, is the first label of each.  One that is
#: replaced counts from zero again, which Prometheus takes for what it is
TRANSLATOR_METRICS = (
    _Row(CounterMetricFamily, "hostd_tc_units", "Translation units made.", (),
         lambda translator: [((), translator.units)]),
    _Row(CounterMetricFamily, "hostd_tc_instructions", "Guest instructions translated.", (),
         lambda translator: [((), translator.instructions)]),
    _Row(CounterMetricFamily, "hostd_tc_chained_jumps", "Jumps linked to the unit they lead to.", (),
         lambda translator: [((), translator.chained)]),
    _Row(CounterMetricFamily, "hostd_tc_units_shared", "Units reused that were made for another guest.", (),
         lambda translator: [((), translator.shared)]),
    _Row(CounterMetricFamily, "hostd_tc_units_evicted", "Units that made room for others.", (),
         lambda translator: [((), translator.evicted)]),
    _Row(CounterMetricFamily, "hostd_tc_units_invalidated", "Units whose guest code changed.", (),
         lambda translator: [((), translator.invalidated)]),
    _Row(CounterMetricFamily, "hostd_tc_units_rejected", "Units that the verifier did not let pass.", (),
         lambda translator: [((), translator.rejected)]),
    _Row(GaugeMetricFamily, "hostd_tc_code_pages", "Pages of guest code that translations are kept for.", (),
         lambda translator: [((), translator.pages)]),
    _Row(GaugeMetricFamily, "hostd_tc_used_bytes", "Translation cache in use.", (),
         lambda translator: [((), translator.used_bytes)]),
)

#: of migrations that are over
MIGRATION_METRICS = (
    _Row(CounterMetricFamily, "hostd_migrations", "Migrations that are over, by what they came to.",
         ("direction", "outcome"), lambda totals: totals.migrations.items()),
    _Row(CounterMetricFamily, "hostd_migration_bytes", "Sent or received for migrations that are over.",
         ("direction", "kind"), lambda totals: totals.bytes.items()),
    _Row(CounterMetricFamily, "hostd_migration_pages", "Pages of guests in migrations that are over.",
         ("direction", "kind"), lambda totals: totals.pages.items()),
)

#: of every VM that migrates now; `name`, the VM's, is the first label of each
VM_MIGRATION_METRICS = (
    _Row(GaugeMetricFamily, "hostd_vm_migration_phase", "1 for the phase its migration is in, 0 for others.",
         ("phase",), lambda view: [((phase,), phase == view.phase) for phase in UNDER_WAY]),
    _Row(GaugeMetricFamily, "hostd_vm_migration_round", "Times its memory was gone through.", (),
         lambda view: [((), view.round)]),
    _Row(GaugeMetricFamily, "hostd_vm_migration_remaining_bytes", "Memory that is still to be moved.", (),
         lambda view: [((), view.remaining_pages * PAGE)]),
    _Row(GaugeMetricFamily, "hostd_vm_migration_dirty_pages_per_second", "Pages the guest writes to.", (),
         lambda view: [((), view.dirty_rate)]),
    _Row(GaugeMetricFamily, "hostd_vm_migration_throughput_bytes_per_second", "What goes over the wire.", (),
         lambda view: [((), view.throughput)]),
)


def _known(value: object, kinds: Mapping[str, str]) -> list[_Sample]:
    """Samples by kind of those attributes of `value` that are not None."""
    return [((kind,), amount) for kind, name in kinds.items() if (amount := getattr(value, name)) is not None]


def reason_of(code: int) -> str:
    """The reason an exit code counts for; negative codes mean what the 64-bit EXITCODE field would hold."""
    return REASONS.get(code & (1 << 64) - 1, OTHER_REASON)


class HostCollector(Collector):
    """Reads the host at every scrape; for the daemon's trio thread, like the host itself."""

    def __init__(self, host: Host) -> None:
        self._host = host
        view = host.overview.view()
        self._version = view.version
        # once, since a difference of clocks that is taken anew would wander
        self._started = time.time() - view.uptime_s

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily("hostd_build_info", "The version that runs.", labels=("version",))
        build.add_metric((self._version,), 1)
        yield build
        yield GaugeMetricFamily("hostd_start_time_seconds", "When the daemon started, in Unix time.",
                                self._started)
        views: list[VmView] = self._host.views()
        memory: MemoryView = self._host.overview.memory(views)
        yield from _families(MEMORY_METRICS, (), [((), memory)])
        workers: list[WorkerView] = self._host.overview.workers()
        yield from _families(WORKER_METRICS, (), [((), workers)])
        yield from _families(TRANSLATOR_METRICS, ("worker",),
                             [((str(worker.index),), worker.translator) for worker in workers])
        yield self._latency()
        yield _count_by_state(views)
        yield from _families(VM_METRICS, ("name",), [((vm.name,), vm) for vm in views])
        yield from _exits((vm.name, self._host.exits(vm.name)) for vm in views)
        yield from self._migrations()

    def _latency(self) -> Metric:
        counts, seconds = self._host.overview.latency()
        return HistogramMetricFamily(
            "hostd_scheduler_wakeup_latency_seconds",
            "Time from the wake-up of a halted guest to its turn on a CPU.",
            buckets=_buckets([bound / 1e9 for bound in LATENCY_BOUNDS_NS], counts), sum_value=seconds)

    def _migrations(self) -> Iterator[Metric]:
        migrations = self._host.migrations
        totals = migrations.totals
        yield from _families(MIGRATION_METRICS, (), [((), totals)])
        yield _by_direction("hostd_migration_downtime_seconds",
                            "How long guests stood still to be handed over.", totals.downtime)
        yield _by_direction("hostd_migration_duration_seconds",
                            "Length of migrations that were done.", totals.duration)
        # one a VM: no series must be there twice
        under_way = {view.vm: view for view in migrations.list() if view.phase in UNDER_WAY}
        yield _count_by_phase(under_way.values())
        yield from _families(VM_MIGRATION_METRICS, ("name",),
                             [((name,), view) for name, view in under_way.items()])


def _families(rows: Iterable[_Row], labels: tuple[str, ...],
              subjects: list[tuple[tuple[str, ...], _Subject]]) -> Iterator[Metric]:
    """The rows' metrics over all subjects, each given with the values of `labels`."""
    for row in rows:
        family = row.family(row.name, row.help, labels=(*labels, *row.labels))
        for values, subject in subjects:
            for more, value in row.samples(subject):
                family.add_metric((*values, *more), value)
        yield family


def _count_by_state(views: Iterable[VmView]) -> Metric:
    count = dict.fromkeys(State, 0)
    for vm in views:
        count[vm.state] += 1
    family = GaugeMetricFamily("hostd_vms", "VMs by state.", labels=("state",))
    for state, vms in count.items():
        family.add_metric((state.value,), vms)
    return family


def _count_by_phase(under_way: Iterable[MigrationView]) -> Metric:
    count = dict.fromkeys(UNDER_WAY, 0)
    for view in under_way:
        count[view.phase] += 1
    family = GaugeMetricFamily("hostd_migrations_under_way", "VMs that migrate now, by phase.",
                               labels=("phase",))
    for phase, views in count.items():
        family.add_metric((phase,), views)
    return family


def _buckets(bounds: Sequence[float], counts: Iterable[int]) -> list[tuple[str, float]]:
    """Counts by bucket, of which there is one more than bounds, as Prometheus has them: cumulative."""
    return list(zip([*map(str, bounds), "+Inf"], accumulate(counts), strict=True))


def _by_direction(name: str, help: str, histograms: Mapping[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(name, help, labels=("direction",))
    for direction, histogram in histograms.items():
        family.add_metric((direction,), _buckets(histogram.bounds, histogram.counts), histogram.sum)
    return family


def _exits(rows_of: Iterable[tuple[str, list[ExitRow]]]) -> tuple[Metric, Metric]:
    """Exits by reason; a reason appears with the VM's first exit for it, since most VMs never have most."""
    counts = CounterMetricFamily("hostd_vm_exits", "Exits from the guest by reason.",
                                 labels=("name", "reason"))
    times = CounterMetricFamily("hostd_vm_exit_handling_seconds", "Time spent handling the guest's exits.",
                                labels=("name", "reason"))
    for name, rows in rows_of:
        totals: dict[str, tuple[int, float]] = {}
        for row in rows:
            reason = reason_of(row.code)
            count, seconds = totals.get(reason, (0, 0.0))
            totals[reason] = (count + row.count, seconds + row.seconds)
        for reason, (count, seconds) in totals.items():
            counts.add_metric((name, reason), count)
            times.add_metric((name, reason), seconds)
    return counts, times


def make_metrics_app(host: Host) -> ASGIApp:
    """The application that serves GET /metrics, as text or OpenMetrics, whichever the scraper prefers."""
    registry = CollectorRegistry()
    registry.register(HostCollector(host))
    ProcessCollector(registry=registry)             # process_*: CPU, memory, files of the daemon itself

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"Content-Type": content_type})

    async def root(request: Request) -> Response:
        return PlainTextResponse(CONTENT_OF_ROOT)

    return Starlette(routes=[Route("/metrics", metrics), Route("/", root)])
