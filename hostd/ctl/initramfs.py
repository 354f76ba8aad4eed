# SPDX-License-Identifier: GPL-2.0-or-later
"""The initramfs of the `debian` image: static busybox, an /init that says INIT-UP, a few kernel modules.

It is left uncompressed: unpacking is then a copy, which a guest on emulated silicon does many times faster
than inflating, and the pages are given back to the guest once unpacked.
"""

import lzma
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import zstandard

from hostd.ctl.cpio import CpioArchive

# Loaded at boot when the kernel command line says `modules=name,name`.
OPTIONAL_MODULES = ("virtio_blk", "virtio_net")
# Loaded always, after INIT-UP: without the first two nobody in the guest hears the ACPI power button, without
# the others it has no balloon, and no randomness but its own.
MODULES = ("button", "evdev", "virtio_mmio", "virtio_balloon", "virtio_rng")

# Only builtins and what must be: every process started here lengthens the boot of every guest.
INIT = """\
#!/bin/sh
mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys
exec </dev/console >/dev/console 2>&1
read -r uptime _ </proc/uptime
echo INIT-UP
echo "uptime: $uptime s"
exec /sbin/init
"""

# `modules` is a word the kernel does not know, so it is handed to the first process as an environment
# variable, and busybox init hands it on.
START = """\
#!/bin/sh
mkdir -p /dev/pts
mount -t devpts none /dev/pts
for name in $(echo "$modules" | tr ',' ' ') {always}; do
    name=$(echo "$name" | tr '-' '_')
    [ -f "/lib/modules/$name.order" ] || continue
    while read -r file; do
        [ -d "/sys/module/${{file%.ko}}" ] || insmod "/lib/modules/$file"
    done <"/lib/modules/$name.order"
done
# Left alone, compaction looks around twice a second, and the statistics of memory are gathered every second.
echo 0 >/proc/sys/vm/compaction_proactiveness
echo 60 >/proc/sys/vm/stat_interval
# Free memory is reported to the host in blocks of 2**order pages, and only while 32 such blocks are free:
# with an order of 9 or 10, as it is set, a small guest never has that many.
order=/sys/module/page_reporting/parameters/page_reporting_order
[ -w $order ] && echo 5 >$order
# A machine without a button has no event device; a respawned acpid would then spin.
[ -c /dev/input/event0 ] && acpid -l /dev/null
""".format(always=" ".join(MODULES))

INITTAB = """\
::sysinit:/etc/start
ttyS0::respawn:/bin/sh
::ctrlaltdel:/sbin/reboot
::shutdown:/bin/sync
"""

POWER_BUTTON = "#!/bin/sh\nexec poweroff -f\n"

_RECIPE = (INIT, START, INITTAB, POWER_BUTTON, *OPTIONAL_MODULES, *MODULES)
_DECOMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".ko": bytes,
    ".ko.xz": lzma.decompress,
    ".ko.zst": lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
}


class InitramfsError(Exception):
    """The initramfs cannot be built; the message is one sentence."""


def recipe() -> bytes:
    """All that shapes the archive besides the packages: part of the key under which an image is cached."""
    return "\0".join(_RECIPE).encode()


def build(busybox: Path, module_tree: Path) -> bytes:
    """The archive made of this busybox binary and the modules found under `module_tree`."""
    archive = CpioArchive()
    for path in ("dev", "proc", "sys", "tmp", "root", "bin", "sbin"):
        archive.directory(path)
    archive.device("dev/console", 5, 1)
    archive.file("init", INIT.encode(), 0o755)
    archive.file("etc/start", START.encode(), 0o755)
    archive.file("etc/inittab", INITTAB.encode())
    archive.file("etc/acpi/PWRF/00000080", POWER_BUTTON.encode(), 0o755)
    archive.file("bin/busybox", busybox.read_bytes(), 0o755)
    for applet in _applets(busybox):
        archive.symlink(f"bin/{applet}", "busybox")
    for name in ("init", "reboot", "poweroff"):
        archive.symlink(f"sbin/{name}", "../bin/busybox")
    _add_modules(archive, module_tree)
    return archive.finish()


def _applets(busybox: Path) -> list[str]:
    try:
        listing = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        raise InitramfsError(f"cannot ask busybox for its applets: {error}") from error
    names = [name for name in listing.stdout.split() if name != "busybox"]
    if "sh" not in names or "init" not in names:
        raise InitramfsError("this busybox has no sh or no init applet")
    return names


def _add_modules(archive: CpioArchive, tree: Path) -> None:
    """Put in the modules of the lists above that this kernel has as modules, each with a file that names
    what it needs and it in the order of loading (`depends=` of the module's own .modinfo section)."""
    found = {_module_name(path): path for path in sorted(tree.rglob("*.ko*"))}
    loaded: dict[str, bytes] = {}

    def order(name: str) -> list[str]:
        if name not in loaded:
            path = found[name]
            loaded[name] = _DECOMPRESSORS[path.name[path.name.index(".ko") :]](path.read_bytes())
            archive.file(f"lib/modules/{name}.ko", loaded[name])
        needed = [part for need in _depends(loaded[name]) if need in found for part in order(need)]
        return list(dict.fromkeys([*needed, name]))

    for name in (*OPTIONAL_MODULES, *MODULES):
        if name in found:
            lines = "".join(f"{part}.ko\n" for part in order(name))
            archive.file(f"lib/modules/{name}.order", lines.encode())


def _module_name(path: Path) -> str:
    """Names of modules know no dash (virtio-rng.ko is the module virtio_rng)."""
    return path.name.partition(".")[0].replace("-", "_")


def _depends(module: bytes) -> list[str]:
    match = re.search(rb"\0depends=([\w,-]*)\0", module)
    return [name.replace("-", "_") for name in match[1].decode().split(",") if name] if match else []
