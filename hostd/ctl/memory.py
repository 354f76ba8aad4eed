# SPDX-License-Identifier: GPL-2.0-or-later
"""`hostctl memory`: who has how much machine memory, as guests and host see it."""

from __future__ import annotations

import sys
from typing import Any

import click
import msgspec

from hostd.ctl.errors import CtlError
from hostd.ctl.formatting import print_json, print_table, size
from hostd.ctl.session import VM_NAME, Session, format_option, pass_session
from hostd.model import MemoryView, VmView

_HEADINGS = ("NAME", ">ASSIGNED", ">RESIDENT", ">PRIVATE", ">SHARED", ">BALLOONED", ">SWAPPED",
             ">WORKING SET", ">TARGET", ">GUEST FREE")


@click.command("memory")
@click.argument("names", metavar="[NAME]...", type=VM_NAME, nargs=-1)
@click.option("--check", is_flag=True,
              help="Check the books of machine memory, too: say what is wrong, and exit with 1.")
@format_option
@pass_session
def memory_command(session: Session, names: tuple[str, ...], check: bool) -> None:
    """Show how the memory of VMs, of all or of those named, stands, and that of the host."""
    client = session.client
    vms = [client.vm(name) for name in session.expand(names)] if names else client.vms()
    host = client.memory(check)
    if session.json:
        print_json({"vms": [{"name": vm.name, **msgspec.to_builtins(vm.memory_usage),
                             "waiting": vm.memory_waiting} for vm in vms], "host": host})
    else:
        print_table(_HEADINGS, [_row(vm) for vm in vms])
        click.echo(_describe(host, [vm.name for vm in vms if vm.memory_waiting]))
    _complain(host.wrong or [])


def _row(vm: VmView) -> tuple[Any, ...]:
    usage = vm.memory_usage
    return (vm.name, size(usage.assigned), size(usage.resident), size(usage.private), size(usage.shared),
            size(usage.ballooned), size(usage.swapped),
            *("-" if count is None else size(count)
              for count in (usage.working_set, usage.target, usage.guest_free)))


def _describe(host: MemoryView, waiting: list[str]) -> str:
    """The host in one line, and who is `waiting` for more than it may have."""
    parts = [f"{size(host.free)} of {size(host.pool)} free ({host.state})"]
    parts += [f"{size(getattr(host, what))} {what}" for what in ("private", "shared", "overhead", "lent")]
    parts.append(f"{size(host.saved)} saved by sharing ({host.scan_rate:.0f} pages/s scanned)")
    swap = host.swap
    parts.append(f"{size(swap.used)} swapped to {size(swap.compressed)} of {size(swap.limit)}" if swap.limit
                 else "no swap")
    if host.waiting:
        parts.append(f"{host.waiting} workers wait for memory")
    if waiting:
        parts.append(f"at their limit and standing still: {' '.join(waiting)}")
    if host.wrong == []:
        parts.append("the books are right")
    return f"host: {', '.join(parts)}"


def _complain(wrong: list[str]) -> None:
    """Fail with all that is wrong, a sentence each."""
    errors = [CtlError(f"the books of machine memory are wrong: {sentence}") for sentence in wrong]
    for error in errors[1:]:
        error.show(sys.stderr)
    if errors:
        raise errors[0]
