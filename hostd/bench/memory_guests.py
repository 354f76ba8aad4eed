# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that are booted one by one, not cloned: what they have in common is for the host to find out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from hostd.ctl.client import Client, vm_path
from hostd.ctl.demo import Template
from hostd.ctl.images import register
from hostd.model import VmCreate

Say = Callable[[str], None]

#: guests that boot at the same time
AT_ONCE = 4
_BOOT_TIMEOUT = 600.0


def boot(client: Client, guests: Mapping[str, Template], say: Say, console: bool = True) -> None:
    """Boot each of the guests, by name, from its template's files, and wait until all of them are up.

    Every one has its number in its kernel's command line, so that no two have the same random numbers.
    """
    images: dict[Template, str] = {}
    for template in guests.values():
        if template not in images:
            images[template] = f"image-{len(images)}"
            register(client, images[template], template.kernel, template.initrd, template.append)
    names = list(guests)
    for start in range(0, len(names), AT_ONCE):
        wave = names[start:start + AT_ONCE]
        for number, name in enumerate(wave, start):
            template = guests[name]
            client.call("POST", "/vms", body=VmCreate(
                name=name, image=images[template], memory=template.memory, vmm=template.vmm,
                append=f"{template.append} number={number}"))
        for operation in [client.begin("POST", vm_path(name, "start")) for name in wave]:
            client.finish(operation)
        for name in wave:
            await_console(client, name, guests[name].ready)
        say(f"{start + len(wave)} of {len(names)} guests are up")


def await_console(client: Client, name: str, pattern: str) -> None:
    """Wait until the guest's console shows it."""
    client.call("GET", vm_path(name, "wait"), patience=None,
                query={"console": pattern, "timeout": _BOOT_TIMEOUT})


def names(count: int) -> Sequence[str]:
    """What they are called."""
    return [f"guest-{number:02}" for number in range(1, count + 1)]
