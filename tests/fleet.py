# SPDX-License-Identifier: GPL-2.0-or-later
"""A host without a machine: the views of a fleet whose life is made up, for tests of what shows them."""

from __future__ import annotations

from typing import cast

import msgspec

from hostd.host import Host
from hostd.lifecycle import Policy, State
from hostd.migration.totals import Totals
from hostd.migration.views import MigrationView
from hostd.model import (
    PAGE,
    CpuTimes,
    ExitRow,
    FrameCounts,
    HostView,
    MemoryEvents,
    MemoryUsage,
    MemoryView,
    SwapUsage,
    TranslatorView,
    VmView,
    WorkerView,
)
from hostd.scheduler import LATENCY_BOUNDS_NS
from vmm.exitcodes import ExitCode, exit_name

MIB = 1 << 20


class Migrations:
    """The part of `Host.migrations` that only looks."""

    def __init__(self) -> None:
        self.views: list[MigrationView] = []
        self.totals = Totals()

    def list(self) -> list[MigrationView]:
        return self.views


class Fleet:
    """The part of `Host` that only looks, over guests that lead the same busy life; `live` passes time."""

    def __init__(self, *names: str) -> None:
        self.vms: dict[str, VmView] = {}
        self.exit_counts: dict[str, dict[int, int]] = {}
        self.restarts = 0
        self.translators: dict[int, TranslatorView] = {}
        self.latencies = [0] * (len(LATENCY_BOUNDS_NS) + 1)
        self.migrations = Migrations()
        for name in names:
            self.add(name)

    def as_host(self) -> Host:
        return cast(Host, self)

    def add(self, name: str, state: State = State.RUNNING, cap: int = 0) -> None:
        self.vms[name] = VmView(
            name=name, state=state, reason="", vmm="hw", memory=128 * MIB, memory_target=None,
            reservation=16 * MIB, limit=128 * MIB, shares=1280, weight=100, cap=cap,
            on_crash=Policy.STOP, on_poweroff=Policy.STOP, autostart=False, image="debian", kernel=None,
            initrd=None, append=None, template=None, worker=0 if state is State.RUNNING else None,
            uptime_s=0.0, exit_status=None, cpu=CpuTimes(),
            memory_usage=MemoryUsage(assigned=128 * MIB, resident=40 * MIB, shared=36 * MIB, private=4 * MIB),
            memory_waiting=False, memory_events=MemoryEvents(),
            exits=0, interrupts=0, world_switches=0, boots=1, crashes=0)
        self.exit_counts[name] = {}

    def change(self, name: str, **fields: object) -> None:
        self.vms[name] = msgspec.structs.replace(self.vms[name], **fields)

    def remove(self, name: str) -> None:
        del self.vms[name], self.exit_counts[name]

    def live(self, seconds: float) -> None:
        """Let time pass: every running guest runs, waits, sleeps, exits, boots again and crashes."""
        self.restarts += 1
        for i in range(len(self.latencies)):
            self.latencies[i] += 1
        for name, vm in self.vms.items():
            if vm.state is not State.RUNNING:
                continue
            counts = self.exit_counts[name]
            for code in (ExitCode.IOIO, ExitCode.CPUID, ExitCode.MSR, ExitCode.HLT, ExitCode.NPF,
                         ExitCode.EXCP_PF, ExitCode.CR3_WRITE):
                counts[code] = counts.get(code, 0) + int(seconds * 1000)
            self.change(
                name, uptime_s=vm.uptime_s + seconds, interrupts=vm.interrupts + int(seconds * 250),
                world_switches=vm.world_switches + int(seconds * 500),
                boots=vm.boots + 1, crashes=vm.crashes + 1,
                memory_events=MemoryEvents(
                    merged=vm.memory_events.merged + 100, broken=vm.memory_events.broken + 10,
                    zeroed=vm.memory_events.zeroed + 20, swapped_out=vm.memory_events.swapped_out + 40,
                    swapped_in=vm.memory_events.swapped_in + 30, inflated=vm.memory_events.inflated + 50,
                    deflated=vm.memory_events.deflated + 60, reported=vm.memory_events.reported + 70),
                cpu=CpuTimes(run=vm.cpu.run + seconds * 0.25, wait=vm.cpu.wait + seconds * 0.25,
                             sleep=vm.cpu.sleep + seconds * 0.5))

    # -- what the collector asks

    @property
    def overview(self) -> Fleet:
        """It is its own."""
        return self

    def view(self) -> HostView:
        return HostView(version="1.2.3", pid=1, uptime_s=3600.0, state_dir="/var/lib/hostd",
                        socket="/run/hostd/hostd.sock", metrics=None, memory=1024 * MIB, frames=self.frames(),
                        workers=self.workers(), vms={})

    def workers(self) -> list[WorkerView]:
        return [WorkerView(index=i, pid=100 + i, ready=i == 0, vms=len(self.vms) if i == 0 else 0,
                           silicon="emulated", tsc_khz=2_000_000, restarts=self.restarts,
                           translator=self.translators.get(i, TranslatorView())) for i in range(2)]

    def frames(self) -> FrameCounts:
        return FrameCounts(total=262_144, free=200_000, granted=2_144, private=50_000, shared=9_500,
                           overhead=500)

    def memory(self, vms: list[VmView] | None = None) -> MemoryView:
        frames = self.frames()
        return MemoryView(
            pool=frames.total * PAGE, free=frames.free * PAGE, lent=frames.granted * PAGE,
            private=frames.private * PAGE, shared=frames.shared * PAGE, overhead=frames.overhead * PAGE,
            saved=200 * MIB, swap=SwapUsage(used=30 * MIB, compressed=10 * MIB, limit=100 * MIB),
            state="soft", waiting=3, scan_rate=2500.0, scanned=1_000_000)

    def latency(self) -> tuple[list[int], float]:
        return self.latencies, sum(self.latencies) * 1e-3

    def views(self) -> list[VmView]:
        return list(self.vms.values())

    def exits(self, name: str) -> list[ExitRow]:
        return [ExitRow(code=code, name=exit_name(code), count=count, seconds=count * 1e-6)
                for code, count in self.exit_counts[name].items()]
