# SPDX-License-Identifier: GPL-2.0-or-later
"""The project's own guest kernels: the images in the tree are what their sources say, and they run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import unicorn
from unicorn import x86_const

from tests.tools import needs
from vmm import guests
from vmm.boot import elf, load, multiboot
from vmm.guests import build
from vmm.state import RAX, RBX

MIB = 1 << 20
EXIT_PORT, CONSOLE, LINE_STATUS = 0xF4, 0x3F8, 0x3FD


def test_names_and_paths() -> None:
    assert guests.names() == sorted((*build.KERNELS, *build.FLAT)) == [
        "fuzz", "idle", "long", "mix", "nano", "primes", "real", "rogue", "triple"]
    assert guests.path("mix").read_bytes() == guests.read("mix")
    with pytest.raises(KeyError, match="there are fuzz, idle"):
        guests.path("../src/mix")


@pytest.mark.parametrize("name", sorted(build.KERNELS))
def test_images_are_small_multiboot_kernels(name: str) -> None:
    image = guests.read(name)
    assert len(image) < 32 << 10
    assert multiboot.find_header(image) is not None
    assert load(image, memory_bytes=2 * MIB).kind == "multiboot"


def test_a_flat_image_begins_with_a_boot_sector() -> None:
    image = guests.read("real")
    assert len(image) < 4096
    assert load(image, memory_bytes=2 * MIB).kind == "flat"


@needs("gcc")
@pytest.mark.parametrize("name", sorted(build.FLAT))
def test_flat_images_are_built_from_the_sources(name: str, tmp_path: Path) -> None:
    rebuilt, kept = build.build(name, tmp_path).read_bytes(), guests.read(name)
    # all of it is assembly: another assembler may choose other lengths of jumps, and nothing else
    if build.toolchain() == build.TOOLCHAIN.read_text():
        assert rebuilt == kept
    else:
        assert rebuilt[510:512] == kept[510:512] and abs(len(rebuilt) - len(kept)) < 64


@needs("gcc")
@pytest.mark.parametrize("name", sorted(build.KERNELS))
def test_images_are_built_from_the_sources(name: str, tmp_path: Path) -> None:
    rebuilt, kept = build.build(name, tmp_path).read_bytes(), guests.read(name)
    if build.toolchain() == build.TOOLCHAIN.read_text():
        assert rebuilt == kept
        return
    # Another compiler makes other code, but of the same kernel: the same start, and the same parts in memory.
    ours, theirs = elf.parse(kept), elf.parse(rebuilt)
    assert (theirs.bits, theirs.entry) == (ours.bits, ours.entry)
    assert [segment.physical for segment in theirs.segments][:1] == [0x100000]
    assert len(theirs.segments) == len(ours.segments) and len(rebuilt) < 32 << 10



def _run_bare(name: str, append: str) -> tuple[bytes, int]:
    """Run a kernel that needs no interrupts on a bare emulated processor: its console and its exit value."""
    image = load(guests.read(name), append=append, memory_bytes=4 * MIB)
    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_32)
    uc.mem_map(0, 4 * MIB)
    for start, data in image.writes:
        uc.mem_write(start, bytes(data))
    console = bytearray()
    status: list[int] = []

    def read_port(_: unicorn.Uc, port: int, size: int, __: object) -> int:
        return 0x60 if port == LINE_STATUS else (1 << 8 * size) - 1

    def write_port(machine: unicorn.Uc, port: int, _: int, value: int, __: object) -> None:
        if port == CONSOLE:
            console.append(value & 0xFF)
        elif port == EXIT_PORT:
            status.append(value)
            machine.emu_stop()

    uc.hook_add(unicorn.UC_HOOK_INSN, read_port, None, 1, 0, x86_const.UC_X86_INS_IN)
    uc.hook_add(unicorn.UC_HOOK_INSN, write_port, None, 1, 0, x86_const.UC_X86_INS_OUT)
    uc.reg_write(x86_const.UC_X86_REG_EAX, image.cpu.gpr[RAX])
    uc.reg_write(x86_const.UC_X86_REG_EBX, image.cpu.gpr[RBX])
    uc.emu_start(image.cpu.rip, 0xFFFFFFFF)
    return bytes(console), status[0]


@pytest.mark.parametrize(("append", "line"), [
    ("", b"primes: 2262 below 20000\r\n"),
    ("limit=100", b"primes: 25 below 100\r\n"),
    ("xlimit=7 limit=50 limit=60", b"primes: 15 below 50\r\n"),
    ("limit=ten", b"primes: 2262 below 20000\r\n"),
    ("limit=2", b"primes: 0 below 2\r\n"),
])
def test_primes(append: str, line: bytes) -> None:
    console, status = _run_bare("primes", append)
    assert console.endswith(line) and status == 0


def test_primes_shows_every_thousandth() -> None:
    console, _ = _run_bare("primes", "")
    assert b"primes: number 1000 is 7919\r\nprimes: number 2000 is 17389\r\n" in console


def _run_in_qemu(name: str, append: str) -> tuple[bytes, int]:
    """Run a kernel in another machine than ours: its console and QEMU's exit status."""
    done = subprocess.run(
        ["qemu-system-x86_64", "-accel", "tcg", "-kernel", str(guests.path(name)), "-append", append,
         "-m", "32", "-display", "none", "-serial", "stdio", "-monitor", "none", "-no-reboot",
         "-device", "isa-debug-exit,iobase=0xf4,iosize=4"],
        stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False,
    )
    return done.stdout, done.returncode


#: the debug exit's answer to 0, and QEMU's own status after a reset it was told not to do
_LEFT, _RESET = 1, 0


@needs("qemu-system-x86_64")
@pytest.mark.parametrize(("name", "append", "lines", "status"), [
    ("primes", "limit=100", [b"primes: 25 below 100"], _LEFT),
    ("idle", "ms=60 ticks=2", [b"idle: tick 1", b"idle: tick 2"], _LEFT),
    ("mix", "rounds=2", [b"mix: round 1, checksum 13ef71f3", b"mix: checksum 160d590a"], _LEFT),
    ("mix", "rounds=2 tasks=20", [b"mix: 20 tasks per round"], _LEFT),
    ("nano", "in=0 callret=100 forkwait=3", [b"nano: done"], _LEFT),
    ("long", "a=b", [b"long: in 64-bit mode", b"long: breakpoint: 0123456789abcdef", b"long: done"], _LEFT),
    ("triple", "", [b""], _RESET),
])
def test_kernels_in_qemu(name: str, append: str, lines: list[bytes], status: int) -> None:
    console, left = _run_in_qemu(name, append)
    assert left == status
    assert set(lines) <= set(console.split(b"\r\n"))
