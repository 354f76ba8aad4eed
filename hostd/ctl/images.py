# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands for images: a named kernel with its initrd and command line."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from urllib.parse import quote

import click

from hostd.ctl.client import Client
from hostd.ctl.errors import CtlError
from hostd.ctl.formatting import dash, print_json, print_table, size
from hostd.ctl.pull import RECIPES, PullError, build_debian
from hostd.ctl.session import Session, format_option, pass_session
from hostd.model import ImageSpec

_FILE = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)


@click.group("image")
def image_command() -> None:
    """Pull, add, list and remove images."""


def register(client: Client, name: str, kernel: Path, initrd: Path | None, append: str) -> None:
    """Upload what the image is made of, and name it."""
    spec = ImageSpec(name=name, kernel=client.upload(kernel), append=append,
                     initrd=client.upload(initrd) if initrd else None)
    client.call("POST", "/images", body=spec, patience=None)


@image_command.command("pull")
@click.argument("what", type=click.Choice(list(RECIPES)))
@click.option("--name", default=None, help="What to call it (default: as it is).")
@pass_session
def pull(session: Session, what: str, name: str | None) -> None:
    """Get a kernel of Debian's and busybox by apt, and make a bootable image of them: the cloud kernel
    (debian), or one for 32-bit PCs (debian-i386), with large physical addresses (debian-i386-pae)."""
    session.client.host()  # a daemon that is not there is told before the download
    try:
        image = build_debian(progress=lambda text: click.echo(text, err=True), recipe=RECIPES[what])
    except PullError as error:
        raise CtlError(str(error)) from None
    register(session.client, name or what, image.kernel, image.initrd, image.append)
    click.echo(f"image {name or what}: Debian {image.version}")


@image_command.command("add")
@click.argument("name")
@click.option("--kernel", type=_FILE, required=True, help="A Linux, multiboot or flat kernel.")
@click.option("--initrd", type=_FILE, help="Its initial RAM disk or module.")
@click.option("--append", default="", help="Its command line.")
@pass_session
def add(session: Session, name: str, kernel: Path, initrd: Path | None, append: str) -> None:
    """Name a kernel, its initrd and its command line."""
    register(session.client, name, kernel, initrd, append)


@image_command.command("list")
@format_option
@pass_session
def list_images(session: Session) -> None:
    """Show all images."""
    images = session.client.images()
    if session.json:
        print_json(images)
        return
    print_table(
        ("NAME", "KIND", ">SIZE", "CREATED", "KERNEL", "INITRD", "APPEND"),
        [
            (image.name, image.kind, size(image.size), f"{datetime.fromtimestamp(image.created):%F %R}",
             image.kernel[:12], dash(image.initrd and image.initrd[:12]), image.append)
            for image in images
        ],
    )  # fmt: skip


@image_command.command("remove")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@pass_session
def remove(session: Session, names: tuple[str, ...]) -> None:
    """Forget images; VMs made of them stay."""
    for name in names:
        session.client.call("DELETE", f"/images/{quote(name, safe='')}")
