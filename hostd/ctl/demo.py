# SPDX-License-Identifier: GPL-2.0-or-later
"""`hostctl demo`: a private daemon, one booted guest, and many clones of it, watched live."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Group
from rich.text import Text

from hostd.ctl.client import Client, vm_path
from hostd.ctl.errors import CtlError
from hostd.ctl.formatting import console, duration, print_fields, size
from hostd.ctl.images import register
from hostd.ctl.live import Activity, Screen
from hostd.ctl.private import PrivateDaemon, private_daemon
from hostd.ctl.pull import RECIPES, PullError, build_debian
from hostd.ctl.usage import CpuMeter, processes, proportional_bytes
from hostd.lifecycle import State
from hostd.model import MONITORS, CloneRequest, MonitorName
from vmm import guests

TEMPLATE = "template"
_BOOT_TIMEOUT = 300.0
_TOP_EXITS = 6
#: what is translated is 32-bit code
_DEBIAN: dict[MonitorName, str] = {"hw": "debian", "bt": "debian-i386"}


@dataclass(frozen=True)
class Template:
    """What the guests are clones of."""

    kernel: Path
    initrd: Path | None
    append: str
    memory: int
    #: what its console shows when it is up and has nothing more to do
    ready: str
    vmm: MonitorName = "hw"


@dataclass(frozen=True)
class Figures:
    """What the demo measured."""

    daemon_seconds: float
    boot_seconds: float
    clone_seconds: float
    bytes_per_guest: float
    idle_cpu: float
    exits: Counter[str]


@click.command("demo")
@click.option("--guests", type=click.IntRange(1, 1000), default=50, show_default=True, metavar="N",
              help="How many guests to run.")
@click.option("--seconds", type=click.FloatRange(1), default=30.0, show_default=True, metavar="S",
              help="How long to watch them.")
@click.option("--vmm", type=click.Choice(MONITORS), default=MONITORS[0], show_default=True,
              help="The monitor that runs them.")
def demo_command(guests: int, seconds: float, vmm: MonitorName) -> None:
    """Boot one Linux guest, clone it to fifty running ones, watch them, and tell what they cost.

    Needs no daemon and no configuration: it runs its own with temporary state and leaves nothing behind.
    Without Debian's kernel (hostctl gets it by apt), a small kernel of our own takes its place.
    """
    template = choose_template(vmm)
    with private_daemon() as daemon:
        say(f"metrics: {daemon.client.host().metrics}")
        try:
            figures = run(daemon, template, guests, seconds)
        except KeyboardInterrupt:
            raise CtlError("interrupted, cleaning up") from None
    summarize(figures, guests)


def choose_template(vmm: MonitorName = "hw") -> Template:
    """Debian if it can be had, the kind that the monitor is for; else our own idle kernel."""
    try:
        image = build_debian(progress=say, recipe=RECIPES[_DEBIAN[vmm]])
    except PullError as error:
        say(f"no Debian image ({error}): using a kernel of our own")
        return Template(guests.path("idle"), None, "", 16 << 20, "idle: tick", vmm)
    say(f"guests: Debian {image.version}")
    # The last thing the image's start does is to show a prompt.
    return Template(image.kernel, image.initrd, image.append, 128 << 20, r"/ # ", vmm)


def run(daemon: PrivateDaemon, template: Template, count: int, seconds: float) -> Figures:
    """The demo itself, once a daemon is there."""
    client = daemon.client
    boot_seconds = boot(client, template)
    say(f"{TEMPLATE}: {duration(boot_seconds)} to its prompt; making {count} clones")
    clone_seconds = clone(client, count)
    say(f"{count} guests running after {duration(clone_seconds)}")
    pids = processes(client.host())
    idle_cpu = watch(client, seconds, pids)
    return Figures(
        daemon_seconds=daemon.start_seconds,
        boot_seconds=boot_seconds,
        clone_seconds=clone_seconds,
        bytes_per_guest=proportional_bytes(pids) / count,
        idle_cpu=idle_cpu,
        exits=exits_by_reason(client),
    )


def boot(client: Client, template: Template) -> float:
    """Start the template and wait until it is up; then pause it, so that it stays as it is."""
    register(client, TEMPLATE, template.kernel, template.initrd, template.append)
    client.call("POST", "/vms", body={"name": TEMPLATE, "image": TEMPLATE, "memory": template.memory,
                                      "vmm": template.vmm})
    began = time.monotonic()
    client.finish(client.begin("POST", vm_path(TEMPLATE, "start")))
    client.call("GET", vm_path(TEMPLATE, "wait"), patience=None,
                query={"console": template.ready, "timeout": _BOOT_TIMEOUT})
    elapsed = time.monotonic() - began
    client.finish(client.begin("POST", vm_path(TEMPLATE, "pause")))
    return elapsed


def clone(client: Client, count: int) -> float:
    """Make the guests and have them run; how long it took."""
    names = [f"guest-{number:02}" for number in range(1, count + 1)]
    began = time.monotonic()
    client.finish(client.begin("POST", vm_path(TEMPLATE, "clone"), CloneRequest(names=names, start=True)))
    for name in names:
        client.call("GET", vm_path(name, "wait"), query={"state": State.RUNNING, "timeout": _BOOT_TIMEOUT},
                    patience=None)
    return time.monotonic() - began


def watch(client: Client, seconds: float, pids: list[int]) -> float:
    """Show the live table for a while; the CPUs the daemon used in the second half, when all had settled."""
    activity = Activity(client)
    activity.look()
    end = time.monotonic() + seconds
    meter: CpuMeter | None = None
    with Screen() as screen:
        while (left := end - time.monotonic()) > 0:
            if meter is None and left <= seconds / 2:
                meter = CpuMeter(pids)
            time.sleep(min(1.0, left, seconds / 4))
            activity.look()
            if screen.rows is not None:
                remark = Text(f"\n{max(left, 0):.0f} s left; Ctrl-C ends", style="dim")
                screen.show(Group(activity.table(screen.rows), remark))
    console().print(activity.table())
    assert meter is not None, "the loop looks at least twice in the second half"
    return meter.share()


def exits_by_reason(client: Client) -> Counter[str]:
    """Exits of all VMs."""
    total: Counter[str] = Counter()
    for vm in client.vms():
        total.update({row.name: row.count for row in client.exits(vm.name)})
    return total


def summarize(figures: Figures, count: int) -> None:
    """The numbers the host is judged by."""
    total = max(figures.exits.total(), 1)
    most = figures.exits.most_common(_TOP_EXITS)
    common = ", ".join(f"{name} {number / total:.0%}" for name, number in most)
    click.echo()
    print_fields(
        [
            ("daemon start to first answer", duration(figures.daemon_seconds)),
            ("template, power-on to prompt", duration(figures.boot_seconds)),
            (f"{count} running guests from it", f"{figures.clone_seconds:.2f}s"),
            ("memory per guest, all in (PSS)", size(figures.bytes_per_guest)),
            ("CPU of the host, all idle", f"{figures.idle_cpu:.1%} of one core"),
            ("exits", f"{figures.exits.total()}: {common}"),
        ]
    )


def say(text: str) -> None:
    """Progress, beside the results."""
    click.echo(text, err=True)
