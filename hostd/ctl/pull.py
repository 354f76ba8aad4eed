# SPDX-License-Identifier: GPL-2.0-or-later
"""`hostctl image pull`: a kernel of Debian's and its static busybox, by apt, made into a bootable image.

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

# Every word earns its place.  loglevel=3: no complaints about hardware a virtual machine lacks (an oops shows
# in full at any level).  tsc=reliable, no_timer_check: the clock and the timer are not doubted.  nokaslr,
# mitigations=off: no time is spent on hiding addresses, or on speculation that emulated silicon does not do.
# panic=-1: a panic resets the machine at once.  8250.nr_uarts=1: only one serial port is probed.  The last
# three stop what would wake an idle guest several times a second: the lockup watchdog, the averages of
# pressure-stall information, and the memory controller's statistics.  The last one spares each guest ten
# thousand inodes of tracefs: 9 MB of slabs that no two guests can share; without it there is no tracefs.
_APPEND = (
    "console=ttyS0 loglevel=3 tsc=reliable no_timer_check nokaslr mitigations=off panic=-1 8250.nr_uarts=1 "
    "nowatchdog psi=0 cgroup_disable=memory initcall_blacklist=tracer_init_tracefs"
)
# The i386 kernels are made for any PC: they would test their ciphers and look for ISA cards, a second each.
_APPEND_PC = f"{_APPEND} cryptomgr.notests noisapnp"

Progress = Callable[[str], None]


class PullError(Exception):
    """The image cannot be had; the message is one sentence."""


@dataclass(frozen=True)
class Recipe:
    """What an image is made of."""

    name: str
    #: the meta package that stands for the newest kernel of its kind
    kernel: str
    append: str = _APPEND
    #: Debian's name of the guest's architecture, where it need not be the host's
    architecture: str = ""

    def package(self, name: str) -> str:
        """A package as apt is to be asked for it."""
        return f"{name}:{self.architecture}" if self.architecture else name


_RECIPES = (
    Recipe("debian", "linux-image-cloud-amd64"),
    # Pages of a kernel without PAE are all executable, and stores to such cost the emulated silicon ten
    # times more: this one is for what needs 32-bit page tables.
    Recipe("debian-i386", "linux-image-686", _APPEND_PC, "i386"),
    Recipe("debian-i386-pae", "linux-image-686-pae", _APPEND_PC, "i386"),
)
#: what can be pulled, by name
RECIPES = {recipe.name: recipe for recipe in _RECIPES}
BUSYBOX = "busybox-static"


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


def build_debian(
    workdir: Path | None = None, progress: Progress = lambda text: None, recipe: Recipe = RECIPES["debian"]
) -> PulledImage:
    """An image of Debian, from the cache in `workdir` (default: the user's) or freshly downloaded and built.

    Without usable apt the newest image in the cache does; without that either, `PullError`.
    """
    cache = workdir if workdir is not None else cache_directory()
    try:
        kernel, busybox = _resolve(recipe)
    except PullError:
        if (newest := _newest(cache, recipe)) is not None:
            return newest
        raise
    key = hashlib.sha256(initramfs.recipe()).hexdigest()[:8]
    version = f"{kernel.version}+busybox-{busybox.version.rpartition(':')[2]}+{key}"
    target = cache / f"{recipe.name}-{version}"
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=cache) as scratch:
            _build(Path(scratch), target, kernel, busybox, progress)
    return _image(target, recipe)


@dataclass(frozen=True)
class _Package:
    #: with its architecture, if that is not the host's
    name: str
    version: str


def _resolve(recipe: Recipe) -> tuple[_Package, _Package]:
    """The kernel package the meta package stands for, and busybox, at the versions apt would install."""
    wanted = {name: recipe.package(name) for name in (recipe.kernel, BUSYBOX)}
    shown = _run(["apt-cache", "show", "--no-all-versions", *wanted.values()], check=False)
    fields = {
        stanza["Package"]: stanza
        for stanza in (dict(re.findall(r"^(\w+): (.*)$", text, re.M)) for text in shown.split("\n\n"))
        if "Package" in stanza
    }
    for name, package in wanted.items():
        if name not in fields:
            cure = "apt-get update"
            if recipe.architecture:
                cure = f"dpkg --add-architecture {recipe.architecture} && {cure}"
            raise PullError(f"apt knows no package {package}: run '{cure}' as root first, on a Debian system")
    match = re.search(r"(linux-image-[\w.+~-]+) \(= ([^)]+)\)", fields[recipe.kernel].get("Depends", ""))
    if match is None:
        raise PullError(f"{recipe.kernel} names no kernel package among its dependencies")
    return _Package(recipe.package(match[1]), match[2]), _Package(wanted[BUSYBOX], fields[BUSYBOX]["Version"])


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


def _newest(cache: Path, recipe: Recipe) -> PulledImage | None:
    # versions begin with a digit, what follows in a longer name of an image does not
    images = sorted(cache.glob(f"{recipe.name}-[0-9]*/initrd"), key=lambda path: path.stat().st_mtime)
    return _image(images[-1].parent, recipe) if images else None


def _image(directory: Path, recipe: Recipe) -> PulledImage:
    version = directory.name.removeprefix(f"{recipe.name}-")
    return PulledImage(directory / "vmlinuz", directory / "initrd", recipe.append, version)


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
