# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands that make, change and end VMs, and show them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import msgspec

from hostd.ctl.client import vm_path
from hostd.ctl.errors import CtlError
from hostd.ctl.formatting import dash, duration, print_fields, print_json, print_table, size, state
from hostd.ctl.session import SIZE, VM_NAME, Session, format_option, many_names, one_name, pass_session
from hostd.lifecycle import Policy
from hostd.migration.views import SwitchedView, SwitchRequest
from hostd.model import MONITORS, CloneRequest, Monitor, StopRequest, VmView

_POLICIES = click.Choice([policy.value for policy in Policy])
_FILE = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)


def _policies(command: Callable[..., Any]) -> Callable[..., Any]:
    for option, what in (("--on-poweroff", "powers off"), ("--on-crash", "crashes")):
        command = click.option(option, type=_POLICIES, help=f"What follows when the guest {what}.")(command)
    return command


def _shares(command: Callable[..., Any]) -> Callable[..., Any]:
    cap = click.option("--cap", type=int, metavar="PCT", help="At most so many percent of a CPU; 0: no cap.")
    weight = click.option("--weight", type=int, metavar="N", help="Share of the CPUs, against 100 of others.")
    return weight(cap(command))


def _memory(command: Callable[..., Any]) -> Callable[..., Any]:
    """--memory and what goes with it."""
    options = (
        click.option("--memory", type=SIZE, help="RAM, like 128M or 1G (default of create: the daemon's)."),
        click.option("--reservation", type=SIZE, help="Machine memory that is its own (default: 0)."),
        click.option("--limit", type=SIZE, help="The most machine memory it gets (default: all its RAM)."),
        click.option("--shares", type=int, metavar="N",
                     help="Claim on memory when there is too little (default: 10 for each MiB)."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command("create")
@click.argument("name")
@click.option("--image", help="A registered image (hostctl image list).")
@click.option("--kernel", type=_FILE, help="A Linux, multiboot or flat kernel.")
@click.option("--initrd", type=_FILE, help="Its initial RAM disk or module.")
@click.option("--append", help="Its command line; with an image, instead of the image's own.")
@_memory
@click.option("--vmm", type=click.Choice(MONITORS), help="The monitor that runs it (default: the daemon's).")
@_shares
@_policies
@click.option("--autostart", is_flag=True, help="Start it with the daemon.")
@click.option("--start", is_flag=True, help="Start it now.")
@pass_session
def create_command(
    session: Session, name: str, kernel: Path | None, initrd: Path | None, start: bool, **options: Any
) -> None:
    """Define a VM of an IMAGE, or of a KERNEL of its own."""
    if (kernel is None) == (options["image"] is None):
        raise click.UsageError("give either --image or --kernel")
    if initrd is not None and kernel is None:
        raise click.UsageError("--initrd goes with --kernel")
    spec = {"name": name, **{key: value for key, value in options.items() if value is not None}}
    for key, path in (("kernel", kernel), ("initrd", initrd)):
        if path is not None:
            spec[key] = session.client.upload(path)
    session.client.call("POST", "/vms", body=spec, patience=None)
    if start:
        _act(session, "start", [name])


@click.command("list")
@click.argument("names", metavar="[NAME]...", type=VM_NAME, nargs=-1)
@format_option
@pass_session
def list_command(session: Session, names: tuple[str, ...]) -> None:
    """Show all VMs, or those named."""
    vms = session.client.vms()
    if names:
        wanted = session.expand(names)
        known = {vm.name: vm for vm in vms}
        vms = [known.get(name) or session.client.vm(name) for name in wanted]
    if session.json:
        print_json(vms)
        return
    print_table(_HEADINGS, [_row(vm) for vm in vms])


_HEADINGS = ("NAME", "STATE", ">MEMORY", ">PRIVATE", ">SHARED", ">CPU", ">UPTIME", "VMM", "IMAGE", "TEMPLATE")


def _row(vm: VmView) -> tuple[Any, ...]:
    usage = vm.memory_usage
    return (
        vm.name, state(vm.state), size(vm.memory), size(usage.private), size(usage.shared),
        duration(vm.cpu.run), duration(vm.uptime_s), vm.vmm, dash(vm.image), dash(vm.template),
    )  # fmt: skip


@click.command("show")
@one_name
@format_option
@pass_session
def show_command(session: Session, name: str) -> None:
    """Show everything about one VM."""
    vm = session.client.vm(name)
    if session.json:
        print_json(vm)
        return
    fields: list[tuple[str, Any]] = []
    for field, value in msgspec.to_builtins(vm).items():
        label = field.removesuffix("_s").replace("_", " ")
        match value:
            case dict() if field == "cpu":
                fields += [(f"cpu {part}", duration(seconds)) for part, seconds in value.items()]
            case dict() if field == "memory_events":
                fields += [(f"pages {what.replace('_', ' ')}", count) for what, count in value.items()]
            case dict():
                fields += [(f"memory {part.replace('_', ' ')}", size(count)) for part, count in value.items()
                           if count is not None]
            case int() if field in ("memory", "memory_target", "reservation", "limit"):
                fields.append((label, size(value)))
            case _ if field.endswith("_s"):
                fields.append((label, duration(value)))
            case _ if field == "state":
                fields.append((label, state(vm.state)))
            case _ if value is not None and value != "":
                fields.append((label, value))
    print_fields(fields)


def _act(session: Session, verb: str, names: list[str], body: Any = None, **query: Any) -> None:
    """Do one thing to several VMs at once.  All are tried, each failure is told, the first decides."""
    begun = []
    failures: list[CtlError] = []

    def attempt(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except CtlError as error:
            failures.append(error)
            return None

    client = session.client
    for name in names:
        method, path = ("DELETE", vm_path(name)) if verb == "destroy" else ("POST", vm_path(name, verb))
        begun.append(attempt(partial(client.begin, method, path, body, query)))
    for operation in filter(None, begun):
        attempt(partial(client.finish, operation))
    for error in failures[1:]:
        error.show(sys.stderr)
    if failures:
        raise failures[0]


@click.command("start")
@many_names
@pass_session
def start_command(session: Session, names: tuple[str, ...]) -> None:
    """Power VMs on."""
    _act(session, "start", session.expand(names))


@click.command("pause")
@many_names
@pass_session
def pause_command(session: Session, names: tuple[str, ...]) -> None:
    """Take running VMs off their CPUs."""
    _act(session, "pause", session.expand(names))


@click.command("resume")
@many_names
@pass_session
def resume_command(session: Session, names: tuple[str, ...]) -> None:
    """Let paused VMs go on."""
    _act(session, "resume", session.expand(names))


@click.command("stop")
@many_names
@click.option("--force", "-f", is_flag=True, help="Cut the power at once.")
@click.option("--timeout", type=click.FloatRange(0), metavar="S",
              help="Cut the power after so many seconds (default: the daemon's).")
@pass_session
def stop_command(session: Session, names: tuple[str, ...], force: bool, timeout: float | None) -> None:
    """Press the power button of VMs, and cut the power of those that do not follow."""
    _act(session, "stop", session.expand(names), StopRequest(force=force, timeout=timeout))


@click.command("reset")
@many_names
@pass_session
def reset_command(session: Session, names: tuple[str, ...]) -> None:
    """Start VMs anew, as their reset button would."""
    _act(session, "reset", session.expand(names))


@click.command("destroy")
@many_names
@click.option("--force", "-f", is_flag=True, help="Also those that are running or paused.")
@pass_session
def destroy_command(session: Session, names: tuple[str, ...], force: bool) -> None:
    """Forget VMs, with all that is in their memory."""
    _act(session, "destroy", session.expand(names), force="true" if force else None)


@click.command("clone")
@one_name
@click.argument("new", metavar="NEW...", nargs=-1)
@click.option("--count", type=click.IntRange(1, 1000), metavar="N", help="Make NEW-1 to NEW-N.")
@click.option("--start", is_flag=True, help="Let them run at once.")
@pass_session
def clone_command(session: Session, name: str, new: tuple[str, ...], count: int | None, start: bool) -> None:
    """Make VMs that continue where the paused VM NAME stands, sharing its memory until they write to it."""
    if count is not None:
        if len(new) > 1:
            raise click.UsageError("with --count, give one NEW to number (default: NAME)")
        prefix = new[0] if new else name
        new = tuple(f"{prefix}-{number}" for number in range(1, count + 1))
    if not new:
        raise click.UsageError("give the names of the clones, or --count")
    client = session.client
    client.finish(client.begin("POST", vm_path(name, "clone"), CloneRequest(names=list(new), start=start)))


@click.command("switch")
@one_name
@click.argument("vmm", metavar="|".join(MONITORS), type=click.Choice(MONITORS))
@format_option
@pass_session
def switch_command(session: Session, name: str, vmm: Monitor) -> None:
    """Have another monitor run the VM NAME, running or paused, from here on."""
    client = session.client
    result = client.finish(client.begin("POST", vm_path(name, "switch"), SwitchRequest(vmm=vmm)))
    view = msgspec.convert(result, SwitchedView)
    if session.json:
        print_json(view)
    else:
        click.echo(f"{name}: under {view.vmm}, stood still for {view.pause_s * 1000:.1f} ms")


@click.command("set")
@click.argument("words", metavar="NAME... [KEY=VALUE]...", type=VM_NAME, nargs=-1, required=True)
@_memory
@_shares
@_policies
@click.option("--autostart/--no-autostart", default=None, help="Start it with the daemon.")
@pass_session
@click.pass_context
def set_command(ctx: click.Context, session: Session, words: tuple[str, ...], **options: Any) -> None:
    """Change the memory, the shares and the policies of VMs, running or not.

    hostctl set 'web-*' memory=96M weight=200 is the same as --memory 96M --weight 200.  The memory of a VM
    that is off is its new size; one that is on is asked to make do with so much of what it was started with.
    """
    names = tuple(word for word in words if "=" not in word)
    changes = {key: value for key, value in options.items() if value is not None}
    for word in words:
        if "=" in word:
            key, value = _setting(ctx, word)
            if key in changes:
                raise click.UsageError(f"{key} is given twice")
            changes[key] = value
    if not names:
        raise click.UsageError("name the VMs to change")
    if not changes:
        raise click.UsageError("say what to change, such as memory=96M or --weight 200")
    for name in session.expand(names):
        session.client.call("PATCH", vm_path(name), body=changes)


def _setting(ctx: click.Context, word: str) -> tuple[str, Any]:
    """KEY=VALUE, where KEY is an option of the command, as that option would have it."""
    key, _, value = word.partition("=")
    options = {option.name: option for option in ctx.command.params if isinstance(option, click.Option)}
    option = options.get(key.replace("-", "_"))
    if option is None or option.name is None:
        raise click.UsageError(f"{key!r} cannot be set: {', '.join(str(name) for name in options)} can")
    return option.name, option.type.convert(value, option, ctx)
