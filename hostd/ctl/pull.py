# SPDX-License-Identifier: GPL-2.0-or-later
"""`hostctl image pull debian`: Debian's cloud kernel and static busybox, by apt, made into a bootable image.

Nothing here needs root or a daemon: `apt-get download` fetches the packages apt would install into a
directory of ours, they are unpacked there, and the finished kernel and initramfs are kept in the user's cache
under the versions of both packages.
"""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hostd.ctl import initramfs

META_PACKAGE = "linux-image-cloud-amd64"
BUSYBOX_PACKAGE = "busybox-static"

# Every word earns its place.  loglevel=3: no complaints about hardware a virtual machine lacks (an oops shows
# in full at any level).  tsc=reliable, no_timer_check: the clock and the timer are not doubted.  nokaslr,
# mitigations=off: no time is spent on hiding addresses, or on speculation that emulated silicon does not do.
# panic=-1: a panic resets the machine at once.  8250.nr_uarts=1: only one serial port is probed.  The last
# three stop what would wake an idle guest several times a second: the lockup watchdog, the averages of
# pressure-stall information, and the memory controller's statistics.
APPEND = (
    "console=ttyS0 loglevel=3 tsc=reliable no_timer_check nokaslr mitigations=off panic=-1 8250.nr_uarts=1 "
    "nowatchdog psi=0 cgroup_disable=memory"
)

Progress = Callable[[str], None]


class PullError(Exception):
    """The image cannot be had; the message is one sentence."""


@dataclass(frozen=True)
class PulledImage:
    """Files ready to boot, and the command line they are meant for."""

    kernel: Path
    initrd: Path
    append: str
    version: str


def cache_directory() -> Path:
    """Where finished images are kept: $XDG_CACHE_HOME/hostd, or ~/.cache/hostd."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "hostd"


def build_debian(workdir: Path | None = None, progress: Progress = lambda text: None) -> PulledImage:
    """The Debian image, from the cache in `workdir` (default: the user's) or freshly downloaded and built.

    Without usable apt the newest image in the cache does; without that either, `PullError`.
    """
    cache = workdir if workdir is not None else cache_directory()
    try:
        kernel, busybox = _resolve()
    except PullError:
        if (newest := _newest(cache)) is not None:
            return newest
        raise
    recipe = hashlib.sha256(initramfs.recipe()).hexdigest()[:8]
    version = f"{kernel.version}+busybox-{busybox.version.rpartition(':')[2]}+{recipe}"
    target = cache / f"debian-{version}"
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=cache) as scratch:
            _build(Path(scratch), target, kernel, busybox, progress)
    return _image(target)


@dataclass(frozen=True)
class _Package:
    name: str
    version: str


def _resolve() -> tuple[_Package, _Package]:
    """The kernel package the meta package stands for, and busybox, at the versions apt would install."""
    shown = _run(["apt-cache", "show", "--no-all-versions", META_PACKAGE, BUSYBOX_PACKAGE], check=False)
    fields = {
        stanza["Package"]: stanza
        for stanza in (dict(re.findall(r"^(\w+): (.*)$", text, re.M)) for text in shown.split("\n\n"))
        if "Package" in stanza
    }
    for name in (META_PACKAGE, BUSYBOX_PACKAGE):
        if name not in fields:
            raise PullError(
                f"apt knows no package {name}: run 'apt-get update' as root first, on a Debian system"
            )
    match = re.search(r"(linux-image-[\w.+~-]+) \(= ([^)]+)\)", fields[META_PACKAGE].get("Depends", ""))
    if match is None:
        raise PullError(f"{META_PACKAGE} names no kernel package among its dependencies")
    return _Package(match[1], match[2]), _Package(BUSYBOX_PACKAGE, fields[BUSYBOX_PACKAGE]["Version"])


def _build(scratch: Path, target: Path, kernel: _Package, busybox: _Package, progress: Progress) -> None:
    """Download, unpack, build, and move the result to `target` in one step: a half image is never seen."""
    progress(f"downloading {kernel.name} {kernel.version} and {busybox.name}")
    packages = [f"{package.name}={package.version}" for package in (kernel, busybox)]
    # apt would otherwise try to drop to its own user, which cannot write here, and complain.
    _run(["apt-get", "--quiet=2", "-o", "APT::Sandbox::User=root", "download", *packages], cwd=scratch)
    progress("building the initramfs")
    tree = scratch / "tree"
    for archive in sorted(scratch.glob("*.deb")):
        _run(["dpkg-deb", "--extract", str(archive), str(tree)])
    finished = scratch / "finished"
    finished.mkdir()
    try:
        data = initramfs.build(_only(tree, "**/bin/busybox"), tree)
    except initramfs.InitramfsError as error:
        raise PullError(str(error)) from error
    shutil.copyfile(_only(tree, "boot/vmlinuz-*"), finished / "vmlinuz")
    (finished / "initrd").write_bytes(data)
    try:
        finished.rename(target)
    except OSError:
        if not target.is_dir():  # else somebody else finished the same image meanwhile
            raise


def _only(tree: Path, pattern: str) -> Path:
    for path in sorted(tree.glob(pattern)):
        return path
    raise PullError(f"the downloaded packages hold no file {pattern}")


def _newest(cache: Path) -> PulledImage | None:
    images = sorted(cache.glob("debian-*/initrd"), key=lambda path: path.stat().st_mtime)
    return _image(images[-1].parent) if images else None


def _image(directory: Path) -> PulledImage:
    version = directory.name.removeprefix("debian-")
    return PulledImage(directory / "vmlinuz", directory / "initrd", APPEND, version)


def _run(command: Sequence[str], cwd: Path | None = None, check: bool = True) -> str:
    """Run one tool of Debian's; its last complaint becomes the sentence of the error."""
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}, check=False
        )
    except FileNotFoundError:
        raise PullError(f"this needs Debian's {command[0]}, which is not installed here") from None
    if check and done.returncode != 0:
        said = done.stderr.splitlines() or ["no reason given"]
        reason = next((line for line in said if line.startswith("E:")), said[-1]).removeprefix("E: ")
        raise PullError(f"{command[0]} failed: {reason}")
    return done.stdout
