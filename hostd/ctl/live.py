# SPDX-License-Identifier: GPL-2.0-or-later
"""The live table of VMs: what each did between two looks at the daemon."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from hostd.ctl.client import Client
from hostd.ctl.formatting import console, dash, duration, size, state, table
from hostd.model import FrameCounts, HostView, VmView

_FRAME = 4096

#: SW/S: world switches a second; all fit into eighty columns
_HEADINGS = ("NAME", "STATE", ">WORKER", ">CPU", ">WAIT", ">EXITS/S", ">SW/S", ">PRIVATE", ">SHARED",
             ">UPTIME")


@dataclass(frozen=True)
class _Rates:
    """Per second between two looks; CPU and waiting as parts of one CPU."""

    cpu: float
    wait: float
    exits: float
    switches: float


class Screen:
    """Where the table is shown: redrawn in place on a terminal, one after the other elsewhere."""

    def __init__(self) -> None:
        self._console = console()
        self._live = Live(console=self._console, auto_refresh=False, screen=True)

    def __enter__(self) -> Screen:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    @property
    def rows(self) -> int | None:
        """How many VMs fit on the terminal."""
        return max(self._console.height - 6, 1) if self._console.is_terminal else None

    def show(self, content: RenderableType) -> None:
        if self._console.is_terminal:
            self._live.update(content, refresh=True)
        else:
            self._console.print(content)


class Activity:
    """Looks at the daemon again and again, and shows the difference."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._host: HostView | None = None
        self._vms: dict[str, VmView] = {}
        self._rates: dict[str, _Rates] = {}
        self._time = 0.0

    @property
    def vms(self) -> list[VmView]:
        """The last look."""
        return list(self._vms.values())

    def look(self) -> None:
        """Ask the daemon how things stand now."""
        now, before = time.monotonic(), self._vms
        self._vms = {vm.name: vm for vm in self._client.vms()}
        self._host = self._client.host()
        elapsed = max(now - self._time, 1e-9)
        self._time = now
        self._rates = {
            name: _rates(before[name], vm, elapsed) for name, vm in self._vms.items() if name in before
        }

    def cpu(self) -> float:
        """CPUs all guests together used since the look before."""
        return sum(rates.cpu for rates in self._rates.values())

    def table(self, rows: int | None = None) -> RenderableType:
        """The busiest first, at most `rows` of them, under a line about the host."""
        idle = _Rates(0.0, 0.0, 0.0, 0.0)
        order = sorted(self._vms.values(), key=lambda vm: (-self._rates.get(vm.name, idle).cpu, vm.name))
        body = table(_HEADINGS, [_row(vm, self._rates.get(vm.name, idle)) for vm in order[:rows]])
        hidden = len(order) - len(order[:rows])
        parts: list[RenderableType] = [self._summary(), body]
        if hidden:
            parts.append(Text(f"... and {hidden} more", style="dim"))
        return Group(*parts)

    def _summary(self) -> Text:
        assert self._host is not None
        counts: dict[str, int] = {}
        for vm in self._vms.values():
            counts[str(vm.state)] = counts.get(str(vm.state), 0) + 1
        states = ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "no VMs"
        return Text(
            f"{states}   CPU {self.cpu():.0%} of {len(self._host.workers)} workers   "
            f"memory {_used(self._host.frames)} of {size(self._host.memory)}\n"
        )


def _used(frames: FrameCounts) -> str:
    return size((frames.total - frames.free) * _FRAME)


def _rates(before: VmView, after: VmView, elapsed: float) -> _Rates:
    """Counters that went back belong to a VM that was destroyed and made anew: they start at zero."""

    def rate(old: float, new: float) -> float:
        return max(new - old, 0.0) / elapsed

    return _Rates(
        cpu=rate(before.cpu.run, after.cpu.run),
        wait=rate(before.cpu.wait, after.cpu.wait),
        exits=rate(before.exits, after.exits),
        switches=rate(before.world_switches, after.world_switches),
    )


def _row(vm: VmView, rates: _Rates) -> tuple[object, ...]:
    usage = vm.memory_usage
    return (
        vm.name, state(vm.state), dash(vm.worker), f"{rates.cpu:.1%}", f"{rates.wait:.1%}",
        f"{rates.exits:.0f}", f"{rates.switches:.0f}", size(usage.private), size(usage.shared),
        duration(vm.uptime_s),
    )  # fmt: skip
