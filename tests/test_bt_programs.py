# SPDX-License-Identifier: GPL-2.0-or-later
"""Whole programs, compiled by gcc: translated ones have the results of the same programs run by the host."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.bt_guest import Guest
from tests.tools import needs
from vmm.bt.decode import decode

pytestmark = needs("gcc")
SOURCE = Path(__file__).with_name("bt_programs.c")
BASE, STACK, MEMORY = 0x100000, 0xF0000, 8 << 20
_FLAGS = ["-m32", "-O2", "-ffreestanding", "-fno-pic", "-fno-stack-protector", "-fno-math-errno",
          "-fno-asynchronous-unwind-tables", "-fcf-protection=none", "-static", "-nostdlib", "-no-pie",
          "-Wl,--build-id=none"]
#: name and argument, as ordered in the source
PROGRAMS = (("primes", 3000), ("fib", 17), ("sieve", 30_000), ("copy", 2), ("indirect", 20_000),
            ("switches", 20_000), ("x87", 5000), ("sse2", 20_000), ("collatz", 2000),
            ("wide", 3000), ("digits", 100), ("strings", 60), ("recursion", 3000), ("towers", 12),
            ("setjmps", 200), ("rounding", 1500), ("vectors", 1500))
#: those behind them, whose results only the host's own processor has
APPROXIMATE = (("functions", 1500),)
_ALL = PROGRAMS + APPROXIMATE


class Built(NamedTuple):
    """The programs as an image loaded at BASE and begun at `entry`, and as a program of the host's."""

    image: bytes
    entry: int
    host: Path

    def on_host(self, number: int, argument: int) -> int:
        done = subprocess.run([self.host, str(number), str(argument)], check=True, capture_output=True)
        return int(struct.unpack("<I", done.stdout)[0])


def build(directory: Path) -> Built:
    host, flat, image = directory / "host", directory / "guest", directory / "guest.bin"
    subprocess.run(["gcc", *_FLAGS, "-DHOST", "-o", host, SOURCE], check=True)
    subprocess.run(["gcc", *_FLAGS, "-Wl,-N,-Ttext=0x100000", "-o", flat, SOURCE], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-R", ".note*", flat, image], check=True)
    return Built(image.read_bytes(), struct.unpack_from("<I", flat.read_bytes(), 24)[0], host)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("programs"))


@pytest.fixture
def guest(built: Built) -> Iterator[Guest]:
    guest = Guest(memory=MEMORY)
    guest.write(BASE, built.image)
    yield guest
    guest.close()


def run(guest: Guest, entry: int, number: int, argument: int) -> int:
    guest.registers = [number, 0, argument, 0, STACK, 0, 0, 0]
    guest.block.set("flags", 2)
    stop = guest.run(entry)
    assert stop.why == "callout"
    code = bytes(guest.memory[stop.eip:stop.eip + 16])
    assert decode(code, 0, True).entry.mnemonic == "hlt", stop
    return guest.registers[0]


@pytest.mark.parametrize("number", range(len(_ALL)), ids=[name for name, _ in _ALL])
def test_a_program_has_the_result_it_has_on_the_host(built: Built, guest: Guest, number: int) -> None:
    argument = _ALL[number][1]
    assert run(guest, built.entry, number, argument) == built.on_host(number, argument)
    assert guest.cache.counters.rejected == 0


def test_a_warm_cache_translates_nothing(built: Built, guest: Guest) -> None:
    first = run(guest, built.entry, 1, 12)
    units = guest.cache.counters.units
    assert run(guest, built.entry, 1, 12) == first
    assert guest.cache.counters.units == units


def test_programs_run_in_a_cache_that_is_much_too_small(built: Built) -> None:
    """Units are evicted all the time: the arena has room for a part of each program only."""
    small = Guest(memory=MEMORY, arena=0x3000, stubs=64)
    small.write(BASE, built.image)
    for number, (_, argument) in enumerate(_ALL):
        assert run(small, built.entry, number, argument // 4 + 5) == built.on_host(number, argument // 4 + 5)
    assert small.cache.counters.evicted > 10
    small.close()
