# SPDX-License-Identifier: GPL-2.0-or-later
"""Every kind of kernel file, booted under either monitor: our own, Debian's, and memtest86+."""

from __future__ import annotations

import hashlib
import random
import re
import struct
import subprocess
import time
from collections.abc import Callable

import pytest

from hostd.ctl.initramfs import INIT
from hostd.ctl.pull import RECIPES, PulledImage, PullError, build_debian
from hostd.loader import BootFiles, lay_out
from tests.hw_rig import Machine, Rig
from vmm import guests
from vmm.boot.linux import decompress_bzimage
from vmm.monitor import Stop, StopReason
from vmm.state import MachineState

MONITORS = ("hw", "bt")
MIB = 1 << 20
GOOD = Stop(StopReason.EXIT, "wrote 1 to the debug-exit port", 1)
PROMPT = "/ # "
_PATIENCE_S = 50


def boot(
    rig: Rig, kernel: bytes, memory: int = 8 * MIB, append: str = "", initrd: bytes | None = None
) -> Machine:
    """A machine with these files in its memory, and all the firmware tables."""
    image = lay_out(BootFiles(kernel, initrd, append), memory)
    return rig.machine(MachineState(memory, cpu=image.cpu), image.writes)


def go_until(machine: Machine, text: str, start: int = 0) -> int:
    """Run until `text` is on the console, behind `start`; the answer is where it ends."""
    go_while(machine, lambda: text not in machine.text[start:], start)
    return machine.text.index(text, start) + len(text)


def go_while(machine: Machine, waiting: Callable[[], bool], start: int = 0) -> None:
    """Run until there is nothing to wait for any more; what is printed behind `start` tells why there is."""
    patience = time.monotonic() + _PATIENCE_S
    while waiting():
        assert time.monotonic() < patience, f"nothing but {machine.text[start:]!r}"
        stop = machine.run(time.monotonic_ns() + 10_000_000)
        assert not stop.reason.final, (stop, machine.text[start:])
        if stop.reason is StopReason.HALTED:
            wake = machine.next_wake()
            assert wake is not None, machine.text[start:]
            time.sleep(max(0, wake - time.monotonic_ns()) / 1e9)


class Shell:
    """A shell on the console of a machine."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._at = go_until(machine, PROMPT)

    def ask(self, command: str) -> list[str]:
        """What a command prints."""
        self._machine.feed(f"echo 'answer' 'begins'; {command}; echo 'answer' 'ends'\n".encode())
        begin = go_until(self._machine, "answer begins\r\n", self._at)
        end = go_until(self._machine, "answer ends\r\n", begin)
        self._at = go_until(self._machine, PROMPT, end)
        return self._machine.text[begin:end].splitlines()[:-1]


def test_a_multiboot_kernel_switches_to_long_mode(rig: Rig) -> None:
    module = random.Random(1).randbytes(100_000)
    machine = boot(rig, guests.read("long"), append="a=b c", initrd=module)
    assert machine.go() == GOOD
    assert machine.text.splitlines() == [
        "long: in 64-bit mode",
        "long: command line: kernel a=b c",
        f"long: sum of the module: {sum(module):08x}00000000",
        "long: breakpoint: 0123456789abcdef",
        "long: done",
    ]


def test_a_flat_image_takes_interrupts_in_every_mode(rig: Rig) -> None:
    machine = boot(rig, guests.read("real"))
    assert machine.go() == GOOD
    assert machine.text.splitlines() == [
        "real: in real mode",
        "real: called in real mode",
        "real: the timer ticks",
        "real: called in 16-bit protected mode",
        "real: called in 32-bit protected mode",
        "real: called in real mode",
    ]


@pytest.fixture(scope="module")
def memtest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The 32-bit memtest86+ of Debian: a bzImage without a payload."""
    directory = tmp_path_factory.mktemp("memtest")
    try:
        subprocess.run(["apt-get", "--quiet=2", "-o", "APT::Sandbox::User=root", "download", "memtest86+"],
                       cwd=directory, check=True, capture_output=True)
        for archive in directory.glob("*.deb"):
            subprocess.run(["dpkg-deb", "--extract", archive, directory], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"apt cannot get memtest86+: {error}")
    return (directory / "boot/memtest86+ia32.bin").read_bytes()


@pytest.mark.slow
def test_memtest_finds_no_error(rig: Rig, memtest: bytes) -> None:
    machine = boot(rig, memtest, append="console=ttyS0,115200 nosmp nobench nosm nopause")
    go_until(machine, "#4  [Moving inversions, 8 bit pattern]")
    assert set(re.findall(r"Pass: +(\d+) +Errors: +(\d+)", machine.text)) == {("0", "0")}


def debian(name: str) -> PulledImage:
    try:
        return build_debian(recipe=RECIPES[name])
    except PullError as error:
        pytest.skip(f"no {name} to be had: {error}")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), [("debian-i386", "bzimage"), ("debian-i386-pae", "vmlinux")])
def test_debian_for_i386(rig: Rig, name: str, form: str) -> None:
    image = debian(name)
    kernel = image.kernel.read_bytes()
    if form == "vmlinux":
        kernel = bytes(decompress_bzimage(kernel))
    machine = boot(rig, kernel, 96 * MIB, image.append, image.initrd.read_bytes())
    shell = Shell(machine)
    assert shell.ask("uname -m") == ["i686"]
    assert shell.ask("sha256sum /init") == [hashlib.sha256(INIT.encode()).hexdigest() + "  /init"]
    zeros = hashlib.sha256(bytes(1_000_000)).hexdigest()
    assert shell.ask("dd if=/dev/zero bs=1000 count=1000 2>/dev/null | sha256sum") == [f"{zeros}  -"]
    forks = "i=0; while [ $i -lt 50 ]; do (/bin/busybox true) && i=$((i + 1)); done; echo $i $(echo $i | cat)"
    assert shell.ask(forks) == ["50 50"]
    assert shell.ask("grep -c '^flags.* sep .* hypervisor' /proc/cpuinfo") == ["1"]
    assert shell.ask("dmesg | grep -c 'kvm-clock: using sched offset'") == ["1"]
    # the PCI bus and the machine checks that this machine does not have are all they complain about
    assert shell.ask("dmesg -r | grep '^<[0-4]>' | grep -v ' PCI\\| MCE '") == []
    machine.feed(b"poweroff -f\n")
    assert machine.go().reason is StopReason.POWEROFF


@pytest.mark.slow
def test_a_linux_kernel_is_entered_by_its_own_code(rig: Rig) -> None:
    """Its header made to name no payload, a bzImage unpacks itself: it says so before it begins."""
    kernel = bytearray(debian("debian-i386-pae").kernel.read_bytes())
    struct.pack_into("<I", kernel, 0x24C, 0)
    machine = boot(rig, bytes(kernel), 96 * MIB, "earlyprintk=ttyS0,115200 nokaslr")
    go_until(machine, "KASLR disabled: 'nokaslr' on cmdline.")
